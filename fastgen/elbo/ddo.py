"""Direct Discriminative Optimization: real images against a model's own."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor

from ..core import checks, distributed
from . import operators
from .arguments import loss_of, shared_of

__all__ = ["ddo_loss"]


@overload
def ddo_loss(
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    is_real: Tensor,
    *,
    weight: Tensor | None = ...,
    alpha: float | Tensor = ...,
    beta: float = ...,
    mc_samples: int = ...,
    element_reduction: Literal["mean", "sum"] = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    return_delta: Literal[False] = ...,
    group: Any = ...,
) -> Tensor: ...
@overload
def ddo_loss(
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    is_real: Tensor,
    *,
    weight: Tensor | None = ...,
    alpha: float | Tensor = ...,
    beta: float = ...,
    mc_samples: int = ...,
    element_reduction: Literal["mean", "sum"] = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    return_delta: Literal[True],
    group: Any = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def ddo_loss(
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    is_real: Tensor,
    *,
    weight: Tensor | None = ...,
    alpha: float | Tensor = ...,
    beta: float = ...,
    mc_samples: int = ...,
    element_reduction: Literal["mean", "sum"] = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    return_delta: bool,
    group: Any = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def ddo_loss(
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    is_real: Tensor,
    *,
    weight: Tensor | None = None,
    alpha: float | Tensor = 1.0,
    beta: float = 0.05,
    mc_samples: int = 1,
    element_reduction: Literal["mean", "sum"] = "sum",
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_delta: bool = False,
    group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Direct Discriminative Optimization (arXiv 2503.01103): fine-tunes a likelihood-based model as its own GAN.

    .. math:: L = mean_{real} softplus(-βΔ) + α · mean_{fake} softplus(βΔ)

    with Δ of :func:`elbo_difference`: the model against its frozen reference is the discriminator's logit, real images
    are data, fake ones samples of the reference. The optimum is ``p ∝ p_ref^(1-1/β) p_data^(1/β)``; at
    ``pred == ref_pred`` the loss is ``(1 + α) ln 2``.

    Args:
        pred, ref_pred, target: as in :func:`elbo_difference`, [B·mc_samples, …]: the model's and the reference's
            predictions at the same noisy inputs, and what they predict. Share t and noise between the two models, and
            between the real and the fake half. Fakes must be the reference's samples as they come, unclamped.
        is_real: bool [B], True for data, False for samples of the reference.
        weight: w, float32 or float64 [B·mc_samples]; for EDM's x0-errors
            :meth:`fastgen.NoiseSchedule.edm_weight`.
        alpha: weight of the fakes, ≥ 0; the paper uses 0.5 to 50. Or one for each image, float32 or float64 [B], of
            which those of the fakes count: 0 on rows whose label was dropped for guidance leaves them out of the fakes,
            though the mean still counts them.
        beta: inverse temperature, > 0; the paper uses 0.01 to 0.1 with sums over an image.
        mc_samples: M, draws of (t, noise) per image, in consecutive rows. Δ is averaged over them inside the sigmoid;
            by Jensen's inequality the bound is tighter than at M = 1, the paper's.
        element_reduction: ``"sum"`` over an image's elements (the paper) or ``"mean"``.
        reduction: ``"mean"``: each group's own mean, an absent group contributing 0; ``"sum"``; or ``"none"``: the
            terms [B], with α applied to the fakes.
        return_delta: also return Δ [B] (after the mean over M), detached, for logging.
        group: a ``torch.distributed`` process group over which the two means are taken. Averaging over its ranks, as
            DDP and FSDP do to gradients, then gives the loss and the gradients of the whole batch in one process, also
            where a rank has no fakes. Batch-sharded DTensors need no group: their loss is global as it is, however
            uneven the shards; each must hold whole groups of `mc_samples` rows.

    Returns:
        The loss, float32 (float64 if an input is), or ``(loss, delta)``. Gradients flow to `pred` alone, once
        differentiable. B = 0 gives 0. A non-finite element makes its own row's term and gradient non-finite, and no
        other row's gradient.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> pred = torch.zeros(4, 3, 8, 8, requires_grad=True)
        >>> is_real = torch.tensor([True, True, False, False])
        >>> loss = fastgen.ddo_loss(pred, torch.zeros(4, 3, 8, 8), torch.randn(4, 3, 8, 8), is_real, alpha=2.0)
        >>> loss.backward()
        >>> print(f"{loss:.4f}")
        2.0794

    With sums over an image and EDM's weights the slope of Δ grows with the number of elements: take Adam, or a step
    size far below what a mean would take. On a network that is not trained yet, SGD at 1e-3 diverges.
    """
    shared = shared_of(pred, ref_pred, target, weight, element_reduction, reduction)
    mc_samples = checks.positive_int("mc_samples", mc_samples)
    if pred.shape[0] % mc_samples:
        raise ValueError(f"mc_samples = {mc_samples} does not divide the {pred.shape[0]} rows of pred")
    if mc_samples > 1:
        streams = {"pred": pred, "ref_pred": ref_pred, "target": target}
        distributed.check_groups(streams, mc_samples, f"groups of mc_samples = {mc_samples} rows")
    checks.flags("is_real", is_real, pred.shape[0] // mc_samples, pred)
    alphas = None
    if isinstance(alpha, Tensor):
        checks.per_row("alpha", alpha, is_real)
        alphas = alpha
    else:
        alpha = checks.number("alpha", alpha, low=0)
    beta = checks.number("beta", beta, low=0, open_low=True)
    own: dict[str, Any] = {"is_real": is_real, "alpha": alpha, "beta": beta, "mc_samples": mc_samples}
    if distributed.backend_of(operators.ddo_loss.name, pred) == "reference":
        own["group"] = group
    else:
        own |= {"alphas": alphas, "alpha": alpha if alphas is None else 0.0}
        own["counts"] = distributed.loss_counts(is_real, group) if reduction == "mean" else None
    return loss_of(operators.ddo_loss, shared, 1, return_delta=return_delta, **own)
