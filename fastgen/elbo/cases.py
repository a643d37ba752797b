"""Cases of ``fastgen.elbo``, and of the fake network's loss, which is an ELBO error."""

from __future__ import annotations

from ..core.case import case, falling, flags, flags_of_pairs, near, per_row, stream

WEIGHT = {"weight": per_row}
ERROR = {"pred": stream, "target": stream}
DIFFERENCE = {"pred": stream, "ref_pred": near, "target": stream}
DDO = DIFFERENCE | {"is_real": flags}
DDO_OF_PAIRS = DIFFERENCE | {"is_real": flags_of_pairs}
KTO = DIFFERENCE | {"is_desirable": flags}
DENOISING = {"pred": stream, "x0": stream, "noise": stream, "alpha_t": per_row, "sigma_t": falling}

CASES = (
    case("elbo_error", ERROR | WEIGHT, "pred"),
    case("elbo_error-l1", ERROR | WEIGHT, "pred", loss="l1"),
    case("elbo_error-l1-sum", ERROR, "pred", loss="l1", element_reduction="sum"),
    case("elbo_error-huber", ERROR | WEIGHT, "pred", loss="huber"),
    case("elbo_difference", DIFFERENCE | WEIGHT, "pred"),
    case("elbo_difference-mean", DIFFERENCE, "pred", element_reduction="mean"),
    case("ddo_loss", DDO | WEIGHT, "pred", alpha=2.0, beta=0.05),
    case("ddo_loss-mc", DDO_OF_PAIRS | WEIGHT, "pred", alpha=0.5, beta=0.05, mc_samples=2),
    case("ddo_loss-none", DDO_OF_PAIRS | WEIGHT, "pred", alpha=3.0, mc_samples=2, reduction="none"),
    case("ddo_loss-sum-mean", DDO, "pred", beta=2.0, reduction="sum", element_reduction="mean"),
    case("ddo_loss-alphas", DDO | {"alpha": per_row}, "pred", beta=0.2),
    case("diffusion_dpo_loss-interleaved-none", DIFFERENCE, "pred", beta=50.0, interleaved=True, reduction="none"),
    case("diffusion_dpo_loss-interleaved", DIFFERENCE | WEIGHT, "pred", beta=50.0, interleaved=True),
    case("diffusion_dpo_loss", DIFFERENCE | WEIGHT, "pred", beta=50.0),
    case("diffusion_dpo_loss-none", DIFFERENCE, "pred", beta=50.0, reduction="none"),
    case("diffusion_dpo_loss-ipo", DIFFERENCE | WEIGHT, "pred", beta=2.0, kind="ipo"),
    case("diffusion_dpo_loss-ipo-none", DIFFERENCE, "pred", beta=2.0, kind="ipo", reduction="none"),
    case(
        "diffusion_dpo_loss-hinge",
        DIFFERENCE | WEIGHT,
        "pred",
        beta=0.2,
        kind="hinge",
        element_reduction="sum",
        reduction="sum",
    ),
    case("diffusion_kto_loss", KTO | WEIGHT, "pred", beta=5.0, desirable_weight=2.0),
    case("diffusion_kto_loss-sum", KTO, "pred", beta=5.0, undesirable_weight=3.0, baseline=0.1, reduction="sum"),
    case("mapo_loss", ERROR | WEIGHT, "pred", timesteps=3),
    case("mapo_loss-none", ERROR, "pred", beta=2.0, scale=0.01, timesteps=100, reduction="none"),
    case("mapo_loss-sum", ERROR | WEIGHT, "pred", timesteps=2, element_reduction="sum", reduction="sum"),
    case("fake_score_loss", DENOISING | WEIGHT, "pred", prediction_type="v_prediction"),
)
