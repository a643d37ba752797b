"""Operators of ``score_distillation`` and the autograd Function that all its losses share.

An operator returns ``(loss, coefficients, stats, grad)`` from one pass: ``grad`` is the gradient if asked for,
``coefficients`` (one a row; two for the decoupled loss) are what its backward operator needs to make it again, and
``stats`` has one column per group of rows that share a normaliser. The kernels are in
``csrc/formulas/score_distillation.h``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _backend, _layout
from ._autograd import once_differentiable
from ._gradient import scale_gradient
from .reference.score_distillation import DistillationStats

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
    return _outputs([pred, target, uncond, gate], dtype, 1, 3, 1, reduction, with_grad)


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
    return _outputs([real, fake, uncond, gate, x_t, x], dtype, 1, 3, group_rows, reduction, with_grad)


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
    return _outputs(streams, dtype, 2, 5, group_rows, reduction, with_grad)


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
    def forward(
        ctx: Any, name: str, backend: str, group_rows: int, keep_grad: bool, x: Tensor, args: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        loss, coefficients, stats, grad = _backend.operators[name].on(backend)(*args, keep_grad)
        kept = list(args[slice(*_KEPT[name])])
        if name != "score_difference" and kept[-4] == kept[-3]:
            kept[0] = None  # of two predictions of one quantity the noisy image cancels
        ctx.places = [i for i, value in enumerate(kept) if isinstance(value, Tensor)]
        ctx.save_for_backward(coefficients, *[kept[i] for i in ctx.places])
        ctx.kept = [None if isinstance(value, Tensor) else value for value in kept]
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.name, ctx.backend, ctx.group_rows = name, backend, group_rows
        ctx.grad = grad if keep_grad else None
        return loss, stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        grad, ctx.grad = ctx.grad, None
        if grad_loss is None:  # the loss was not used
            grad = None
        elif grad is not None:
            scale_gradient(grad, grad_loss, ctx.backend)
        else:
            grad = _FieldLoss.recompute(ctx, grad_loss)
        return None, None, None, None, grad, None

    @staticmethod
    def recompute(ctx: Any, grad_loss: Tensor) -> Tensor:
        coefficients, *tensors = ctx.saved_tensors
        args = list(ctx.kept)
        for place, value in zip(ctx.places, tensors, strict=True):
            args[place] = value
        if grad_loss.dim() == 1 and ctx.group_rows > 1:  # one number a group: spread it over the group's rows
            grad_loss = grad_loss.repeat_interleave(ctx.group_rows)
        return _backend.operators[f"{ctx.name}_backward"].on(ctx.backend)(coefficients * grad_loss, *args)


def field_loss(op: _backend.Operator, backend: str, x: Tensor, group_rows: int, *args: Any) -> tuple[Tensor, Tensor]:
    """The loss and the statistics; `args` are the operator's but the last, and end with the reduction."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        with torch.no_grad():  # the networks' outputs may have a graph
            loss, _, stats, _ = op.on(backend)(*args, False)
        return loss, stats
    if torch.compiler.is_compiling():  # which takes no tensor twice: x, or one level's times for both levels
        args = tuple(value.detach() if isinstance(value, Tensor) else value for value in args)
    # float16 would underflow before a loss scale reaches it; a compiled backward cannot take the buffer over.
    keep_grad = (
        args[-1] != "none"
        and x.dtype != torch.float16
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
    )
    return _FieldLoss.apply(op.name, backend, group_rows, keep_grad, x, args)


class Rows(NamedTuple):
    """How the operators see x: a row a sample or, where anything is given per frame, a row a frame."""

    frames: int | None  # per sample, where rows are frames
    group: int  # consecutive rows that share a normaliser

    def stream(self, t: Tensor) -> Tensor:
        return t if self.frames is None else t.flatten(0, 1)

    def optional(self, t: Tensor | None) -> Tensor | None:
        return None if t is None else self.stream(t)

    def scalars(self, t: Tensor | None) -> Tensor | None:
        if t is None or self.frames is None:
            return t
        return (t if t.dim() == 2 else t.unsqueeze(1).expand(-1, self.frames)).reshape(-1)

    def finish(
        self, loss: Tensor, stats: Tensor, terms: int, count: Tensor | None, x: Tensor, return_stats: bool
    ) -> Tensor | tuple[Tensor, DistillationStats]:
        """From groups to samples. Rows of `stats`: `terms` sums of |G|, `terms` normalisers, skips."""
        per_frame = self.frames is not None and self.group == 1
        if per_frame and loss.dim() == 1:
            loss = loss.unflatten(0, (-1, self.frames)).sum(1)
        if not return_stats:
            return loss
        grad_abs = stats[:terms].sum(1) / (max(x.numel(), 1) if count is None else count.clamp(min=1))
        normalizer = stats[terms : 2 * terms]
        if per_frame:
            normalizer = normalizer.unflatten(1, (-1, self.frames))
        if terms == 1:
            grad_abs, normalizer = grad_abs[0], normalizer[0]
        return loss, DistillationStats(loss.detach(), grad_abs, normalizer, stats[-1].sum().to(torch.int64))


def rows_of(x: Tensor, normalizer_dims: str, weight: Tensor | None, *scalars: Tensor) -> Rows:
    per_frame = any(t.dim() == 2 for t in scalars) or _is_2d(row_weight(weight, x))
    if normalizer_dims == "sample" and not per_frame:
        return Rows(None, 1)
    frames = x.shape[1]
    return Rows(frames, 1 if normalizer_dims == "frame" else frames)


def _is_2d(t: Tensor | None) -> bool:
    return t is not None and t.dim() == 2


def row_weight(weight: Tensor | None, x: Tensor) -> Tensor | None:
    """The weight where it is one per sample or frame; a map of x's shape is a stream (``gate_of``)."""
    return None if weight is not None and is_map(weight, x) else weight


def is_map(weight: Tensor, x: Tensor) -> bool:
    return weight.shape == x.shape and x.dim() > 1


def gate_of(x: Tensor, weight: Tensor | None, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """What multiplies G elementwise, and the number of elements to average over where that is not all."""
    gate = weight if weight is not None and is_map(weight, x) else None
    if mask is None:
        return gate, None
    whole = mask.expand(x.shape)
    # In x's own layout, which the operators then read in place.
    count = whole.sum() if whole.stride() == mask.stride() else mask.sum() * (x.numel() // max(mask.numel(), 1))
    if gate is None:
        gate = whole if whole.stride() == x.stride() else torch.empty_like(x, dtype=torch.bool).copy_(whole)
    else:
        gate = torch.where(whole, gate, 0)
    return gate.detach(), count.to(torch.float32)
