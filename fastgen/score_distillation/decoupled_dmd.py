"""Decoupled DMD: distribution matching and guidance, each at a noise level of its own."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor

from ..core import checks, dispatch
from ..core.distributed import is_dtensor
from . import operators, reference
from .arguments import DMD_REDUCTIONS, common_of
from .reference import DistillationStats, ScorePair
from .sharded import on_own_samples

__all__ = ["decoupled_dmd_loss"]


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
    if is_dtensor(x):
        checks.choice("reduction", reduction, DMD_REDUCTIONS)
        given = {f"{name}.{field}": t for name, pair in (("dm", dm), ("ca", ca)) for field, t in pair._asdict().items()}

        def of_samples(own: Tensor, tensors: dict[str, Tensor | None], **how: Any) -> Any:
            pairs = (ScorePair(*(tensors[f"{name}.{field}"] for field in ScorePair._fields)) for name in ("dm", "ca"))  # type: ignore[arg-type]
            return decoupled_dmd_loss(
                own,
                *pairs,
                guidance_scale=guidance_scale,
                prediction_type=prediction_type,
                fake_prediction_type=fake_prediction_type,
                normalizer=normalizer,
                normalizer_eps=normalizer_eps,
                normalizer_min=normalizer_min,
                normalizer_dims=normalizer_dims,
                weight=tensors["weight"],
                **how,
            )

        return on_own_samples(of_samples, x, given | {"weight": weight}, reduction, mask, return_stats)
    guidance = checks.number("guidance_scale", guidance_scale)
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
        prediction_type=common["prediction_type"],
        fake_prediction_type=common["fake_prediction_type"],
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
