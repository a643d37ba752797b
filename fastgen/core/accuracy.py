"""A tolerance that can fail: errors against float64 are held to what eager PyTorch gets at the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

HARDWARE = 6 * 2.0**-22  # what hardware's exponentials and logarithms lose


def errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """Relative L2 and relative maximum error against a float64 result; (nan, nan) if any element is not finite."""
    if exact.numel() == 0:
        return 0.0, 0.0
    difference = actual.double() - exact
    norm, largest = exact.norm().item() or 1.0, exact.abs().max().item() or 1.0
    return difference.norm().item() / norm, difference.abs().max().item() / largest


def bounds(eager: Tensor, exact: Tensor) -> tuple[float, float]:
    """What :func:`errors` may be at most: twice eager's, plus one rounding of the dtype.

    On a GPU our kernels take 2^x and log2 x from the hardware, in float32, to 2^-22 each: six of these are added.

    Of a few numbers eager may have every digit by luck: four roundings are always allowed. Eager float64 is the oracle
    itself, whose error reads 0 and is not: there a floor of what differences of log-probabilities lose stands for both.
    """
    roundings = 1024 if eager.dtype == torch.float64 else 4 if eager.numel() < 8 else 1
    floor = torch.finfo(eager.dtype).eps * roundings + (HARDWARE if eager.is_cuda else 0.0)
    l2, largest = errors(eager, exact)
    return 2 * l2 + floor, 2 * largest + floor


def accurate(actual: Tensor, eager: Tensor, exact: Tensor) -> bool:
    """Whether `actual` is within :func:`bounds` in both norms; never true of NaN."""
    return all(mine <= limit for mine, limit in zip(errors(actual, exact), bounds(eager, exact), strict=True))
