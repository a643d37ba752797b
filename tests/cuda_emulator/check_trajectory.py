"""Compares the emulated CUDA trajectory solver with the reference, to the bit. Run by tests/test_aot_cuda.py."""

from __future__ import annotations

import sys

import torch

sys.modules["fastgen._C"] = None  # type: ignore[assignment]  # its kernels would hold the CPU's place
import fastgen  # noqa: E402
from fastgen.core import dispatch  # noqa: E402
from fastgen.trajectory import reference as reference  # noqa: E402


def operator(name: str):
    return dispatch.operators[name].native


def check(cost: torch.Tensor, h: torch.Tensor | None, first: int, edges: int) -> None:
    what = f"{list(cost.shape)} {cost.dtype} first {first} edges {edges}"
    for certify in (False, True):
        status = [f(cost, h, first, certify) for f in (operator("trajectory_inspect"), reference.trajectory_inspect)]
        assert torch.equal(*status), f"{what}: inspected as {status}"
    totals, table = operator("trajectory_table")(cost, h, first, edges, False)
    expected, layers = reference.trajectory_table(cost, h, first, edges, False)
    assert torch.equal(totals, expected), f"{what}: totals {totals - expected}"
    feasible = bool(expected[:, edges].isfinite().all())
    if feasible:
        steps = operator("trajectory_path")(cost, h, table, first, edges, False)
        assert torch.equal(steps, reference.trajectory_path(cost, h, layers, first, edges, False)), what


def main() -> None:
    for points, edges, problems in ((2, 1, 1), (34, 33, 2), (71, 12, 2), (135, 134, 1), (200, 3, 1), (5, 2, 0)):
        for first in (0, 1) if edges < points - 1 else (0,):
            for dtype in (torch.float64, torch.float32):
                cost = torch.randint(-3, 4, (problems, points, points)).to(dtype) / 3
                cost[:, :, points // 2] += torch.inf * (torch.rand(problems, points) < 0.3)
                check(cost.nan_to_num(nan=1.0), None, first, edges)
            v, h = (torch.rand(problems, points, dtype=torch.float64).cumsum(1) for _ in range(2))
            check(v, h + 0.1, first, edges)
            check(v, 2 + h.flip(1), first, edges)
    s = torch.arange(40.0)
    check((-s[:, None] * s)[None].contiguous(), None, 0, 5)  # certified
    for bad in (float("nan"), -torch.inf):
        cost = torch.ones(2, 40, 40)
        cost[1, 20, 30] = bad
        inspect = operator("trajectory_inspect")
        assert inspect(cost, None, 0, True).tolist() == [0, 1], bad
    with fastgen.use_backend("native"):
        result = fastgen.optimal_trajectory(torch.rand(3, 50, 50), 7, convention="nodes", method="exact")
    assert result.steps.shape == (3, 7)


if __name__ == "__main__":
    torch.ops.load_library(sys.argv[1])
    torch.manual_seed(0)
    main()
    print("agrees")
