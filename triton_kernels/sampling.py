"""Reverse diffusion steps and guidance, as in ``csrc/sampling.h``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import scalar
from .rowwise import Formula, Functions, Groups, Rows, run
from .scalar import divide, number
from .score_formulas import X0, _guided


class Numbers(NamedTuple):
    """A vector with a number for each row or, with stride 0, one for all."""

    data: Tensor
    stride: int


class StepArgs(NamedTuple):
    alpha_t: Numbers
    sigma_t: Numbers
    k_x0: Numbers
    k_x_t: Numbers
    k_eps: Numbers | None
    k_noise: Numbers | None
    guidance: Numbers | None
    clean: Any  # x0 = a x_t + b pred
    eps: Any  # and the noise
    bounds: tuple[float | int, float | int] | None


class GuidanceArgs(NamedTuple):
    scale: Numbers


@triton.jit
def _eps_epsilon(alpha, sigma):
    return tl.zeros_like(alpha), tl.zeros_like(alpha) + 1.0


@triton.jit
def _eps_sample(alpha, sigma):
    return divide(1.0, sigma), divide(-alpha, sigma)


@triton.jit
def _eps_v(alpha, sigma):
    norm = alpha * alpha + sigma * sigma
    return divide(sigma, norm), divide(alpha, norm)


@triton.jit
def _eps_flow(alpha, sigma):
    total = alpha + sigma
    return divide(1.0, total), divide(alpha, total)


EPS = {"epsilon": _eps_epsilon, "sample": _eps_sample, "v_prediction": _eps_v, "flow_prediction": _eps_flow}


@triton.jit
def _of_row(numbers, row, T: tl.constexpr):
    if numbers is None:
        return tl.zeros((), T)
    else:
        return tl.load(numbers.data + row * numbers.stride)


@triton.jit
def _bounds(bounds, T: tl.constexpr):
    if bounds is None:
        return ()  # what is None, Triton 3.6 cannot return
    else:
        return number(bounds[0], T), number(bounds[1], T)


@triton.jit
def _step_row(args, row, rank, T: tl.constexpr):
    alpha, sigma = _of_row(args.alpha_t, row, T), _of_row(args.sigma_t, row, T)
    clean_x, clean_pred = args.clean(alpha, sigma)
    rest_x, rest_pred = _of_row(args.k_x_t, row, T), tl.zeros((), T)
    if args.k_eps is not None:
        k = _of_row(args.k_eps, row, T)
        eps_x, eps_pred = args.eps(alpha, sigma)
        rest_x += tl.where(k == 0.0, 0.0, k * eps_x)  # without noise, sigma = 0, there is no eps
        rest_pred += tl.where(k == 0.0, 0.0, k * eps_pred)
    k_x0, k_noise = _of_row(args.k_x0, row, T), _of_row(args.k_noise, row, T)
    guidance = _of_row(args.guidance, row, T)
    return clean_x, clean_pred, rest_x, rest_pred, k_x0, k_noise, guidance, _bounds(args.bounds, T)


@triton.jit
def _step_map(constants, coefficient, v):
    clean_x, clean_pred, rest_x, rest_pred, k_x0, k_noise, guidance, bounds = constants
    pred = _guided(v[1], v[2], guidance)
    clean = clean_x * v[0] + clean_pred * pred
    if len(bounds) > 0:
        clean = tl.where(clean < bounds[0], bounds[0], tl.where(clean > bounds[1], bounds[1], clean))  # NaN stays NaN
    x_s = k_x0 * clean + (rest_x * v[0] + rest_pred * pred)
    if v[3] is not None:
        x_s += k_noise * v[3]
    return x_s


@triton.jit
def _no_coefficient(args, row, rank, constants, slope, T: tl.constexpr):
    return slope


@triton.jit
def _guidance_row(args, row, rank, T: tl.constexpr):
    return (_of_row(args.scale, row, T),)


@triton.jit
def _guidance_map(constants, coefficient, v):
    return _guided(v[0], v[1], constants[0])


STEP = Formula(Functions(_step_row, coefficient=_no_coefficient, map=_step_map), map_streams=4)
GUIDANCE = Formula(Functions(_guidance_row, coefficient=_no_coefficient, map=_guidance_map), map_streams=2)


def _numbers(rows: Rows, t: Tensor | None) -> Numbers | None:
    vector = rows.scalars(t)
    return None if vector is None else Numbers(vector, int(vector.shape[0] != 1))


def _step(
    out: Tensor | None,
    x_t: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    noise: Tensor | None,
    alpha_t: Tensor,
    sigma_t: Tensor,
    k_x0: Tensor,
    k_x_t: Tensor,
    k_eps: Tensor | None,
    k_noise: Tensor | None,
    guidance_scale: Tensor | None,
    prediction_type: str,
    low: float,
    high: float,
) -> Tensor:
    rows = Rows(x_t, cond, uncond, noise)
    if out is not None and (rows.first is not x_t or (rows.count > 1 and x_t.stride(0) != rows.size)):
        raise ValueError("reverse_step_: x_t must be packed, and the other tensors laid out like it")
    vectors = (_numbers(rows, t) for t in (alpha_t, sigma_t, k_x0, k_x_t, k_eps, k_noise, guidance_scale))
    clamps = low > -float("inf") or high < float("inf")
    bounds = (scalar.argument(low, rows.dtype), scalar.argument(high, rows.dtype)) if clamps else None
    out = rows.new_output(x_t.dtype) if out is None else out
    run(STEP, Groups(rows.count), rows, StepArgs(*vectors, X0[prediction_type], EPS[prediction_type], bounds), out)
    return out


def reverse_step(x_t: Tensor, **arguments: Any) -> Tensor:
    return _step(None, x_t, **arguments)


def reverse_step_(x_t: Tensor, **arguments: Any) -> None:
    _step(x_t, x_t, **arguments)


def guidance(cond: Tensor, uncond: Tensor, scale: Tensor) -> Tensor:
    rows = Rows(cond, uncond)
    out = rows.new_output(torch.promote_types(cond.dtype, uncond.dtype))
    run(GUIDANCE, Groups(rows.count), rows, GuidanceArgs(_numbers(rows, scale)), out)
    return out
