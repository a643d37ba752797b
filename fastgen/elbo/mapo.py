"""MaPO: preferences over pairs of images without a reference model."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..core import checks, distributed
from . import operators, reference
from .arguments import ELEMENT_REDUCTIONS, REDUCTIONS

__all__ = ["mapo_loss"]


def mapo_loss(
    pred: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    beta: float = 0.1,
    scale: float = 0.5,
    timesteps: int = 1000,
    element_reduction: Literal["mean", "sum"] = "mean",
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """MaPO (arXiv 2406.06424): a preference loss over pairs of images that needs no reference model.

    .. math:: L = ℓ_w - β \\log σ(T (f(s ℓ_w) - f(s ℓ_l))), \\qquad f(x) = \\frac{x}{e^x - 1}

    with ℓ the error of :func:`elbo_error`, of the winner and of the loser. The first term keeps the model at the
    winners, the second sets them apart. f falls from 1 at 0; it is taken from its series there, where x/expm1(x) and
    with it the difference, which T multiplies, would lose their digits.

    Args:
        pred: predictions [B, …] with B even: the first half are winners, the second half the losers, in the same
            order; float32, bfloat16, float16 or float64. A pair shares t and noise. Gradients flow to it, and to it
            alone. A DTensor must not be sharded over its rows: no shard would hold a pair.
        target: what is predicted, like `pred`; its dtype may differ.
        weight: of the errors, float32 or float64 [B]; 1 if None.
        beta: β ≥ 0, the weight of the preference. 0.1 is the published code's.
        scale: s > 0 (the published code's 0.5, which it calls snr).
        timesteps: T > 0, the number of training timesteps.
        element_reduction: ``"mean"`` over an image's elements (published code) or ``"sum"``.
        reduction: over the B/2 pairs; ``"none"`` returns [B/2].

    Returns:
        The loss, float32 (float64 if an input is). B = 0 gives 0. Non-finite elements make their own pair's term and
        gradients non-finite.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> pred = torch.zeros(4, 16, requires_grad=True)
        >>> loss = fastgen.mapo_loss(pred, torch.ones(4, 16))
        >>> print(f"{loss:.4f}")
        1.0693
    """
    checks.streams(pred=pred, target=target)
    checks.per_row("weight", weight, pred)
    checks.choice("element_reduction", element_reduction, ELEMENT_REDUCTIONS)
    checks.choice("reduction", reduction, REDUCTIONS)
    if pred.shape[0] % 2:
        raise ValueError(f"pred must hold winners and then as many losers, got {pred.shape[0]} rows")
    instead = "pass plain tensors of the rank's own pairs"
    distributed.check_groups({"pred": pred, "target": target}, max(pred.shape[0], 1), distributed.HALVES, instead)
    beta = checks.number("beta", beta, low=0)
    scale = checks.number("scale", scale, low=0, open_low=True)
    timesteps = checks.positive_int("timesteps", timesteps)
    backend = distributed.backend_of(operators.mapo_loss.name, pred)
    if backend == "reference":
        return reference.mapo_loss(
            pred,
            target,
            weight=weight,
            beta=beta,
            scale=scale,
            timesteps=timesteps,
            element_reduction=element_reduction,
            reduction=reduction,
        )
    return operators.mapo_loss(
        backend,
        pred=pred,
        target=target,
        weight=weight,
        element_mean=element_reduction == "mean",
        reduction=reduction,
        scale=2 / max(pred.shape[0], 1) if reduction == "mean" else 1.0,
        beta=beta,
        error_scale=scale,
        timesteps=float(timesteps),
    )
