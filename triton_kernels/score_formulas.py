"""The formulas of score distillation: SDS (arXiv 2209.14988), VSD (arXiv 2305.16213), DMD (arXiv 2311.18828,
2405.14867) and Decoupled DMD (arXiv 2511.22677), as in ``csrc/score_distillation.h``.

Each is a gradient field G, whose loss is G²/2. A stream `uncond` is for guidance; a stream `gate`, a mask or a map of
weights, multiplies G: where it is 0, G is 0 whatever the rest is. Both are decided at compile time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .rowwise import Formula, Functions
from .scalar import divide, is_finite, number


class Loss(NamedTuple):
    term: Tensor  # [groups]
    coefficients: Any  # one vector [rows] a term: the gradient is coefficient * element
    stats: Tensor  # [2 * terms + 1, groups]: sums of |G|, normalisers, 1 if skipped
    groups: int
    elements: float | int  # of a group
    reduction: float | int  # d loss / d (sum of G²/2), to be divided by `count` where there is one
    count: Tensor | None


class ScoreArgs(NamedTuple):
    field: Any
    loss: Loss | None = None
    grad: Any = None  # of a backward pass: one vector of coefficients a term


# -- Predictions: x0 = a x_t + b pred


@triton.jit
def _x0_epsilon(alpha, sigma):
    return divide(1.0, alpha), divide(-sigma, alpha)


@triton.jit
def _x0_sample(alpha, sigma):
    return tl.zeros_like(alpha), tl.zeros_like(alpha) + 1.0


@triton.jit
def _x0_v(alpha, sigma):
    norm = alpha * alpha + sigma * sigma
    return divide(alpha, norm), divide(-sigma, norm)


@triton.jit
def _x0_flow(alpha, sigma):
    total = alpha + sigma  # 1 of a flow, in float32 too
    return divide(1.0, total), divide(-sigma, total)


X0 = {"epsilon": _x0_epsilon, "sample": _x0_sample, "v_prediction": _x0_v, "flow_prediction": _x0_flow}


# -- What all fields share


@triton.jit
def _row_weight(weight, row, T: tl.constexpr):
    if weight is None:
        return tl.full((), 1.0, T)
    else:
        return tl.load(weight + row)


@triton.jit
def _guided(cond, uncond, scale):
    if uncond is None:
        return cond
    else:
        return uncond + scale * (cond - uncond)


@triton.jit
def _gated(value, gate):
    if gate is None:
        return value
    else:
        return tl.where(gate == 0.0, 0.0, gate * value)


@triton.jit
def _normalizer(bounds, mean, T: tl.constexpr):
    """What divides G, from the mean of |x - r|. NaN stays NaN."""
    if bounds is None:
        return tl.full((), 1.0, T)
    else:
        minimum = number(bounds[0], T)
        return tl.where(mean < minimum, minimum, mean) + number(bounds[1], T)


@triton.jit
def _scaled(coefficient, value):
    # A coefficient of 0 marks a skipped row: its elements may be infinite, and 0 * inf is NaN.
    return tl.where(coefficient == 0.0, 0.0, coefficient * value)


@triton.jit
def _reduction(loss, T: tl.constexpr):
    scale = number(loss.reduction, T)
    if loss.count is not None:
        count = tl.load(loss.count)
        scale = divide(scale, tl.where(count < 1.0, 1.0, count))
    return scale


# -- Fields with one term


@triton.jit
def _accumulate_one(residual, g):
    return tl.abs(residual), g * g, tl.abs(g)


@triton.jit
def _finish_one(loss, group, n, sums, T: tl.constexpr):
    inverse = divide(1.0, n)
    g_abs = sums[2] * inverse
    finite = is_finite(n) & is_finite(inverse) & is_finite(g_abs)
    scale, elements = _reduction(loss, T), number(loss.elements, T)
    term = 0.5 * scale * elements * (sums[1] * inverse) * inverse
    tl.store(loss.term + group, tl.where(finite, term, 0.0))
    tl.store(loss.stats + group, tl.where(finite, elements * g_abs, 0.0))
    tl.store(loss.stats + loss.groups + group, n)
    tl.store(loss.stats + 2 * loss.groups + group, tl.where(finite, 0.0, 1.0).to(T))
    return tl.where(finite, scale * inverse, 0.0)


@triton.jit
def _store_coefficient(args, row, rank, constants, slope, T: tl.constexpr):
    tl.store(args.loss.coefficients[0] + row, slope)
    return slope


@triton.jit
def _load_coefficient(args, row, rank, constants, slope, T: tl.constexpr):
    return tl.load(args.grad[0] + row)


# -- G = w (pred_cfg - target), clipped. Streams: pred, target, uncond, gate


class Score(NamedTuple):
    weight: Tensor | None
    guidance: float | int
    clip: float | int
    scale: float | int


@triton.jit
def _score_row(args, row, rank, T: tl.constexpr):
    weight = _row_weight(args.field.weight, row, T)
    return number(args.field.scale, T), weight, number(args.field.guidance, T), number(args.field.clip, T)


@triton.jit
def _score_unclipped(constants, v):
    return _gated(constants[1] * (_guided(v[0], v[2], constants[2]) - v[1]), v[3])


@triton.jit
def _clipped(constants, g):
    clip = constants[3]
    return tl.where(g > clip, clip, tl.where(g < -clip, -clip, g))


@triton.jit
def _score_accumulate(constants, v):
    g = _score_unclipped(constants, v)
    return _accumulate_one(g, _clipped(constants, g))


@triton.jit
def _score_epilogue(args, group, sums, T: tl.constexpr):
    # Not finite where G was not before the clip, which would hide it.
    return _finish_one(args.loss, group, 1.0 + 0.0 * sums[0], sums, T)


@triton.jit
def _score_map(constants, coefficient, v):
    return _scaled(coefficient, _clipped(constants, _score_unclipped(constants, v)))


# -- G = w (f - r_cfg) / n, of predictions. Streams: real, fake, uncond, gate, x_t, x


class Dmd(NamedTuple):
    weight: Tensor | None
    alpha: Tensor
    sigma: Tensor
    real: Any
    fake: Any  # None: as `real`. Then x_t cancels from f - r, exactly, and the map does not read it
    guidance: float | int
    scale: float | int
    normalizer: tuple[float | int, float | int] | None = None  # the least mean, eps


@triton.jit
def _x0_pair(field, alpha, sigma):
    a, b = field.real(alpha, sigma)
    if field.fake is None:
        return a, b
    else:
        fake_a, fake_b = field.fake(alpha, sigma)
        return a, b, fake_a, fake_b


@triton.jit
def _dmd_row(args, row, rank, T: tl.constexpr):
    x0 = _x0_pair(args.field, tl.load(args.field.alpha + row), tl.load(args.field.sigma + row))
    return number(args.field.scale, T), _row_weight(args.field.weight, row, T), number(args.field.guidance, T), x0


@triton.jit
def _difference(x0, real, fake, x_t):
    if len(x0) == 2:
        return x0[1] * (fake - real)
    else:
        return (x0[2] * x_t + x0[3] * fake) - (x0[0] * x_t + x0[1] * real)


@triton.jit
def _dmd_accumulate(constants, v):
    x0 = constants[3]
    real = _guided(v[0], v[2], constants[2])
    g = _gated(constants[1] * _difference(x0, real, v[1], v[4]), v[3])
    return _accumulate_one(v[5] - (x0[0] * v[4] + x0[1] * real), g)


@triton.jit
def _dmd_epilogue(args, group, sums, T: tl.constexpr):
    return _finish_one(args.loss, group, _normalizer(args.field.normalizer, sums[0], T), sums, T)


@triton.jit
def _dmd_map_same(constants, coefficient, v):
    real = _guided(v[0], v[2], constants[2])
    return _scaled(coefficient, _gated(constants[1] * _difference(constants[3], real, v[1], None), v[3]))


@triton.jit
def _dmd_map(constants, coefficient, v):
    real = _guided(v[0], v[2], constants[2])
    return _scaled(coefficient, _gated(constants[1] * _difference(constants[3], real, v[1], v[4]), v[3]))


# -- G = w (f - r_cond)|DM / n_DM - w (s - 1) (r_cond - r_uncond)|CA / n_CA, each term at its own noise level.
# -- Streams: dm_real, dm_fake, ca_real, ca_uncond, gate, dm_x_t, ca_x_t, x


class Decoupled(NamedTuple):
    weight: Tensor | None
    dm_alpha: Tensor
    dm_sigma: Tensor
    ca_alpha: Tensor
    ca_sigma: Tensor
    real: Any
    fake: Any  # None: as `real`
    guidance: float | int  # s - 1
    scale: float | int
    normalizer: tuple[float | int, float | int] | None = None


@triton.jit
def _decoupled_row(args, row, rank, T: tl.constexpr):
    dm = _x0_pair(args.field, tl.load(args.field.dm_alpha + row), tl.load(args.field.dm_sigma + row))
    ca = args.field.real(tl.load(args.field.ca_alpha + row), tl.load(args.field.ca_sigma + row))
    weight = _row_weight(args.field.weight, row, T)
    return number(args.field.scale, T), weight, weight * number(args.field.guidance, T) * ca[1], dm, ca


@triton.jit
def _decoupled_ca(constants, v):
    return _gated(constants[2] * (v[3] - v[2]), v[4])


@triton.jit
def _decoupled_accumulate(constants, v):
    x0, ca_x0 = constants[3], constants[4]
    dm = _gated(constants[1] * _difference(x0, v[0], v[1], v[5]), v[4])
    ca = _decoupled_ca(constants, v)
    dm_residual = v[7] - (x0[0] * v[5] + x0[1] * v[0])
    ca_residual = v[7] - (ca_x0[0] * v[6] + ca_x0[1] * v[2])
    return tl.abs(dm_residual), tl.abs(ca_residual), tl.abs(dm), tl.abs(ca), dm * dm, dm * ca, ca * ca


@triton.jit
def _decoupled_epilogue(args, group, sums, T: tl.constexpr):
    loss = args.loss
    n_dm, n_ca = _normalizer(args.field.normalizer, sums[0], T), _normalizer(args.field.normalizer, sums[1], T)
    dm, ca = divide(1.0, n_dm), divide(1.0, n_ca)
    dm_abs, ca_abs = sums[2] * dm, sums[3] * ca
    finite = is_finite(n_dm) & is_finite(dm) & is_finite(dm_abs)
    finite = finite & is_finite(n_ca) & is_finite(ca) & is_finite(ca_abs)
    scale, elements = _reduction(loss, T), number(loss.elements, T)
    squares = sums[4] * dm * dm + 2.0 * sums[5] * dm * ca + sums[6] * ca * ca
    term = 0.5 * scale * elements * tl.where(squares < 0.0, 0.0, squares)
    tl.store(loss.term + group, tl.where(finite, term, 0.0))
    tl.store(loss.stats + group, tl.where(finite, elements * dm_abs, 0.0))
    tl.store(loss.stats + loss.groups + group, tl.where(finite, elements * ca_abs, 0.0))
    tl.store(loss.stats + 2 * loss.groups + group, n_dm)
    tl.store(loss.stats + 3 * loss.groups + group, n_ca)
    tl.store(loss.stats + 4 * loss.groups + group, tl.where(finite, 0.0, 1.0).to(T))
    return tl.where(finite, scale * dm, 0.0), tl.where(finite, scale * ca, 0.0)


@triton.jit
def _decoupled_store(args, row, rank, constants, slope, T: tl.constexpr):
    tl.store(args.loss.coefficients[0] + row, slope[0])
    tl.store(args.loss.coefficients[1] + row, slope[1])
    return slope


@triton.jit
def _decoupled_load(args, row, rank, constants, slope, T: tl.constexpr):
    return tl.load(args.grad[0] + row), tl.load(args.grad[1] + row)


@triton.jit
def _decoupled_sum(coefficient, dm, ca):
    return tl.where(coefficient[0] == 0.0, 0.0, coefficient[0] * dm + coefficient[1] * ca)


@triton.jit
def _decoupled_map_same(constants, coefficient, v):
    dm = _gated(constants[1] * _difference(constants[3], v[0], v[1], None), v[4])
    return _decoupled_sum(coefficient, dm, _decoupled_ca(constants, v))


@triton.jit
def _decoupled_map(constants, coefficient, v):
    dm = _gated(constants[1] * _difference(constants[3], v[0], v[1], v[5]), v[4])
    return _decoupled_sum(coefficient, dm, _decoupled_ca(constants, v))


SCORE = Formula(
    Functions(_score_row, _score_accumulate, _score_epilogue, _store_coefficient, _score_map), sums=3, map_streams=4
)
SCORE_BACKWARD = Formula(Functions(_score_row, coefficient=_load_coefficient, map=_score_map), map_streams=4)
# By whether both networks predict the same quantity.
DMD = {
    same: Formula(Functions(_dmd_row, _dmd_accumulate, _dmd_epilogue, _store_coefficient, value), 3, streams)
    for same, value, streams in ((True, _dmd_map_same, 4), (False, _dmd_map, 5))
}
DMD_BACKWARD = {
    same: Formula(Functions(_dmd_row, coefficient=_load_coefficient, map=formula.functions.map), 0, formula.map_streams)
    for same, formula in DMD.items()
}
DECOUPLED = {
    same: Formula(
        Functions(_decoupled_row, _decoupled_accumulate, _decoupled_epilogue, _decoupled_store, value), 7, streams
    )
    for same, value, streams in ((True, _decoupled_map_same, 5), (False, _decoupled_map, 6))
}
DECOUPLED_BACKWARD = {
    same: Formula(
        Functions(_decoupled_row, coefficient=_decoupled_load, map=formula.functions.map), 0, formula.map_streams
    )
    for same, formula in DECOUPLED.items()
}
