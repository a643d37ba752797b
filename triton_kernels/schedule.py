"""The forward process and conversions between predictions: per-row linear combinations."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rowwise import Formula, Functions, Groups, Rows, run


class Coefficients(NamedTuple):
    a: Tensor
    b: Tensor | None


@triton.jit
def _combination_row(args, row, rank, T: tl.constexpr):
    return tl.load(args.a + row), tl.load(args.b + row)


@triton.jit
def _combination_map(constants, coefficient, v):
    return constants[0] * v[0] + constants[1] * v[1]


@triton.jit
def _scaled_row(args, row, rank, T: tl.constexpr):
    return (tl.load(args.a + row),)


@triton.jit
def _scaled_map(constants, coefficient, v):
    return coefficient * v[0]


@triton.jit
def _scale_coefficient(args, row, rank, constants, slope, T: tl.constexpr):
    return constants[0]


ROW_COMBINATION = Formula(
    Functions(_combination_row, coefficient=_scale_coefficient, map=_combination_map), map_streams=2
)
ROW_SCALED = Formula(Functions(_scaled_row, coefficient=_scale_coefficient, map=_scaled_map), map_streams=1)


def row_combination(x: Tensor, a: Tensor, y: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    rows = Rows(x) if y is None else Rows(x, y)
    out = rows.new_output(x.dtype if y is None else torch.promote_types(x.dtype, y.dtype))
    args = Coefficients(rows.scalars(a), rows.scalars(b))
    run(ROW_SCALED if y is None else ROW_COMBINATION, Groups(rows.count), rows, args, out)
    return out
