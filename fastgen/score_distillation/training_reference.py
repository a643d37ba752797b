"""The fake network's loss, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from ..elbo.reference import elbo_error
from ..schedule.reference import add_noise, widened

__all__ = ["fake_score_loss"]


def fake_score_loss(
    pred: Tensor,
    x0: Tensor,
    noise: Tensor,
    alpha_t: Tensor,
    sigma_t: Tensor,
    *,
    prediction_type: str = "epsilon",
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The denoising loss ``w mean (pred - target)²`` in the network's own prediction type."""
    x0, noise = x0.detach(), noise.detach()
    target = {
        "epsilon": lambda: noise,
        "sample": lambda: x0,
        "v_prediction": lambda: add_noise(widened(noise), x0, alpha_t, -sigma_t),
        "flow_prediction": lambda: widened(noise) - widened(x0),
    }[prediction_type]()
    error = elbo_error(pred, target, weight=weight)
    return error if reduction == "none" else error.sum() / (max(len(error), 1) if reduction == "mean" else 1)
