"""SDS and VSD: a field of two predictions, without a normaliser."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, overload

from torch import Tensor

from ..core import checks, dispatch
from ..core.distributed import is_dtensor
from . import operators, reference
from .arguments import check_weight, guidance_of
from .reference import DistillationStats
from .sharded import on_own_samples

__all__ = ["sds_loss", "vsd_loss"]

SDS_REDUCTIONS = ("sum_per_batch", "mean", "sum", "none")


@overload
def sds_loss(
    x: Tensor,
    pred_cond: Tensor,
    noise: Tensor,
    *,
    pred_uncond: Tensor | None = ...,
    guidance_scale: float = ...,
    weight: Tensor | None = ...,
    reduction: Literal["sum_per_batch", "mean", "sum", "none"] = ...,
    grad_clip: float | None = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...
@overload
def sds_loss(
    x: Tensor,
    pred_cond: Tensor,
    noise: Tensor,
    *,
    pred_uncond: Tensor | None = ...,
    guidance_scale: float = ...,
    weight: Tensor | None = ...,
    reduction: Literal["sum_per_batch", "mean", "sum", "none"] = ...,
    grad_clip: float | None = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, DistillationStats]: ...
@overload
def sds_loss(
    x: Tensor,
    pred_cond: Tensor,
    noise: Tensor,
    *,
    pred_uncond: Tensor | None = ...,
    guidance_scale: float = ...,
    weight: Tensor | None = ...,
    reduction: Literal["sum_per_batch", "mean", "sum", "none"] = ...,
    grad_clip: float | None = ...,
    return_stats: bool,
) -> Tensor | tuple[Tensor, DistillationStats]: ...
def sds_loss(
    x: Tensor,
    pred_cond: Tensor,
    noise: Tensor,
    *,
    pred_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    weight: Tensor | None = None,
    reduction: Literal["sum_per_batch", "mean", "sum", "none"] = "sum_per_batch",
    grad_clip: float | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, DistillationStats]:
    """Score Distillation Sampling (DreamFusion, arXiv 2209.14988).

    .. math:: G = w (ê_{cfg} - ε), \\qquad ê_{cfg} = ê_{uncond} + s (ê_{cond} - ê_{uncond})

    with x's gradient ∂L/∂x = G, scaled by the reduction, and the loss value ½ΣG², scaled alike.

    Args:
        x: what is optimised: a rendering or its latents [B, …], any floating dtype. Gradients flow to it alone.
        pred_cond: the network's noise prediction ê_cond at ``x_t = alpha_t x + sigma_t noise``, like `x`.
        noise: ε, like `x`.
        pred_uncond: the unconditional prediction; None: no guidance, and `guidance_scale` must be 1.
        guidance_scale: s; 1 is no guidance. Codes that add ``s (cond - uncond)`` to ``cond`` use s + 1 here.
        weight: w(t), float32 or float64 [B] (the paper's is ``sigma_t²``), or a map of x's shape in any floating
            dtype; 1 if None. Elements of weight 0 contribute nothing, whatever the predictions there.
        reduction: ``"sum_per_batch"``: the sum divided by B, as threestudio has it; ``"mean"`` over all elements;
            ``"sum"``; or ``"none"``: each sample's sum [B].
        grad_clip: clips the elements of G, after the weight, to ±grad_clip.
        return_stats: also return :class:`DistillationStats`.

    Returns:
        The loss, float32 (float64 if an input is), or ``(loss, stats)``. A sample whose G is not finite contributes no
        loss and a zero gradient, and is counted in ``stats.skipped``; the others' gradients are as if it were sound.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> x = torch.zeros(1, 2, requires_grad=True)
        >>> loss = fastgen.sds_loss(x, torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]]))
        >>> loss.backward()
        >>> loss.item(), x.grad
        (2.5, tensor([[1., 2.]]))
    """
    names = {"pred_cond": pred_cond, "noise": noise, "pred_uncond": pred_uncond}
    return _score_loss(
        reference.sds_loss,
        names,
        x,
        pred_cond,
        noise,
        pred_uncond,
        guidance_scale,
        weight,
        reduction,
        grad_clip,
        return_stats,
    )


@overload
def vsd_loss(
    x: Tensor,
    real_cond: Tensor,
    fake: Tensor,
    *,
    real_uncond: Tensor | None = ...,
    guidance_scale: float = ...,
    weight: Tensor | None = ...,
    reduction: Literal["sum_per_batch", "mean", "sum", "none"] = ...,
    grad_clip: float | None = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...
@overload
def vsd_loss(
    x: Tensor,
    real_cond: Tensor,
    fake: Tensor,
    *,
    real_uncond: Tensor | None = ...,
    guidance_scale: float = ...,
    weight: Tensor | None = ...,
    reduction: Literal["sum_per_batch", "mean", "sum", "none"] = ...,
    grad_clip: float | None = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, DistillationStats]: ...
@overload
def vsd_loss(
    x: Tensor,
    real_cond: Tensor,
    fake: Tensor,
    *,
    real_uncond: Tensor | None = ...,
    guidance_scale: float = ...,
    weight: Tensor | None = ...,
    reduction: Literal["sum_per_batch", "mean", "sum", "none"] = ...,
    grad_clip: float | None = ...,
    return_stats: bool,
) -> Tensor | tuple[Tensor, DistillationStats]: ...
def vsd_loss(
    x: Tensor,
    real_cond: Tensor,
    fake: Tensor,
    *,
    real_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    weight: Tensor | None = None,
    reduction: Literal["sum_per_batch", "mean", "sum", "none"] = "sum_per_batch",
    grad_clip: float | None = None,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, DistillationStats]:
    """Variational Score Distillation (ProlificDreamer, arXiv 2305.16213).

    .. math:: G = w (ê_{real,cfg} - ê_{fake})

    where the fake network is trained on x by :func:`fastgen.fake_score_loss`. The two must predict the same quantity.

    Args:
        x: as in :func:`sds_loss`.
        real_cond, real_uncond: the pre-trained network's noise predictions at x_t, with and without the condition.
        fake: the fake (LoRA) network's prediction at the same x_t; guidance does not apply to it.
        guidance_scale, weight, reduction, grad_clip, return_stats: as in :func:`sds_loss`. The paper uses s = 7.5.

    Returns, Raises:
        As :func:`sds_loss`.

    Example::

        >>> import torch, fastgen
        >>> x = torch.zeros(1, 2, requires_grad=True)
        >>> fastgen.vsd_loss(x, torch.ones(1, 2), torch.zeros(1, 2), weight=torch.tensor([0.5])).backward()
        >>> x.grad
        tensor([[0.5000, 0.5000]])
    """
    names = {"real_cond": real_cond, "fake": fake, "real_uncond": real_uncond}
    return _score_loss(
        reference.vsd_loss,
        names,
        x,
        real_cond,
        fake,
        real_uncond,
        guidance_scale,
        weight,
        reduction,
        grad_clip,
        return_stats,
    )


def _streams(named: dict[str, Tensor | None]) -> dict[str, Any]:
    return dict(zip(("pred", "target", "uncond"), named.values(), strict=True))


def _score_loss(
    written_out: Callable[..., Any],
    names: dict[str, Tensor | None],
    x: Tensor,
    pred: Tensor,
    target: Tensor,
    uncond: Tensor | None,
    guidance_scale: float,
    weight: Tensor | None,
    reduction: str,
    grad_clip: float | None,
    return_stats: bool,
) -> Tensor | tuple[Tensor, DistillationStats]:
    """SDS and VSD: `names` are the public names of the streams, in the order pred, target, uncond."""
    uncond_name = list(names)[2]
    checks.streams(x=x, **dict(zip(names, (pred, target), strict=False)), **checks.given(**{uncond_name: uncond}))
    checks.choice("reduction", reduction, SDS_REDUCTIONS)
    if is_dtensor(x):
        given = dict(zip(names, (pred, target, uncond), strict=True)) | {"weight": weight}

        def of_samples(own: Tensor, tensors: dict[str, Tensor | None], **how: Any) -> Any:
            del how["mask"]  # there is none
            inner = {name: tensors[name] for name in names}
            options: dict[str, Any] = {
                "guidance_scale": guidance_scale,
                "weight": tensors["weight"],
                "grad_clip": grad_clip,
            }
            return _score_loss(written_out, inner, own, **_streams(inner), **options, **how)

        return on_own_samples(of_samples, x, given, reduction, None, return_stats)
    guidance = guidance_of(guidance_scale, uncond, uncond_name)
    check_weight(weight, x, frames=False)
    clip = math.inf if grad_clip is None else checks.number("grad_clip", grad_clip, low=0, open_low=True)
    backend = dispatch.backend_for(operators.score_difference.name, x.device.type)
    if backend == "reference":
        return written_out(
            x,
            pred,
            target,
            guidance_scale=guidance,
            weight=weight,
            reduction=reduction,
            grad_clip=grad_clip,
            return_stats=return_stats,
            **{uncond_name: uncond},
        )
    gate, _ = operators.gate_of(x, weight, None)
    loss, stats = operators.score_difference(
        backend,
        x,
        pred=pred,
        target=target,
        uncond=uncond,
        weight=operators.row_weight(weight, x),
        gate=gate,
        guidance_scale=guidance,
        grad_clip=clip,
        dtype=x.dtype,
        reduction=reduction,
    )
    return operators.SampleRows(None, 1).finish(loss, stats, 1, None, x, return_stats)
