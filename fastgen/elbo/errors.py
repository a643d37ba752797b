"""ELBO errors and their differences, a number a row."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..core import checks, distributed
from . import operators, reference
from .arguments import ELEMENT_REDUCTIONS

__all__ = ["elbo_difference", "elbo_error"]


def elbo_error(
    pred: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    loss: Literal["l2", "l1", "huber"] = "l2",
    element_reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """The weighted error of each row: ``error_i = w_i · red_D penalty(pred - target)``.

    This is the denoising loss before its mean over the batch, and the quantity that a Diffusion Classifier compares.

    Args:
        pred: predictions [B, …] in float32, bfloat16, float16 or float64. Gradients flow to it, and to it alone.
        target: like `pred`; its dtype may differ.
        weight: float32 or float64 [B]; 1 if None.
        loss: ``"l2"``: d²; ``"l1"``: abs(d); ``"huber"``: d²/2 where abs(d) < 1, else abs(d) - 1/2.
        element_reduction: how a row's D elements are reduced.

    Returns:
        [B], float32 (float64 if an input is), summed in that precision whatever the dtype of the images. A non-finite
        element makes its own row non-finite and touches no other.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> fastgen.elbo_error(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]]), element_reduction="sum")
        tensor([5.])
    """
    checks.streams(pred=pred, target=target)
    checks.per_row("weight", weight, pred)
    checks.choice("loss", loss, ("l2", "l1", "huber"))
    checks.choice("element_reduction", element_reduction, ELEMENT_REDUCTIONS)
    backend = distributed.backend_of(operators.elbo_error.name, pred)
    if backend == "reference":
        return reference.elbo_error(pred, target, weight=weight, loss=loss, element_reduction=element_reduction)
    return operators.elbo_error(
        backend, pred=pred, target=target, weight=weight, loss=loss, element_mean=element_reduction == "mean"
    )


def elbo_difference(
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    element_reduction: Literal["mean", "sum"] = "sum",
) -> Tensor:
    """How much better than a reference a model predicts each row: a one-sample estimate of a log-likelihood ratio.

    .. math:: Δ_i = -w_i (red_D (p - y)^2 - red_D (q - y)^2) = w_i · red_D (q - p)(q + p - 2y)

    computed in the factored form on the right: the difference of the two sums cancels when p is near q, as it is early
    in training.

    Args:
        pred: the model's predictions p [B, …] in float32, bfloat16, float16 or float64. Gradients flow to it alone:
            ``∂Δ_i/∂p = -2 w_i (p - y)``, divided by D for the mean.
        ref_pred: the frozen reference's predictions q at the same noisy inputs; same shape, any of those dtypes.
        target: what both predict, y.
        weight: w, float32 or float64 [B]; 1 if None. For a likelihood ratio use the ELBO's weight of such errors, e.g.
            :meth:`fastgen.NoiseSchedule.edm_weight` on x0-predictions.
        element_reduction: ``"sum"`` (a log-likelihood ratio) or ``"mean"``.

    Returns:
        Δ [B], float32 (float64 if an input is). Positive where the model is better than the reference. Non-finite
        elements make their own row non-finite and touch no other.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> y = torch.zeros(1, 4)
        >>> fastgen.elbo_difference(torch.full((1, 4), 0.5), torch.ones(1, 4), y)
        tensor([3.])
    """
    checks.streams(pred=pred, ref_pred=ref_pred, target=target)
    checks.per_row("weight", weight, pred)
    checks.choice("element_reduction", element_reduction, ELEMENT_REDUCTIONS)
    backend = distributed.backend_of(operators.elbo_difference.name, pred)
    if backend == "reference":
        return reference.elbo_difference(pred, ref_pred, target, weight=weight, element_reduction=element_reduction)
    return operators.elbo_difference(
        backend, pred=pred, ref_pred=ref_pred, target=target, weight=weight, element_mean=element_reduction == "mean"
    )
