"""Schedules by search from a teacher's trajectory, against a loop over pairs and a loop over paths."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastgen
from benchmarks.bench_trajectory import pairwise, triple_loop


def teacher(n: int = 12, batch: int = 3, device: str = "cpu", dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Points and slopes of curves in a few dimensions."""
    t = torch.linspace(2, 0.01, n, dtype=dtype) ** 2
    generator = torch.Generator().manual_seed(0)
    rate = torch.rand(batch, 2, 4, 4, generator=generator, dtype=dtype) + 0.2
    start = torch.randn(batch, 2, 4, 4, generator=generator, dtype=dtype)
    time = t.view(-1, 1, 1, 1, 1)
    x = start * torch.exp(-rate * time) + time * rate
    d = rate - start * rate * torch.exp(-rate * time)
    return x.to(device), d.to(device), t.to(device)


@pytest.mark.parametrize("metric", ["l2", "l1", "deviation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_costs_are_those_of_a_loop_over_pairs(metric, dtype, device, monkeypatch):
    x, d, t = teacher(device=device, dtype=dtype)
    expected = pairwise(*(v.cpu().double() for v in (x, d, t)), metric)
    tolerance = {"rtol": 1e-5 if dtype == torch.float32 else 1e-12, "atol": 1e-5 if dtype == torch.float32 else 1e-12}
    cost = fastgen.deviation_cost(x, d, t, metric=metric)
    assert cost.dtype == dtype
    torch.testing.assert_close(cost.cpu().double(), expected, **tolerance)
    monkeypatch.setattr("fastgen.trajectory.deviation.CHUNK", 500)  # five points at a time
    torch.testing.assert_close(fastgen.deviation_cost(x, d, t, metric=metric), cost, rtol=1e-6, atol=1e-6)


def test_cost_by_hand(device):
    """x = t²: a step from t_i to t_j misses by (t_i - t_j)² in each element."""
    t = torch.tensor([3.0, 1.0, 0.0], device=device)
    x, d = t.square()[:, None, None].expand(3, 2, 4), 2 * t[:, None, None].expand(3, 2, 4)
    for metric, factor in (("l2", 2.0), ("l1", 4.0)):
        cost = fastgen.deviation_cost(x, d, t, metric=metric)
        assert cost.tolist() == [[math.inf, 4 * factor, 9 * factor], [math.inf] * 2 + [factor], [math.inf] * 3]
    scalars = fastgen.deviation_cost(x[..., 0], d[..., 0], t)
    assert scalars[0].tolist() == [math.inf, 4, 9]


@pytest.mark.parametrize("discount", [0.8, 1.0, 1.15])
def test_schedules_are_those_of_the_triple_loop(discount, backend, device):
    x, d, t = teacher(61, device=device)
    cost = fastgen.deviation_cost(x, d, t)
    result = fastgen.optimal_trajectory(cost, range(5, 11), discount=discount)
    for column, edges in enumerate(range(5, 11)):
        path, total = triple_loop(cost.tolist(), edges, discount)
        assert result.steps[edges].tolist() == path
        assert result.total_cost[column].item() == pytest.approx(total, rel=1e-12)
    assert fastgen.optimal_trajectory(cost, 7, discount=discount).steps.tolist() == result.steps[7].tolist()


def test_discounts_count_edges_of_nodes_too(device):
    cost = torch.rand(2, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    result = fastgen.optimal_trajectory(cost, 4, convention="nodes", discount=1.5)
    for problem, path, total in zip(cost, result.steps, result.total_cost, strict=True):
        expected, value = triple_loop(problem[1:, 1:].tolist(), 3, 1.5)
        assert (path - 1).tolist() == expected
        assert total.item() == pytest.approx(value, rel=1e-12)


def test_forbidden_edges_stay_forbidden(device):
    cost = torch.ones(4, 4, device=device)
    cost[0, 1] = math.inf
    assert fastgen.optimal_trajectory(cost, 2, discount=2.0).steps.tolist() == [0, 2, 3]
    with pytest.raises(ValueError, match="no path of num_steps = 3 avoids the forbidden"):
        fastgen.optimal_trajectory(cost, 3, discount=2.0)
    large = torch.ones(4, 4, device=device)
    with pytest.raises(ValueError, match="cost is too large: the total of num_steps = 3"):
        fastgen.optimal_trajectory(large, 3, discount=1e30)


X, T = torch.randn(3, 2, 4), torch.tensor([2.0, 1.0, 0.0])
MATRIX = torch.rand(4, 4)
BAD_CALLS = {
    "slopes has shape": (ValueError, lambda: fastgen.deviation_cost(X, X[:2], T)),
    "trajectory must be a torch.Tensor": (TypeError, lambda: fastgen.deviation_cost([X], X, T)),
    r"trajectory must have shape \[n, B, ...\]": (ValueError, lambda: fastgen.deviation_cost(X[:1], X[:1], T[:1])),
    r"times must have shape \[3\]": (ValueError, lambda: fastgen.deviation_cost(X, X, T[:2])),
    "times must be float32 or float64": (TypeError, lambda: fastgen.deviation_cost(X, X, T.half())),
    "times must decrease": (ValueError, lambda: fastgen.deviation_cost(X, X, T.flip(0))),
    "metric must be one of": (ValueError, lambda: fastgen.deviation_cost(X, X, T, metric="l3")),  # type: ignore
    "discount must be > 0": (ValueError, lambda: fastgen.optimal_trajectory(MATRIX, 2, discount=0.0)),
    "discount must be finite": (ValueError, lambda: fastgen.optimal_trajectory(MATRIX, 2, discount=math.nan)),
    "discount = 2 needs method 'exact'": (
        ValueError,
        lambda: fastgen.optimal_trajectory(MATRIX, 2, discount=2.0, method="monge"),
    ),
    "discount = 2 needs a matrix": (
        ValueError,
        lambda: fastgen.optimal_trajectory(fastgen.FactoredCost(T.flip(0), 1 + T.flip(0)), 2, discount=2.0),
    ),
    "cost has NaN": (ValueError, lambda: fastgen.optimal_trajectory(MATRIX * math.nan, 2, discount=2.0)),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_names_the_argument(message):
    error, call = BAD_CALLS[message]
    with pytest.raises(error, match=f"^{message}"):
        call()
