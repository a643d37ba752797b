"""The checks of arguments that the losses of score distillation share."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor

from ..core import checks
from ..schedule import PREDICTION_TYPES
from . import operators

DMD_REDUCTIONS = ("mean", "sum", "none")
ALIASES = {"x0": "sample", "eps": "epsilon"}  # other libraries' words


def prediction_type_of(name: str, value: str) -> str:
    checks.choice(name, value, (*PREDICTION_TYPES, *ALIASES))
    return ALIASES.get(value, value)


Given = TypeVar("Given", Tensor, Tensor | None)


def per_row_of(value: Given, x: Tensor) -> Given:
    """A number a sample, or a frame, as [B] or [B, F], where it comes with dimensions that broadcast it over x."""
    if not isinstance(value, Tensor) or value.dim() < 2 or value.dim() != x.dim() or value.shape == x.shape:
        return value
    if any(n != 1 for n in value.shape[2:]):
        return value
    return value.flatten() if value.shape[1] == 1 else value.flatten(1)


def noisy_of(
    x: Tensor, x_t: Tensor | None, alpha_t: Tensor | None, sigma_t: Tensor | None, prediction_types: set[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """The noisy image and its coefficients; of networks that predict x0 itself, which need none, whatever will do."""
    for name, value in (("x_t", x_t), ("alpha_t", alpha_t), ("sigma_t", sigma_t)):
        if value is None and prediction_types != {"sample"}:
            raise TypeError(f"{name} must be a torch.Tensor, got NoneType; only 'sample' predictions need none")
    if alpha_t is None or sigma_t is None:
        one = x.new_ones(x.shape[:1], dtype=torch.float32)
        alpha_t, sigma_t = (one if t is None else t for t in (alpha_t, sigma_t))
    return x.detach() if x_t is None else x_t, per_row_of(alpha_t, x), per_row_of(sigma_t, x)


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
    prediction_type = prediction_type_of("prediction_type", prediction_type)
    if fake_prediction_type is not None:
        fake_prediction_type = prediction_type_of("fake_prediction_type", fake_prediction_type)
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
        "fake_prediction_type": fake_prediction_type or prediction_type,
        "normalizer": normalizer,
        "normalizer_eps": normalizer_eps,
        "normalizer_min": normalizer_min,
        "normalizer_dims": normalizer_dims,
    }
