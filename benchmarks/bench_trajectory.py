"""Trajectories against a vectorised numpy sweep: one number of steps, all of them, and large problems."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

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
