"""Operators of ``elbo`` and the autograd Functions of its losses.

Every loss here reduces a row to one number and hands it to a scalar function, so all of them share one operator shape:
``(loss, delta, error_slope, grad_pred)`` from one pass, where ``error_slope`` is d loss / d error of each row. The
kernels are in ``csrc/formulas/elbo.h`` and ``triton_kernels/elbo.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _backend, _layout
from ._autograd import once_differentiable
from ._gradient import scale_gradient

LossOutputs = tuple[Tensor, Tensor, Tensor, Tensor]


@_backend.operator(
    "elbo_error(Tensor pred, Tensor target, Tensor? weight, str loss, bool element_mean) -> Tensor",
)
def elbo_error(pred: Tensor, target: Tensor, weight: Tensor | None, loss: str, element_mean: bool) -> Tensor:
    return pred.new_empty(pred.shape[:1], dtype=_layout.arithmetic_dtype(pred, target))


@_backend.operator(
    "elbo_error_backward(Tensor grad, Tensor pred, Tensor target, Tensor? weight, str loss, bool element_mean)"
    " -> Tensor"
)
def elbo_error_backward(
    grad: Tensor, pred: Tensor, target: Tensor, weight: Tensor | None, loss: str, element_mean: bool
) -> Tensor:
    return _layout.new_output(pred, target, dtype=pred.dtype)


@_backend.operator(
    "l1_distance(Tensor pred, Tensor target, float scale, bool with_grad) -> (Tensor distance, Tensor grad_pred)"
)
def l1_distance(pred: Tensor, target: Tensor, scale: float, with_grad: bool) -> tuple[Tensor, Tensor]:
    """``scale Σ abs(pred - target)`` over all elements, and its gradient from the same pass."""
    return (
        pred.new_empty((), dtype=_layout.arithmetic_dtype(pred, target)),
        _layout.new_output(pred, target, dtype=pred.dtype) if with_grad else pred.new_empty((0,)),
    )


@_backend.operator(
    "elbo_difference(Tensor pred, Tensor ref_pred, Tensor target, Tensor? weight, bool element_mean) -> Tensor"
)
def elbo_difference(
    pred: Tensor, ref_pred: Tensor, target: Tensor, weight: Tensor | None, element_mean: bool
) -> Tensor:
    return pred.new_empty(pred.shape[:1], dtype=_layout.arithmetic_dtype(pred, ref_pred, target))


def _loss_outputs(
    pred: Tensor, ref_pred: Tensor, target: Tensor, terms: int, reduction: str, with_grad: bool
) -> LossOutputs:
    dtype = _layout.arithmetic_dtype(pred, ref_pred, target)
    return (
        pred.new_empty((terms,) if reduction == "none" else (), dtype=dtype),
        pred.new_empty((terms,), dtype=dtype),
        pred.new_empty(pred.shape[:1], dtype=dtype),
        _layout.new_output(pred, target, ref_pred, dtype=pred.dtype) if with_grad else pred.new_empty((0,)),
    )


_LOSS_STREAMS = (
    "Tensor pred, Tensor ref_pred, Tensor target, Tensor? weight, bool element_mean, str reduction, bool with_grad"
)


@_backend.operator(
    f"ddo_loss({_LOSS_STREAMS}, Tensor is_real, Tensor? counts, float alpha, float beta, int mc_samples)"
    " -> (Tensor loss, Tensor delta, Tensor error_slope, Tensor grad_pred)"
)
def ddo_loss(
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    element_mean: bool,
    reduction: str,
    with_grad: bool,
    is_real: Tensor,
    counts: Tensor | None,
    alpha: float,
    beta: float,
    mc_samples: int,
) -> LossOutputs:
    return _loss_outputs(pred, ref_pred, target, is_real.shape[0], reduction, with_grad)


@_backend.operator(
    f"diffusion_dpo_loss({_LOSS_STREAMS}, float beta, str kind)"
    " -> (Tensor loss, Tensor delta, Tensor error_slope, Tensor grad_pred)"
)
def diffusion_dpo_loss(
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    element_mean: bool,
    reduction: str,
    with_grad: bool,
    beta: float,
    kind: str,
) -> LossOutputs:
    return _loss_outputs(pred, ref_pred, target, pred.shape[0] // 2, reduction, with_grad)


class RowError(torch.autograd.Function):
    """``elbo_error``, and with a reference ``elbo_difference``, which is the reference's error minus this one."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        pred: Tensor,
        ref_pred: Tensor | None,
        target: Tensor,
        weight: Tensor | None,
        loss: str,
        mean: bool,
    ) -> Tensor:
        ctx.backend, ctx.loss, ctx.mean, ctx.negate = backend, loss, mean, ref_pred is not None
        ctx.save_for_backward(pred, target, weight)
        if ref_pred is None:
            return elbo_error.on(backend)(pred, target, weight, loss, mean)
        return elbo_difference.on(backend)(pred, ref_pred, target, weight, mean)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pred, target, weight = ctx.saved_tensors
        row_grad = -grad if ctx.negate else grad
        grad_pred = elbo_error_backward.on(ctx.backend)(row_grad, pred, target, weight, ctx.loss, ctx.mean)
        return None, grad_pred, None, None, None, None, None


class DifferenceLoss(torch.autograd.Function):
    """A loss over ELBO differences: `name` is its operator, `args` what that takes after the streams.

    Where `keep_grad`, the pass that computes the loss writes the gradient too, while the row is on chip. The first
    backward takes that buffer over and scales it in place; a later one (retain_graph) recomputes into a fresh one, as
    every backward does where `keep_grad` is off.
    """

    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        backend: str,
        keep_grad: bool,
        slope_shape: tuple[int, int],
        reduction: str,
        mean: bool,
        pred: Tensor,
        ref_pred: Tensor,
        target: Tensor,
        weight: Tensor | None,
        *args: Any,
    ) -> tuple[Tensor, Tensor]:
        run = _backend.operators[name].on(backend)
        loss, delta, error_slope, grad_pred = run(pred, ref_pred, target, weight, mean, reduction, keep_grad, *args)
        ctx.save_for_backward(pred, target, weight, error_slope)
        ctx.mark_non_differentiable(delta)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.mean, ctx.slope_shape = backend, mean, slope_shape if reduction == "none" else None
        ctx.grad_pred = grad_pred if keep_grad else None
        ctx.unused = (None,) * (3 + len(args))  # the gradients of what comes after pred
        return loss, delta

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        grad_pred, ctx.grad_pred = ctx.grad_pred, None
        if grad_loss is None:  # the loss was not used
            grad_pred = None
        elif grad_pred is not None:
            scale_gradient(grad_pred, grad_loss, ctx.backend)
        else:
            grad_pred = DifferenceLoss.recompute(ctx, grad_loss)
        return (None,) * 6 + (grad_pred, *ctx.unused)

    @staticmethod
    def recompute(ctx: Any, grad_loss: Tensor) -> Tensor:
        pred, target, weight, error_slope = ctx.saved_tensors
        if ctx.slope_shape is not None:  # one number a term: spread it over the term's rows
            error_slope = error_slope.view(ctx.slope_shape)
            grad_loss = grad_loss.view((-1, 1) if ctx.slope_shape[0] == -1 else (1, -1))
        row_grad = (error_slope * grad_loss).reshape(-1)
        return elbo_error_backward.on(ctx.backend)(row_grad, pred, target, weight, "l2", ctx.mean)


def difference_loss(
    op: _backend.Operator,
    backend: str,
    slope_shape: tuple[int, int],
    reduction: str,
    element_reduction: str,
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *args: Any,
) -> tuple[Tensor, Tensor]:
    mean = element_reduction == "mean"
    if not (torch.is_grad_enabled() and pred.requires_grad):
        loss, delta, _, _ = op.on(backend)(pred, ref_pred, target, weight, mean, reduction, False, *args)
        return loss, delta
    # float16 would underflow before a loss scale reaches it; a compiled backward cannot take the buffer over.
    keep_grad = (
        reduction != "none"
        and pred.dtype != torch.float16
        and type(pred) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
    )
    loss, delta = DifferenceLoss.apply(
        op.name,
        backend,
        keep_grad,
        slope_shape,
        reduction,
        mean,
        pred,
        ref_pred,
        target,
        weight,
        *args,
    )
    return loss, delta
