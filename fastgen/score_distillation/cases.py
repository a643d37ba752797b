"""Cases of ``fastgen.score_distillation``."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from ..core.case import case, falling, mask, near, per_row, stream, weights
from .reference import ScorePair

WEIGHT, MAP, MASK = {"weight": per_row}, {"weight": weights}, {"mask": mask}
SDS = {"x": stream, "pred_cond": near, "noise": stream}
VSD = {"x": stream, "real_cond": stream, "fake": near}
DMD = {"x": stream, "x_t": stream, "real_cond": stream, "fake": stream, "alpha_t": per_row, "sigma_t": falling}
GUIDED = DMD | {"real_uncond": stream}
DM = {"dm_x_t": stream, "dm_alpha_t": per_row, "dm_sigma_t": falling, "dm_real": stream, "dm_contrast": stream}
CA = {"ca_x_t": stream, "ca_alpha_t": falling, "ca_sigma_t": per_row, "ca_real": stream, "ca_contrast": stream}
PAIRS = {"x": stream} | DM | CA
MIXED: dict[str, Any] = {"prediction_type": "epsilon", "fake_prediction_type": "v_prediction"}


def _decoupled(m: ModuleType, x: Tensor, **given: Any) -> Tensor:
    dm, ca = (ScorePair(*(given.pop(f"{which}_{name}") for name in ScorePair._fields)) for which in ("dm", "ca"))
    return m.decoupled_dmd_loss(x, dm, ca, guidance_scale=3.0, **given)


def _of_x0(m: ModuleType, x: Tensor, real_cond: Tensor, fake: Tensor) -> Tensor:
    return m.dmd_loss(x, None, real_cond, fake, prediction_type="sample")


CASES = (
    case("sds_loss", SDS | WEIGHT, "x", grad_clip=1.0, reduction="sum"),
    case("sds_loss-guided", SDS | WEIGHT | {"pred_uncond": stream}, "x", guidance_scale=7.5),
    case("vsd_loss", VSD | MAP | {"real_uncond": stream}, "x", guidance_scale=7.5, grad_clip=1.0, reduction="mean"),
    case("vsd_loss-map-none", VSD | MAP, "x", reduction="none"),
    case("dmd_loss", DMD, "x"),
    case("dmd_loss-guided", GUIDED, "x", guidance_scale=7.5, normalizer_eps=1e-6),
    case("dmd_loss-mixed", GUIDED | WEIGHT | MASK, "x", guidance_scale=3.0, **MIXED),
    case("dmd_loss-none", GUIDED | WEIGHT | MASK, "x", guidance_scale=2.0, reduction="none"),
    case("dmd_loss-v-none", GUIDED | MAP, "x", guidance_scale=2.0, prediction_type="v_prediction", reduction="none"),
    case("dmd_loss-mixed-none", GUIDED | WEIGHT | MASK, "x", guidance_scale=2.0, reduction="none", **MIXED),
    case("dmd_loss-x0", {n: DMD[n] for n in ("x", "real_cond", "fake")}, "x", _of_x0),
    case("decoupled_dmd_loss", PAIRS, "x", _decoupled),
    case("decoupled_dmd_loss-mixed", PAIRS | WEIGHT | MASK, "x", _decoupled, **MIXED),
    case("decoupled_dmd_loss-none", PAIRS | WEIGHT | MASK, "x", _decoupled, reduction="none"),
    case("decoupled_dmd_loss-mixed-none", PAIRS | WEIGHT | MASK, "x", _decoupled, reduction="none", **MIXED),
)
