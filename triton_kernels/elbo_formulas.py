"""The formulas of ELBO errors and of losses over them, as in ``csrc/elbo.h``. Streams: prediction p, target y, and in
differences the frozen reference prediction q."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .rowwise import Formula, Functions
from .scalar import divide, exp_negative, number, sigmoid, softplus

# -- Penalties on d = p - y: value and slope. NaN stays NaN.


@triton.jit
def _l2_value(d):
    return d * d


@triton.jit
def _l2_slope(d):
    return 2.0 * d


@triton.jit
def _l1_slope(d):
    return tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))


@triton.jit
def _huber_value(d):
    a = tl.abs(d)
    return tl.where(a < 1.0, 0.5 * d * d, a - 0.5)


@triton.jit
def _huber_slope(d):
    return tl.where(d > 1.0, 1.0, tl.where(d < -1.0, -1.0, d))


# -- error[i] = w_i * scale * sum_D penalty(p - y), and its derivative times grad[i]


class ErrorArgs(NamedTuple):
    weight: Tensor | None
    scale: float | int  # 1, or 1/D for the mean over elements
    error: Tensor | None = None
    grad: Tensor | None = None


@triton.jit
def row_scale(args, row, T: tl.constexpr):
    scale = number(args.scale, T)
    if args.weight is not None:
        scale = tl.load(args.weight + row) * scale
    return scale


@triton.jit
def error_row(args, row, rank, T: tl.constexpr):
    return (row_scale(args, row, T),)


@triton.jit
def _accumulate_l2(constants, v):
    return (_l2_value(v[0] - v[1]),)


@triton.jit
def _accumulate_l1(constants, v):
    return (tl.abs(v[0] - v[1]),)


@triton.jit
def _accumulate_huber(constants, v):
    return (_huber_value(v[0] - v[1]),)


@triton.jit
def error_epilogue(args, group, sums, T: tl.constexpr):
    tl.store(args.error + group, sums[0])
    return sums[0]


@triton.jit
def _error_backward_row(args, row, rank, T: tl.constexpr):
    return (tl.load(args.grad + row) * row_scale(args, row, T),)


@triton.jit
def _scale_coefficient(args, row, rank, constants, slope, T: tl.constexpr):
    return constants[0]


@triton.jit
def map_l2(constants, coefficient, v):
    return coefficient * _l2_slope(v[0] - v[1])


@triton.jit
def _map_l1(constants, coefficient, v):
    return coefficient * _l1_slope(v[0] - v[1])


@triton.jit
def _map_huber(constants, coefficient, v):
    return coefficient * _huber_slope(v[0] - v[1])


ELBO_ERROR = {
    loss: Formula(Functions(error_row, accumulate, error_epilogue), sums=1)
    for loss, accumulate in (("l2", _accumulate_l2), ("l1", _accumulate_l1), ("huber", _accumulate_huber))
}
ELBO_ERROR_BACKWARD = {
    loss: Formula(Functions(_error_backward_row, coefficient=_scale_coefficient, map=slope), map_streams=2)
    for loss, slope in (("l2", map_l2), ("l1", _map_l1), ("huber", _map_huber))
}
L1_DISTANCE = Formula(
    Functions(error_row, _accumulate_l1, error_epilogue, _scale_coefficient, _map_l1), sums=1, map_streams=2
)


# -- delta[i] = w_i * scale * sum_D (q - p)(q + p - 2y)


@triton.jit
def accumulate_difference(constants, v):
    # Factored: the difference of the two sums of squares would cancel.
    return ((v[2] - v[0]) * ((v[2] - v[1]) + (v[0] - v[1])),)


ELBO_DIFFERENCE = Formula(Functions(error_row, accumulate_difference, error_epilogue), sums=1)


# -- MaPO (arXiv 2406.06424) over pairs of errors, of which each has its slope


class PairArgs(NamedTuple):
    weight: Tensor | None
    scale: float | int
    term_scale: float | int
    beta: float | int
    error_scale: float | int
    timesteps: float | int
    term: Tensor  # [groups]
    error_slope: Tensor  # [rows]


@triton.jit
def _mapo_row(args, row, rank, T: tl.constexpr):
    winner = tl.where(rank == 0, 1.0, 0.0).to(T)
    return row_scale(args, row, T), winner


@triton.jit
def _mapo_accumulate(constants, v):
    error = _l2_value(v[0] - v[1])
    return constants[1] * error, (1.0 - constants[1]) * error


@triton.jit
def _odds(x):
    """x / expm1(x) - 1 and its derivative; near 0 by the series of the Bernoulli numbers, for both cancel there."""
    near = tl.abs(x) < 0.3
    y = x * x
    series = y * (1.0 / 47900160 - y * (691.0 / 1307674368000))
    series = y * (1.0 / 12 + y * (-1.0 / 720 + y * (1.0 / 30240 + y * (-1.0 / 1209600) + y * series)))
    slope = y * (10.0 / 47900160 - y * (12.0 * 691.0 / 1307674368000))
    slope = x * (2.0 / 12 + y * (-4.0 / 720 + y * (6.0 / 30240 + y * (-8.0 / 1209600) + y * slope)))
    large = tl.where(near, 1.0, x)
    e = exp_negative(-tl.abs(large))  # expm1(x) overflows; and f(-x) = f(x) + x
    f = divide(tl.abs(large) * e, 1.0 - e) + tl.where(large < 0.0, -large, 0.0)
    far_slope = divide(f * ((1.0 - f) - large), large)
    return tl.where(near, series - 0.5 * x, f - 1.0), tl.where(near, slope - 0.5, far_slope)


@triton.jit
def _mapo_epilogue(args, group, sums, T: tl.constexpr):
    scale, beta = number(args.error_scale, T), number(args.beta, T)
    winner, winner_slope = _odds(scale * sums[0])
    loser, loser_slope = _odds(scale * sums[1])
    timesteps, term_scale = number(args.timesteps, T), number(args.term_scale, T)
    x = timesteps * (loser - winner)
    tl.store(args.term + group, term_scale * (sums[0] + beta * softplus(x)))
    rate = term_scale * beta * sigmoid(x) * timesteps * scale
    return term_scale - rate * winner_slope, rate * loser_slope


@triton.jit
def _mapo_coefficient(args, row, rank, constants, slope, T: tl.constexpr):
    own = tl.where(rank == 0, slope[0], slope[1])
    tl.store(args.error_slope + row, own)
    return own * constants[0]


MAPO = Formula(Functions(_mapo_row, _mapo_accumulate, _mapo_epilogue, _mapo_coefficient, map_l2), 2, 2)
