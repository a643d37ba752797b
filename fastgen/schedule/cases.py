"""Cases of ``fastgen.schedule``."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..core.case import Draw, case, falling, per_row, stream
from . import NoiseSchedule

SCHEDULE = NoiseSchedule.linear(1000)


def times(draw: Draw) -> Tensor:
    return torch.arange(draw.rows, device=draw.device) * 150 % 1000


def _diffuse_pair(m: ModuleType, x0: Tensor, t: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return torch.stack(m.diffuse_pair(SCHEDULE, x0, t, noise=(first, second)))


LEVEL = {"alpha_t": per_row, "sigma_t": falling}
PREDICTION = {"pred": stream, "x_t": stream, **LEVEL}

CASES = (
    case("add_noise", {"x0": stream, "noise": stream, **LEVEL}, "x0 noise"),
    case("prediction_to_x0", PREDICTION, "pred x_t"),
    case("prediction_to_x0-v", PREDICTION, "pred x_t", prediction_type="v_prediction"),
    case("prediction_to_x0-flow", PREDICTION, "pred x_t", prediction_type="flow_prediction"),
    case(
        "diffuse_pair", {"x0": stream, "t": times, "first": stream, "second": stream}, "x0 first second", _diffuse_pair
    ),
)
