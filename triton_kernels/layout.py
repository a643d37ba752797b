"""How outputs are laid out: the Python side of ``csrc/runtime/rows.h``, for fake implementations and Triton launchers.

Plain PyTorch, and here because Triton files never import fastgen while fastgen may import this folder: nothing in it
but the kernels needs Triton itself.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense_row_strides(t: Tensor) -> tuple[int, ...] | None:
    """The inner strides of `t` where each row is one dense block, in any order of dimensions; else None.

    Dimensions of size 1 get the stride that packing gives them.
    """
    packed = [0] * (t.dim() - 1)
    expected = 1
    for d in sorted(range(1, t.dim()), key=lambda d: (t.stride(d), -d)):
        if t.shape[d] != 1 and t.stride(d) != expected:
            return None
        packed[d - 1] = expected
        expected *= max(t.shape[d], 1)
    return tuple(packed)


def shared_row_strides(*tensors: Tensor) -> tuple[int, ...] | None:
    """The dense row layout that all `tensors` share, or None."""
    for t in tensors:
        if not t.is_contiguous():
            break
    else:  # as nearly always
        return _contiguous(tensors[0].shape[1:])
    inner = dense_row_strides(tensors[0])
    if inner is None:
        return None
    for t in tensors:
        for d in range(1, t.dim()):
            if t.shape[d] != 1 and t.stride(d) != inner[d - 1]:
                return None
    return inner


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, expected = [0] * len(shape), 1
    for d in reversed(range(len(shape))):
        strides[d] = expected
        expected *= max(shape[d], 1)
    return tuple(strides)


def as_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with one dense row layout: themselves where they share one, else contiguous copies."""
    return tensors if shared_row_strides(*tensors) is not None else tuple(t.contiguous() for t in tensors)


def row_size(t: Tensor) -> int:
    size = 1
    for s in t.shape[1:]:
        size *= s
    return size


def new_output(*inputs: Tensor, dtype: torch.dtype) -> Tensor:
    """An output of the inputs' shape: packed rows, in the layout the inputs share (contiguous if none)."""
    first = inputs[0]
    inner = shared_row_strides(*inputs)
    if inner is None:
        return first.new_empty(first.shape, dtype=dtype)
    return first.new_empty_strided(first.shape, (row_size(first), *inner), dtype=dtype)


def arithmetic_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 as soon as one input is float64, else float32."""
    for t in tensors:
        if t.dtype == torch.float64:
            return torch.float64
    return torch.float32
