"""Cases of ``fastgen.policy``."""

from __future__ import annotations

from ..core.case import case, falling, near, per_row, stream

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

CASES = (
    case("diffusion_nft_loss", NFT, "pred", beta=0.5, scale=2.0),
    case("diffusion_nft_loss-kl", NFT | REFERENCE, "pred", kl_weight=0.3, reduction="sum"),
    case("diffusion_nft_loss-none", NFT | REFERENCE, "pred", beta=0.1, kl_weight=0.1, reduction="none"),
    case("diffusion_nft_loss-v-none", NFT, "pred", prediction_type="v_prediction", reduction="none"),
)
