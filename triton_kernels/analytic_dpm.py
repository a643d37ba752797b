"""The moments of Analytic-DPM (arXiv 2201.06503). The formula is that of ``csrc/analytic_dpm.h``."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import scalar
from .rowwise import Formula, Functions, Groups, Rows, run
from .scalar import number


class MeanSquareArgs(NamedTuple):
    scale: float | int  # 1/D
    out: Tensor


@triton.jit
def _row(args, row, rank, T: tl.constexpr):
    return (number(args.scale, T),)


@triton.jit
def _accumulate(constants, v):
    return (v[0] * v[0],)


@triton.jit
def _epilogue(args, group, sums, T: tl.constexpr):
    tl.store(args.out + group, sums[0])
    return sums[0]


MEAN_SQUARE = Formula(Functions(_row, _accumulate, _epilogue), sums=1)


def mean_square(pred: Tensor) -> Tensor:
    rows = Rows(pred)
    out = rows.new_vector(rows.count)
    args = MeanSquareArgs(scalar.argument(1 / max(rows.size, 1), rows.dtype), out)
    run(MEAN_SQUARE, Groups(rows.count), rows, args)
    return out
