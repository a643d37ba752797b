"""The case of ``fastgen.analytic_dpm`` that has a kernel."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..core.case import case, stream
from . import ScoreMoments


def _moments(m: ModuleType, pred: Tensor) -> Tensor:
    """Mean squares by way of the moments: every row at a timestep of its own."""
    if not hasattr(m, "ScoreMoments"):  # the reference: it has the one pass over the predictions
        return m.mean_square(pred)
    moments = ScoreMoments(len(pred), device=pred.device)
    moments.update(torch.arange(len(pred), device=pred.device), pred)
    return moments.ms_eps[1:].to(torch.promote_types(pred.dtype, torch.float32))


CASES = (case("ScoreMoments", {"pred": stream}, "", _moments),)
