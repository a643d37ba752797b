"""Operators of ``score_distillation`` and the autograd Function that all its losses share.

An operator returns ``(loss, coefficients, stats, grad)`` from one pass: ``grad`` is the gradient if asked for,
``coefficients`` (one a row; two for the decoupled loss) are what its backward operator needs to make it again, and
``stats`` has one column per group of rows that share a normaliser. The kernels are in
``csrc/formulas/score_distillation.h``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _backend, _layout
from ._autograd import apply, once_differentiable
from ._gradient import scale_gradient

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]

_FIELD = "Tensor? weight, Tensor? gate"
_TYPES = "str prediction_type, str fake_prediction_type, float guidance_scale, ScalarType dtype"
_PASS = (
    "Tensor? count, bool normalize, float normalizer_min, float normalizer_eps, int group_rows, str reduction,"
    " bool with_grad"
)
_OUTPUTS = "(Tensor loss, Tensor coefficients, Tensor stats, Tensor grad)"
_SCORE = (
    f"Tensor pred, Tensor target, Tensor? uncond, {_FIELD}, float guidance_scale, float grad_clip, ScalarType dtype"
)
_DMD = f"Tensor real, Tensor fake, Tensor? uncond, {_FIELD}, Tensor alpha_t, Tensor sigma_t, {_TYPES}"
_DECOUPLED = (
    f"Tensor dm_real, Tensor dm_fake, Tensor ca_real, Tensor ca_uncond, {_FIELD}, Tensor dm_alpha_t, Tensor dm_sigma_t,"
    f" Tensor ca_alpha_t, Tensor ca_sigma_t, {_TYPES}"
)

# Of each operator, the arguments that its backward operator takes.
_KEPT = {"score_difference": (0, 8), "dmd": (1, 13), "decoupled_dmd": (2, 17)}


def _outputs(
    streams: list[Tensor | None],
    dtype: torch.dtype,
    terms: int,
    stats: int,
    group_rows: int,
    reduction: str,
    with_grad: bool,
) -> Outputs:
    present = [t for t in streams if t is not None]
    first = present[0]
    rows = first.shape[0]
    groups = rows // group_rows
    wide = torch.float64 if dtype == torch.float64 else _layout.arithmetic_dtype(*present)
    return (
        first.new_empty((groups,) if reduction == "none" else (), dtype=wide),
        first.new_empty((rows,) if terms == 1 else (terms, rows), dtype=wide),
        first.new_empty((stats, groups), dtype=wide),
        _layout.new_output(*present, dtype=dtype) if with_grad else first.new_empty((0,), dtype=dtype),
    )


def _gradient(streams: list[Tensor | None], dtype: torch.dtype) -> Tensor:
    return _layout.new_output(*[t for t in streams if t is not None], dtype=dtype)


@_backend.operator(f"score_difference({_SCORE}, str reduction, bool with_grad) -> {_OUTPUTS}")
def score_difference(
    pred: Tensor,
    target: Tensor,
    uncond: Tensor | None,
    weight: Tensor | None,
    gate: Tensor | None,
    guidance_scale: float,
    grad_clip: float,
    dtype: torch.dtype,
    reduction: str,
    with_grad: bool,
) -> Outputs:
    return _outputs([pred, target, uncond, gate], dtype, 1, 4, 1, reduction, with_grad)


@_backend.operator(f"score_difference_backward(Tensor row_grad, {_SCORE}) -> Tensor")
def _score_difference_backward(
    row_grad: Tensor,
    pred: Tensor,
    target: Tensor,
    uncond: Tensor | None,
    weight: Tensor | None,
    gate: Tensor | None,
    guidance_scale: float,
    grad_clip: float,
    dtype: torch.dtype,
) -> Tensor:
    return _gradient([pred, target, uncond, gate], dtype)


@_backend.operator(f"dmd(Tensor x, Tensor x_t, {_DMD}, {_PASS}) -> {_OUTPUTS}")
def dmd(
    x: Tensor,
    x_t: Tensor,
    real: Tensor,
    fake: Tensor,
    uncond: Tensor | None,
    weight: Tensor | None,
    gate: Tensor | None,
    alpha_t: Tensor,
    sigma_t: Tensor,
    prediction_type: str,
    fake_prediction_type: str,
    guidance_scale: float,
    dtype: torch.dtype,
    count: Tensor | None,
    normalize: bool,
    normalizer_min: float,
    normalizer_eps: float,
    group_rows: int,
    reduction: str,
    with_grad: bool,
) -> Outputs:
    return _outputs([real, fake, uncond, gate, x_t, x], dtype, 1, 4, group_rows, reduction, with_grad)


@_backend.operator(f"dmd_backward(Tensor row_grad, Tensor? x_t, {_DMD}) -> Tensor")
def _dmd_backward(
    row_grad: Tensor,
    x_t: Tensor | None,
    real: Tensor,
    fake: Tensor,
    uncond: Tensor | None,
    weight: Tensor | None,
    gate: Tensor | None,
    alpha_t: Tensor,
    sigma_t: Tensor,
    prediction_type: str,
    fake_prediction_type: str,
    guidance_scale: float,
    dtype: torch.dtype,
) -> Tensor:
    return _gradient([real, fake, uncond, gate, x_t], dtype)


@_backend.operator(f"decoupled_dmd(Tensor x, Tensor ca_x_t, Tensor dm_x_t, {_DECOUPLED}, {_PASS}) -> {_OUTPUTS}")
def decoupled_dmd(
    x: Tensor,
    ca_x_t: Tensor,
    dm_x_t: Tensor,
    dm_real: Tensor,
    dm_fake: Tensor,
    ca_real: Tensor,
    ca_uncond: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    dm_alpha_t: Tensor,
    dm_sigma_t: Tensor,
    ca_alpha_t: Tensor,
    ca_sigma_t: Tensor,
    prediction_type: str,
    fake_prediction_type: str,
    guidance_scale: float,
    dtype: torch.dtype,
    count: Tensor | None,
    normalize: bool,
    normalizer_min: float,
    normalizer_eps: float,
    group_rows: int,
    reduction: str,
    with_grad: bool,
) -> Outputs:
    streams = [dm_real, dm_fake, ca_real, ca_uncond, gate, dm_x_t, ca_x_t, x]
    return _outputs(streams, dtype, 2, 6, group_rows, reduction, with_grad)


@_backend.operator(f"decoupled_dmd_backward(Tensor row_grad, Tensor? dm_x_t, {_DECOUPLED}) -> Tensor")
def _decoupled_dmd_backward(
    row_grad: Tensor,
    dm_x_t: Tensor | None,
    dm_real: Tensor,
    dm_fake: Tensor,
    ca_real: Tensor,
    ca_uncond: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    dm_alpha_t: Tensor,
    dm_sigma_t: Tensor,
    ca_alpha_t: Tensor,
    ca_sigma_t: Tensor,
    prediction_type: str,
    fake_prediction_type: str,
    guidance_scale: float,
    dtype: torch.dtype,
) -> Tensor:
    return _gradient([dm_real, dm_fake, ca_real, ca_uncond, gate, dm_x_t], dtype)


class _FieldLoss(torch.autograd.Function):
    """A loss whose gradient with respect to `x` is a given field; `args` are its operator's.

    Where `keep_grad`, the pass that computes the loss writes the gradient too. The first backward takes that buffer
    over and scales it in place; a later one (retain_graph) recomputes, as every backward does where `keep_grad` is off.
    """

    @staticmethod
    def forward(name: str, backend: str, group_rows: int, keep_grad: bool, x: Tensor, *args: Any) -> Outputs:
        return _backend.operators[name].on(backend)(*args, keep_grad)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        ctx.name, ctx.backend, ctx.group_rows, keep_grad, _, *args = inputs
        _, coefficients, stats, grad = output
        ctx.mark_non_differentiable(coefficients, stats, grad)
        first, last = _KEPT[ctx.name]
        kept = args[first:last]
        if ctx.name != "score_difference" and kept[-4] == kept[-3]:
            kept[0] = None  # of two predictions of one quantity the noisy image cancels
        ctx.kept = [None if isinstance(value, Tensor) else value for value in kept]
        ctx.places = [i for i, value in enumerate(kept) if isinstance(value, Tensor)]
        ctx.save_for_backward(coefficients, *[kept[i] for i in ctx.places])
        ctx.num_inputs = len(inputs)
        ctx.grad = grad if keep_grad else None
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        none_after = (None,) * (ctx.num_inputs - 5)
        if grad_loss is None:
            return (None,) * 5 + none_after
        grad, ctx.grad = ctx.grad, None
        if grad is not None:
            return (None,) * 4 + (scale_gradient(grad, grad_loss, ctx.backend), *none_after)
        coefficients, *tensors = ctx.saved_tensors
        args = list(ctx.kept)
        for place, value in zip(ctx.places, tensors, strict=True):
            args[place] = value
        if grad_loss.dim() == 1 and ctx.group_rows > 1:
            grad_loss = grad_loss.repeat_interleave(ctx.group_rows)
        grad = _backend.operators[f"{ctx.name}_backward"].on(ctx.backend)(coefficients * grad_loss, *args)
        return (None,) * 4 + (grad, *none_after)


def field_loss(op: _backend.Operator, backend: str, x: Tensor, group_rows: int, *args: Any) -> tuple[Tensor, Tensor]:
    """The loss and the statistics; `args` are the operator's but the last, and end with the reduction."""
    # Nothing but x has a gradient; and the compiler takes no tensor twice, as x or as one level's times for both.
    args = tuple(value.detach() if isinstance(value, Tensor) else value for value in args)
    if not (torch.is_grad_enabled() and x.requires_grad):
        loss, _, stats, _ = op.on(backend)(*args, False)
        return loss, stats
    # float16 would underflow before a loss scale reaches it; a compiled backward cannot take the buffer over.
    keep_grad = (
        args[-1] != "none"
        and x.dtype != torch.float16
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
    )
    loss, _, stats, _ = apply(_FieldLoss, op.name, backend, group_rows, keep_grad, x, *args)
    return loss, stats
