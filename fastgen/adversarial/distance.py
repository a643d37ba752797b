"""How weighted L1 distances are cut into rows. Their operator is in ``operators.py``."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core import distributed
from ..elbo import operators
from ..triton_kernels.layout import shared_row_strides

# Elements of a row: a block of a GPU keeps that many between the sum and the gradient, a CPU divides them evenly.
PIECE = 4096


def weighted_l1(backend: str, a: Sequence[Tensor], b: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """``Σ_l w_l mean abs(a_l - b_l)``, differentiable in the a_l."""
    if any(distributed.is_dtensor(t) for t in a):
        distributed.register_sharding_rules()
    distances = [_distance(backend, x, y, w) for x, y, w in zip(a, b, weights, strict=True)]
    return distances[0] if len(distances) == 1 else torch.stack(distances).sum()


def _distance(backend: str, a: Tensor, b: Tensor, weight: float) -> Tensor:
    """``weight mean abs(a - b)``"""
    scale, piece = weight / max(a.numel(), 1), _piece(a, b)
    if not piece:
        return operators.l1_distance(backend, pred=a, target=b, scale=scale)
    rows = (a.numel() // piece, piece)
    pred, target = (t.detach().as_strided(rows, (piece, 1)) for t in (a, b))
    return operators.l1_distance(backend, a, pred=pred, target=target, scale=scale)


def _piece(a: Tensor, b: Tensor) -> int:
    """Into which rows both can be cut as they lie in memory; 0: into none."""
    if not (_is_plain(a) and _is_plain(b)):
        return 0
    if not (a.is_contiguous() and b.is_contiguous()):
        if shared_row_strides(a, b) is None:
            return 0
        if len(a) > 1 and not a.stride(0) == b.stride(0) == a.numel() // len(a):
            return 0
    return _divisor(a.numel())


@functools.lru_cache(1024)
def _divisor(n: int) -> int:
    """The largest of whole 64-byte lines that divides n, of at most :data:`PIECE`; 0 where it is below a quarter."""
    return next((d for d in range(min(PIECE, n), PIECE // 4 - 1, -1) if n % d == 0 and d % 32 == 0), 0)


def _is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
