"""The distance of features and pix2pix's loss, in plain PyTorch; what has no kernel is plain PyTorch already."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..schedule.reference import widened
from .gan import Kind, Logits, generator_loss

__all__ = ["feature_distance", "pix2pix_loss"]


def feature_distance(
    features: Sequence[Tensor], target_features: Sequence[Tensor], weights: Sequence[float] | None = None
) -> Tensor:
    """``Σ w_l mean |φ_l - φ'_l|``."""
    ones = [1.0] * len(features)
    pairs = zip(weights or ones, features, target_features, strict=True)
    return torch.stack([w * (widened(a) - widened(b.detach())).abs().mean() for w, a, b in pairs]).sum()


def pix2pix_loss(
    fake_logits: Logits,
    output: Tensor,
    target: Tensor,
    *,
    kind: Kind = "non_saturating",
    l1_weight: float = 100.0,
    features: Sequence[Tensor] = (),
    target_features: Sequence[Tensor] = (),
    feature_weights: Sequence[float] | None = None,
) -> Tensor:
    """The generator's adversarial loss, plus ``l1_weight mean |output - target|``, plus the features' distance."""
    weights = feature_weights or [1.0] * len(features)
    pairs = [output, *features], [target, *target_features], [l1_weight, *weights]
    return generator_loss(fake_logits, kind=kind) + feature_distance(*pairs)
