"""Post-training by reward, as in ``csrc/policy.h``: DiffusionNFT (arXiv 2509.16117), Flow-GRPO (arXiv 2505.05470)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import scalar
from .rowwise import Formula, Functions, Groups, Rows, run
from .scalar import divide, number, rounded
from .score_formulas import X0

# -- x0± = a x_t + b (old ± beta (pred - old)). Streams: pred, old_pred, x_t, x0, ref_pred or None


class Nft(NamedTuple):
    alpha: Tensor
    sigma: Tensor
    clean: Any  # x0 = a x_t + b pred
    beta: float | int
    mean: float | int  # 1/D
    r: Tensor | None = None
    scale: float | int = 0
    kl_weight: float | int = 0
    least: float | int = 0
    term_scale: float | int = 0
    term: Tensor | None = None  # [rows]
    slopes: Any = None  # three vectors [rows]; of a backward pass, times the loss's gradient
    stats: Any = None  # five vectors [rows]


@triton.jit
def _nft_row(args, row, rank, T: tl.constexpr):
    a, b = args.clean(tl.load(args.alpha + row), tl.load(args.sigma + row))
    return number(args.mean, T), a, b, number(args.beta, T)


@triton.jit
def _branches(constants, v):
    old = (constants[1] * v[2] + constants[2] * v[1]) - v[3]
    step = constants[2] * (constants[3] * (v[0] - v[1]))
    return old + step, old - step


@triton.jit
def _nft_accumulate(constants, v):
    plus, minus = _branches(constants, v)
    if v[4] is None:
        return tl.abs(plus), tl.abs(minus), plus * plus, minus * minus, tl.zeros_like(plus)
    else:
        kl = (v[0] - v[4]) * (v[0] - v[4])
        return tl.abs(plus), tl.abs(minus), plus * plus, minus * minus, kl


@triton.jit
def _nft_epilogue(args, row, sums, T: tl.constexpr):
    least = number(args.least, T)
    n_plus = tl.where(sums[0] < least, least, sums[0])  # NaN stays NaN
    n_minus = tl.where(sums[1] < least, least, sums[1])
    plus, minus = divide(sums[2], n_plus), divide(sums[3], n_minus)
    good = tl.load(args.r + row)
    bad = 1.0 - good
    scale, kl_weight, term_scale = number(args.scale, T), number(args.kl_weight, T), number(args.term_scale, T)
    branches = divide(good * plus + bad * minus, number(args.beta, T))
    tl.store(args.term + row, term_scale * (scale * branches + kl_weight * sums[4]))
    tl.store(args.stats[0] + row, plus)
    tl.store(args.stats[1] + row, minus)
    tl.store(args.stats[2] + row, sums[4])
    tl.store(args.stats[3] + row, n_plus)
    tl.store(args.stats[4] + row, n_minus)
    twice = 2.0 * term_scale
    return divide(twice * scale * good, n_plus), divide(-twice * scale * bad, n_minus), twice * kl_weight


@triton.jit
def _nft_by_row(constants, slopes):
    b = constants[0] * constants[2]
    return b * slopes[0], b * slopes[1], constants[0] * slopes[2]


@triton.jit
def _nft_coefficient(args, row, rank, constants, slopes, T: tl.constexpr):
    tl.store(args.slopes[0] + row, slopes[0])
    tl.store(args.slopes[1] + row, slopes[1])
    tl.store(args.slopes[2] + row, slopes[2])
    return _nft_by_row(constants, slopes)


@triton.jit
def _nft_load(args, row, rank, constants, slope, T: tl.constexpr):
    slopes = tl.load(args.slopes[0] + row), tl.load(args.slopes[1] + row), tl.load(args.slopes[2] + row)
    return _nft_by_row(constants, slopes)


@triton.jit
def _nft_map(constants, coefficient, v):
    plus, minus = _branches(constants, v)
    gradient = coefficient[0] * plus + coefficient[1] * minus
    if v[4] is None:
        return gradient
    else:
        return gradient + coefficient[2] * (v[0] - v[4])


NFT = Formula(Functions(_nft_row, _nft_accumulate, _nft_epilogue, _nft_coefficient, _nft_map), 5, 5)
NFT_BACKWARD = Formula(Functions(_nft_row, coefficient=_nft_load, map=_nft_map), map_streams=5)


def _nft(rows: Rows, alpha_t: Tensor, sigma_t: Tensor, prediction_type: str, beta: float) -> Nft:
    numbers = (scalar.argument(value, rows.dtype) for value in (beta, 1 / max(rows.size, 1)))
    return Nft(rows.scalars(alpha_t), rows.scalars(sigma_t), X0[prediction_type], *numbers)


def diffusion_nft_loss(
    pred: Tensor,
    old_pred: Tensor,
    x_t: Tensor,
    x0: Tensor,
    ref_pred: Tensor | None,
    alpha_t: Tensor,
    sigma_t: Tensor,
    prediction_type: str,
    beta: float,
    r: Tensor,
    loss_scale: float,
    kl_weight: float,
    normalizer_min: float,
    reduction: str,
    scale: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = Rows(pred, old_pred, x_t, x0, ref_pred)
    term, slopes, stats = (rows.new_vector(n * rows.count) for n in (1, 3, 5))
    grad_pred = rows.new_output(pred.dtype) if with_grad else None
    numbers = (scalar.argument(value, rows.dtype) for value in (loss_scale, kl_weight, normalizer_min, scale))
    args = _nft(rows, alpha_t, sigma_t, prediction_type, beta)
    args = Nft(*args[:5], rows.scalars(r), *numbers, term, slopes.tensor_split(3), stats.tensor_split(5))
    run(NFT, Groups(rows.count), rows, args, grad_pred)
    return (
        term if reduction == "none" else term.sum(),
        slopes.view(3, rows.count),
        stats.view(5, rows.count),
        pred.new_empty((0,)) if grad_pred is None else grad_pred,
    )


def diffusion_nft_loss_backward(
    row_grad: Tensor,
    pred: Tensor,
    old_pred: Tensor,
    x_t: Tensor,
    x0: Tensor,
    ref_pred: Tensor | None,
    alpha_t: Tensor,
    sigma_t: Tensor,
    prediction_type: str,
    beta: float,
) -> Tensor:
    rows = Rows(pred, old_pred, x_t, x0, ref_pred)
    args = _nft(rows, alpha_t, sigma_t, prediction_type, beta)._replace(slopes=rows.scalars(row_grad).unbind())
    grad_pred = rows.new_output(pred.dtype)
    run(NFT_BACKWARD, Groups(rows.count), rows, args, grad_pred)
    return grad_pred


# -- mean = k_x x_t + k_v pred, and the log-probability around it of `sample`, or of mean + std noise, which is drawn.
# Streams: pred, x_t, sample or noise


class Flow(NamedTuple):
    k_v: Tensor
    std: Tensor
    share: float | int  # 1/D
    k_x: Tensor | None = None
    log_prob: Tensor | None = None
    grad: Tensor | None = None
    drawn: Tensor | None = None


@triton.jit
def _flow_row(args, row, rank, T: tl.constexpr):
    return number(args.share, T), tl.load(args.k_x + row), tl.load(args.k_v + row)


@triton.jit
def _flow_mean(constants, coefficient, v):
    return constants[1] * v[1] + constants[2] * v[0]


@triton.jit
def _flow_accumulate(constants, v):
    error = v[2] - _flow_mean(constants, None, v)
    return (error * error,)


@triton.jit
def _draw_row(args, row, rank, T: tl.constexpr):
    # The last carries the dtype that the sample is stored in: the log-probability is that of the stored sample.
    stored = tl.zeros((), args.drawn.dtype.element_ty)
    return number(args.share, T), tl.load(args.k_x + row), tl.load(args.k_v + row), tl.load(args.std + row), stored


@triton.jit
def _draw(constants, v):
    return _flow_mean(constants, None, v) + constants[3] * v[2]


@triton.jit
def _draw_accumulate(constants, v):
    drawn = _draw(constants, v)
    error = rounded(drawn, constants[4].dtype).to(drawn.dtype) - _flow_mean(constants, None, v)
    return (error * error,)


@triton.jit
def _flow_epilogue(args, row, sums, T: tl.constexpr):
    std = tl.load(args.std + row)
    half_log_2_pi = tl.full((), 0.91893853320467274178, T)
    tl.store(args.log_prob + row, divide(-sums[0], 2.0 * std * std) - tl.log(std) - half_log_2_pi)
    return sums[0]


@triton.jit
def _flow_coefficient(args, row, rank, constants, slope, T: tl.constexpr):
    return constants[0]


@triton.jit
def _flow_backward_row(args, row, rank, T: tl.constexpr):
    k_v, std = tl.load(args.k_v + row), tl.load(args.std + row)
    return k_v * divide(tl.load(args.grad + row) * number(args.share, T), std * std), k_v


# Streams: sample, mean, grad_mean or None


@triton.jit
def _flow_backward_map(constants, coefficient, v):
    gradient = constants[0] * (v[0] - v[1])
    if v[2] is None:
        return gradient
    else:
        return gradient + constants[1] * v[2]


FLOW = Formula(Functions(_flow_row, _flow_accumulate, _flow_epilogue, _flow_coefficient, _flow_mean), 1, 2)
FLOW_DRAW = Formula(Functions(_draw_row, _draw_accumulate, _flow_epilogue, _flow_coefficient, _flow_mean, _draw), 1, 3)
FLOW_BACKWARD = Formula(
    Functions(_flow_backward_row, coefficient=_flow_coefficient, map=_flow_backward_map), map_streams=3
)


def _flow(rows: Rows, k_v: Tensor, std: Tensor) -> Flow:
    return Flow(rows.scalars(k_v), rows.scalars(std), scalar.argument(1 / max(rows.size, 1), rows.dtype))


def flow_sde_step(
    pred: Tensor, x_t: Tensor, sample: Tensor, k_x: Tensor, k_v: Tensor, std: Tensor
) -> tuple[Tensor, Tensor]:
    rows = Rows(pred, x_t, sample)
    mean, log_prob = rows.new_output(rows.dtype), rows.new_vector(rows.count)
    args = _flow(rows, k_v, std)._replace(k_x=rows.scalars(k_x), log_prob=log_prob)
    run(FLOW, Groups(rows.count), rows, args, mean)
    return mean, log_prob


def flow_sde_draw(
    x_t: Tensor, pred: Tensor, noise: Tensor, k_x: Tensor, k_v: Tensor, std: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows = Rows(pred, x_t, noise)
    sample, mean, log_prob = rows.new_output(x_t.dtype), rows.new_output(rows.dtype), rows.new_vector(rows.count)
    args = _flow(rows, k_v, std)._replace(k_x=rows.scalars(k_x), log_prob=log_prob, drawn=sample)
    run(FLOW_DRAW, Groups(rows.count), rows, args, mean, sample)
    return sample, mean, log_prob


def flow_sde_step_backward(
    grad_log_prob: Tensor,
    sample: Tensor,
    mean: Tensor,
    grad_mean: Tensor | None,
    k_v: Tensor,
    std: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    rows = Rows(sample, mean, grad_mean, dtype=dtype)
    grad = rows.new_output(dtype)
    args = _flow(rows, k_v, std)._replace(grad=rows.scalars(grad_log_prob))
    run(FLOW_BACKWARD, Groups(rows.count), rows, args, grad)
    return grad
