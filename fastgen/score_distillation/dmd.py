"""DMD and DMD2: the difference of two x0-predictions at one noise level, over a normaliser."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor

from ..core import checks, dispatch
from ..core.distributed import is_dtensor
from . import operators, reference
from .arguments import DMD_REDUCTIONS, common_of, guidance_of, noisy_of, per_row_of
from .reference import DistillationStats
from .sharded import on_own_samples

__all__ = ["dmd_loss"]


@overload
def dmd_loss(
    x: Tensor,
    x_t: Tensor | None,
    real_cond: Tensor,
    fake: Tensor,
    *,
    alpha_t: Tensor | None = ...,
    sigma_t: Tensor | None = ...,
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
    x_t: Tensor | None,
    real_cond: Tensor,
    fake: Tensor,
    *,
    alpha_t: Tensor | None = ...,
    sigma_t: Tensor | None = ...,
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
    x_t: Tensor | None,
    real_cond: Tensor,
    fake: Tensor,
    *,
    alpha_t: Tensor | None = ...,
    sigma_t: Tensor | None = ...,
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
    x_t: Tensor | None,
    real_cond: Tensor,
    fake: Tensor,
    *,
    alpha_t: Tensor | None = None,
    sigma_t: Tensor | None = None,
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
        alpha_t, sigma_t: coefficients of x_t, float32 or float64 [B], or [B, F] where frames have their own times;
            with dimensions of 1 behind, if you like. Where both networks predict ``"sample"``, x0 itself, these and
            `x_t` take no part and may be None.
        prediction_type: what the networks predict: ``"epsilon"`` (or ``"eps"``), ``"sample"`` (or ``"x0"``),
            ``"v_prediction"`` or ``"flow_prediction"`` (:func:`fastgen.prediction_to_x0`).
        fake_prediction_type: what the fake network predicts, where that differs.
        real_uncond: the real network's unconditional output; None: no guidance, and `guidance_scale` must be 1.
        guidance_scale: s in ``uncond + s (cond - uncond)``; 1 is no guidance. Not applied to the fake network: where
            that is guided too, `fake` is :func:`fastgen.guidance` of its two outputs, in float32.
        normalizer: ``"x0_l1"``: n above, with the guided r; None: n = 1.
        normalizer_eps, normalizer_min: ``n = max(mean, min) + eps``. DMD2 has neither; others add 1e-6 or clip at 1e-5.
        normalizer_dims: ``"sample"``, or ``"frame"``: each frame of a video has its own n.
        weight: w, float32 or float64 [B] or [B, F], or a map of x's shape in any floating dtype; 1 if None. For
            f-distill see :func:`fastgen.f_distill_weight`.
        mask: bool, broadcastable to x. Elements outside it get no gradient and do not count in the mean, which is over
            the batch's selected elements; the normaliser still sees all. With a weight map too, one temporary is made.
        reduction: ``"mean"`` over all (selected) elements, ``"sum"``, or ``"none"``: each sample's sum [B].
        return_stats: also return :class:`DistillationStats`, whose numbers of each sample tell what a spike came from.

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
        >>> real, fake = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 1.0]])
        >>> loss, stats = fastgen.dmd_loss(
        ...     x, None, real, fake, prediction_type="sample", return_stats=True
        ... )
        >>> loss.backward()
        >>> x.grad, stats.normalizer
        (tensor([[ 0.2500, -0.5000]]), tensor([2.]))
    """
    checks.streams(x=x, real_cond=real_cond, fake=fake, **checks.given(x_t=x_t, real_uncond=real_uncond))
    if is_dtensor(x):
        checks.choice("reduction", reduction, DMD_REDUCTIONS)
        given = {"x_t": x_t, "real_cond": real_cond, "fake": fake, "real_uncond": real_uncond}
        given |= {"alpha_t": alpha_t, "sigma_t": sigma_t, "weight": weight}

        def of_samples(own: Tensor, tensors: dict[str, Tensor | None], **how: Any) -> Any:
            return dmd_loss(  # type: ignore[call-overload]
                own,
                prediction_type=prediction_type,
                fake_prediction_type=fake_prediction_type,
                guidance_scale=guidance_scale,
                normalizer=normalizer,
                normalizer_eps=normalizer_eps,
                normalizer_min=normalizer_min,
                normalizer_dims=normalizer_dims,
                **tensors,
                **how,
            )

        return on_own_samples(of_samples, x, given, reduction, mask, return_stats)
    weight = per_row_of(weight, x)
    guidance = guidance_of(guidance_scale, real_uncond, "real_uncond")
    common = common_of(
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
    types = common["prediction_type"], common["fake_prediction_type"]
    x_t, alpha_t, sigma_t = noisy_of(x, x_t, alpha_t, sigma_t, set(types))
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
        prediction_type=types[0],
        fake_prediction_type=types[1],
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
