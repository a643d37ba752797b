"""The checks of arguments that the losses of score distillation share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core import checks
from ..schedule import PREDICTION_TYPES
from . import operators

DMD_REDUCTIONS = ("mean", "sum", "none")


def guidance_of(guidance_scale: float, uncond: Tensor | None, name: str) -> float:
    guidance = checks.number("guidance_scale", guidance_scale)
    if uncond is None and guidance != 1:
        raise ValueError(f"guidance_scale = {guidance:g} needs {name}; without it only 1, no guidance, makes sense")
    return guidance


def check_weight(weight: Tensor | None, x: Tensor, frames: bool) -> None:
    if weight is None:
        return
    checks.tensor("weight", weight)
    if operators.is_map(weight, x):
        checks.streams(x=x, weight=weight)
    elif frames:
        checks.per_frame("weight", weight, x)
    else:
        checks.per_row("weight", weight, x)


def common_of(
    x: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    prediction_type: str,
    fake_prediction_type: str | None,
    normalizer: str | None,
    normalizer_eps: float,
    normalizer_min: float,
    normalizer_dims: str,
    reduction: str,
) -> dict[str, Any]:
    """Checks what the DMD losses have in common; returns what the reference takes as it is."""
    checks.choice("prediction_type", prediction_type, PREDICTION_TYPES)
    if fake_prediction_type is not None:
        checks.choice("fake_prediction_type", fake_prediction_type, PREDICTION_TYPES)
    if normalizer is not None:
        checks.choice("normalizer", normalizer, ("x0_l1",))
    checks.number("normalizer_eps", normalizer_eps, low=0)
    checks.number("normalizer_min", normalizer_min, low=0)
    checks.choice("normalizer_dims", normalizer_dims, ("sample", "frame"))
    if normalizer_dims == "frame" and x.dim() < 3:
        raise ValueError(f"normalizer_dims='frame' needs a video [B, F, ...], but x has shape {tuple(x.shape)}")
    checks.choice("reduction", reduction, DMD_REDUCTIONS)
    check_weight(weight, x, frames=True)
    if mask is not None:
        checks.mask("mask", mask, x)
    return {
        "prediction_type": prediction_type,
        "fake_prediction_type": fake_prediction_type,
        "normalizer": normalizer,
        "normalizer_eps": normalizer_eps,
        "normalizer_min": normalizer_min,
        "normalizer_dims": normalizer_dims,
    }
