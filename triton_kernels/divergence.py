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
from .scalar import NEAR, divide, expm1, expm1_near, log2_fast, number, rounded
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
    over_p: Any  # 1 where log M is taken over P, which weighs more, and d with it; else 0, and it is over Q
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
        # Of the other's logarithm over M, a difference from d, a small weight leaves much.
        numbers_of_beta = beta, 1 - beta, (1 - beta) / beta, float(beta > 0.5)
        mixture = tuple(scalar.argument(x, dtype) for x in numbers_of_beta)
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
def _exact_offset(high, low, temperature):
    """What `high` lies above `low`, rounded to a multiple of the last place of all logits of these maxima that matter
    (from 16 temperatures below): it can be subtracted from the logits of larger magnitude without rounding them."""
    reach = tl.maximum(tl.abs(high), tl.abs(low)) + 16.0 * temperature
    grain = 24.0 * tl.minimum(reach, 1e29)  # adding it rounds to its last place, 16 to 32 of reach's
    return ((high - low) + grain) - grain


@triton.jit
def _norms(student, teacher, temperature, unit, sign, LOG: tl.constexpr, T: tl.constexpr):
    """Of two normalizers, what :func:`_pair` takes: offset, largest logit and 1 / sum, of Q then of P, and how much
    smaller log P, times `sign`, is for equal logits without the offsets, where a logit counts `unit` and logarithms are
    over LOG.

    What the one row lies above the other means nothing. The offsets, of which one is 0, take it from the row of the
    larger logits. Of the sums it takes one logarithm: the difference of two of some 10 would round it.
    """
    of_teacher = tl.abs(teacher[0]) > tl.abs(student[0])
    above = _exact_offset(teacher[0], student[0], temperature)
    s, t = tl.where(of_teacher, 0.0, -above), tl.where(of_teacher, above, 0.0)
    shift = ((teacher[0] - t) - (student[0] - s)) * unit - sign * tl.log(divide(student[1], teacher[1])) / LOG
    one = tl.full((), 1.0, T)
    t_share = divide(one, teacher[1])
    # NaN with the teacher's. Origins: of a row of -inf, 0.
    s_share = divide(one, student[1]) + (t_share - t_share)
    return s, student[0], s_share, t, teacher[0], t_share, shift


@triton.jit
def _row(args, rows, row, normals, read, T: tl.constexpr):
    """(norms, numbers of the element, unit of the loss, what the gradient is times, center, normals).

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
        beta, rest, odds = number(args.beta, T), number(args.rest, T), number(args.odds, T)
        over_p = number(args.over_p, T)
        sign = 1.0 - 2.0 * over_p
        norms = _norms(normals[0], normals[1], temperature, scale * sign, sign, LN2, T)
        terms = [number(args.terms[i], T) for i in (0, 1, 2, 3, 4)]
        numbers = scale, scale * sign, tl.minimum(beta, rest), tl.maximum(beta, rest), odds, over_p, terms
        return norms, numbers, beta * LN2, factor * rest * LN2, center / LN2, normals
    else:
        norms = _norms(normals[0], normals[1], temperature, slope, 1.0, 1.0, T)
        numbers = scale, slope
        if args.hard is not None:
            numbers = scale, slope, _label(args.labels, args.hard, row, read, T)[2]
        return norms, numbers, tl.full((), 1.0, T), factor, center, normals


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
def _pair(norms, scale, unit, v):
    """Q, P and d = log P - log Q of a pair of logits, or -d where `unit` is negative. Where |d| is small no digits
    cancel: logits of close models subtract exactly. Q and P have exponentials of their own, for nothing to overflow."""
    s_offset, s_largest, s_share, t_offset, t_largest, t_share, shift = norms
    q = tl.exp2((v[0] - s_largest) * scale) * s_share
    p = tl.exp2((v[1] - t_largest) * scale) * t_share
    return q, p, ((v[1] - t_offset) - (v[0] - s_offset)) * unit - shift


@triton.jit
def _kl_pair(constants, v):
    """Q, P, d and Q - P, which sums to 0, makes every share of a KL divergence non-negative and cancels what the
    rounding of the sums adds."""
    q, p, d = _pair(constants[0], constants[1][0], constants[1][1], v)
    difference = q - p
    if d.dtype != tl.float64:
        difference = tl.where(tl.abs(d) < NEAR, -q * expm1_near(d), difference)
    return q, p, d, difference


@triton.jit
def _forward_element(constants, v):
    q, p, d, difference = _kl_pair(constants, v)
    part = difference
    if len(constants[1]) > 2:
        part += constants[1][2] * q
    return (part,), (tl.where(p == 0.0, 0.0, p * d) + difference,)


@triton.jit
def _reverse_element(constants, v):
    q, _, d, difference = _kl_pair(constants, v)
    a = tl.where(q == 0.0, 0.0, -d)
    return (q, a), (q * a - difference, q * a)


@triton.jit
def _mixed_element(constants, v):
    scale, unit, less, more, odds, over_p, terms = constants[1]
    q, p, d = _pair(constants[0], scale, unit, v)
    # NaN too, of two logits of -inf. What is beyond has as good as no probability in one of the two, and would round
    # the logarithm of the other's.
    most = 126.0 if d.dtype == tl.float64 else 36.0
    d = tl.minimum(tl.maximum(d, -most), most)
    power = tl.exp2(d)
    mixture = log2_fast(power * less + more)  # M / Q, or M / P
    if d.dtype != tl.float64:
        near = (((terms[4] * d + terms[3]) * d + terms[2]) * d + terms[1]) * d + terms[0]
        mixture = tl.where(tl.abs(d) < NEAR2, near * d, mixture)
    a = over_p * d - mixture  # log2 Q/M
    from_q = q * a
    return (q, a), (p * ((1.0 - over_p) * d - mixture) + odds * from_q, from_q)


@triton.jit
def _epilogue(args, rows, row, constants, sums, read, T: tl.constexpr):
    norms, numbers, unit, factor, center, normals = constants
    loss, cross_entropy = sums[0] * unit, tl.zeros((), T)
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
    if len(sums) > 1:
        center, stored = sums[1], sums[1]
    if args.beta is not None:
        stored = center * LN2
    if args.hard is not None:
        center = stored - _of_center(args, row, read, T)
        if args.beta is not None:
            center /= LN2
    stored = (normals[0][0], normals[0][1], normals[1][0], normals[1][1], stored)
    for i in tl.static_range(5):
        tl.store(args.stats + i * rows + row, tl.where(read, stored[i], 0.0))
    return norms, numbers, unit, factor, center, normals


@triton.jit
def _forward_map(constants, parts):
    return parts[0] * constants[3]


@triton.jit
def _map(constants, parts):
    return parts[0] * (parts[1] - constants[4]) * constants[3]


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
    largest, total = constants[5][0]
    value = functions.map(constants, parts) + weight * expm1(v[0] - largest - tl.log(total))
    tl.store(out + row * hard.size + label, rounded(value, out.dtype.element_ty), mask=inside)


FORWARD = SweepFormula(
    SweepFunctions(_ignored, _row, _forward_element, _epilogue, _forward_map), sums=1, maps_at_once=True
)
REVERSE = SweepFormula(SweepFunctions(_ignored, _row, _reverse_element, _epilogue, _map), sums=2)
MIXED = SweepFormula(SweepFunctions(_ignored, _row, _mixed_element, _epilogue, _map), sums=2)


def _formula(beta: float) -> SweepFormula:
    return FORWARD if beta == 0 else REVERSE if beta == 1 else MIXED


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
    formula, args = _formula(beta), _args(rows, *of_labels, factor, None, loss, hard, stats, beta, temperature)
    sweep(formula, rows, args, normalized=normals is not None)
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
