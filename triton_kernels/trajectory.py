"""The trajectory solver as a plain sweep: one launch a layer of the table, its nodes t in parallel.

With `h`, `cost` is v and paths carry ``exp(cost)``, as in ``csrc/skeleton/costs.h``. The table is [problem, k, t].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rowwise

NODES = 32  # nodes t of a program: one 256-byte piece of a row of float64 costs, so that rows are read in whole lines
SCAN = 64  # predecessors s that a program tries at a time


@triton.jit
def _edges(cost, h, s, t, points, mask, FACTORED: tl.constexpr):
    """Edges [s, t] of one problem, infinite where masked."""
    if FACTORED:
        v = tl.load(cost + s, mask=s < points, other=0.0)[:, None]
        return tl.where(mask, v + tl.load(h + t, mask=t < points, other=0.0)[None, :], float("inf"))
    return tl.load(cost + s[:, None].to(tl.int64) * points + t[None, :], mask=mask, other=float("inf"))


@triton.jit
def _through(path, edge, FACTORED: tl.constexpr):
    return path * edge if FACTORED else path + edge


@triton.jit
def _common(cost, h, t, mask, FACTORED: tl.constexpr):
    """What every path to t is divided by."""
    if FACTORED:
        return tl.load(cost + t, mask=mask, other=1.0) + tl.load(h + t, mask=mask, other=0.0)
    return tl.full(t.shape, 1.0, cost.dtype.element_ty)


@triton.jit
def _problem(cost, h, problem, points, first, FACTORED: tl.constexpr):
    """The costs of one problem, from its first node on."""
    if FACTORED:
        offset = problem.to(tl.int64) * points + first
        return cost + offset, h + offset
    return cost + (problem.to(tl.int64) * points + first) * points + first, h


@triton.jit(do_not_specialize=["k", "first"])
def _next_layer(
    cost, h, table, k, layers, points, first, FACTORED: tl.constexpr, NODES: tl.constexpr, SCAN: tl.constexpr
):
    """``C[k, t] = min over k - 1 <= s < t of C[k-1, s] + F[s, t]`` for a block of nodes t of one problem."""
    nodes = points - first
    blocks = tl.cdiv(nodes, NODES)
    problem, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    cost, h = _problem(cost, h, problem, points, first, FACTORED)
    before = table + (problem.to(tl.int64) * layers + k - 1) * nodes
    t = block * NODES + tl.arange(0, NODES)
    least = tl.full((NODES,), float("inf"), table.dtype.element_ty)
    for start in range(k - 1, tl.minimum((block + 1) * NODES, nodes) - 1, SCAN):
        s = start + tl.arange(0, SCAN)
        mask = (s[:, None] < t[None, :]) & (t[None, :] < nodes)
        path = tl.load(before + s, mask=s < nodes, other=float("inf"))[:, None]
        edge = _edges(cost, h, s, t, nodes if FACTORED else points, mask, FACTORED)
        least = tl.minimum(least, tl.min(_through(path, edge, FACTORED), 0))
    result = least / _common(cost, h, t, t < nodes, FACTORED)
    tl.store(before + nodes + t, result, mask=t < nodes)


@triton.jit(do_not_specialize=["edges", "first"])
def _path(cost, h, table, steps, edges, layers, points, first, FACTORED: tl.constexpr, SCAN: tl.constexpr):
    """Walks one problem's path back: the predecessor is the lowest s that gives the table's value."""
    nodes = points - first
    problem = tl.program_id(0)
    cost, h = _problem(cost, h, problem, points, first, FACTORED)
    table += problem.to(tl.int64) * layers * nodes
    steps += problem.to(tl.int64) * (edges + 1)
    t = nodes - 1
    tl.store(steps + edges, (t + first).to(tl.int64))
    for i in range(0, edges):
        k = edges - i
        to = t + tl.arange(0, 1)
        wanted = tl.load(table + k.to(tl.int64) * nodes + t)
        best = t
        for start in range(k - 1, t, SCAN):
            s = start + tl.arange(0, SCAN)
            path = tl.load(table + (k - 1).to(tl.int64) * nodes + s, mask=s < t, other=float("inf"))[:, None]
            edge = _edges(cost, h, s, to, nodes if FACTORED else points, (s < t)[:, None], FACTORED)
            cost_here = _through(path, edge, FACTORED) / _common(cost, h, to, to < nodes, FACTORED)[None, :]
            hit = (cost_here == wanted) & (s < t)[:, None]
            best = tl.minimum(best, tl.min(tl.where(hit, s[:, None], t)))
        t = best
        tl.store(steps + k - 1, (t + first).to(tl.int64))


@triton.jit
def _sum_exactly(a, b):
    """a + b rounded, and what rounding lost (Knuth's two-sum)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


@triton.jit(do_not_specialize=["first"])
def _inspect_row(cost, status, points, first, CERTIFY: tl.constexpr, SCAN: tl.constexpr):
    """4 if row s holds NaN or -inf after s; 2, where asked, if rows s and s + 1 break the quadrangle inequality."""
    nodes = points - first
    problem, s = tl.program_id(0) // nodes, tl.program_id(0) % nodes
    row = cost + (problem.to(tl.int64) * points + first + s) * points + first
    invalid = tl.zeros((SCAN,), tl.int32)
    violated = tl.zeros((SCAN,), tl.int32)
    for start in range(s + 1, nodes, SCAN):
        t = start + tl.arange(0, SCAN)
        f = tl.load(row + t, mask=t < nodes, other=0.0)
        invalid |= tl.where(f > -float("inf"), 0, 1)
        if CERTIFY:
            violated |= tl.where(f == float("inf"), 1, 0)
            # The cell (s, s + 1) x (t, t + 1) needs s + 1 < t and t + 1 < nodes.
            cell = (t > s + 1) & (t + 1 < nodes)
            right = tl.load(row + t + 1, mask=cell, other=0.0)
            below = tl.load(row + points + t, mask=cell, other=0.0)
            corner = tl.load(row + points + t + 1, mask=cell, other=0.0)
            straight, straight_rest = _sum_exactly(f, corner)
            crossed, crossed_rest = _sum_exactly(right, below)
            holds = (straight < crossed) | ((straight == crossed) & (straight_rest <= crossed_rest))
            violated |= tl.where(cell & ~holds, 1, 0)
    tl.store(status + tl.program_id(0), tl.maximum(tl.max(invalid) * 4, tl.max(violated) * 2))


def trajectory_table(cost: Tensor, h: Tensor | None, first: int, edges: int, monge: bool) -> tuple[Tensor, Tensor]:
    problems, points = cost.shape[:2]
    nodes = points - first
    table = cost.new_full((problems, edges + 1, nodes), torch.inf)
    table[:, 0, 0] = 0 if h is None else 1
    for k in range(1, edges + 1) if problems else ():
        rowwise.launch(
            _next_layer,
            problems * triton.cdiv(nodes, NODES),
            cost,
            cost,
            cost if h is None else h,
            table,
            k,
            edges + 1,
            points,
            first,
            FACTORED=h is not None,
            NODES=NODES,
            SCAN=SCAN,
            num_warps=4,
        )
    return table[:, :, -1].clone(), table.reshape(-1)


def trajectory_path(cost: Tensor, h: Tensor | None, table: Tensor, first: int, edges: int, monge: bool) -> Tensor:
    problems, points = cost.shape[:2]
    steps = cost.new_empty((problems, edges + 1), dtype=torch.int64)
    if problems:
        rowwise.launch(
            _path,
            problems,
            cost,
            cost,
            cost if h is None else h,
            table,
            steps,
            edges,
            table.numel() // (problems * (points - first)),
            points,
            first,
            FACTORED=h is not None,
            SCAN=1024,
            num_warps=8,
        )
    return steps


def trajectory_inspect(cost: Tensor, h: Tensor | None, first: int, certify: bool) -> Tensor:
    problems, points = cost.shape[:2]
    nodes = points - first
    if h is not None:
        return _inspect_factors(cost[:, first:], h[:, first + 1 :], certify)
    status = cost.new_empty((problems, nodes), dtype=torch.int32)
    if problems:
        rowwise.launch(
            _inspect_row, problems * nodes, cost, cost, status, points, first, CERTIFY=certify, SCAN=256, num_warps=4
        )
    worst = status.amax(1).long()  # 4 stands for invalid, so that it outranks 2
    return torch.where(worst == 4, 1, worst)


def _inspect_factors(v: Tensor, h: Tensor, certify: bool) -> Tensor:
    """A few tensor operations on vectors: nothing that a kernel would make faster."""
    if h.shape[1] == 0:
        return torch.zeros(len(v), dtype=torch.long, device=v.device)
    valid = ((v[:, :1] + h > 0) & (v[:, 1:] + h < torch.inf)).all(1)
    largest = 2.0**480 if v.dtype == torch.float64 else 2.0**56
    in_range = ((v[:, :1] + h > 1 / largest) & (v[:, -1:] + h < largest)).all(1)
    certified, increasing = ((x[:, 1:] >= x[:, :-1]).all(1) for x in (h, v))
    faults = 1 * ~valid + 4 * ~increasing + 8 * ~in_range
    return faults + 2 * (valid & ~certified) if certify else faults
