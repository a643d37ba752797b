"""The generalized Jensen-Shannon divergence of logits (arXiv 2306.13649), forward and backward KL among its ends.

With P the teacher's and Q the student's softmax(logits / τ) and M = βP + (1 - β)Q, a row's loss is β KL(P‖M) +
(1 - β) KL(Q‖M); for β = 0 it is KL(P‖Q), for β = 1 KL(Q‖P). Streams: student, teacher, and the student's gradient.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import scalar
from .scalar import divide, exp2m1, log2_near, number
from .sweep import LOG2E, Formula, Functions, LogitRows, sweep, sweep_map

LN2 = tl.constexpr(math.log(2))


class Args(NamedTuple):
    labels: Tensor | None
    ignore: int
    factor: Tensor | None  # of the call, one number
    grad: Tensor | None  # of the rows
    loss: Tensor | None
    stats: Tensor  # [5, rows]: largest logit and sum of the student, of the teacher; center
    slope: Any  # 1 / τ
    scale: Any  # log2(e) / τ: from differences of logits to base-2 logarithms of probabilities
    temperature: Any
    beta: Any  # None at the ends
    rest: Any  # 1 - β


def _args(
    dtype: torch.dtype,
    labels: Tensor | None,
    ignore_index: int,
    factor: Tensor | None,
    grad: Tensor | None,
    loss: Tensor | None,
    stats: Tensor,
    beta: float,
    temperature: float,
) -> Args:
    numbers = [scalar.argument(x, dtype) for x in (1 / temperature, LOG2E.value / temperature, temperature)]
    mixture = [None if beta in (0, 1) else scalar.argument(x, dtype) for x in (beta, 1 - beta)]
    labels = None if labels is None else labels.contiguous()
    return Args(labels, ignore_index, factor, grad, loss, stats.contiguous(), *numbers, *mixture)


@triton.jit
def _ignored(args, row):
    if args.labels is None:
        return tl.full((), 0, tl.int1)
    else:
        return tl.load(args.labels + row) == args.ignore


@triton.jit
def _exact_offset(high, low, temperature):
    """What `high` lies above `low`, rounded to a multiple of the last place of all logits of these maxima that matter
    (from 16 temperatures below): it can be subtracted from the logits of larger magnitude without rounding them."""
    reach = tl.maximum(tl.abs(high), tl.abs(low)) + 16.0 * temperature
    grain = 24.0 * tl.minimum(reach, 1e29)  # adding it rounds to its last place, 16 to 32 of reach's
    return ((high - low) + grain) - grain


@triton.jit
def _norms(student, teacher, temperature, scale, T: tl.constexpr):
    """Of two normalizers, what :func:`_pair` takes: offset, largest logit without it and 1 / sum, of Q then of P,
    and in units of the logits how much smaller log P is for equal logits without the offsets.

    What the one row lies above the other means nothing. The offsets, of which one is 0, take it from the row of the
    larger logits. Of the sums it takes one logarithm: the difference of two of some 10 would round it.
    """
    of_teacher = tl.abs(teacher[0]) > tl.abs(student[0])
    above = _exact_offset(teacher[0], student[0], temperature)
    s, t = tl.where(of_teacher, 0.0, -above), tl.where(of_teacher, above, 0.0)
    shift = ((teacher[0] - t) - (student[0] - s)) - divide(tl.log2(divide(student[1], teacher[1])), scale)
    one = tl.full((), 1.0, T)
    return s, student[0] - s, divide(one, student[1]), t, teacher[0] - t, divide(one, teacher[1]), shift


@triton.jit
def _row(args, rows, row, normals, read, T: tl.constexpr):
    """(norms, numbers of the element, the unit of sums, what the gradient is times, center, normals).

    KL divergences sum in units of the logits, where τ = 1 rounds nothing, mixtures logarithms of base 2."""
    center = tl.zeros((), T)
    if normals is None:
        stats = args.stats + row
        normals = (tl.load(stats), tl.load(stats + rows)), (tl.load(stats + 2 * rows), tl.load(stats + 3 * rows))
        normals = (
            (normals[0][0], tl.where(read, normals[0][1], 1.0)),
            (normals[1][0], tl.where(read, normals[1][1], 1.0)),
        )
        center = tl.load(stats + 4 * rows)
    slope, scale, temperature = number(args.slope, T), number(args.scale, T), number(args.temperature, T)
    factor = slope
    if args.grad is not None:
        factor *= tl.load(args.grad + row)
    if args.factor is not None:
        factor *= tl.load(args.factor)
    norms = _norms(normals[0], normals[1], temperature, scale, T)
    if args.beta is not None:
        beta, rest = number(args.beta, T), number(args.rest, T)
        return norms, (scale, beta, rest), tl.full((), LN2, T), factor * rest, center, normals
    else:
        return norms, (scale, temperature, temperature), slope, factor, center, normals


@triton.jit
def _pair(norms, scale, v):
    """Of a pair of logits: d = log P - log Q in units of the logits, whether P is larger, -|d| in base 2, the larger of
    the two, 2^-|d| and that - 1.

    Everything follows from these: nothing overflows, and where Q is close to P no digits cancel."""
    s_offset, s_largest, s_share, t_offset, t_largest, t_share, shift = norms
    # Of logits that are not normalised: those of close models subtract exactly. Equal ones may both be -inf.
    s, t = v[0] - s_offset, v[1] - t_offset
    d = tl.where(s == t, 0.0, t - s) - shift
    above = d > 0.0
    gap = -tl.abs(d * scale)
    ratio, minus_one = exp2m1(gap)
    larger = tl.exp2(tl.where(above, t - t_largest, s - s_largest) * scale) * tl.where(above, t_share, s_share)
    return d, above, gap, larger, ratio, minus_one


@triton.jit
def _kl_pair(constants, v):
    """d, Q, P, Q - P and the last with its temperature: it sums to 0, makes every share of a KL divergence non-negative
    and cancels what the rounding of the sums adds."""
    d, above, _, larger, ratio, minus_one = _pair(constants[0], constants[1][0], v)
    smaller = larger * ratio
    difference = larger * tl.where(above, minus_one, -minus_one)
    balance = difference * constants[1][1]
    return d, tl.where(above, smaller, larger), tl.where(above, larger, smaller), difference, balance


@triton.jit
def _forward_element(constants, v):
    d, _, p, difference, balance = _kl_pair(constants, v)
    return (difference,), (tl.where(p == 0.0, 0.0, p * d) + balance,)


@triton.jit
def _reverse_element(constants, v):
    d, q, _, _, balance = _kl_pair(constants, v)
    from_q = tl.where(q == 0.0, 0.0, -q * d)
    return (from_q, q), (from_q - balance, from_q)


@triton.jit
def _mixed_element(constants, v):
    scale, beta, rest = constants[1]
    _, above, gap, larger, ratio, minus_one = _pair(constants[0], scale, v)
    smaller = larger * ratio
    q, p = tl.where(above, smaller, larger), tl.where(above, larger, smaller)
    other = tl.where(above, rest, beta)
    mixture = log2_near(tl.where(above, beta, rest) + other * ratio, other * minus_one)  # of M / larger
    from_smaller = gap - mixture
    from_q = tl.where(q == 0.0, 0.0, q * tl.where(above, from_smaller, -mixture))
    from_p = tl.where(p == 0.0, 0.0, p * tl.where(above, -mixture, from_smaller))
    return (from_q, q), (beta * from_p + rest * from_q, from_q)


@triton.jit
def _epilogue(args, rows, row, constants, sums, read, T: tl.constexpr):
    norms, numbers, unit, factor, center, normals = constants
    loss = sums[0] * unit
    if args.factor is not None:
        loss *= tl.load(args.factor)
    tl.store(args.loss + row, tl.where(read, loss, 0.0))
    if len(sums) > 1:
        center = sums[1] * unit
    stored = (normals[0][0], normals[0][1], normals[1][0], normals[1][1], center)
    for i in tl.static_range(5):
        tl.store(args.stats + i * rows + row, tl.where(read, stored[i], 0.0))
    return norms, numbers, unit, factor, center, normals


@triton.jit
def _forward_map(constants, parts):
    return parts[0] * constants[3]


@triton.jit
def _map(constants, parts):
    return (parts[0] * constants[2] - constants[4] * parts[1]) * constants[3]


FORWARD = Formula(Functions(_ignored, _row, _forward_element, _epilogue, _forward_map), sums=1, maps_at_once=True)
REVERSE = Formula(Functions(_ignored, _row, _reverse_element, _epilogue, _map), sums=2)
MIXED = Formula(Functions(_ignored, _row, _mixed_element, _epilogue, _map), sums=2)


def _formula(beta: float) -> Formula:
    return FORWARD if beta == 0 else REVERSE if beta == 1 else MIXED


def _rows(student: Tensor, teacher: Tensor, out: Tensor | None) -> LogitRows:
    """Over the vocabulary that the two share."""
    size = min(student.shape[-1], teacher.shape[-1])
    return LogitRows(student[..., :size], teacher[..., :size], out=out)


def generalized_jsd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    scale: Tensor | None,
    beta: float,
    temperature: float,
    ignore_index: int,
    reduction: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad = student.new_empty(student.shape if with_grad else (0,))
    rows = _rows(student, teacher, grad if with_grad else None)
    shape = student.shape[:-1]
    loss, stats = rows.new_vector(*shape), rows.new_vector(5, *shape)
    factor = None if scale is None else scale.to(rows.dtype)
    sweep(_formula(beta), rows, _args(rows.dtype, labels, ignore_index, factor, None, loss, stats, beta, temperature))
    return loss if reduction == "none" else loss.sum(), stats, grad


def generalized_jsd_backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    stats: Tensor,
    beta: float,
    temperature: float,
    ignore_index: int,
) -> Tensor:
    out = student.new_empty(student.shape)
    rows = _rows(student, teacher, out)
    args = _args(rows.dtype, labels, ignore_index, None, rows.scalars(grad), None, stats, beta, temperature)
    sweep_map(_formula(beta), rows, args)
    return out
