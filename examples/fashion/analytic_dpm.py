"""Analytic-DPM (arXiv 2201.06503): the base as a DDPM of 1000 steps, its variances as usual and optimal.

    python examples/fashion analytic_dpm

The noise of a variance-preserving DDPM (linear β) is read off the base at the level σ_t/α_t; nothing is trained. Its
moments are gathered from training images with ``ScoreMoments``. Then few steps are sampled with DDPM's β and β̃ and
with DDIM, on evenly spaced timesteps, each beside its analytic form, and on the trajectory with the best likelihood
bound. The last noise of all methods is capped at what two grey levels show, as in the paper.
"""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Literal

import torch
from common import Table, farewell, plt, save_picture
from torch import Tensor
from tqdm import tqdm

import fastgen
from fashion.data import SIDE, Split
from fashion.networks import Denoiser
from fashion.study import Study, options
from fastgen import NoiseSchedule, ScoreMoments

Method = Literal["ddpm", "ddim", "analytic-ddpm", "analytic-ddim"]
Variance = Literal["analytic", "beta", "beta_tilde"]
N = 1000
CAP = 2 * 2 / 255 * math.sqrt(math.pi / 2)
SAMPLES = {10: 1000, 25: 400, 50: 250, 100: 150}  # distances of fewer samples are larger, for all rows alike
METHODS: dict[str, tuple[Method, Variance | None]] = {
    "DDPM β": ("ddpm", "beta"),
    "DDPM β̃": ("ddpm", "beta_tilde"),
    "Analytic-DDPM": ("analytic-ddpm", "analytic"),
    "DDIM": ("ddim", None),
    "Analytic-DDIM": ("analytic-ddim", None),
}
DISTANCE, BOUND = "Distance to the test split", "Bound on the likelihood, bits per dimension (256 levels)"


class NoisePredictor:
    """The base as a DDPM's network: x_t and an integer t in, the noise out."""

    def __init__(self, base: Denoiser, schedule: NoiseSchedule) -> None:
        self.base, self.schedule = base, schedule

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        alpha, sigma = (k(t)[:, None, None, None] for k in (self.schedule.alpha_t, self.schedule.sigma_t))
        return (x - alpha * self.base(x / alpha, (sigma / alpha).flatten(), label)) / sigma


def gather(model: NoisePredictor, images: Split, samples: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """The regularised mean squares of the predictions, and those of their errors: `samples` for each timestep."""
    moments, errors, device = ScoreMoments(N), ScoreMoments(N), images.images.device
    for _ in tqdm(range(samples), desc="moments"):
        for t in torch.arange(N, device=device).split(250):
            rows = images.draw(len(t), gen)
            noise = torch.randn(rows.images.shape, generator=gen).to(device)
            pred = model(model.schedule.add_noise(rows.images, noise, t), t, rows.labels)
            moments.update(t, pred)
            errors.update(t, noise - pred)
    return fastgen.regularize_moments(model.schedule, moments.ms_eps), errors.ms_eps


def draw(model: NoisePredictor, nodes: Tensor, name: str, ms_eps: Tensor, label: Tensor, seed: int) -> Tensor:
    """From noise to data over `nodes`; all methods start from the same noise."""
    method, variance = METHODS[name]
    gen = torch.Generator().manual_seed(seed)
    own = torch.Generator(label.device).manual_seed(seed)
    noise = torch.randn(len(label), 1, SIDE, SIDE, generator=gen).to(label.device)
    parts = [
        fastgen.sample(
            partial(model, label=y),
            model.schedule,
            z,
            method=method,
            steps=nodes,
            variance="beta" if variance == "beta" else "beta_tilde",
            ms_eps=ms_eps if "analytic" in method else None,
            max_last_std=CAP,
            generator=own,
            progress=False,
        )
        for z, y in zip(noise.split(250), label.split(250), strict=True)
    ]
    return torch.cat(parts)


def bits(schedule: NoiseSchedule, ms_eps: Tensor, nodes: Tensor, variance: Variance, mse_eps: Tensor) -> Tensor:
    """The bound, in bits per dimension."""
    found = fastgen.variational_bound(schedule, ms_eps, nodes, variance=variance, mse_eps=mse_eps, levels=256)
    return found.total / math.log(2)


def main(argv: list[str] | None = None) -> dict[str, Table]:
    study = Study(options("Optimal variances and trajectories for a diffusion model of Fashion-MNIST."), argv)
    schedule = NoiseSchedule.linear(N)
    model = NoisePredictor(study.base, schedule)
    counts = {3: 1000} if study.smoke else SAMPLES
    even = {k: torch.linspace(1, N, k).round().long() for k in counts}

    def run(seed: int) -> dict[str, Table]:
        gen = torch.Generator().manual_seed(100 * seed)
        ms_eps, mse_eps = gather(model, study.data.train, study.count(20, 1), gen)
        optimal: dict[int, Tensor] = {k: fastgen.analytic_trajectory(schedule, ms_eps, k).steps for k in counts}
        plans = [(f"{name}, even", name, even) for name in METHODS]
        plans.append(("Analytic-DDPM, optimal", "Analytic-DDPM", optimal))
        floors = {f"K = {k}": study.floor(seed, count)["distance"] for k, count in counts.items()}
        distance: Table = {"floor: training images": floors, **{row: {} for row, _, _ in plans}}
        for (row, name, nodes), k in tqdm(list(itertools.product(plans, counts)), desc=f"samples, seed {seed}"):
            wanted = study.wanted(counts[k])
            distance[row][f"K = {k}"] = study.test.distance(draw(model, nodes[k], name, ms_eps, wanted, seed))
        bound: Table = {}
        for row, name, nodes in plans:
            variance = METHODS[name][1]
            if variance is not None:
                bound[row] = {f"K = {k}": float(bits(schedule, ms_eps, nodes[k], variance, mse_eps)) for k in counts}
        return {DISTANCE: distance, BOUND: bound}

    tables = study.over_seeds(run)
    fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for ax, (title, table) in zip(axes, tables.items(), strict=True):
        for name, row in table.items():
            ax.plot(list(counts), list(row.values()), "o-" if "Analytic" in name else "o--", label=name)
        ax.set(xscale="log", yscale="log", xlabel="K", title=title)
        ax.set_xticks(list(counts), [str(k) for k in counts], minor=False)
        ax.legend(fontsize=8)
        ax.grid(alpha=0.3)
    picture = study.args.out / "analytic_dpm.png"
    save_picture(fig, picture)
    farewell(study.args, picture)
    return tables
