"""Cases of ``fastgen.policy``."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..core.case import Draw, case, falling, near, per_row, stream


def times(draw: Draw) -> Tensor:
    """From 1 to 0.3, of which the first needs another in the noise's rate."""
    return torch.linspace(1.0, 0.3, draw.rows, device=draw.device, dtype=draw.wide)


def earlier(draw: Draw) -> Tensor:
    return 0.8 * times(draw)


NFT = {
    "pred": stream,
    "old_pred": near,
    "x_t": stream,
    "x0": stream,
    "r": falling,
    "alpha_t": falling,
    "sigma_t": per_row,
}
REFERENCE = {"ref_pred": near}
FLOW = {"pred": stream, "x_t": stream, "sample": stream, "t": times, "t_next": earlier}


def _log_prob(m: ModuleType, pred: Tensor, **given: Any) -> Tensor:
    return m.flow_sde_step(pred, **given).log_prob


def _mean(m: ModuleType, pred: Tensor, **given: Any) -> Tensor:
    return m.flow_sde_step(pred, **given).mean


def _both(m: ModuleType, pred: Tensor, **given: Any) -> Tensor:
    """The penalty of a reference too, as of one that predicts 0."""
    step = m.flow_sde_step(pred, **given)
    return step.log_prob + step.mean.unsqueeze(-1).flatten(1).square().mean(1)


def _drawn(m: ModuleType, pred: Tensor, **given: Any) -> Tensor:
    step = m.flow_sde_step(pred, **given)
    return step.sample


CASES = (
    case("diffusion_nft_loss", NFT, "pred", beta=0.5, scale=2.0),
    case("diffusion_nft_loss-kl", NFT | REFERENCE, "pred", kl_weight=0.3, reduction="sum"),
    case("diffusion_nft_loss-none", NFT | REFERENCE, "pred", beta=0.1, kl_weight=0.1, reduction="none"),
    case("diffusion_nft_loss-v-none", NFT, "pred", prediction_type="v_prediction", reduction="none"),
    case("flow_sde_step", FLOW, "pred", _log_prob),
    case("flow_sde_step-both", FLOW, "pred", _both, noise_level=1.2, t_max=0.9),
    case("flow_sde_step-mean", FLOW, "pred", _mean),
    case("flow_sde_step-drawn", {k: FLOW[k] for k in FLOW if k != "sample"} | {"noise": stream}, "", _drawn),
)
