"""The operators of score distillation. What they compute is in ``score_formulas.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import scalar
from .rowwise import Formula, Groups, Rows, run
from .score_formulas import (
    DECOUPLED,
    DECOUPLED_BACKWARD,
    DMD,
    DMD_BACKWARD,
    SCORE,
    SCORE_BACKWARD,
    X0,
    Decoupled,
    Dmd,
    Loss,
    Score,
    ScoreArgs,
)

LossOutputs = tuple[Tensor, Tensor, Tensor, Tensor]  # loss, coefficients, stats, grad


def _reduction_scale(reduction: str, counted: bool, rows: Rows) -> float:
    if reduction == "mean":
        return 1.0 if counted else 1 / max(rows.count * rows.size, 1)
    return 1 / max(rows.count, 1) if reduction == "sum_per_batch" else 1.0


def _run_loss(
    formula: Formula,
    field: Any,
    rows: Rows,
    groups: Groups,
    terms: int,
    count: Tensor | None,
    dtype: torch.dtype,
    reduction: str,
    with_grad: bool,
) -> LossOutputs:
    """One pass: loss, coefficients, statistics, and the gradient if asked for."""
    term, coefficients = rows.new_vector(groups.count), rows.new_vector(terms * rows.count)
    stats = rows.new_vector((2 * terms + 1) * groups.count).view(2 * terms + 1, groups.count)
    grad = rows.new_output(dtype) if with_grad else None
    loss = Loss(
        term,
        coefficients.tensor_split(terms),
        stats,
        groups.count,
        scalar.argument(groups.rows * rows.size, rows.dtype),
        scalar.argument(_reduction_scale(reduction, count is not None, rows), rows.dtype),
        rows.scalars(count),
    )
    run(formula, groups, rows, ScoreArgs(field, loss), grad)
    return (
        term if reduction == "none" else term.sum(),
        coefficients if terms == 1 else coefficients.view(terms, rows.count),
        stats,
        rows.first.new_empty((0,), dtype=dtype) if grad is None else grad,
    )


def _run_backward(formula: Formula, field: Any, rows: Rows, grad: Tensor, dtype: torch.dtype) -> Tensor:
    out = rows.new_output(dtype)
    coefficients = rows.scalars(grad)
    vectors = (coefficients,) if grad.dim() == 1 else coefficients.unbind()
    run(formula, Groups(rows.count), rows, ScoreArgs(field, grad=vectors), out)
    return out


def _mean(rows: Rows, group_rows: int) -> float | int:
    return scalar.argument(1 / max(group_rows * rows.size, 1), rows.dtype)


def _bounds(rows: Rows, normalize: bool, minimum: float, eps: float) -> tuple[float | int, float | int] | None:
    return (scalar.argument(minimum, rows.dtype), scalar.argument(eps, rows.dtype)) if normalize else None


def _score(rows: Rows, weight: Tensor | None, guidance: float, clip: float) -> Score:
    numbers = (scalar.argument(value, rows.dtype) for value in (guidance, clip))
    return Score(rows.scalars(weight), *numbers, _mean(rows, 1))


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
) -> LossOutputs:
    rows = Rows(pred, target, uncond, gate, dtype=dtype)
    field = _score(rows, weight, guidance_scale, grad_clip)
    return _run_loss(SCORE, field, rows, Groups(rows.count), 1, None, dtype, reduction, with_grad)


def score_difference_backward(
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
    rows = Rows(pred, target, uncond, gate, dtype=dtype)
    return _run_backward(SCORE_BACKWARD, _score(rows, weight, guidance_scale, grad_clip), rows, row_grad, dtype)


def _dmd(
    rows: Rows,
    group_rows: int,
    weight: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    prediction_type: str,
    fake_prediction_type: str,
    guidance_scale: float,
) -> Dmd:
    vectors = (rows.scalars(t) for t in (weight, alpha, sigma))
    fake = None if prediction_type == fake_prediction_type else X0[fake_prediction_type]
    return Dmd(
        *vectors, X0[prediction_type], fake, scalar.argument(guidance_scale, rows.dtype), _mean(rows, group_rows)
    )


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
) -> LossOutputs:
    rows = Rows(real, fake, uncond, gate, x_t, x, dtype=dtype)
    field = _dmd(rows, group_rows, weight, alpha_t, sigma_t, prediction_type, fake_prediction_type, guidance_scale)
    field = field._replace(normalizer=_bounds(rows, normalize, normalizer_min, normalizer_eps))
    groups = Groups.consecutive(rows.count, group_rows)
    return _run_loss(
        DMD[prediction_type == fake_prediction_type], field, rows, groups, 1, count, dtype, reduction, with_grad
    )


def dmd_backward(
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
    same = prediction_type == fake_prediction_type
    rows = Rows(real, fake, uncond, gate, *(() if same else (x_t,)), dtype=dtype)
    field = _dmd(rows, 1, weight, alpha_t, sigma_t, prediction_type, fake_prediction_type, guidance_scale)
    return _run_backward(DMD_BACKWARD[same], field, rows, row_grad, dtype)


def _decoupled(
    rows: Rows,
    group_rows: int,
    weight: Tensor | None,
    times: tuple[Tensor, ...],
    prediction_type: str,
    fake_prediction_type: str,
    guidance_scale: float,
) -> Decoupled:
    vectors = (rows.scalars(t) for t in (weight, *times))
    fake = None if prediction_type == fake_prediction_type else X0[fake_prediction_type]
    return Decoupled(
        *vectors, X0[prediction_type], fake, scalar.argument(guidance_scale - 1, rows.dtype), _mean(rows, group_rows)
    )


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
) -> LossOutputs:
    rows = Rows(dm_real, dm_fake, ca_real, ca_uncond, gate, dm_x_t, ca_x_t, x, dtype=dtype)
    times = (dm_alpha_t, dm_sigma_t, ca_alpha_t, ca_sigma_t)
    field = _decoupled(rows, group_rows, weight, times, prediction_type, fake_prediction_type, guidance_scale)
    field = field._replace(normalizer=_bounds(rows, normalize, normalizer_min, normalizer_eps))
    groups = Groups.consecutive(rows.count, group_rows)
    return _run_loss(
        DECOUPLED[prediction_type == fake_prediction_type], field, rows, groups, 2, count, dtype, reduction, with_grad
    )


def decoupled_dmd_backward(
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
    same = prediction_type == fake_prediction_type
    rows = Rows(dm_real, dm_fake, ca_real, ca_uncond, gate, *(() if same else (dm_x_t,)), dtype=dtype)
    times = (dm_alpha_t, dm_sigma_t, ca_alpha_t, ca_sigma_t)
    field = _decoupled(rows, 1, weight, times, prediction_type, fake_prediction_type, guidance_scale)
    return _run_backward(DECOUPLED_BACKWARD[same], field, rows, row_grad, dtype)
