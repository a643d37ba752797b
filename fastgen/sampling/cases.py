"""Cases of ``fastgen.sampling``."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from ..core.case import case, falling, for_all, per_row, stream
from ..schedule import PREDICTION_TYPES
from ..schedule.cases import SCHEDULE, times
from .reference import StepCoefficients

# A coefficient's name is that of StepCoefficients, after "k_".
EACH_ROW = {f"k_{name}": (per_row, falling)[i % 2] for i, name in enumerate(StepCoefficients._fields)}
ALL_ROWS = dict.fromkeys(EACH_ROW, for_all)
IMAGES = {"x_t": stream, "cond": stream}
GUIDED = IMAGES | {"uncond": stream, "noise": stream, "guidance_scale": per_row}
CHAIN = {"x": stream, "grad": stream, "noise": stream}


def _step(module: ModuleType, name: str, x_t: Tensor, tensors: dict[str, Any]) -> Tensor:
    k = StepCoefficients(**{f: tensors.pop(f"k_{f}") for f in StepCoefficients._fields})
    return getattr(module, name)(x_t, coefficients=k, **tensors)


def _reverse_step(m: ModuleType, x_t: Tensor, **tensors: Any) -> Tensor:
    return _step(m, "reverse_step", x_t, tensors)


def _reverse_step_(m: ModuleType, x_t: Tensor, **tensors: Any) -> Tensor:
    in_place = hasattr(m, "reverse_step_")  # the reference has none
    return _step(m, "reverse_step_" if in_place else "reverse_step", x_t.clone(), tensors)


def _langevin_step_(m: ModuleType, x: Tensor, **tensors: Any) -> Tensor:
    return getattr(m, "langevin_step_", m.langevin_step)(x.clone(), **tensors)


def _posterior_sample(m: ModuleType, **tensors: Tensor) -> Tensor:
    return m.posterior_sample(SCHEDULE, **tensors)


CASES = (
    case("guidance", {"cond": stream, "uncond": stream, "scale": per_row}, "cond uncond"),
    case("guidance-number", {"cond": stream, "uncond": stream}, "cond uncond", scale=7.5),
    *(
        case(
            f"reverse_step-{kind}",
            GUIDED | EACH_ROW,
            " ".join(GUIDED | EACH_ROW),
            _reverse_step,
            prediction_type=kind,
            clamp=(-1.0, 1.0),
        )
        for kind in PREDICTION_TYPES
    ),
    *(
        case(
            f"reverse_step-plain-{kind}",
            IMAGES | ALL_ROWS,
            "x_t cond k_alpha_t k_sigma_t k_x0 k_x_t k_eps",
            _reverse_step,
            prediction_type=kind,
        )
        for kind in PREDICTION_TYPES
    ),
    *(
        case(f"reverse_step_-{kind}", GUIDED | EACH_ROW, "", _reverse_step_, prediction_type=kind, clamp=(-1.0, 1.0))
        for kind in PREDICTION_TYPES
    ),
    case(
        "posterior_sample",
        {"x0": stream, "x_t": stream, "t": times, "noise": stream},
        "x0 x_t noise",
        _posterior_sample,
    ),
    case("langevin_step", CHAIN | {"step_size": per_row, "noise_scale": falling}),
    case("langevin_step_", CHAIN, "", _langevin_step_, step_size=0.5, noise_scale=0.1),
)
