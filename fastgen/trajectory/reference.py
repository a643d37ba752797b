"""Cheapest trajectories in plain PyTorch: the O(K N²) sweep, and its paths.

The functions named ``trajectory_…`` have the operators' arguments, so that they serve in their place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["optimal_trajectory"]


def optimal_trajectory(
    cost: Tensor,
    num_steps: int | Sequence[int],
    *,
    convention: str = "edges",
    method: str = "exact",
    discount: float = 1.0,
) -> tuple[dict[int, Tensor], Tensor]:
    """Paths and their costs for each number of steps: ({K: [..., steps]}, [..., len(num_steps)])."""
    counts = [num_steps] if isinstance(num_steps, int) else list(num_steps)
    first = 0 if convention == "edges" else 1
    batch = cost.shape[:-2]
    problems = cost.reshape(-1, *cost.shape[-2:])
    totals, table = trajectory_table(problems, None, first, max(counts) - first, False, discount)
    steps = {k: trajectory_path(problems, None, table, first, k - first, False, discount) for k in counts}
    edges = torch.tensor(counts, device=cost.device) - first
    return {k: path.reshape(*batch, -1) for k, path in steps.items()}, totals[:, edges].reshape(*batch, -1)


def trajectory_table(
    cost: Tensor, h: Tensor | None, first: int, edges: int, monge: bool, discount: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``C[k+1, t] = min over s < t of C[k, s] + γ^k F[s, t]``: totals [B, edges + 1] and table [B, edges + 1, nodes].

    With `h`, `cost` is v and paths carry ``exp(cost)``: the product of the ``(v_s + h_t) / (v_t + h_t)``.
    """
    edge, common = _edges(cost, h, first)
    layer = torch.full_like(edge[:, 0], torch.inf)
    layer[:, 0] = 0 if h is None else 1
    layers = [layer]
    for k in range(edges):
        layers.append(_extend(layers[-1], _discounted(edge, discount, k), h).amin(1) / common)
    table = torch.stack(layers, 1)
    return table[:, :, -1].clone(), table


def trajectory_path(
    cost: Tensor, h: Tensor | None, table: Tensor, first: int, edges: int, monge: bool, discount: float = 1.0
) -> Tensor:
    """The nodes of the cheapest paths [B, edges + 1]; of predecessors that give the same cost, the lowest."""
    edge, common = _edges(cost, h, first)
    rows = torch.arange(len(edge), device=edge.device)
    t = torch.full_like(rows, edge.shape[1] - 1)
    path = [t]
    for k in range(edges, 0, -1):
        last = _discounted(edge[rows, :, t].unsqueeze(2), discount, k - 1)
        through = _extend(table[:, k - 1], last, h).squeeze(2) / common[rows, t, None]
        before = torch.arange(edge.shape[1], device=edge.device) < t[:, None]
        t = (before & (through == table[rows, k, t][:, None])).long().argmax(1)
        path.append(t)
    return torch.stack(path[::-1], 1) + first


def trajectory_inspect(cost: Tensor, h: Tensor | None, first: int, certify: bool) -> Tensor:
    """Per problem [B] the sum of: 1 for NaN or -inf, 2 if valid but not Monge, 4 if v decreases, 8 for its range."""
    if h is not None:
        v, h = cost[:, first:], h[:, first + 1 :]
        if h.shape[1] == 0:
            return torch.zeros(len(v), dtype=torch.long, device=v.device)
        valid = ((v[:, :1] + h > 0) & (v[:, 1:] + h < torch.inf)).all(1)
        largest = 2.0**480 if v.dtype == torch.float64 else 2.0**56
        in_range = ((v[:, :1] + h > 1 / largest) & (v[:, -1:] + h < largest)).all(1)
        certified, increasing = ((x[:, 1:] >= x[:, :-1]).all(1) for x in (h, v))
        return 1 * ~valid + (2 * (valid & ~certified) if certify else 0) + 4 * ~increasing + 8 * ~in_range
    f = cost[:, first:, first:]
    used = torch.ones_like(f, dtype=torch.bool).triu(1)
    status = (used & ~(f > -torch.inf)).flatten(1).any(1).long()
    if certify:
        straight, crossed = _exact_sum(f[:, :-1, :-1], f[:, 1:, 1:]), _exact_sum(f[:, :-1, 1:], f[:, 1:, :-1])
        holds = (straight[0] < crossed[0]) | ((straight[0] == crossed[0]) & (straight[1] <= crossed[1]))
        violated = (used[:, 1:, :-1] & ~holds).flatten(1).any(1) | (used & (f == torch.inf)).flatten(1).any(1)
        status += 2 * (violated & (status == 0))
    return status


def _edges(cost: Tensor, h: Tensor | None, first: int) -> tuple[Tensor, Tensor]:
    """F[s,t] [B, n, n], infinite unless s < t, and the divisor [B, n] that all paths to t share."""
    edge = cost[:, first:, first:] if h is None else cost[:, first:, None] + h[:, None, first:]
    forbidden = torch.ones_like(edge, dtype=torch.bool).tril()
    common = torch.ones_like(edge[:, 0]) if h is None else edge.diagonal(dim1=1, dim2=2)
    return edge.masked_fill(forbidden, torch.inf), common


def _discounted(edge: Tensor, discount: float, k: int) -> Tensor:
    """The costs of edges that k others come before."""
    return edge if discount == 1 else edge * torch.tensor(discount, dtype=torch.float64).pow(k)


def _extend(layer: Tensor, edge: Tensor, h: Tensor | None) -> Tensor:
    return layer[:, :, None] + edge if h is None else layer[:, :, None] * edge


def _exact_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a + b rounded, and what rounding lost (Knuth's two-sum)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)
