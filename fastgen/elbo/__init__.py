"""ELBO errors and losses over them: DDO, Diffusion-DPO and their relatives. The operators are in ``operators.py``."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor

from ..core import checks, distributed
from . import operators, reference
from .arguments import ELEMENT_REDUCTIONS, backend_of, loss_of, shared_of
from .ddo import ddo_loss
from .mapo import mapo_loss

__all__ = ["ddo_loss", "diffusion_dpo_loss", "diffusion_kto_loss", "elbo_difference", "elbo_error", "mapo_loss"]


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
    backend = backend_of(operators.elbo_error, pred)
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
    backend = backend_of(operators.elbo_difference, pred)
    if backend == "reference":
        return reference.elbo_difference(pred, ref_pred, target, weight=weight, element_reduction=element_reduction)
    return operators.elbo_difference(
        backend, pred=pred, ref_pred=ref_pred, target=target, weight=weight, element_mean=element_reduction == "mean"
    )


@overload
def diffusion_dpo_loss(
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = ...,
    beta: float = ...,
    kind: Literal["sigmoid", "ipo", "hinge"] = ...,
    element_reduction: Literal["mean", "sum"] = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    return_delta: Literal[False] = ...,
) -> Tensor: ...
@overload
def diffusion_dpo_loss(
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = ...,
    beta: float = ...,
    kind: Literal["sigmoid", "ipo", "hinge"] = ...,
    element_reduction: Literal["mean", "sum"] = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    return_delta: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def diffusion_dpo_loss(
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = ...,
    beta: float = ...,
    kind: Literal["sigmoid", "ipo", "hinge"] = ...,
    element_reduction: Literal["mean", "sum"] = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    return_delta: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def diffusion_dpo_loss(
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    beta: float = 5000.0,
    kind: Literal["sigmoid", "ipo", "hinge"] = "sigmoid",
    element_reduction: Literal["mean", "sum"] = "mean",
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_delta: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Diffusion-DPO (arXiv 2311.12908) and two relatives: preference losses over pairs of images.

    With Δ of :func:`elbo_difference` and the margin ``m_i = Δ_winner,i - Δ_loser,i``::

        "sigmoid"   -log sigmoid(beta m / 2)         the ½ is the published code's
        "ipo"       (m - 1/(2 beta))²                arXiv 2310.12036
        "hinge"     relu(1 - beta m)                 arXiv 2305.10425

    Args:
        pred, ref_pred, target: as in :func:`elbo_difference`, [B, …] with B even: the first half are winners, the
            second half the losers, in the same order. A pair shares t and noise.
        weight: float32 or float64 [B].
        beta: inverse temperature, > 0. 5000 is the published code's, with the mean over elements.
        kind: one of the three.
        element_reduction: ``"mean"`` over an image's elements (published code) or ``"sum"``.
        reduction: over the B/2 pairs; ``"none"`` returns [B/2].
        return_delta: also return the margins m [B/2], detached.

    Returns:
        The loss, float32 (float64 if an input is), or ``(loss, margin)``. Gradients flow to `pred` alone, once
        differentiable. B = 0 gives 0. Non-finite elements make their own pair's term and gradients non-finite.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> pred = torch.zeros(4, 16, requires_grad=True)
        >>> loss = fastgen.diffusion_dpo_loss(pred, torch.zeros(4, 16), torch.randn(4, 16))
        >>> print(f"{loss:.4f}")
        0.6931
    """
    shared = shared_of(pred, ref_pred, target, weight, element_reduction, reduction)
    if pred.shape[0] % 2:
        raise ValueError(f"pred must hold winners and then as many losers, got {pred.shape[0]} rows")
    beta = checks.number("beta", beta, low=0, open_low=True)
    checks.choice("kind", kind, ("sigmoid", "ipo", "hinge"))
    pairs = pred.shape[0] // 2
    return loss_of(operators.diffusion_dpo_loss, shared, pairs, return_delta=return_delta, beta=beta, kind=kind)


def diffusion_kto_loss(
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    is_desirable: Tensor,
    *,
    weight: Tensor | None = None,
    beta: float = 1000.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    baseline: float | Tensor | None = None,
    element_reduction: Literal["mean", "sum"] = "mean",
    reduction: Literal["mean", "sum", "none"] = "mean",
    group: Any = None,
) -> Tensor:
    """Diffusion-KTO (arXiv 2404.04465): a preference loss of single images, each liked or not; no pairs are needed.

    .. math:: L_i = w_i · (1 - σ(± β(Δ_i - z)))

    with Δ of :func:`elbo_difference`, + and w = `desirable_weight` where an image is desirable, - and
    w = `undesirable_weight` elsewhere. z is the point from which gains and losses count: the mean Δ of the whole batch
    where that is positive, else 0, without a gradient.

    Args:
        pred, ref_pred, target: as in :func:`elbo_difference`, [B, …].
        is_desirable: bool [B].
        weight: of the ELBO's errors, float32 or float64 [B]; 1 if None.
        beta: inverse temperature, > 0. 1000 is the published code's, with the mean over elements.
        desirable_weight, undesirable_weight: ≥ 0, to balance what is more frequent.
        baseline: z, a number or a 0-dimensional tensor, which gets no gradient; e.g. a running mean. With None the
            predictions are read once more, to find it first, and a non-finite row makes the whole batch so.
        element_reduction: ``"mean"`` over an image's elements (published code) or ``"sum"``.
        reduction: over the batch; ``"none"`` returns [B].
        group: a ``torch.distributed`` process group over whose rows z is the mean; the loss stays that of the rank's
            own. Batch-sharded DTensors need none: their z and their loss are those of the whole batch.

    Returns:
        The loss, float32 (float64 if an input is). Gradients flow to `pred` alone, once differentiable. B = 0 gives 0.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> pred = torch.zeros(4, 16, requires_grad=True)
        >>> liked = torch.tensor([True, False, False, True])
        >>> loss = fastgen.diffusion_kto_loss(pred, torch.zeros(4, 16), torch.randn(4, 16), liked)
        >>> print(f"{loss:.4f}")
        0.5000
    """
    shared = shared_of(pred, ref_pred, target, weight, element_reduction, reduction)
    checks.flags("is_desirable", is_desirable, pred.shape[0], pred)
    if baseline is None:
        delta = elbo_difference(pred.detach(), ref_pred, target, weight=weight, element_reduction=element_reduction)
        baseline = distributed.batch_mean(delta, group).clamp(min=0)
    return loss_of(
        operators.diffusion_kto_loss,
        shared,
        pred.shape[0],
        is_desirable=is_desirable,
        baseline=checks.scalar("baseline", baseline, pred),
        beta=checks.number("beta", beta, low=0, open_low=True),
        desirable_weight=checks.number("desirable_weight", desirable_weight, low=0),
        undesirable_weight=checks.number("undesirable_weight", undesirable_weight, low=0),
    )
