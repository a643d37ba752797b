"""Operators of ``sampling``. A step's coefficients are vectors of the rows' number or of one element, for all rows.

The kernels are in ``csrc/formulas/sampling.h`` and ``triton_kernels/sampling.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _backend, _layout
from .reference.sampling import StepCoefficients
from .schedule import _RowCombination

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
    pred: Tensor,
    coefficients: StepCoefficients,
    *,
    prediction_type: str,
    uncond: Tensor | None = None,
    guidance_scale: Tensor | None = None,
    noise: Tensor | None = None,
    clamp: tuple[float, float] | None = None,
) -> Any:
    """:func:`reverse_step` or :func:`reverse_step_`, which `op` is."""
    low, high = (-math.inf, math.inf) if clamp is None else clamp
    return op.on(backend)(x_t, pred, uncond, noise, *coefficients, guidance_scale, prediction_type, low, high)


class Posterior(torch.autograd.Function):
    """``k_x0 · x0 + k_x_t · x_t + k_noise · noise``: linear, so its backward is a multiplication of each row."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, x0: Tensor, x_t: Tensor, noise: Tensor, k_x0: Tensor, k_x_t: Tensor, k_noise: Tensor
    ) -> Tensor:
        ctx.backend = backend
        ctx.dtypes = (x0.dtype, x_t.dtype, noise.dtype)
        ctx.save_for_backward(k_x0, k_x_t, k_noise)
        return mix(reverse_step, backend, x_t, x0, noise, k_x0, k_x_t, k_noise)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scales = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[1:4], strict=True)
        grads = (
            _RowCombination.apply(ctx.backend, grad, k, None, None).to(dtype) if needed else None
            for k, dtype, needed in scales
        )
        return None, *grads, None, None, None


def mix(
    op: _backend.Operator,
    backend: str,
    x: Tensor,
    y: Tensor,
    noise: Tensor | None,
    k_y: Tensor,
    k_x: Tensor,
    k_noise: Tensor,
) -> Any:
    """``k_x x + k_y y + k_noise noise``, a reverse step of which y is the x0."""
    unused = StepCoefficients(k_x, k_x, k_y, k_x, None, k_noise)  # type: ignore[arg-type]
    return launch_step(op, backend, x, y, unused, prediction_type="sample", noise=noise)


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
