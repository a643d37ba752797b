"""Operators of ``score_distillation``, and how its losses are differentiated.

An operator returns ``(loss, coefficients, stats, grad)`` from one pass: ``grad`` is the gradient if asked for,
``coefficients`` (one a row; two for the decoupled loss) are what its backward operator needs to make it again, and
``stats`` has one column per group of rows that share a normaliser. The kernels are in
``csrc/score_distillation.h``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from ..core.autograd import differentiable
from ..core.operator import Gradient, Loss, PerRow, PredictionType, Reduction, Role, Stream, Whole, operator
from .reference import DistillationStats


class FieldOutputs(NamedTuple):
    """Of a loss with one term."""

    loss: Loss
    coefficients: PerRow
    stats: Annotated[Tensor, Role.STACKED_GROUP, 3]
    grad: Gradient


class DecoupledOutputs(NamedTuple):
    """Of :func:`decoupled_dmd`."""

    loss: Loss
    coefficients: Annotated[Tensor, Role.STACKED, 2]
    stats: Annotated[Tensor, Role.STACKED_GROUP, 5]
    grad: Gradient


class ScoreField(NamedTuple):
    """``G = w (guided - target)``, clipped."""

    pred: Stream
    target: Stream
    uncond: Stream | None
    weight: PerRow | None
    gate: Stream | None
    guidance_scale: float
    grad_clip: float
    dtype: torch.dtype


class DmdField(NamedTuple):
    """``G = w (f - r)``, but for the noisy image."""

    real: Stream
    fake: Stream
    uncond: Stream | None
    weight: PerRow | None
    gate: Stream | None
    alpha_t: PerRow
    sigma_t: PerRow
    prediction_type: PredictionType
    fake_prediction_type: PredictionType
    guidance_scale: float
    dtype: torch.dtype


class DecoupledField(NamedTuple):
    """Both terms of G, but for the noisy images."""

    dm_real: Stream
    dm_fake: Stream
    ca_real: Stream
    ca_uncond: Stream
    weight: PerRow | None
    gate: Stream | None
    dm_alpha_t: PerRow
    dm_sigma_t: PerRow
    ca_alpha_t: PerRow
    ca_sigma_t: PerRow
    prediction_type: PredictionType
    fake_prediction_type: PredictionType
    guidance_scale: float
    dtype: torch.dtype


class Normalized(NamedTuple):
    """How a DMD loss divides: `count` elements share the mean, `group_rows` rows a normaliser."""

    count: Whole | None  # type: ignore[assignment]  # tuples have a method of that name
    normalize: bool
    normalizer_min: float
    normalizer_eps: float
    group_rows: int
    reduction: Reduction
    with_grad: bool


def _noisy_image_cancels(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Of two predictions of one quantity, the difference does not depend on the noisy image."""
    one_type = arguments["prediction_type"] == arguments["fake_prediction_type"]
    return ("x_t", "dm_x_t") if one_type else ()


_FIELD: dict[str, Any] = {"slope": "coefficients", "returns": ("loss", "stats")}
_DMD: dict[str, Any] = {"wrt": "x", "group_rows": "group_rows", "unused": _noisy_image_cancels}


@operator
def score_difference_backward(row_grad: PerRow, of: ScoreField) -> Gradient:
    """`row_grad` times G."""


@differentiable(score_difference_backward, **_FIELD)
@operator
def score_difference(of: ScoreField, reduction: Reduction, with_grad: bool) -> FieldOutputs:
    """SDS and VSD: ``G = w (guided - target)``."""


@operator
def dmd_backward(row_grad: PerRow, x_t: Stream | None, of: DmdField) -> Gradient:
    """`row_grad` times G without its normaliser; x_t may be missing where both networks predict one quantity."""


@differentiable(dmd_backward, **_FIELD, **_DMD)
@operator
def dmd(x: Stream, x_t: Stream, of: DmdField, by: Normalized) -> FieldOutputs:
    """DMD: ``G = w (f - r) / n``."""


@operator
def decoupled_dmd_backward(
    row_grad: Annotated[Tensor, Role.STACKED, 2], dm_x_t: Stream | None, of: DecoupledField
) -> Gradient:
    """Each row of `row_grad` times its term, without normalisers."""


@differentiable(decoupled_dmd_backward, **_FIELD, **_DMD)
@operator
def decoupled_dmd(x: Stream, ca_x_t: Stream, dm_x_t: Stream, of: DecoupledField, by: Normalized) -> DecoupledOutputs:
    """Decoupled DMD: distribution matching and guidance, each at its own level with its own normaliser."""


class SampleRows(NamedTuple):
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
        skipped = stats[-1].sum().to(torch.int64)
        if per_frame:
            stats = stats.unflatten(1, (-1, self.frames))
        grad_norm, normalizer, skips = stats[:terms], stats[terms : 2 * terms], stats[-1] > 0
        if terms == 1:
            grad_abs, grad_norm, normalizer = grad_abs[0], grad_norm[0], normalizer[0]
        return loss, DistillationStats(loss.detach(), grad_abs, normalizer, skipped, grad_norm, skips)


def rows_of(x: Tensor, normalizer_dims: str, weight: Tensor | None, *scalars: Tensor) -> SampleRows:
    per_frame = any(t.dim() == 2 for t in scalars) or _is_2d(row_weight(weight, x))
    if normalizer_dims == "sample" and not per_frame:
        return SampleRows(None, 1)
    frames = x.shape[1]
    return SampleRows(frames, 1 if normalizer_dims == "frame" else frames)


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
