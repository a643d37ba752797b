"""Cases of ``fastgen.trajectory``: totals, and the cost of a path."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..core.case import Draw, case
from . import FactoredCost

NODES = 101  # at most


def _nodes(draw: Draw) -> int:
    return min(max(torch.Size(draw.shape).numel() // 8, 6), NODES)


def matrix(draw: Draw) -> Tensor:
    return draw.normal(2, _nodes(draw), _nodes(draw)).square().to(draw.wide)


def monge(draw: Draw) -> Tensor:
    """A matrix with a certificate."""
    s = torch.arange(_nodes(draw), device=draw.device, dtype=draw.wide)
    return -s[:, None] * torch.stack([s, 2 * s])[:, None]


def increasing(draw: Draw) -> Tensor:
    return draw.normal(2, _nodes(draw)).square().to(draw.wide).cumsum(1)


def decreasing(draw: Draw) -> Tensor:
    """A factor without certificate."""
    return 1 + increasing(draw).flip(1)


def _solved(m: ModuleType, cost: Tensor | FactoredCost, **options: Any) -> Tensor:
    matrix = cost.matrix() if isinstance(cost, FactoredCost) else cost
    counts = [2, matrix.shape[-1] // 2]
    # The reference takes a matrix alone, and returns paths and totals.
    if hasattr(m, "FactoredCost"):
        result = m.optimal_trajectory(cost, counts, **options)
        totals, path = result.total_cost, result.steps[counts[1]]
    else:
        paths, totals = m.optimal_trajectory(matrix, counts, **options)
        path = paths[counts[1]]
    edges = matrix.detach().gather(1, path[:, :-1, None].expand(-1, -1, matrix.shape[-1]))
    return torch.cat([totals, edges.gather(2, path[:, 1:, None])[..., 0].to(totals.dtype)], 1)


def _factored(m: ModuleType, v: Tensor, h: Tensor) -> Tensor:
    return _solved(m, FactoredCost(v, h))


CASES = (
    case("optimal_trajectory", {"cost": matrix}, "", _solved),
    case("optimal_trajectory-nodes", {"cost": matrix}, "", _solved, convention="nodes"),
    case("optimal_trajectory-discounted", {"cost": matrix}, "", _solved, discount=1.15),
    case("optimal_trajectory-monge", {"cost": monge}, "", _solved, method="monge"),
    case("optimal_trajectory-factored", {"v": increasing, "h": decreasing}, "", _factored),
    case("optimal_trajectory-certified", {"v": increasing, "h": increasing}, "", _factored),
)
