"""Operators of ``sampling``, and the checks of their arguments.

A step's coefficients are vectors of the rows' number, or of one element, for all rows. The kernels are in
``csrc/sampling.h`` and ``triton_kernels/sampling.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core import checks
from ..core.operator import Operator, Output, PerRowOrAll, PredictionType, Stream, Written, operator
from ..schedule import PREDICTION_TYPES, NoiseSchedule, _RowCombination
from ..triton_kernels.layout import arithmetic_dtype, new_output, shared_row_strides
from .reference import StepCoefficients, randn_like


@operator
def reverse_step(
    x_t: Stream,
    cond: Stream,
    uncond: Stream | None,
    noise: Stream | None,
    alpha_t: PerRowOrAll,
    sigma_t: PerRowOrAll,
    k_x0: PerRowOrAll,
    k_x_t: PerRowOrAll,
    k_eps: PerRowOrAll | None,
    k_noise: PerRowOrAll | None,
    guidance_scale: PerRowOrAll | None,
    prediction_type: PredictionType,
    low: float,
    high: float,
) -> Output:
    """``k_x0 clamp(x0) + k_x_t x_t + k_eps ε̂ + k_noise noise`` of the guided prediction, in the dtype of `x_t`."""


@operator
def reverse_step_(
    x_t: Written,
    cond: Stream,
    uncond: Stream | None,
    noise: Stream | None,
    alpha_t: PerRowOrAll,
    sigma_t: PerRowOrAll,
    k_x0: PerRowOrAll,
    k_x_t: PerRowOrAll,
    k_eps: PerRowOrAll | None,
    k_noise: PerRowOrAll | None,
    guidance_scale: PerRowOrAll | None,
    prediction_type: PredictionType,
    low: float,
    high: float,
) -> None:
    """:func:`reverse_step`, written over `x_t`."""


@operator
def guidance(cond: Stream, uncond: Stream, scale: PerRowOrAll) -> Output:
    """``uncond + scale (cond - uncond)``"""
    return new_output(cond, uncond, dtype=torch.promote_types(cond.dtype, uncond.dtype))


def launch_step(
    op: Operator,
    backend: str,
    x_t: Tensor,
    cond: Tensor,
    coefficients: StepCoefficients,
    *,
    prediction_type: str,
    uncond: Tensor | None = None,
    guidance_scale: Tensor | None = None,
    noise: Tensor | None = None,
    clamp: tuple[float, float] | None = None,
) -> Any:
    """`op` is :func:`reverse_step` or :func:`reverse_step_`; the coefficients are those of a StepCoefficients."""
    low, high = (-math.inf, math.inf) if clamp is None else clamp
    return op(
        backend,
        x_t=x_t,
        cond=cond,
        uncond=uncond,
        noise=noise,
        alpha_t=coefficients.alpha_t,
        sigma_t=coefficients.sigma_t,
        k_x0=coefficients.x0,
        k_x_t=coefficients.x_t,
        k_eps=coefficients.eps,
        k_noise=coefficients.noise,
        guidance_scale=guidance_scale,
        prediction_type=prediction_type,
        low=low,
        high=high,
    )


def launch_mix(
    op: Operator,
    backend: str,
    x: Tensor,
    y: Tensor,
    noise: Tensor | None,
    k_x: Tensor,
    k_y: Tensor,
    k_noise: Tensor | None,
) -> Any:
    """``k_x x + k_y y + k_noise noise``: a reverse step of which y is the x0, and which knows no noise level."""
    return op(
        backend,
        x_t=x,
        cond=y,
        uncond=None,
        noise=noise,
        alpha_t=k_x,
        sigma_t=k_x,
        k_x0=k_y,
        k_x_t=k_x,
        k_eps=None,
        k_noise=k_noise,
        guidance_scale=None,
        prediction_type="sample",
        low=-math.inf,
        high=math.inf,
    )


class Posterior(torch.autograd.Function):
    """``k_x0 · x0 + k_x_t · x_t + k_noise · noise``: linear, so its backward is a multiplication of each row."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, x0: Tensor, x_t: Tensor, noise: Tensor, k_x0: Tensor, k_x_t: Tensor, k_noise: Tensor
    ) -> Tensor:
        ctx.backend = backend
        ctx.dtypes = (x0.dtype, x_t.dtype, noise.dtype)
        ctx.save_for_backward(k_x0, k_x_t, k_noise)
        return launch_mix(reverse_step, backend, x_t, x0, noise, k_x_t, k_x0, k_noise)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scales = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[1:4], strict=True)
        grads = (_scaled(ctx.backend, grad, k, dtype) if needed else None for k, dtype, needed in scales)
        return None, *grads, None, None, None


class Guidance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, cond: Tensor, uncond: Tensor, scale: Tensor) -> Tensor:
        ctx.backend = backend
        ctx.dtypes = (cond.dtype, uncond.dtype)
        ctx.save_for_backward(scale)
        return guidance(backend, cond=cond, uncond=uncond, scale=scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = ctx.saved_tensors
        scale = scale.expand(grad.shape[0])
        cond, uncond = (
            _scaled(ctx.backend, grad, k, dtype) if needed else None
            for k, dtype, needed in zip((scale, 1 - scale), ctx.dtypes, ctx.needs_input_grad[1:3], strict=True)
        )
        return None, cond, uncond, None


def _scaled(backend: str, grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """A row's gradient times its number, rounded once: to `dtype`, that of the input whose gradient it is."""
    wide = grad.to(torch.promote_types(grad.dtype, dtype))
    return _RowCombination.apply(backend, wide, scale, None, None).to(dtype)


# -- Checks and conversions of arguments


def check_discrete(schedule: NoiseSchedule) -> None:
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a fastgen.NoiseSchedule, got {type(schedule).__name__}")
    if schedule.num_timesteps is None:
        raise ValueError(
            f"schedule must be discrete, got {schedule.kind!r}: take NoiseSchedule.from_alphas_cumprod of its"
            " alpha_t² at the times wanted"
        )


def checked_times(schedule: NoiseSchedule, s: int | Tensor, t: int | Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(s, Tensor) and isinstance(t, Tensor):
        t = checks.indices("t", t, t)
        return checks.indices("s", s, t), t
    if isinstance(s, Tensor) or isinstance(t, Tensor):
        raise TypeError(f"s and t must both be ints or both be tensors, got {type(s).__name__} and {type(t).__name__}")
    s, t = checks.integer("s", s), checks.integer("t", t)
    if not -1 <= s < t < (schedule.num_timesteps or 0):
        raise ValueError(f"s and t must satisfy -1 <= s < t < {schedule.num_timesteps}, got {s} and {t}")
    return torch.tensor([s]), torch.tensor([t])


def check_row_numbers(name: str, value: Tensor, like: Tensor) -> None:
    """One number a row, or one for all."""
    checks.tensor(name, value)
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64 whatever the images are, got {value.dtype}")
    if value.dim() != 1 or value.shape[0] not in (1, like.shape[0]):
        raise ValueError(f"{name} must have shape [{like.shape[0]}] or [1], got {list(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, but the batch is on {like.device}")


def check_number_or_rows(name: str, value: float | Tensor, like: Tensor) -> None:
    if isinstance(value, Tensor):
        check_row_numbers(name, value, like)
    else:
        checks.number(name, value)


def vector(value: float | Tensor, *streams: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.full((1,), value, dtype=arithmetic_dtype(*streams), device=streams[0].device)


def scale_vector(scale: float | Tensor, uncond: Tensor | None, streams: list[Tensor]) -> Tensor | None:
    return None if uncond is None else vector(scale, *streams)


def check_step(
    x_t: Tensor,
    cond: Tensor,
    coefficients: Any,
    prediction_type: str,
    uncond: Tensor | None,
    guidance_scale: float | Tensor,
    noise: Tensor | None,
    clamp: tuple[float, float] | None,
) -> list[Tensor]:
    streams = {"x_t": x_t, "cond": cond}
    if uncond is not None:
        streams["uncond"] = uncond
    if noise is not None:
        streams["noise"] = noise
    checks.streams(**streams)
    if not isinstance(coefficients, StepCoefficients):
        raise TypeError(f"coefficients must be a fastgen.StepCoefficients, got {type(coefficients).__name__}")
    vectors, device = ((1,), x_t.shape[:1]), x_t.device
    for name, value in zip(coefficients._fields, coefficients, strict=True):
        well = type(value) is Tensor and value.shape in vectors and value.device == device
        if not (well and value.dtype is torch.float32):
            check_row_numbers(f"coefficients.{name}", value, x_t)
    checks.choice("prediction_type", prediction_type, PREDICTION_TYPES)
    check_number_or_rows("guidance_scale", guidance_scale, x_t)
    if uncond is None and (isinstance(guidance_scale, Tensor) or guidance_scale != 1):
        raise ValueError("guidance_scale other than 1 needs uncond")
    if clamp is not None:
        if not isinstance(clamp, (tuple, list)):
            raise TypeError(f"clamp must be (low, high) or None, got {type(clamp).__name__}")
        if len(clamp) != 2:
            raise ValueError(f"clamp must be (low, high), got {len(clamp)} numbers")
        low, high = (checks.number("clamp", bound) for bound in clamp)
        if low > high:
            raise ValueError(f"clamp must be (low, high) with low <= high, got {clamp}")
    return list(streams.values())


def check_langevin(
    x: Tensor,
    grad: Tensor,
    step_size: float | Tensor,
    noise_scale: float | Tensor,
    noise: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:
    """The noise, drawn where it is not given."""
    checks.streams(x=x, grad=grad, **checks.given(noise=noise))
    check_number_or_rows("step_size", step_size, x)
    check_number_or_rows("noise_scale", noise_scale, x)
    return randn_like(x, generator) if noise is None else noise


def langevin_numbers(
    x: Tensor, grad: Tensor, step_size: float | Tensor, noise_scale: float | Tensor, noise: Tensor
) -> tuple[Tensor, ...]:
    return tuple(vector(value, x, grad, noise) for value in (1.0, step_size, noise_scale))


def in_place(x: Tensor, *others: Tensor) -> bool:
    """Whether the kernel can write its rows over those of `x`."""
    # Of the imaginary part of a conjugate the memory holds the negatives. A compiled graph may not ask.
    if not torch.compiler.is_compiling() and x.is_neg():
        return False
    packed = x.is_contiguous() or x.shape[0] <= 1 or x.stride(0) == x[0].numel()
    return packed and shared_row_strides(x, *others) is not None
