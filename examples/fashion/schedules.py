"""Schedules found by search: GITS (arXiv 2405.11326) for the base, by ``deviation_cost`` and ``optimal_trajectory``.

    python examples/fashion schedules

A teacher's trajectory of 61 levels is drawn once for 256 images; what one Euler step costs between any two of its
levels is a matrix, and its cheapest path of K edges a schedule of K steps. Beside it EDM's levels (rho = 7, Karras et
al., arXiv 2206.00364) and levels evenly spaced in their logarithm; samplers are DDIM, whose step is what the matrix
measures, and DPM-Solver++(2M). The discount weighs later steps; it was chosen on the validation split, for each
sampler.
"""

from __future__ import annotations

import itertools

import torch
from common import Table, farewell, plt, save_picture
from torch import Tensor
from tqdm import tqdm

import fastgen
from fashion.data import SIDE
from fashion.networks import HIGHEST, LOWEST, Denoiser, karras, sample
from fashion.study import Study, options

NODES = 61
DISCOUNTS = (1.0, 1.15, 1.3)
SAMPLERS = {"DDIM": 1, "DPM-Solver++(2M)": 2}


@torch.no_grad()
def cost_matrix(base: Denoiser, label: Tensor, gen: torch.Generator, nodes: Tensor) -> Tensor:
    """What steps between the teacher's levels cost; the last of them is 0, the data."""
    sigmas = nodes.to(label.device)
    x = torch.randn(len(label), 1, SIDE, SIDE, generator=gen).to(label.device) * sigmas[0]
    points, slopes = [x], []
    for now, after in tqdm(itertools.pairwise(sigmas), desc="teacher", total=len(nodes) - 1):
        first = (x - base(x, now.expand(len(x)), label)) / now
        euler = x + (after - now) * first
        slope = first if after == 0 else (first + (euler - base(euler, after.expand(len(x)), label)) / after) / 2
        slopes.append(first)
        x = x + (after - now) * slope
        points.append(x)
    return fastgen.deviation_cost(torch.stack(points), torch.stack([*slopes, torch.zeros_like(x)]), sigmas)


def searched(cost: Tensor, nodes: Tensor, k: int, discount: float) -> Tensor:
    """The levels of K steps, without the 0 at the end."""
    path = fastgen.optimal_trajectory(cost, k, discount=discount).steps
    return nodes[path[:-1].cpu()]


def main(argv: list[str] | None = None) -> dict[str, Table]:
    study = Study(options("Search for the noise levels of few sampling steps."), argv)
    nodes = torch.cat([karras(study.count(NODES - 1, 6)), torch.zeros(1)])
    counts = (3,) if study.smoke else (5, 7, 10)

    def run(seed: int) -> dict[str, Table]:
        wanted = study.data.train.draw(study.count(256), torch.Generator().manual_seed(seed)).labels
        cost = cost_matrix(study.base, wanted, torch.Generator().manual_seed(100 * seed), nodes)
        tables: dict[str, Table] = {}
        for title, order in SAMPLERS.items():
            found: dict[int, Tensor] = {}
            for k in tqdm(counts, desc=f"discount for {title}"):
                choices = [searched(cost, nodes, k, discount) for discount in DISCOUNTS]
                few = study.wanted(500)
                scores = [
                    study.validation.distance(
                        sample(study.base, few, torch.Generator().manual_seed(seed), sigmas=s, order=order)
                    )
                    for s in choices
                ]
                found[k] = choices[scores.index(min(scores))]
            plans = {
                "even in log σ": {
                    k: torch.logspace(torch.tensor(HIGHEST).log10(), torch.tensor(LOWEST).log10(), k) for k in counts
                },
                "Karras": {k: karras(k) for k in counts},
                "searched": found,
            }
            labels, table = study.wanted(1000), Table()
            for (name, levels), k in tqdm(list(itertools.product(plans.items(), counts)), desc=title):
                x = sample(
                    study.base, labels, torch.Generator().manual_seed(100 * seed + 1), sigmas=levels[k], order=order
                )
                table.setdefault(name, {})[f"K = {k}"] = study.test.distance(x)
            tables[f"{title}: distance to the test split in K steps"] = table
        return tables

    tables = study.over_seeds(run)
    fig, axes = plt.subplots(1, len(tables), figsize=(9, 3.6), layout="constrained")
    for ax, (title, table) in zip(axes, tables.items(), strict=True):
        for name, row in table.items():
            ax.plot(counts, list(row.values()), "o-", label=name)
        ax.set(yscale="log", xlabel="K", title=title)
        ax.legend()
        ax.grid(alpha=0.3)
    picture = study.args.out / "schedules.png"
    save_picture(fig, picture)
    farewell(study.args, picture)
    return tables
