"""The moments that Analytic-DPM gathers, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from ..schedule.reference import widened

__all__ = ["mean_square"]


def mean_square(pred: Tensor) -> Tensor:
    """``Σ_D pred² / D`` of each row."""
    return widened(pred.detach()).unsqueeze(-1).flatten(1).square().mean(1)
