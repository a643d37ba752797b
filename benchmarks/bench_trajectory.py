"""Trajectories against a vectorised numpy sweep: one number of steps, all of them, and large problems."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastgen
from fastgen import FactoredCost, optimal_trajectory
from fastgen.core.timing import synchronize

DEVICE = os.environ.get("FASTGEN_TEST_DEVICE", "cpu")


def analytic_cost(n: int, device: str) -> FactoredCost:
    """A cosine-like schedule and the posterior variance of unit Gaussian data with a little noise."""
    t = torch.linspace(0, 1, n + 1, dtype=torch.float64, device=device)
    v = torch.tan(t * 1.55) ** 2
    return FactoredCost(v, 0.01 + v / (1 + v))


def random_cost(n: int, device: str, batch: tuple[int, ...] = ()) -> Tensor:
    return torch.rand(*batch, n + 1, n + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)


def numpy_sweep(cost: np.ndarray, edges: int) -> float:
    """The least cost of reaching the last node in `edges` edges: one broadcast sum and minimum a layer."""
    used = np.where(np.triu(np.ones(cost.shape, bool), 1), cost, np.inf)
    layer = np.full(len(cost), np.inf)
    layer[0] = 0
    through = np.empty_like(used)
    for _ in range(edges):
        np.add(layer[:, None], used, out=through)
        layer = through.min(0)
    return float(layer[-1])


def seconds(f: Callable[[], Any], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    f()
    synchronize(device)
    return time.perf_counter() - start


def against_numpy(benchmark: Any, ours: Callable[[], Any], cost: np.ndarray, layers: int, device: str) -> None:
    """Times `layers` numpy layers, of which the first 50 stand for all, and leaves the ratio with the benchmark."""
    measured = min(layers, 50)
    sweep = min(seconds(lambda: numpy_sweep(cost, measured), "cpu") for _ in range(3)) * layers / measured
    ours()
    fastest = min(seconds(ours, device) for _ in range(9))
    benchmark.extra_info.update(numpy_seconds=sweep, fastest_seconds=fastest, times_numpy=sweep / fastest)
    benchmark.pedantic(ours, rounds=9, warmup_rounds=1)


def pairwise(x: Tensor, d: Tensor, t: Tensor, metric: str) -> Tensor:
    """GITS' costs (arXiv 2405.11326) as its published code has them, pair by pair."""
    n = len(x)
    cost = torch.full((n, n), math.inf, dtype=x.dtype)

    def deviation(point: Tensor) -> Tensor:
        to_end, chord = (x[-1] - point).flatten(1), (x[-1] - x[0]).flatten(1)
        unit = chord / chord.norm(dim=1, keepdim=True)
        return (to_end - (to_end * unit).sum(1, keepdim=True) * unit).norm(dim=1)

    for i in range(n - 1):
        for j in range(i + 1, n):
            end = x[i] + (t[j] - t[i]) * d[i]
            if metric == "deviation":
                cost[i, j] = (deviation(end) - deviation(x[j])).mean()
            else:
                cost[i, j] = (end - x[j]).flatten(1).norm(p={"l1": 1, "l2": 2}[metric], dim=1).mean()
    return cost


def triple_loop(cost: list[list[float]], edges: int, discount: float) -> tuple[list[int], float]:
    """As the published code has it: from the end, the least cost to it in k edges, and the path from the start."""
    n = len(cost)
    value = [[math.inf] * (edges + 1) for _ in range(n)]
    for i in range(n - 1):
        value[i][1] = cost[i][n - 1]
    for k in range(2, edges + 1):
        for j in range(n - 1):
            for i in range(j + 1, n - 1):
                value[j][k] = min(value[j][k], cost[j][i] + discount * value[i][k - 1])
    path = [0]
    for k in range(edges, 1, -1):
        j = path[-1]
        path.append(next(i for i in range(j + 1, n) if value[j][k] == cost[j][i] + discount * value[i][k - 1]))
    return [*path, n - 1], value[0][edges]


@pytest.mark.parametrize("nodes", [61, 1000])
def test_schedule_search(nodes: int, benchmark: Any, device: str) -> None:
    """Costs of a teacher's trajectory and its schedules of 5 to 10 steps, against the loops of the published code."""
    t = torch.linspace(2, 0.01, nodes, dtype=torch.float64, device=device) ** 2
    images = (16, 3, 16, 16) if nodes < 100 else (4, 3, 8, 8)
    x = torch.randn(images, dtype=torch.float64, device=device) * torch.exp(-t).view(-1, 1, 1, 1, 1)
    slopes = -x
    edges = range(5, 11)

    def ours() -> Any:
        return optimal_trajectory(fastgen.deviation_cost(x, slopes, t), edges, discount=1.1)

    if nodes < 100:
        began = time.perf_counter()
        cost = pairwise(x, slopes, t, "l2").tolist()
        of_costs = time.perf_counter() - began
    else:  # the same loop over as many pairs takes as long for each
        of_costs = (
            seconds(lambda: pairwise(x[:61], slopes[:61], t[:61], "l2"), device) * nodes * (nodes - 1) / (61 * 60)
        )
        cost = fastgen.deviation_cost(x, slopes, t).tolist()
    of_paths = seconds(lambda: [triple_loop(cost, k, 1.1) for k in edges], "cpu")
    ours()
    fastest = min(seconds(ours, device) for _ in range(5))
    ratio = (of_costs + of_paths) / fastest
    benchmark.extra_info.update(loop_seconds=of_costs + of_paths, fastest_seconds=fastest, times_loop=ratio)
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)


def test_all_of_1000(benchmark: Any, device: str) -> None:
    cost = random_cost(1000, device)
    against_numpy(benchmark, lambda: optimal_trajectory(cost, "all"), cost.cpu().numpy(), 1000, device)


def test_50_of_1000(benchmark: Any, device: str) -> None:
    cost = random_cost(1000, device)
    against_numpy(benchmark, lambda: optimal_trajectory(cost, 50), cost.cpu().numpy(), 50, device)


def test_factored_50_of_1000(benchmark: Any, device: str) -> None:
    cost = analytic_cost(1000, device)
    matrix = cost.matrix().cpu().numpy()
    against_numpy(benchmark, lambda: optimal_trajectory(cost, 50), matrix, 50, device)


@pytest.mark.parametrize("method", ["exact", "monge"])
def test_methods_on_a_certified_matrix(method: Any, benchmark: Any, device: str) -> None:
    """Why "auto" takes the exact method for matrices: the certificate costs what Monge saves."""
    s = torch.arange(2001, dtype=torch.float64, device=device)
    cost = -s[:, None] * s
    benchmark.pedantic(lambda: optimal_trajectory(cost, 50, method=method), rounds=5, warmup_rounds=1)


def test_64_problems_of_1000(benchmark: Any, device: str) -> None:
    cost = random_cost(1000, device, (64,))
    benchmark.pedantic(lambda: optimal_trajectory(cost, "all"), rounds=1, warmup_rounds=1)


def test_all_of_4000(benchmark: Any, device: str) -> None:
    cost = random_cost(4000, device)
    benchmark.pedantic(lambda: optimal_trajectory(cost, "all"), rounds=3, warmup_rounds=1)


def test_factored_100_of_100000(benchmark: Any, device: str) -> None:
    cost = analytic_cost(100_000, device)
    benchmark.pedantic(lambda: optimal_trajectory(cost, 100), rounds=3, warmup_rounds=1)
