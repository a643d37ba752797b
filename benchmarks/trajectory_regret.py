"""What Monte-Carlo noise in the moments costs an optimal trajectory, and what the repair of the moments saves.

    python -m benchmarks.trajectory_regret

The data are Gaussian with a power-law spectrum, whose exact moments are known. A trajectory is chosen from moments of
M samples a timestep and then charged its cost under the exact ones; its regret is what exceeds the true optimum, in
units of ``F`` (one is half a nat per dimension of the bound). Compared: moments clamped to 1, which is what it takes
for all costs to be finite; :func:`fastgen.regularize_moments`; and evenly spaced steps, which need no moments.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastgen import FactoredCost, NoiseSchedule, Trajectory, analytic_trajectory, optimal_trajectory, trajectory_cost

STEPS = (10, 25, 50, 100)
SAMPLES = (10, 30, 100, 300, 1000)
SCHEDULES = ("linear", "cosine")
DECAYS = (1.0, 1.5, 2.0)
DIMENSIONS = 3072
METHODS = ("clamped", "regularised", "even")


@dataclass(frozen=True)
class Regret:
    """Of one method on one kind of data: a number for each K, the mean over seeds, and the worst seed's."""

    schedule: str
    decay: float
    samples: int
    method: str
    mean: tuple[float, ...]
    worst: tuple[float, ...]


def posterior_shares(schedule: NoiseSchedule, decay: float) -> Tensor:
    """E ε̂² of every node and dimension for variances ∝ i^-decay with mean 1/4: [N+1, D]."""
    variances = torch.arange(1, DIMENSIONS + 1, dtype=torch.float64) ** -decay
    variances *= 0.25 / variances.mean()
    assert schedule.alphas_cumprod is not None
    signal = torch.cat([torch.ones(1, dtype=torch.float64), schedule.alphas_cumprod])[:, None]
    return (1 - signal) / (signal * variances + 1 - signal)


def monte_carlo(shares: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """ms_eps of `samples` draws a node: a dimension's mean square is its share times chi-square over M."""
    chi_square = 2 * torch._standard_gamma(torch.full_like(shares, samples / 2), generator=generator)
    return (shares * chi_square).mean(1) / samples


def path_cost(cost: FactoredCost, path: Tensor) -> float:
    s, t = path[:-1], path[1:]
    return float(((cost.v[s] + cost.h[t]) / (cost.v[t] + cost.h[t])).log().sum())


def regrets(truth: FactoredCost, best: Trajectory[Any], found: dict[int, Tensor], steps: Sequence[int]) -> list[float]:
    return [path_cost(truth, found[k]) - total for k, total in zip(steps, best.total_cost.tolist(), strict=True)]


def study(
    samples: Sequence[int] = SAMPLES,
    steps: Sequence[int] = STEPS,
    schedules: Sequence[str] = SCHEDULES,
    decays: Sequence[float] = DECAYS,
    seeds: int = 8,
    progress: bool = False,
) -> Iterator[Regret]:
    """Every method on every combination, one after another."""
    combinations = list(itertools.product(schedules, decays))
    for name, decay in tqdm(combinations, unit="spectrum", disable=not progress):
        schedule: NoiseSchedule = getattr(NoiseSchedule, name)(1000)
        shares = posterior_shares(schedule, decay)
        truth = trajectory_cost(schedule, shares.mean(1))
        best = optimal_trajectory(truth, steps, convention="nodes")
        even = {k: torch.linspace(1, 1000, k, dtype=torch.float64).round().long() for k in steps}
        for m in samples:
            results: dict[str, list[list[float]]] = {method: [] for method in METHODS}
            for seed in range(seeds):
                noisy = monte_carlo(shares, m, torch.Generator().manual_seed(seed))
                clamped = trajectory_cost(schedule, noisy.clamp(max=1))
                chosen = {
                    "clamped": optimal_trajectory(clamped, steps, convention="nodes").steps,
                    "regularised": analytic_trajectory(schedule, noisy, steps).steps,
                    "even": even,
                }
                for method, found in chosen.items():
                    results[method].append(regrets(truth, best, dict(found), steps))
            for method, rows in results.items():
                table = torch.tensor(rows, dtype=torch.float64)
                yield Regret(name, decay, m, method, tuple(table.mean(0).tolist()), tuple(table.amax(0).tolist()))


def plot(rows: Sequence[Regret], steps: Sequence[int], path: Path) -> None:
    """A panel for each schedule and K: mean regret over M, a line for each spectrum and method, and the worst seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    schedules = list(dict.fromkeys(r.schedule for r in rows))
    fig, axes = plt.subplots(
        len(schedules),
        len(steps),
        figsize=(3.4 * len(steps), 3.0 * len(schedules)),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    colours = {"clamped": "tab:red", "regularised": "tab:blue", "even": "tab:gray"}
    styles = dict(zip(dict.fromkeys(r.decay for r in rows), ("-", "--", ":"), strict=False))
    for (i, name), (j, k) in itertools.product(enumerate(schedules), enumerate(steps)):
        ax = axes[i][j]
        for (method, decay), line in itertools.groupby(
            sorted((r for r in rows if r.schedule == name), key=lambda r: (r.method, r.decay, r.samples)),
            key=lambda r: (r.method, r.decay),
        ):
            points = list(line)
            x = [r.samples for r in points]
            ax.plot(
                x, [r.mean[j] for r in points], styles[decay], color=colours[method], label=f"{method}, 1/f^{decay:g}"
            )
            if method != "even":
                ax.plot(x, [r.worst[j] for r in points], styles[decay], color=colours[method], alpha=0.3)
        ax.axhline(0.05, color="black", linewidth=0.5)
        ax.set(xscale="log", yscale="log", title=f"{name}, K = {k}")
    for ax in axes[-1]:
        ax.set_xlabel("samples a timestep")
    for row in axes:
        row[0].set_ylabel("regret in units of F")
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    fig.tight_layout(rect=(0, 0.1, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "trajectory_regret.png")
    parser.add_argument("--seeds", type=int, default=8)
    options = parser.parse_args()
    rows = list(study(seeds=options.seeds, progress=True))
    print(f"mean regret over {options.seeds} seeds (the worst one's), in units of F, D = {DIMENSIONS}")
    print(f"{'schedule':10}{'spectrum':10}{'M':>5} {'method':13}" + "".join(f"{f'K = {k}':>18}" for k in STEPS))
    for r in rows:
        figures = "".join(f"{f'{mean:.3f} ({worst:.3f})':>18}" for mean, worst in zip(r.mean, r.worst, strict=True))
        print(f"{r.schedule:10}{f'1/f^{r.decay:g}':10}{r.samples:5} {r.method:13}{figures}")
    plot(rows, STEPS, options.out)
    print(f"\nPicture: {options.out}")


if __name__ == "__main__":
    main()
