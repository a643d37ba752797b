"""Operators of ``sampling``, and the checks of their arguments.

A step's coefficients are vectors of the rows' number, or of one element, for all rows. The kernels are in
``csrc/formulas/sampling.h`` and ``triton_kernels/sampling.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _backend, _checks, _layout
from .reference.sampling import StepCoefficients, randn_like
from .schedule import PREDICTION_TYPES, NoiseSchedule, _RowCombination

_STEP = (
    "Tensor cond, Tensor? uncond, Tensor? noise, Tensor alpha_t, Tensor sigma_t, Tensor k_x0, Tensor k_x_t,"
    " Tensor? k_eps, Tensor? k_noise, Tensor? guidance_scale, str prediction_type, float low, float high"
)


@_backend.operator(f"reverse_step(Tensor x_t, {_STEP}) -> Tensor")
def reverse_step(x_t: Tensor, cond: Tensor, uncond: Tensor | None, noise: Tensor | None, *_: Any) -> Tensor:
    present = [t for t in (x_t, cond, uncond, noise) if t is not None]
    return _layout.new_output(*present, dtype=x_t.dtype)


@_backend.operator(f"reverse_step_(Tensor(a!) x_t, {_STEP}) -> ()")
def reverse_step_(x_t: Tensor, *_: Any) -> None:
    return None


@_backend.operator("guidance(Tensor cond, Tensor uncond, Tensor scale) -> Tensor")
def guidance(cond: Tensor, uncond: Tensor, scale: Tensor) -> Tensor:
    return _layout.new_output(cond, uncond, dtype=torch.promote_types(cond.dtype, uncond.dtype))


def launch_step(
    op: _backend.Operator,
    backend: str,
    x_t: Tensor,
    cond: Tensor,
    coefficients: Sequence[Tensor | None],
    *,
    prediction_type: str,
    uncond: Tensor | None = None,
    guidance_scale: Tensor | None = None,
    noise: Tensor | None = None,
    clamp: tuple[float, float] | None = None,
) -> Any:
    """`op` is :func:`reverse_step` or :func:`reverse_step_`; the coefficients are those of a StepCoefficients."""
    low, high = (-math.inf, math.inf) if clamp is None else clamp
    return op.on(backend)(x_t, cond, uncond, noise, *coefficients, guidance_scale, prediction_type, low, high)


def launch_mix(
    op: _backend.Operator,
    backend: str,
    x: Tensor,
    y: Tensor,
    noise: Tensor | None,
    k_x: Tensor,
    k_y: Tensor,
    k_noise: Tensor | None,
) -> Any:
    """``k_x x + k_y y + k_noise noise``: a reverse step of which y is the x0, and which knows no noise level."""
    coefficients = (k_x, k_x, k_y, k_x, None, k_noise)
    return launch_step(op, backend, x, y, coefficients, prediction_type="sample", noise=noise)


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
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scales = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[1:4], strict=True)
        grads = (
            # Not rounded to the dtype of x_t first.
            _RowCombination.apply(ctx.backend, grad.to(torch.promote_types(grad.dtype, dtype)), k, None, None).to(dtype)
            if needed
            else None
            for k, dtype, needed in scales
        )
        return None, *grads, None, None, None


class Guidance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, cond: Tensor, uncond: Tensor, scale: Tensor) -> Tensor:
        ctx.backend = backend
        ctx.dtypes = (cond.dtype, uncond.dtype)
        ctx.save_for_backward(scale)
        return guidance.on(backend)(cond, uncond, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (scale,) = ctx.saved_tensors
        scale = scale.expand(grad.shape[0])
        cond, uncond = (
            _RowCombination.apply(ctx.backend, grad, k, None, None).to(dtype) if needed else None
            for k, dtype, needed in zip((scale, 1 - scale), ctx.dtypes, ctx.needs_input_grad[1:3], strict=True)
        )
        return None, cond, uncond, None


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
        _checks.indices("t", t, t)
        _checks.indices("s", s, t)
        return s, t
    if not (type(s) is int and type(t) is int):
        raise TypeError(f"s and t must both be ints or both be tensors, got {type(s).__name__} and {type(t).__name__}")
    if not -1 <= s < t < (schedule.num_timesteps or 0):
        raise ValueError(f"s and t must satisfy -1 <= s < t < {schedule.num_timesteps}, got {s} and {t}")
    return torch.tensor([s]), torch.tensor([t])


def check_row_numbers(name: str, value: Tensor, like: Tensor) -> None:
    """One number a row, or one for all."""
    _checks.tensor(name, value)
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
        _checks.number(name, value)


def vector(value: float | Tensor, *streams: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.full((1,), value, dtype=_layout.arithmetic_dtype(*streams), device=streams[0].device)


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
    _checks.streams(**streams)
    if not isinstance(coefficients, StepCoefficients):
        raise TypeError(f"coefficients must be a fastgen.StepCoefficients, got {type(coefficients).__name__}")
    vectors, device = ((1,), x_t.shape[:1]), x_t.device
    for name, value in zip(coefficients._fields, coefficients, strict=True):
        well = type(value) is Tensor and value.shape in vectors and value.device == device
        if not (well and value.dtype is torch.float32):
            check_row_numbers(f"coefficients.{name}", value, x_t)
    _checks.choice("prediction_type", prediction_type, PREDICTION_TYPES)
    check_number_or_rows("guidance_scale", guidance_scale, x_t)
    if uncond is None and (isinstance(guidance_scale, Tensor) or guidance_scale != 1):
        raise ValueError("guidance_scale other than 1 needs uncond")
    if clamp is not None:
        if not isinstance(clamp, (tuple, list)):
            raise TypeError(f"clamp must be (low, high) or None, got {type(clamp).__name__}")
        if len(clamp) != 2:
            raise ValueError(f"clamp must be (low, high), got {len(clamp)} numbers")
        low, high = (_checks.number("clamp", bound) for bound in clamp)
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
    _checks.streams(x=x, grad=grad, **_checks.given(noise=noise))
    check_number_or_rows("step_size", step_size, x)
    check_number_or_rows("noise_scale", noise_scale, x)
    return randn_like(x, generator) if noise is None else noise


def langevin_numbers(
    x: Tensor, grad: Tensor, step_size: float | Tensor, noise_scale: float | Tensor, noise: Tensor
) -> tuple[Tensor, ...]:
    return tuple(vector(value, x, grad, noise) for value in (1.0, step_size, noise_scale))


def needs_grad(*tensors: Tensor) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:  # a generator would take several times as long
            if t.requires_grad:
                return True
    return False


def in_place(x: Tensor, *others: Tensor) -> bool:
    """Whether the kernel can write its rows over those of `x`."""
    packed = x.is_contiguous() or x.shape[0] <= 1 or x.stride(0) == x[0].numel()
    return packed and _layout.shared_row_strides(x, *others) is not None
