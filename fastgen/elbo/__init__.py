"""ELBO errors and losses over them: DDO, Diffusion-DPO and their relatives. The operators are in ``operators.py``."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from ..core import checks, distributed
from . import operators
from .arguments import loss_of, shared_of
from .ddo import ddo_loss
from .dpo import PreferenceErrors, diffusion_dpo_loss
from .errors import elbo_difference, elbo_error
from .mapo import mapo_loss

__all__ = ["PreferenceErrors", "ddo_loss", "diffusion_dpo_loss", "diffusion_kto_loss", "elbo_difference", "elbo_error"]
__all__ += ["mapo_loss"]


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
