"""The autograd Function of weighted L1 distances. Their operator is in ``_elbo.py``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _distributed, _layout
from ._autograd import apart, once_differentiable
from ._elbo import elbo_error_backward, l1_distance
from ._gradient import scale_gradient

# Elements of a row: a block of a GPU keeps that many between the sum and the gradient, a CPU divides them evenly.
PIECE = 4096


class WeightedL1(torch.autograd.Function):
    """``Σ_l w_l mean abs(a_l - b_l)`` of `tensors` a_1, …, a_n, b_1, …, b_n.

    Where `keep[l]`, the pass that computes the distance writes the gradient too, while the elements are on chip. The
    first backward takes those buffers over and scales them in place; a later one (retain_graph) recomputes, as every
    backward does where `keep[l]` is off.
    """

    @staticmethod
    def forward(ctx: Any, backend: str, weights: Sequence[float], keep: Sequence[bool], *tensors: Tensor) -> Tensor:
        pairs = list(zip(tensors[: len(weights)], tensors[len(weights) :], strict=True))
        results = [_distance(backend, *pair, w, k) for pair, w, k in zip(pairs, weights, keep, strict=True)]
        ctx.save_for_backward(*tensors)
        ctx.backend, ctx.weights = backend, weights
        ctx.grads = [grad for _, grad in results]
        return torch.stack([distance for distance, _ in results]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        kept, ctx.grads = ctx.grads, [None] * len(ctx.weights)
        grads = [WeightedL1.gradient(ctx, i, grad, grad_loss) for i, grad in enumerate(kept)]
        return None, None, None, *grads, *(None,) * len(kept)

    @staticmethod
    def gradient(ctx: Any, i: int, kept: Tensor | None, grad_loss: Tensor) -> Tensor | None:
        if not ctx.needs_input_grad[3 + i]:
            return None
        if kept is not None:
            return scale_gradient(kept, grad_loss, ctx.backend)
        pred, target = ctx.saved_tensors[i], ctx.saved_tensors[len(ctx.weights) + i]
        row_grad = (grad_loss * (ctx.weights[i] / max(pred.shape[0], 1))).expand(pred.shape[:1])
        return elbo_error_backward.on(ctx.backend)(row_grad, pred, target, None, "l1", True)


def weighted_l1(backend: str, a: Sequence[Tensor], b: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    if any(_distributed.is_dtensor(t) for t in a):
        _distributed.register_sharding_rules()
    with_grad = [torch.is_grad_enabled() and t.requires_grad for t in a]
    if not any(with_grad):
        distances = [_distance(backend, x, y, w, False)[0] for x, y, w in zip(a, b, weights, strict=True)]
        return torch.stack(distances).sum()
    # float16 would underflow before a loss scale reaches it; a compiled backward cannot take a buffer over.
    keep = [wanted and t.dtype != torch.float16 and _is_plain(t) for wanted, t in zip(with_grad, a, strict=True)]
    return WeightedL1.apply(backend, weights, keep, *apart(*a, *b))


def _distance(backend: str, a: Tensor, b: Tensor, weight: float, keep: bool) -> tuple[Tensor, Tensor | None]:
    """``weight mean abs(a - b)``, and its gradient where wanted."""
    run = l1_distance.on(backend)
    scale = weight / max(a.numel(), 1)
    piece = _piece(a, b)
    if not piece:
        distance, grad = run(a, b, scale, keep)
        return distance, grad if keep else None
    rows = (a.numel() // piece, piece)
    distance, grad = run(a.as_strided(rows, (piece, 1)), b.as_strided(rows, (piece, 1)), scale, keep)
    return distance, grad.as_strided(a.shape, a.stride()) if keep else None


def _piece(a: Tensor, b: Tensor) -> int:
    """Into which rows both can be cut as they lie in memory; 0: into none."""
    if not (_is_plain(a) and _is_plain(b)):
        return 0
    if not (a.is_contiguous() and b.is_contiguous()):
        if _layout.shared_row_strides(a, b) is None:
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
