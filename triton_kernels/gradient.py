"""What every backward does to a gradient that its forward pass has written."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rowwise
from .plan import flat_plan, offsets_type, unit_of
from .scalar import rounded


@triton.jit(do_not_specialize=["units"])
def _scale_in_place(grad, scale, units, BLOCK: tl.constexpr, UNIT: tl.constexpr, INDEX: tl.constexpr, T: tl.constexpr):
    factor = tl.load(scale).to(T)
    if factor != 1.0:  # the usual 1 costs one load a program
        size = units.to(INDEX) * UNIT
        cols = tl.arange(0, BLOCK)
        step = tl.num_programs(0).to(INDEX) * BLOCK
        for start in range(tl.program_id(0).to(INDEX) * BLOCK, size, step):
            mask = cols < size - start
            pointers = grad + start + cols
            value = factor * tl.load(pointers, mask=mask, other=0.0).to(T)
            tl.store(pointers, rounded(value, grad.dtype.element_ty), mask=mask)


def scale_gradient_(grad: Tensor, scale: Tensor) -> None:
    """`grad` is packed, in any order of dimensions, as the operators allocate it."""
    size = grad.numel()
    if size == 0:
        return
    block, num_warps, programs = flat_plan(size, grad.element_size(), grad.device)
    unit = unit_of((size,), grad.element_size())
    rowwise.launch(
        _scale_in_place,
        programs,
        grad,
        grad,
        scale,
        size // unit,
        BLOCK=block,
        UNIT=unit,
        INDEX=offsets_type(size),
        T=tl.float64 if grad.dtype == torch.float64 else tl.float32,
        num_warps=num_warps,
    )
