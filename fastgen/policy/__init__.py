"""Post-training by reward: DiffusionNFT and Flow-GRPO. The operators are in ``operators.py``."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from ..core import checks, distributed
from ..schedule import PREDICTION_TYPES
from . import operators, reference
from .flow import GrpoStats, flow_sde_step, grpo_loss
from .reference import FlowStep, NftStats

__all__ = [
    "FlowStep",
    "GrpoStats",
    "NftStats",
    "diffusion_nft_loss",
    "flow_sde_step",
    "grpo_loss",
    "optimality_probability",
]

REDUCTIONS = ("mean", "sum", "none")


def optimality_probability(advantages: Tensor, *, clip: float = 5.0) -> Tensor:
    """The r of :func:`diffusion_nft_loss` from advantages: ``r = clamp(A / (2 clip) + 1/2, 0, 1)``.

    Args:
        advantages: A, such as ``(reward - mean) / std`` over the images of one prompt: any shape, float32 or float64.
        clip: c > 0, where r reaches 0 and 1. 5 is the published code's; the loss is then usually scaled by it.

    Returns:
        r, shaped like `advantages`; NaN where they are.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> fastgen.optimality_probability(torch.tensor([-9.0, 0.0, 2.5]))
        tensor([0.0000, 0.5000, 0.7500])
    """
    checks.floating("advantages", advantages)
    if advantages.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"advantages must be float32 or float64, got {advantages.dtype}")
    clip = checks.number("clip", clip, low=0, open_low=True)
    return (advantages / (2 * clip) + 0.5).clamp(0, 1)


@overload
def diffusion_nft_loss(
    pred: Tensor,
    old_pred: Tensor,
    x_t: Tensor,
    x0: Tensor,
    r: Tensor,
    *,
    alpha_t: Tensor,
    sigma_t: Tensor,
    beta: float = ...,
    ref_pred: Tensor | None = ...,
    kl_weight: float = ...,
    scale: float = ...,
    prediction_type: str = ...,
    normalizer_min: float = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...
@overload
def diffusion_nft_loss(
    pred: Tensor,
    old_pred: Tensor,
    x_t: Tensor,
    x0: Tensor,
    r: Tensor,
    *,
    alpha_t: Tensor,
    sigma_t: Tensor,
    beta: float = ...,
    ref_pred: Tensor | None = ...,
    kl_weight: float = ...,
    scale: float = ...,
    prediction_type: str = ...,
    normalizer_min: float = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, NftStats]: ...
@overload
def diffusion_nft_loss(
    pred: Tensor,
    old_pred: Tensor,
    x_t: Tensor,
    x0: Tensor,
    r: Tensor,
    *,
    alpha_t: Tensor,
    sigma_t: Tensor,
    beta: float = ...,
    ref_pred: Tensor | None = ...,
    kl_weight: float = ...,
    scale: float = ...,
    prediction_type: str = ...,
    normalizer_min: float = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    return_stats: bool,
) -> Tensor | tuple[Tensor, NftStats]: ...
def diffusion_nft_loss(
    pred: Tensor,
    old_pred: Tensor,
    x_t: Tensor,
    x0: Tensor,
    r: Tensor,
    *,
    alpha_t: Tensor,
    sigma_t: Tensor,
    beta: float = 1.0,
    ref_pred: Tensor | None = None,
    kl_weight: float = 0.0,
    scale: float = 1.0,
    prediction_type: str = "flow_prediction",
    normalizer_min: float = 1e-5,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, NftStats]:
    """DiffusionNFT (arXiv 2509.16117): policy improvement on the forward process, from samples and their rewards.

    .. math::
        L = c \\left( \\frac{r}{β} \\frac{|x_0^+ - x_0|^2}{n_+} + \\frac{1 - r}{β} \\frac{|x_0^- - x_0|^2}{n_-} \\right)
        + λ |v - v_{ref}|^2, \\qquad n_± = max(mean |x_0^± - x_0|, n_{min})

    with means over a sample's elements for all norms. x0⁺ and x0⁻ are the x0-predictions of ``v_old + β (v - v_old)``
    and of ``v_old - β (v - v_old)``: one is pulled to a sample as far as that is good, the other as far as it is bad.
    Both branches, their normalisers, which have no gradient, and the reference's term are one pass.

    Args:
        pred: the trained network's output v at x_t [B, …] in float32, bfloat16, float16 or float64. Gradients flow to
            it, and to it alone.
        old_pred: the output at x_t of the network that drew x0 (or its moving average), like `pred`.
        x_t: x0 renoised (:func:`fastgen.add_noise`), as the networks saw it.
        x0: the samples.
        r: how good a sample is, from 0 to 1, float32 or float64 [B]; see :func:`optimality_probability`. Values are
            taken as they are: outside [0, 1] a branch has a negative weight.
        alpha_t, sigma_t: coefficients of x_t, float32 or float64 [B]. Of a flow, 1 - t and t.
        beta: β > 0.
        ref_pred: the frozen first model's output v_ref at x_t; needed where `kl_weight` is not 0.
        kl_weight: λ ≥ 0.
        scale: c, a factor of the first two terms; the published code's is the clip of its advantages.
        prediction_type: what the networks predict: ``"flow_prediction"``, ``"v_prediction"``, ``"epsilon"`` or
            ``"sample"`` (:func:`fastgen.prediction_to_x0`).
        normalizer_min: n_min > 0; 1e-5 is the published code's.
        reduction: over the batch; ``"none"`` returns [B].
        return_stats: also return :class:`NftStats`.

    Returns:
        The loss, float32 (float64 if an input is), or ``(loss, stats)``. B = 0 gives 0. Non-finite elements make their
        own sample's term and gradients non-finite.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> v = torch.ones(2, 4, requires_grad=True)
        >>> x0, t = torch.zeros(2, 4), torch.full((2,), 0.5)
        >>> r = torch.tensor([1.0, 0.0])  # a good sample and a bad one
        >>> fastgen.diffusion_nft_loss(v, v.detach(), x0, x0, r, alpha_t=1 - t, sigma_t=t).backward()
        >>> v.grad[:, 0]
        tensor([ 0.1250, -0.1250])
    """
    given = checks.given(ref_pred=ref_pred)
    checks.streams(pred=pred, old_pred=old_pred, x_t=x_t, x0=x0, **given)
    for name, value in (("r", r), ("alpha_t", alpha_t), ("sigma_t", sigma_t)):
        checks.tensor(name, value)
        checks.per_row(name, value, pred)
    beta = checks.number("beta", beta, low=0, open_low=True)
    kl_weight = checks.number("kl_weight", kl_weight, low=0)
    if kl_weight and ref_pred is None:
        raise ValueError(f"kl_weight = {kl_weight:g} needs ref_pred")
    scale = checks.number("scale", scale)
    least = checks.number("normalizer_min", normalizer_min, low=0, open_low=True)
    checks.choice("prediction_type", prediction_type, PREDICTION_TYPES)
    checks.choice("reduction", reduction, REDUCTIONS)
    backend = distributed.backend_of(operators.diffusion_nft_loss.name, pred)
    if backend == "reference":
        return reference.diffusion_nft_loss(
            pred,
            old_pred,
            x_t,
            x0,
            r,
            alpha_t=alpha_t,
            sigma_t=sigma_t,
            beta=beta,
            ref_pred=ref_pred,
            kl_weight=kl_weight,
            scale=scale,
            prediction_type=prediction_type,
            normalizer_min=least,
            reduction=reduction,
            return_stats=return_stats,
        )
    loss, stats = operators.diffusion_nft_loss(
        backend,
        pred=pred,
        old_pred=old_pred,
        x_t=x_t,
        x0=x0,
        ref_pred=ref_pred,
        alpha_t=alpha_t,
        sigma_t=sigma_t,
        prediction_type=prediction_type,
        beta=beta,
        r=r,
        loss_scale=scale,
        kl_weight=kl_weight,
        normalizer_min=least,
        reduction=reduction,
        scale=1 / max(pred.shape[0], 1) if reduction == "mean" else 1.0,
    )
    return (loss, NftStats(stats[0], stats[1], stats[3:], stats[2])) if return_stats else loss
