"""Score distillation: SDS, VSD, DMD, DMD2 and Decoupled DMD.

Every method is a gradient field G on the generator's output x. Here G is computed in float32 from the networks' raw
outputs and handed to autograd as x's gradient. The usual pseudo-target ``½ MSE(x, (x - G).detach())`` has the same
gradient in exact arithmetic, but in bfloat16 ``x - (x - G)`` loses a quarter of a G that is 0.003 of x. The operators
are in ``operators.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, overload

from torch import Tensor

from ..core import checks, dispatch
from ..schedule import PREDICTION_TYPES
from . import operators, reference
from .reference import DistillationStats, ScorePair

__all__ = ["DistillationStats", "ScorePair", "decoupled_dmd_loss", "dmd_loss", "sds_loss", "vsd_loss"]

SDS_REDUCTIONS = ("sum_per_batch", "mean", "sum", "none")
DMD_REDUCTIONS = ("mean", "sum", "none")


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


@overload
def dmd_loss(
    x: Tensor,
    x_t: Tensor,
    real_cond: Tensor,
    fake: Tensor,
    *,
    alpha_t: Tensor,
    sigma_t: Tensor,
    prediction_type: str = ...,
    fake_prediction_type: str | None = ...,
    real_uncond: Tensor | None = ...,
    guidance_scale: float = ...,
    normalizer: Literal["x0_l1"] | None = ...,
    normalizer_eps: float = ...,
    normalizer_min: float = ...,
    normalizer_dims: Literal["sample", "frame"] = ...,
    weight: Tensor | None = ...,
    mask: Tensor | None = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...
@overload
def dmd_loss(
    x: Tensor,
    x_t: Tensor,
    real_cond: Tensor,
    fake: Tensor,
    *,
    alpha_t: Tensor,
    sigma_t: Tensor,
    prediction_type: str = ...,
    fake_prediction_type: str | None = ...,
    real_uncond: Tensor | None = ...,
    guidance_scale: float = ...,
    normalizer: Literal["x0_l1"] | None = ...,
    normalizer_eps: float = ...,
    normalizer_min: float = ...,
    normalizer_dims: Literal["sample", "frame"] = ...,
    weight: Tensor | None = ...,
    mask: Tensor | None = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, DistillationStats]: ...
@overload
def dmd_loss(
    x: Tensor,
    x_t: Tensor,
    real_cond: Tensor,
    fake: Tensor,
    *,
    alpha_t: Tensor,
    sigma_t: Tensor,
    prediction_type: str = ...,
    fake_prediction_type: str | None = ...,
    real_uncond: Tensor | None = ...,
    guidance_scale: float = ...,
    normalizer: Literal["x0_l1"] | None = ...,
    normalizer_eps: float = ...,
    normalizer_min: float = ...,
    normalizer_dims: Literal["sample", "frame"] = ...,
    weight: Tensor | None = ...,
    mask: Tensor | None = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    return_stats: bool,
) -> Tensor | tuple[Tensor, DistillationStats]: ...
def dmd_loss(
    x: Tensor,
    x_t: Tensor,
    real_cond: Tensor,
    fake: Tensor,
    *,
    alpha_t: Tensor,
    sigma_t: Tensor,
    prediction_type: str = "epsilon",
    fake_prediction_type: str | None = None,
    real_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    normalizer: Literal["x0_l1"] | None = "x0_l1",
    normalizer_eps: float = 0.0,
    normalizer_min: float = 0.0,
    normalizer_dims: Literal["sample", "frame"] = "sample",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, DistillationStats]:
    """Distribution Matching Distillation (DMD, arXiv 2311.18828; DMD2, arXiv 2405.14867).

    .. math:: G = w \\frac{f - r_{cfg}}{n}, \\qquad n = mean_{sample} |x - r_{cfg}|

    with r and f the x0-predictions of the real and the fake network at ``x_t = alpha_t x + sigma_t noise``, made of
    their raw outputs, in float32, in the same pass. x's gradient is ∂L/∂x = G / numel for the mean, and the loss value
    ½ mean G², which is that of the pseudo-target form.

    Args:
        x: the generator's output [B, …], or a video [B, F, …]; any floating dtype. Gradients flow to it alone.
        x_t: x renoised (:func:`fastgen.add_noise`), as the networks saw it.
        real_cond, fake: the real and the fake network's raw outputs at x_t, like `x`; dtypes may differ.
        alpha_t, sigma_t: coefficients of x_t, float32 or float64 [B], or [B, F] where frames have their own times.
        prediction_type: what the networks predict: ``"epsilon"``, ``"sample"``, ``"v_prediction"`` or
            ``"flow_prediction"`` (:func:`fastgen.prediction_to_x0`).
        fake_prediction_type: what the fake network predicts, where that differs.
        real_uncond: the real network's unconditional output; None: no guidance, and `guidance_scale` must be 1.
        guidance_scale: s in ``uncond + s (cond - uncond)``; 1 is no guidance. Not applied to the fake network.
        normalizer: ``"x0_l1"``: n above, with the guided r; None: n = 1.
        normalizer_eps, normalizer_min: ``n = max(mean, min) + eps``. DMD2 has neither; others add 1e-6 or clip at 1e-5.
        normalizer_dims: ``"sample"``, or ``"frame"``: each frame of a video has its own n.
        weight: w, float32 or float64 [B] or [B, F], or a map of x's shape in any floating dtype; 1 if None.
        mask: bool, broadcastable to x. Elements outside it get no gradient and do not count in the mean, which is over
            the batch's selected elements; the normaliser still sees all. With a weight map too, one temporary is made.
        reduction: ``"mean"`` over all (selected) elements, ``"sum"``, or ``"none"``: each sample's sum [B].
        return_stats: also return :class:`DistillationStats`.

    Returns:
        The loss, float32 (float64 if an input is), or ``(loss, stats)``. A sample (with ``"frame"``: a frame) whose G
        is not finite (an inf or NaN came in, or x equals r and n = 0) contributes no loss and a zero gradient, and is
        counted in ``stats.skipped``; the others' gradients are as if it were sound. It still counts in the mean's
        denominator, so that nothing waits for the count. There is no host sync.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> x = torch.zeros(1, 2, requires_grad=True)
        >>> one = torch.ones(1)
        >>> real, fake = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 1.0]])
        >>> loss, stats = fastgen.dmd_loss(
        ...     x, x.detach(), real, fake, alpha_t=one, sigma_t=one, prediction_type="sample", return_stats=True
        ... )
        >>> loss.backward()
        >>> x.grad, stats.normalizer
        (tensor([[ 0.2500, -0.5000]]), tensor([2.]))
    """
    checks.streams(x=x, x_t=x_t, real_cond=real_cond, fake=fake, **checks.given(real_uncond=real_uncond))
    checks.local("x", x)
    guidance = _guidance(guidance_scale, real_uncond, "real_uncond")
    common = _common(
        x,
        weight,
        mask,
        prediction_type,
        fake_prediction_type,
        normalizer,
        normalizer_eps,
        normalizer_min,
        normalizer_dims,
        reduction,
    )
    for name, value in (("alpha_t", alpha_t), ("sigma_t", sigma_t)):
        checks.per_frame(name, value, x)
    backend = dispatch.backend_for(operators.dmd.name, x.device.type)
    if backend == "reference":
        return reference.dmd_loss(
            x,
            x_t,
            real_cond,
            fake,
            alpha_t=alpha_t,
            sigma_t=sigma_t,
            real_uncond=real_uncond,
            guidance_scale=guidance,
            weight=weight,
            mask=mask,
            reduction=reduction,
            return_stats=return_stats,
            **common,
        )
    rows = operators.rows_of(x, normalizer_dims, weight, alpha_t, sigma_t)
    gate, count = operators.gate_of(x, weight, mask)
    divisor = count if reduction == "mean" else None
    loss, stats = operators.dmd(
        backend,
        x=rows.stream(x),
        x_t=rows.stream(x_t),
        real=rows.stream(real_cond),
        fake=rows.stream(fake),
        uncond=rows.optional(real_uncond),
        weight=rows.scalars(operators.row_weight(weight, x)),
        gate=rows.optional(gate),
        alpha_t=rows.scalars(alpha_t),
        sigma_t=rows.scalars(sigma_t),
        prediction_type=prediction_type,
        fake_prediction_type=fake_prediction_type or prediction_type,
        guidance_scale=guidance,
        dtype=x.dtype,
        count=divisor,
        normalize=normalizer is not None,
        normalizer_min=float(normalizer_min),
        normalizer_eps=float(normalizer_eps),
        group_rows=rows.group,
        reduction=reduction,
    )
    return rows.finish(loss, stats, 1, count, x, return_stats)


@overload
def decoupled_dmd_loss(
    x: Tensor,
    dm: ScorePair,
    ca: ScorePair,
    *,
    guidance_scale: float,
    prediction_type: str = ...,
    fake_prediction_type: str | None = ...,
    normalizer: Literal["x0_l1"] | None = ...,
    normalizer_eps: float = ...,
    normalizer_min: float = ...,
    normalizer_dims: Literal["sample", "frame"] = ...,
    weight: Tensor | None = ...,
    mask: Tensor | None = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...
@overload
def decoupled_dmd_loss(
    x: Tensor,
    dm: ScorePair,
    ca: ScorePair,
    *,
    guidance_scale: float,
    prediction_type: str = ...,
    fake_prediction_type: str | None = ...,
    normalizer: Literal["x0_l1"] | None = ...,
    normalizer_eps: float = ...,
    normalizer_min: float = ...,
    normalizer_dims: Literal["sample", "frame"] = ...,
    weight: Tensor | None = ...,
    mask: Tensor | None = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, DistillationStats]: ...
@overload
def decoupled_dmd_loss(
    x: Tensor,
    dm: ScorePair,
    ca: ScorePair,
    *,
    guidance_scale: float,
    prediction_type: str = ...,
    fake_prediction_type: str | None = ...,
    normalizer: Literal["x0_l1"] | None = ...,
    normalizer_eps: float = ...,
    normalizer_min: float = ...,
    normalizer_dims: Literal["sample", "frame"] = ...,
    weight: Tensor | None = ...,
    mask: Tensor | None = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    return_stats: bool,
) -> Tensor | tuple[Tensor, DistillationStats]: ...
def decoupled_dmd_loss(
    x: Tensor,
    dm: ScorePair,
    ca: ScorePair,
    *,
    guidance_scale: float,
    prediction_type: str = "epsilon",
    fake_prediction_type: str | None = None,
    normalizer: Literal["x0_l1"] | None = "x0_l1",
    normalizer_eps: float = 0.0,
    normalizer_min: float = 0.0,
    normalizer_dims: Literal["sample", "frame"] = "sample",
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, DistillationStats]:
    """Decoupled DMD (arXiv 2511.22677): DMD's gradient taken apart into distribution matching (DM) and guidance (CA).

    .. math::
        G = w \\frac{f - r_{cond}}{n}\\Big|_{DM} - w (s - 1) \\frac{r_{cond} - r_{uncond}}{n}\\Big|_{CA},
        \\qquad n = mean |x - r_{cond}|

    Each term is taken at its own noise level, with its own normaliser, and both in one pass. At one level and without
    normaliser this is :func:`dmd_loss` with guidance s. For the levels see :func:`fastgen.renoise_times`.

    Args:
        x: the generator's output, as in :func:`dmd_loss`. Gradients flow to it alone.
        dm: :class:`ScorePair` with the real network's conditional and the fake network's output.
        ca: :class:`ScorePair` with the real network's conditional and unconditional output.
        guidance_scale: s; at 1 the CA term vanishes.
        prediction_type, …, return_stats: as in :func:`dmd_loss`.

    Returns, Raises:
        As :func:`dmd_loss`. A sample is skipped as a whole if either term is not finite.

    Example::

        >>> import torch, fastgen
        >>> x = torch.zeros(1, 2, requires_grad=True)
        >>> one, real = torch.ones(1), torch.tensor([[1.0, 3.0]])
        >>> dm = fastgen.ScorePair(x.detach(), one, one, real, torch.tensor([[2.0, 1.0]]))
        >>> ca = fastgen.ScorePair(x.detach(), one, one, real, torch.zeros(1, 2))
        >>> fastgen.decoupled_dmd_loss(x, dm, ca, guidance_scale=2.0, prediction_type="sample").backward()
        >>> x.grad
        tensor([[ 0.0000, -1.2500]])
    """
    for name, pair in (("dm", dm), ("ca", ca)):
        if not isinstance(pair, ScorePair):
            raise TypeError(f"{name} must be a fastgen.ScorePair, got {type(pair).__name__}")
    checks.streams(
        **{"x": x, "dm.x_t": dm.x_t, "dm.real": dm.real, "dm.contrast": dm.contrast},
        **{"ca.x_t": ca.x_t, "ca.real": ca.real, "ca.contrast": ca.contrast},
    )
    checks.local("x", x)
    guidance = checks.number("guidance_scale", guidance_scale)
    common = _common(
        x,
        weight,
        mask,
        prediction_type,
        fake_prediction_type,
        normalizer,
        normalizer_eps,
        normalizer_min,
        normalizer_dims,
        reduction,
    )
    times = {"dm.alpha_t": dm.alpha_t, "dm.sigma_t": dm.sigma_t, "ca.alpha_t": ca.alpha_t, "ca.sigma_t": ca.sigma_t}
    for name, value in times.items():
        checks.per_frame(name, value, x)
    backend = dispatch.backend_for(operators.decoupled_dmd.name, x.device.type)
    if backend == "reference":
        return reference.decoupled_dmd_loss(
            x,
            dm,
            ca,
            guidance_scale=guidance,
            weight=weight,
            mask=mask,
            reduction=reduction,
            return_stats=return_stats,
            **common,
        )
    rows = operators.rows_of(x, normalizer_dims, weight, *times.values())
    gate, count = operators.gate_of(x, weight, mask)
    divisor = count if reduction == "mean" else None
    loss, stats = operators.decoupled_dmd(
        backend,
        x=rows.stream(x),
        ca_x_t=rows.stream(ca.x_t),
        dm_x_t=rows.stream(dm.x_t),
        dm_real=rows.stream(dm.real),
        dm_fake=rows.stream(dm.contrast),
        ca_real=rows.stream(ca.real),
        ca_uncond=rows.stream(ca.contrast),
        weight=rows.scalars(operators.row_weight(weight, x)),
        gate=rows.optional(gate),
        dm_alpha_t=rows.scalars(dm.alpha_t),
        dm_sigma_t=rows.scalars(dm.sigma_t),
        ca_alpha_t=rows.scalars(ca.alpha_t),
        ca_sigma_t=rows.scalars(ca.sigma_t),
        prediction_type=prediction_type,
        fake_prediction_type=fake_prediction_type or prediction_type,
        guidance_scale=guidance,
        dtype=x.dtype,
        count=divisor,
        normalize=normalizer is not None,
        normalizer_min=float(normalizer_min),
        normalizer_eps=float(normalizer_eps),
        group_rows=rows.group,
        reduction=reduction,
    )
    return rows.finish(loss, stats, 2, count, x, return_stats)


def _guidance(guidance_scale: float, uncond: Tensor | None, name: str) -> float:
    guidance = checks.number("guidance_scale", guidance_scale)
    if uncond is None and guidance != 1:
        raise ValueError(f"guidance_scale = {guidance:g} needs {name}; without it only 1, no guidance, makes sense")
    return guidance


def _check_weight(weight: Tensor | None, x: Tensor, frames: bool) -> None:
    if weight is None:
        return
    checks.tensor("weight", weight)
    if operators.is_map(weight, x):
        checks.streams(x=x, weight=weight)
    elif frames:
        checks.per_frame("weight", weight, x)
    else:
        checks.per_row("weight", weight, x)


def _common(
    x: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    prediction_type: str,
    fake_prediction_type: str | None,
    normalizer: str | None,
    normalizer_eps: float,
    normalizer_min: float,
    normalizer_dims: str,
    reduction: str,
) -> dict[str, Any]:
    """Checks what the DMD losses have in common; returns what the reference takes as it is."""
    checks.choice("prediction_type", prediction_type, PREDICTION_TYPES)
    if fake_prediction_type is not None:
        checks.choice("fake_prediction_type", fake_prediction_type, PREDICTION_TYPES)
    if normalizer is not None:
        checks.choice("normalizer", normalizer, ("x0_l1",))
    checks.number("normalizer_eps", normalizer_eps, low=0)
    checks.number("normalizer_min", normalizer_min, low=0)
    checks.choice("normalizer_dims", normalizer_dims, ("sample", "frame"))
    if normalizer_dims == "frame" and x.dim() < 3:
        raise ValueError(f"normalizer_dims='frame' needs a video [B, F, ...], but x has shape {tuple(x.shape)}")
    checks.choice("reduction", reduction, DMD_REDUCTIONS)
    _check_weight(weight, x, frames=True)
    if mask is not None:
        checks.mask("mask", mask, x)
    return {
        "prediction_type": prediction_type,
        "fake_prediction_type": fake_prediction_type,
        "normalizer": normalizer,
        "normalizer_eps": normalizer_eps,
        "normalizer_min": normalizer_min,
        "normalizer_dims": normalizer_dims,
    }


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
    checks.local("x", x)
    guidance = _guidance(guidance_scale, uncond, uncond_name)
    _check_weight(weight, x, frames=False)
    checks.choice("reduction", reduction, SDS_REDUCTIONS)
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
    return operators.Rows(None, 1).finish(loss, stats, 1, None, x, return_stats)
