"""A tolerance that can fail: errors against float64 are held to what eager PyTorch gets at the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """Relative L2 and relative maximum error against a float64 result; (nan, nan) if any element is not finite."""
    if exact.numel() == 0:
        return 0.0, 0.0
    difference = actual.double() - exact
    norm, largest = exact.norm().item() or 1.0, exact.abs().max().item() or 1.0
    return difference.norm().item() / norm, difference.abs().max().item() / largest


def bounds(eager: Tensor, exact: Tensor) -> tuple[float, float]:
    """What :func:`errors` may be at most: twice eager's, plus one rounding of the dtype.

    Eager float64 is the oracle itself and its error reads 0, so there a floor of some roundings stands for both.
    """
    floor = torch.finfo(eager.dtype).eps * (32 if eager.dtype == torch.float64 else 1)
    l2, largest = errors(eager, exact)
    return 2 * l2 + floor, 2 * largest + floor


def accurate(actual: Tensor, eager: Tensor, exact: Tensor) -> bool:
    """Whether `actual` is within :func:`bounds` in both norms; never true of NaN."""
    return all(mine <= limit for mine, limit in zip(errors(actual, exact), bounds(eager, exact), strict=True))
