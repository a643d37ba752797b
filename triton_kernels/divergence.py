"""The generalized Jensen-Shannon divergence of logits (arXiv 2306.13649), forward and backward KL among its ends.

With P the teacher's and Q the student's softmax(logits / τ) and M = βP + (1 - β)Q, a row's loss is β KL(P‖M) +
(1 - β) KL(Q‖M); for β = 0 it is KL(P‖Q), for β = 1 KL(Q‖P). Streams: student, teacher, and the student's gradient.

A cross-entropy of labels may be added at τ = 1, where its softmax is Q: of its gradient Q - onehot the map adds Q, and
a kernel of one element a row writes the labels' columns after it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rowwise, scalar
from .scalar import NEAR, divide, expm1, expm1_near, log2_fast, number, origin, rounded
from .sweep import LOG2E, LogitRows, SweepFormula, SweepFunctions, sweep, sweep_map
from .tiles import both, row_start

LN2 = tl.constexpr(math.log(2))
NEAR2 = tl.constexpr(NEAR.value / math.log(2))
TERMS = 5
ROWS_AT_ONCE = 128  # of a program that writes one element a row


class HardLabels(NamedTuple):
    """What finds the labels' logits, and their cross-entropy's weight."""

    data: tuple[Tensor, ...]
    places: tuple[Any, ...]
    inner: int
    size: int
    weight: Any


class DivergenceArgs(NamedTuple):
    labels: Tensor | None
    ignore: int
    hard: HardLabels | None
    cross_entropy: Tensor | None
    factor: Tensor | None  # of the call, one number
    grad: Tensor | None  # of the rows
    loss: Tensor | None
    stats: Tensor  # [5, rows]: largest logit and sum of the student, of the teacher; center
    slope: Any  # 1 / τ
    scale: Any  # log2(e) / τ: from differences of logits to base-2 logarithms of probabilities
    temperature: Any
    beta: Any  # None at the ends
    rest: Any  # 1 - β
    odds: Any  # that / β: a mixed loss is summed over β
    over_p: Any  # 1 where log M is taken over P, which weighs more, and d with it; else None, and it is over Q
    terms: Any  # of log2 M/Q in log2 P/Q, near 0; or of M/P in Q/P


def mixture_terms(beta: float) -> list[float]:
    """The first coefficients of log2(1 - β + β 2^d) in d: cumulants of a coin that shows 1 with probability β, over
    factorials."""
    mean = [beta]  # the series of β e^u / (1 - β + β e^u), whose integral is the logarithm: p' = p (1 - p)
    for n in range(TERMS - 1):
        mean.append((mean[n] - sum(mean[i] * mean[n - i] for i in range(n + 1))) / (n + 1))
    return [m / (n + 1) * LN2.value**n for n, m in enumerate(mean)]


def _args(
    rows: LogitRows,
    labels: Tensor | None,
    ignore_index: int,
    cross_entropy_weight: float,
    factor: Tensor | None,
    grad: Tensor | None,
    loss: Tensor | None,
    cross_entropy: Tensor | None,
    stats: Tensor,
    beta: float,
    temperature: float,
) -> DivergenceArgs:
    dtype, hard = rows.dtype, None
    if cross_entropy_weight != 0:
        if labels is None or temperature != 1 or rows.size != rows.first.shape[-1]:
            raise ValueError("generalized_jsd: a cross-entropy wants labels, temperature 1 and a teacher as wide")
        weight = scalar.argument(cross_entropy_weight, dtype)
        hard = HardLabels(rows.data[:2], rows.places[:2], rows.inner, rows.size, weight)
    numbers = [scalar.argument(x, dtype) for x in (1 / temperature, LOG2E.value / temperature, temperature)]
    mixture: tuple[Any, ...] = (None, None, None, None, None)
    if beta not in (0, 1):
        mixture = tuple(scalar.argument(x, dtype) for x in (beta, 1 - beta, (1 - beta) / beta))
        # Of the other's logarithm over M, a difference from d, a small weight leaves much.
        mixture += (1 if _over_p(beta) else None,)
        mixture += (tuple(scalar.argument(x, dtype) for x in mixture_terms(min(beta, 1 - beta))),)
    labels = None if labels is None else labels.contiguous()
    of_rows = factor, grad, loss, stats.contiguous()
    return DivergenceArgs(labels, ignore_index, hard, cross_entropy, *of_rows, *numbers, *mixture)


@triton.jit
def _ignored(args, row):
    if args.labels is None:
        return tl.full((), 0, tl.int1)
    else:
        return tl.load(args.labels + row) == args.ignore


@triton.jit
def _label(labels, hard, row, read, T: tl.constexpr):
    """The label's column, whether there is one, and what its cross-entropy is times in the gradient: 0 outside."""
    label = tl.load(labels + row)
    inside = both((label >= 0) & (label < hard.size), read)
    return label, inside, tl.where(inside, number(hard.weight, T), 0.0)


@triton.jit
def _label_logit(hard, stream: tl.constexpr, row, label, inside, T: tl.constexpr):
    """The student's logit of a label, or the teacher's."""
    start = row_start(hard.places[stream], row, hard.inner)
    return tl.load(hard.data[stream] + start + label, mask=inside, other=0.0).to(T)


@triton.jit
def _offsets(student, teacher, temperature):
    """What each of two rows gives up before their logits are subtracted, given their largest. A constant between the
    rows means nothing, and must round nothing.

    The row of larger magnitude gives up what it lies above the other, rounded to a multiple of the last place of all
    its logits that matter (those from 16 temperatures below the largest), which rounds none of them. Where that place
    is more than a temperature, what is left of the constant would round the other row: then each row gives up its
    largest logit. That is exact where a row is so large, and elsewhere rounds no more than a log-softmax does.
    """
    teacher_moves = tl.abs(teacher) > tl.abs(student)
    reach = tl.where(teacher_moves, tl.abs(teacher), tl.abs(student)) + 16.0 * temperature
    grain = 24.0 * tl.minimum(reach, 1e29)  # its last place is 16 to 32 of reach's
    place = grain * (2.0**-52 if grain.dtype == tl.float64 else 2.0**-23)
    above = ((teacher - student) + grain) - grain
    apart = place > temperature
    of_student = tl.where(apart, student, tl.where(teacher_moves, 0.0, -above))
    return of_student, tl.where(apart, teacher, tl.where(teacher_moves, above, 0.0))


@triton.jit
def _norms(student, teacher, scale, temperature, unit, sign, LOG: tl.constexpr):
    """Returns what :func:`_pair` takes, and what exponentials of Q and of P are multiplied by: 1 / sum. Logarithms of
    probabilities count `unit` a logit, `sign` times what they are over LOG. One logarithm serves both sums: the
    difference of two of some 10 would round it."""
    s, t = _offsets(student[0], teacher[0], temperature)
    shift = ((teacher[0] - t) - (student[0] - s)) * unit - sign * tl.log(divide(student[1], teacher[1])) / LOG
    s_scale, s_base, s_factor = origin(student[0], scale)
    t_scale, t_base, t_factor = origin(teacher[0], scale)
    t_share = divide(t_factor, teacher[1])
    s_share = divide(s_factor, student[1]) + (t_share - t_share)  # NaN with the teacher's
    return (s_scale, s_base, t_scale, t_base, unit, shift, s, t), (s_share, t_share)


@triton.jit
def _row(args, rows, row, normals, read, T: tl.constexpr):
    """(what makes pairs, shares, numbers of the element, unit of the loss, what the gradient is times, center,
    normals).

    Logarithms of KL divergences are natural, those of mixtures of base 2, as is the center."""
    center = tl.zeros((), T)
    if normals is None:
        stats = args.stats + row
        normals = (tl.load(stats), tl.load(stats + rows)), (tl.load(stats + 2 * rows), tl.load(stats + 3 * rows))
        normals = (
            (normals[0][0], tl.where(read, normals[0][1], 1.0)),
            (normals[1][0], tl.where(read, normals[1][1], 1.0)),
        )
        center = tl.load(stats + 4 * rows) - _of_center(args, row, read, T)
    slope, scale, temperature = number(args.slope, T), number(args.scale, T), number(args.temperature, T)
    factor = slope
    if args.grad is not None:
        factor *= tl.load(args.grad + row)
    if args.factor is not None:
        factor *= tl.load(args.factor)
    if args.beta is not None:
        beta, rest = number(args.beta, T), number(args.rest, T)
        sign = 1.0 if args.over_p is None else -1.0
        unit = scale * sign
        pair, shares = _norms(normals[0], normals[1], scale, temperature, unit, sign, LN2)
        terms = [number(args.terms[i], T) for i in (0, 1, 2, 3, 4)]
        numbers = tl.minimum(beta, rest), tl.maximum(beta, rest), terms
        return pair, shares, numbers, beta * LN2, factor * rest * LN2, center / LN2, normals
    else:
        pair, shares = _norms(normals[0], normals[1], scale, temperature, slope, 1.0, 1.0)
        numbers = ()
        if args.hard is not None:
            numbers = (_label(args.labels, args.hard, row, read, T)[2],)
        return pair, shares, numbers, tl.full((), 1.0, T), factor, center, normals


@triton.jit
def _of_center(args, row, read, T: tl.constexpr):
    """What is taken from the center for the map to add Q of a cross-entropy, as Q (a - center) + Q h is
    Q (a - (center - h)). The forward divergence has no center: its elements add it."""
    if args.hard is None:
        return tl.zeros((), T)
    else:
        hard = _label(args.labels, args.hard, row, read, T)[2]
        if args.beta is not None:
            hard = divide(hard, number(args.rest, T))
        return hard


@triton.jit
def _pair(pair, v):
    """Exponentials of a pair of logits, which their shares make Q and P, and d = log P - log Q, or -d where its unit is
    negative. Where |d| is small no digits cancel: logits of close models subtract exactly. Q and P have exponentials of
    their own, for nothing to overflow."""
    s_scale, s_base, t_scale, t_base, unit, shift, s_offset, t_offset = pair
    d = tl.fma((v[1] - t_offset) - (v[0] - s_offset), unit, -shift)
    return tl.exp2(tl.fma(v[0], s_scale, -s_base)), tl.exp2(tl.fma(v[1], t_scale, -t_base)), d


@triton.jit
def _difference(q, p, d):
    """Q - P, which sums to 0, makes every share of a KL divergence non-negative and cancels what the rounding of the
    sums adds."""
    difference = q - p
    if d.dtype != tl.float64:
        difference = tl.where(tl.abs(d) < NEAR, -q * expm1_near(d), difference)
    return difference


@triton.jit
def _forward_element(constants, v):
    of_q, of_p, d = _pair(constants[0], v)
    q, p = of_q * constants[1][0], of_p * constants[1][1]
    difference = _difference(q, p, d)
    part = difference
    if len(constants[2]) > 0:
        part += constants[2][0] * q
    # A probability of 0 counts nothing, where d may be NaN or infinite.
    return (part,), (p * tl.where(p == 0.0, 0.0, d) + difference,)


@triton.jit
def _reverse_element(constants, v):
    of_q, of_p, d = _pair(constants[0], v)
    q, p = of_q * constants[1][0], of_p * constants[1][1]
    counted = tl.where(of_q == 0.0, 0.0, d)  # a probability of 0 counts nothing, where d may be NaN or infinite
    return (of_q, counted), (q * counted, _difference(q, p, d), q)


@triton.jit
def _mixed_pair(constants, v):
    """The exponentials, d, and log2 M/Q; or M/P, where d is log2 Q/P."""
    less, more, terms = constants[2]
    of_q, of_p, d = _pair(constants[0], v)
    # NaN too, of two logits of -inf. What is beyond has as good as no probability in one of the two, and would round
    # the logarithm of the other's.
    most = 126.0 if d.dtype == tl.float64 else 36.0
    d = tl.minimum(tl.maximum(d, -most), most)
    mixture = log2_fast(tl.fma(tl.exp2(d), less, more))
    if d.dtype != tl.float64:
        near = (((terms[4] * d + terms[3]) * d + terms[2]) * d + terms[1]) * d + terms[0]
        mixture = tl.where(tl.abs(d) < NEAR2, near * d, mixture)
    return of_q, of_p, d, mixture


@triton.jit
def _mixed_element(constants, v):
    of_q, of_p, d, mixture = _mixed_pair(constants, v)
    return (of_q, mixture), (of_p * (d - mixture), of_q * mixture)


@triton.jit
def _mixed_element_over_p(constants, v):
    of_q, of_p, d, mixture = _mixed_pair(constants, v)
    return (of_q, mixture - d), (of_p * -mixture, of_q * (mixture - d))


@triton.jit
def _forward_epilogue(args, rows, row, constants, sums, read, T: tl.constexpr):
    return _finish(args, rows, row, constants, sums[0], constants[5], read, T)


@triton.jit
def _reverse_epilogue(args, rows, row, constants, sums, read, T: tl.constexpr):
    """d may be hundreds, and Σ Q of the hardware's 2^x is 1 to 2^-22 only: Σ Q d is divided by the sum of those very
    Q, or the center would be off from the d of those that have most probability. A slice does not know that sum."""
    center = -sums[0]
    if len(sums) > 2:
        center = divide(center, tl.where(read, sums[2], 1.0))
    return _finish(args, rows, row, constants, center - sums[1], center, read, T)


@triton.jit
def _mixed_epilogue(args, rows, row, constants, sums, read, T: tl.constexpr):
    center = -constants[1][0] * sums[1]
    loss = constants[1][1] * sums[0] + number(args.odds, T) * center
    return _finish(args, rows, row, constants, loss, center, read, T)


@triton.jit
def _finish(args, rows, row, constants, loss, center, read, T: tl.constexpr):
    pair, shares, numbers, unit, factor, _, normals = constants
    loss, cross_entropy = loss * unit, tl.zeros((), T)
    if args.hard is not None:
        label, inside, _weight = _label(args.labels, args.hard, row, read, T)
        logit = _label_logit(args.hard, 0, row, label, inside, T)
        cross_entropy = tl.where(inside, tl.log(normals[0][1]) - (logit - normals[0][0]), float("nan"))
        loss += number(args.hard.weight, T) * cross_entropy
    tl.store(args.cross_entropy + row, tl.where(read, cross_entropy, 0.0))
    if args.factor is not None:
        loss *= tl.load(args.factor)
    tl.store(args.loss + row, tl.where(read, loss, 0.0))
    stored = center
    if args.beta is not None:
        stored = center * LN2
    if args.hard is not None:
        center = stored - _of_center(args, row, read, T)
        if args.beta is not None:
            center /= LN2
    stored = (normals[0][0], normals[0][1], normals[1][0], normals[1][1], stored)
    for i in tl.static_range(5):
        tl.store(args.stats + i * rows + row, tl.where(read, stored[i], 0.0))
    return pair, shares, numbers, unit, factor, center, normals


@triton.jit
def _forward_map(constants, parts):
    return parts[0] * constants[4]


@triton.jit
def _reverse_map(constants, parts):
    """Of a row with one probability near 1 the center is nearly its d, and cancels it."""
    return parts[0] * (parts[1] + constants[5]) * (-constants[4] * constants[1][0])


@triton.jit
def _mixed_map(constants, parts):
    """There d is small: one operation for the center and what the gradient is times."""
    factor = -constants[4] * constants[1][0]  # Q's share too, of all elements at once
    return parts[0] * tl.fma(parts[1], factor, constants[5] * factor)


@triton.jit
def _write_labels(functions, out, args, hard, rows, T: tl.constexpr, ROWS: tl.constexpr):
    """The labels' columns of the gradient, which the map has without their -1. `args` has no cross-entropy."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    last = row < rows
    row = tl.minimum(row, rows - 1)
    label, inside, weight = _label(args.labels, hard, row, both(_ignored(args, row) == 0, last), T)
    constants = functions.row(args, rows, row, None, inside, T)
    v = [_label_logit(hard, 0, row, label, inside, T), _label_logit(hard, 1, row, label, inside, T)]
    parts, _ = functions.element(constants, v)
    if args.grad is not None:
        weight *= tl.load(args.grad + row)
    if args.factor is not None:
        weight *= tl.load(args.factor)
    largest, total = constants[6][0]
    value = functions.map(constants, parts) + weight * expm1(v[0] - largest - tl.log(total))
    tl.store(out + row * hard.size + label, rounded(value, out.dtype.element_ty), mask=inside)


FORWARD = SweepFormula(
    SweepFunctions(_ignored, _row, _forward_element, _forward_epilogue, _forward_map), sums=1, maps_at_once=True
)
REVERSE = SweepFormula(SweepFunctions(_ignored, _row, _reverse_element, _reverse_epilogue, _reverse_map), sums=3)
REVERSE_SLICE = SweepFormula(REVERSE.functions, sums=2)
MIXED = SweepFormula(SweepFunctions(_ignored, _row, _mixed_element, _mixed_epilogue, _mixed_map), sums=2)
MIXED_OVER_P = SweepFormula(SweepFunctions(_ignored, _row, _mixed_element_over_p, _mixed_epilogue, _mixed_map), sums=2)


def _over_p(beta: float) -> bool:
    return beta > 0.5


def _formula(beta: float, of_slice: bool = False) -> SweepFormula:
    if beta == 0:
        return FORWARD
    if beta == 1:
        return REVERSE_SLICE if of_slice else REVERSE
    return MIXED_OVER_P if _over_p(beta) else MIXED


def _rows(student: Tensor, teacher: Tensor, out: Tensor | None) -> LogitRows:
    """Over the vocabulary that the two share."""
    size = min(student.shape[-1], teacher.shape[-1])
    return LogitRows(student[..., :size], teacher[..., :size], out=out)


def _add_labels(formula: SweepFormula, rows: LogitRows, args: DivergenceArgs, out: Tensor) -> None:
    """After the map, what it cannot know of the labels' columns."""
    if args.hard is None or rows.count == 0:
        return
    T = tl.float64 if rows.dtype == torch.float64 else tl.float32
    plain, programs = args._replace(hard=None), triton.cdiv(rows.count, ROWS_AT_ONCE)
    rowwise.launch(
        _write_labels,
        programs,
        rows.first,
        formula.functions,
        out,
        plain,
        args.hard,
        rows.count,
        T=T,
        ROWS=ROWS_AT_ONCE,
        num_warps=ROWS_AT_ONCE // 32,
    )


def generalized_jsd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    normals: Tensor | None,
    scale: Tensor | None,
    beta: float,
    temperature: float,
    ignore_index: int,
    cross_entropy_weight: float,
    reduction: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if normals is not None and (with_grad or cross_entropy_weight != 0):
        raise ValueError("generalized_jsd: of a slice there are sums alone, which wait for those of all slices")
    grad = student.new_empty(student.shape if with_grad else (0,))
    rows = _rows(student, teacher, grad if with_grad else None)
    shape = student.shape[:-1]
    loss, hard, stats = rows.new_vector(*shape), rows.new_vector(*shape), rows.new_vector(5, *shape)
    factor = None if scale is None else scale.to(rows.dtype)
    if normals is not None:  # where the row function looks for them
        stats[:4], stats[4] = normals, 0
    of_labels = labels, ignore_index, cross_entropy_weight
    of_slice = normals is not None
    formula = _formula(beta, of_slice)
    args = _args(rows, *of_labels, factor, None, loss, hard, stats, beta, temperature)
    sweep(formula, rows, args, normalized=of_slice)
    if with_grad:
        _add_labels(formula, rows, args, grad)
    return loss if reduction == "none" else loss.sum(), hard, stats, grad


def generalized_jsd_backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    stats: Tensor,
    beta: float,
    temperature: float,
    ignore_index: int,
    cross_entropy_weight: float,
) -> Tensor:
    out = student.new_empty(student.shape)
    rows = _rows(student, teacher, out)
    of_labels, grad = (labels, ignore_index, cross_entropy_weight), rows.scalars(grad)
    formula, args = _formula(beta), _args(rows, *of_labels, None, grad, None, None, stats, beta, temperature)
    sweep_map(formula, rows, args)
    _add_labels(formula, rows, args, out)
    return out
