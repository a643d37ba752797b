"""Divergences from a teacher that is known on K ids of the vocabulary: the counterpart of ``csrc/sparse_divergence.h``.

A sweep finds the student's normalizer; its row function then takes the entries, a tile at a time, to the row's loss and
to what every element's gradient is as a multiple of its probability. The entries' own columns are written by a second
launch, as they may be anybody's. Logarithms are natural here: there are K of them, not V.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rowwise, scalar
from .layout import arithmetic_dtype
from .scalar import divide, exp_negative, expm1, log1p, number, rounded
from .sweep import LOG2E, LogitRows, SweepFormula, SweepFunctions, both, row_start, sweep, sweep_map

ENTRIES = tl.constexpr(64)  # of a tile
COMPARED = tl.constexpr(16)  # of those that a tile is compared with, a few at a time: all pairs live in registers
ROUNDED_MASS = tl.constexpr(1 / 32)
BUCKET, RENORMALIZE, NONE = (tl.constexpr(tail) for tail in range(3))
TAILS = {"bucket": BUCKET.value, "renormalize": RENORMALIZE.value, "none": NONE.value}
FORWARD, REVERSE, MIXED = (tl.constexpr(kind) for kind in range(3))


class SparseArgs(NamedTuple):
    labels: Tensor | None
    ignore: int
    student: Tensor
    place: Any
    inner: int
    logprobs: Tensor
    ids: Tensor
    entries: int
    columns: int
    tail: int
    weight: Tensor | None
    normals: Tensor | None  # [2, rows]: largest logit and sum, where the student's columns are not all
    factor: Tensor | None  # of the call, one number
    grad: Tensor | None  # of the rows
    loss: Tensor | None
    masses: Tensor | None  # [2, rows]
    stats: Tensor  # [6, rows]: largest logit, sum; what is taken from log Q and log P; center, outside
    slope: Any  # 1 / τ
    scale: Any  # log2(e) / τ
    beta: Any
    rest: Any  # 1 - β
    least: Any  # a bucket's probability


@triton.jit
def _ignored(args, row):
    if args.labels is None:
        return tl.full((), 0, tl.int1)
    else:
        return tl.load(args.labels + row) == args.ignore


@triton.jit
def _logs(args, row, ids, logprobs, present, largest, log_sum, T: tl.constexpr):
    """log Q and log P of entries; NaN of ids beyond the vocabulary, -inf of those that are not present."""
    inside = both(present, ids < args.columns)
    start = row_start(args.place, row, args.inner)
    v = tl.load(args.student + start + ids, mask=inside, other=float("nan")).to(T)
    log_q = (v - largest) * number(args.slope, T) - log_sum
    log_p = tl.where(both(inside, logprobs <= ROUNDED_MASS), tl.where(logprobs > 0.0, 0.0, logprobs), float("nan"))
    return tl.where(present, log_q, float("-inf")), tl.where(present, log_p, float("-inf"))


@triton.jit
def _entries(args, row, first, T: tl.constexpr, COUNT: tl.constexpr = ENTRIES):
    """Ids and log-probabilities of a tile, and which of them are there."""
    k = first + tl.arange(0, COUNT)
    ids = tl.load(args.ids + row * args.entries + k, mask=k < args.entries, other=-1)
    logprobs = tl.load(args.logprobs + row * args.entries + k, mask=k < args.entries, other=float("-inf")).to(T)
    return ids, logprobs, ids >= 0


@triton.jit
def _log_near(u, z):
    """log u for u in [0, 1], given z = u - 1, which says more of a u near 1."""
    return tl.where(z < -0.5, tl.log(u), -log1p(divide(-z, 1.0 + z)))


@triton.jit
def _category_of(larger, ratio, minus_one, d, args, balanced, KIND: tl.constexpr, T: tl.constexpr):
    """(Q - P, Q, slope, loss) of the larger of P and Q, the smaller's ratio to it, that - 1, and log P - log Q."""
    above = d > 0.0
    smaller = larger * ratio
    q, p = tl.where(above, smaller, larger), tl.where(above, larger, smaller)
    difference = larger * tl.where(above, minus_one, -minus_one)
    balance = tl.where(balanced, difference, 0.0)
    if KIND == FORWARD:
        return difference, q, 0.0 * difference, tl.where(p == 0.0, 0.0, p * d) + balance
    elif KIND == REVERSE:
        slope = tl.where(q == 0.0, 0.0, -d)
        return difference, q, slope, q * slope - balance
    else:
        beta, rest = number(args.beta, T), number(args.rest, T)
        gap = -tl.abs(d)
        gap = tl.where(gap < -1e30, -1e30, gap)
        of_larger, of_smaller = tl.where(above, beta, rest), tl.where(above, rest, beta)
        log_m = _log_near(of_larger + of_smaller * ratio, of_smaller * minus_one)
        log_smaller = gap - log_m
        loss = of_larger * (larger * -log_m) + of_smaller * (smaller * log_smaller)
        return difference, q, tl.where(above, log_smaller, -log_m), loss


@triton.jit
def _category(log_q, log_p, args, balanced, KIND: tl.constexpr, T: tl.constexpr):
    d = tl.where(log_q == log_p, 0.0, log_p - log_q)  # both may be -inf
    gap = -tl.abs(d)
    gap = tl.where(gap < -1e30, -1e30, gap)
    larger = exp_negative(tl.where(d > 0.0, log_p, log_q))
    return _category_of(larger, exp_negative(gap), expm1(gap), d, args, balanced, KIND, T)


@triton.jit
def _bucket(args, q, p, difference, KIND: tl.constexpr, T: tl.constexpr):
    """All ids besides the entries', of which Q and P are in float64 and their difference is summed of differences."""
    least = number(args.least, T).to(tl.float64)
    empty = (1.0 - q < least) | (1.0 - p < least)
    of_q, of_p = tl.where(1.0 - q < least, least, 1.0 - q).to(T), tl.where(1.0 - p < least, least, 1.0 - p).to(T)
    lead = tl.where(empty, of_p - of_q, difference.to(T))
    above = lead > 0.0
    larger, smaller = tl.where(above, of_p, of_q), tl.where(above, of_q, of_p)
    minus_one = divide(-tl.abs(lead), larger)
    near = -_log_near(1.0 + minus_one, minus_one)  # log(larger / smaller)
    far = tl.log(divide(larger, smaller))
    d = tl.where(minus_one > -0.5, near, far)
    d = tl.where(above, d, -d)
    return _category_of(larger, divide(smaller, larger), minus_one, d, args, True, KIND, T)


@triton.jit
def _sum(x, T: tl.constexpr):
    return tl.sum(x.to(tl.float64), axis=0)


@triton.jit
def _found(args, row, largest, total, KIND: tl.constexpr, T: tl.constexpr):
    """The loss, the masses of Q and P, and what is kept of a row."""
    log_sum = tl.log(total)
    bucket, renormalize = args.tail == BUCKET, args.tail == RENORMALIZE
    # Where they are renormalised, their largest is taken off: probabilities of entries that all underflow have ratios.
    most_q, most_p = tl.full((), 0.0, T), tl.full((), 0.0, T)
    if renormalize:
        most_q, most_p = tl.full((), float("-inf"), T), tl.full((), float("-inf"), T)
        for first in range(0, args.entries, ENTRIES):
            ids, logprobs, present = _entries(args, row, first, T)
            log_q, log_p = _logs(args, row, ids, logprobs, present, largest, log_sum, T)
            most_q, most_p = tl.maximum(most_q, tl.max(log_q, axis=0)), tl.maximum(most_p, tl.max(log_p, axis=0))
        most_q = tl.where(most_q == float("-inf"), 0.0, most_q)
        most_p = tl.where(most_p == float("-inf"), 0.0, most_p)
    zero = tl.zeros((ENTRIES,), T)
    q, p, count = zero, zero, tl.zeros((ENTRIES,), tl.int32)
    for first in range(0, args.entries, ENTRIES):
        ids, logprobs, present = _entries(args, row, first, T)
        log_q, log_p = _logs(args, row, ids, logprobs, present, largest, log_sum, T)
        q += exp_negative(log_q - most_q)
        p += exp_negative(log_p - most_p)
        count += present.to(tl.int32)
    q, p, any_entry = _sum(q, T), _sum(p, T), tl.sum(count, axis=0) > 0
    shift_q = tl.where(renormalize, most_q + tl.log(q).to(T), 0.0)
    shift_p = tl.where(renormalize, most_p + tl.log(p).to(T), 0.0)
    q, p = q * exp_negative(most_q).to(tl.float64), p * exp_negative(most_p).to(tl.float64)
    p = tl.where(p <= 1.0 + ROUNDED_MASS, p, float("nan"))
    # A bucket that is as good as empty has no gradient; `whole`: what has gradients sums to 1.
    moves = bucket & (1.0 - q >= number(args.least, T).to(tl.float64))
    whole = moves | renormalize
    losses, differences, slopes = zero, zero, zero
    for first in range(0, args.entries, ENTRIES):
        ids, logprobs, present = _entries(args, row, first, T)
        log_q, log_p = _logs(args, row, ids, logprobs, present, largest, log_sum, T)
        log_q, log_p = tl.where(present, log_q - shift_q, log_q), tl.where(present, log_p - shift_p, log_p)
        difference, of_q, slope, loss = _category(log_q, log_p, args, args.tail != NONE, KIND, T)
        losses += tl.where(present, loss, 0.0)
        differences += tl.where(present, difference, 0.0)
        slopes += tl.where(present, of_q * slope, 0.0)
    loss, difference, slope = _sum(losses, T), _sum(differences, T), _sum(slopes, T)
    tail = _bucket(args, q, p, difference, KIND, T)
    # Of ids that occur twice Q can be more than 1 in all. Then Q - P, which KL divergences have, does not sum to 0.
    excess = tl.where(bucket & (q > 1.0), q - 1.0, 0.0)
    if KIND == FORWARD:
        loss -= excess
    if KIND == REVERSE:
        loss += excess
    loss = tl.where(bucket, loss + tail[3].to(tl.float64), loss).to(T) + 0.0 * p.to(T)
    if KIND == FORWARD:
        center = tl.where(whole, 0.0, 1.0 - p)
        outside = tl.where(moves, divide(tail[0], tail[1]).to(tl.float64), tl.where(whole, 0.0, p))
    else:
        # The bucket's slope less the center, by the entries alone: a bucket that holds nearly all would cancel.
        of_bucket, of_none = q * tail[2].to(tl.float64) - slope, -slope
        if KIND == REVERSE:
            of_none = -(slope + q)
        outside = tl.where(moves, of_bucket, tl.where(whole, 0.0, of_none))
        slope = tl.where(moves, slope + (tail[1] * tail[2]).to(tl.float64), slope)
        center = slope
        if KIND == REVERSE:
            center = tl.where(whole, slope, slope + q - 1.0)
    center, outside = (center + 0.0 * p).to(T), (outside + 0.0 * p).to(T)
    loss, center = tl.where(any_entry, loss, 0.0), tl.where(any_entry, center, 0.0)
    q, p = tl.where(q > 1.0, 1.0, q), tl.where(p > 1.0, 1.0, p)
    return loss, q.to(T), p.to(T), shift_q, shift_p, center, tl.where(any_entry, outside, 0.0)


@triton.jit
def _coefficient(args, row, KIND: tl.constexpr, T: tl.constexpr):
    """What the loss is times, and what the gradient is."""
    factor = tl.full((), 1.0, T)
    if args.grad is not None:
        factor *= tl.load(args.grad + row)
    if args.factor is not None:
        factor *= tl.load(args.factor)
    if args.weight is not None:
        factor *= tl.load(args.weight + row)
    slope = number(args.slope, T)
    if KIND == MIXED:
        slope *= number(args.rest, T)
    return factor, factor * slope


@triton.jit
def _row_of(args, rows, row, normals, read, KIND: tl.constexpr, T: tl.constexpr):
    """(largest logit, scale, what 2^scaled logits are times for the gradient, sum, loss and what else is stored)"""
    factor, coefficient = _coefficient(args, row, KIND, T)
    scale = number(args.scale, T)
    if normals is None:
        total = tl.where(read, tl.load(args.stats + rows + row), 1.0)
        outside = tl.where(read, tl.load(args.stats + 5 * rows + row), 0.0)
        share = tl.where(read, coefficient, 0.0) * divide(outside, total)
        return tl.load(args.stats + row), scale, share, total, ()
    else:
        largest, total = normals[0]
        if args.normals is not None:
            largest, total = tl.load(args.normals + row), tl.where(read, tl.load(args.normals + rows + row), 1.0)
        loss, q, p, shift_q, shift_p, center, outside = _found(args, row, largest, total, KIND, T)
        share = tl.where(read, coefficient * divide(outside, total), 0.0)
        return largest, scale, share, total, (loss * factor, q, p, shift_q, shift_p, center, outside)


@triton.jit
def _forward_row(args, rows, row, normals, read, T: tl.constexpr):
    return _row_of(args, rows, row, normals, read, FORWARD, T)


@triton.jit
def _reverse_row(args, rows, row, normals, read, T: tl.constexpr):
    return _row_of(args, rows, row, normals, read, REVERSE, T)


@triton.jit
def _mixed_row(args, rows, row, normals, read, T: tl.constexpr):
    return _row_of(args, rows, row, normals, read, MIXED, T)


@triton.jit
def _element(constants, v):
    return (tl.exp2((v[0] - constants[0]) * constants[1]),), ()


@triton.jit
def _map(constants, parts):
    return parts[0] * constants[2]


@triton.jit
def _epilogue(args, rows, row, constants, sums, read, T: tl.constexpr):
    largest, _, _, total, found = constants
    loss, q, p, shift_q, shift_p, center, outside = found
    tl.store(args.loss + row, tl.where(read, loss, 0.0))
    tl.store(args.masses + row, tl.where(read, q, 0.0))
    tl.store(args.masses + rows + row, tl.where(read, p, 0.0))
    stored = (largest, total, shift_q, shift_p, center, outside)
    for i in tl.static_range(6):
        tl.store(args.stats + i * rows + row, tl.where(read, stored[i], 0.0))
    return constants


@triton.jit
def _values(args, rows, row, first, KIND: tl.constexpr, T: tl.constexpr, COUNT: tl.constexpr = ENTRIES):
    """Ids of a tile of entries; the gradients of their columns, and without the part of all elements outside."""
    ids, logprobs, present = _entries(args, row, first, T, COUNT)
    stats = args.stats + row
    largest, log_sum = tl.load(stats), tl.log(tl.load(stats + rows))
    shift_q, shift_p = tl.load(stats + 2 * rows), tl.load(stats + 3 * rows)
    center, outside = tl.load(stats + 4 * rows), tl.load(stats + 5 * rows)
    _, coefficient = _coefficient(args, row, KIND, T)
    log_q, log_p = _logs(args, row, ids, logprobs, present, largest, log_sum, T)
    difference, q, slope, _ = _category(log_q - shift_q, log_p - shift_p, args, True, KIND, T)
    value = difference - center * q if KIND == FORWARD else q * (slope - center)
    again = value - outside * exp_negative(log_q)
    return tl.where(both(present, ids < args.columns), ids, -1), coefficient * value, coefficient * again


@triton.jit
def _scatter(out, args, rows, KIND: tl.constexpr, T: tl.constexpr):
    """The gradients of a row's entries: who has the first of a column adds what others have of it, in their order."""
    row = tl.program_id(0).to(tl.int64)
    if _ignored(args, row) == 0:
        for first in range(0, args.entries, ENTRIES):
            ids, value, _again = _values(args, rows, row, first, KIND, T)
            place = first + tl.arange(0, ENTRIES)
            mine = ids >= 0
            for other in range(0, args.entries, COMPARED):
                other_ids, _value, again = _values(args, rows, row, other, KIND, T, COMPARED)
                other_place = other + tl.arange(0, COMPARED)
                same = (ids.to(tl.int32)[:, None] == other_ids.to(tl.int32)[None, :]) & mine[:, None]
                before = same & (other_place[None, :] < place[:, None])
                after = same & (other_place[None, :] > place[:, None])
                value += tl.sum(tl.where(after, again[None, :], 0.0), axis=1)
                mine = both(mine, tl.sum(before.to(tl.int32), axis=1) == 0)
            element = out + row * args.columns + ids
            tl.store(element, rounded(value, out.dtype.element_ty), mask=mine)


FORMULAS = tuple(
    SweepFormula(SweepFunctions(_ignored, row, _element, _epilogue, _map))
    for row in (_forward_row, _reverse_row, _mixed_row)
)


def _kind(beta: float) -> int:
    return FORWARD.value if beta == 0 else REVERSE.value if beta == 1 else MIXED.value


def _rows(student: Tensor, logprobs: Tensor, out: Tensor | None) -> LogitRows:
    rows = LogitRows(student, out=out)
    rows.dtype = arithmetic_dtype(student, logprobs)
    return rows


def _args(
    rows: LogitRows,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    labels: Tensor | None,
    ignore_index: int,
    weight: Tensor | None,
    normals: Tensor | None,
    factor: Tensor | None,
    grad: Tensor | None,
    loss: Tensor | None,
    masses: Tensor | None,
    stats: Tensor,
    beta: float,
    tail: str,
    temperature: float,
) -> SparseArgs:
    dtype = rows.dtype
    numbers = (1 / temperature, LOG2E.value / temperature, beta, 1 - beta, torch.finfo(dtype).eps / 2)
    return SparseArgs(
        None if labels is None else labels.contiguous(),
        ignore_index,
        rows.data[0],
        rows.places[0],
        rows.inner,
        teacher_logprobs.contiguous(),
        teacher_ids.contiguous(),
        teacher_ids.shape[-1],
        rows.size,
        TAILS[tail],
        None if weight is None else rows.scalars(weight),
        None if normals is None else rows.scalars(normals),
        None if factor is None else factor.to(dtype),
        None if grad is None else rows.scalars(grad),
        loss,
        masses,
        stats.contiguous(),
        *(scalar.argument(x, dtype) for x in numbers),
    )


def _write_entries(rows: LogitRows, args: SparseArgs, out: Tensor, beta: float) -> None:
    if rows.count == 0:
        return
    T = tl.float64 if rows.dtype == torch.float64 else tl.float32
    rowwise.launch(_scatter, rows.count, rows.first, out, args, rows.count, KIND=_kind(beta), T=T, num_warps=4)


def sparse_divergence(
    student: Tensor,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    normals: Tensor | None,
    scale: Tensor | None,
    beta: float,
    tail: str,
    temperature: float,
    ignore_index: int,
    reduction: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad = student.new_empty(student.shape if with_grad else (0,))
    rows = _rows(student, teacher_logprobs, grad if with_grad else None)
    shape = student.shape[:-1]
    loss, masses, stats = rows.new_vector(*shape), rows.new_vector(2, *shape), rows.new_vector(6, *shape)
    teacher = teacher_logprobs, teacher_ids, labels, ignore_index, weight
    args = _args(rows, *teacher, normals, scale, None, loss, masses, stats, beta, tail, temperature)
    sweep(FORMULAS[_kind(beta)], rows, args)
    if with_grad:
        _write_entries(rows, args, grad, beta)
    return loss if reduction == "none" else loss.sum(), masses, stats, grad


def sparse_divergence_backward(
    grad: Tensor,
    student: Tensor,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    stats: Tensor,
    beta: float,
    tail: str,
    temperature: float,
    ignore_index: int,
) -> Tensor:
    out = student.new_empty(student.shape)
    rows = _rows(student, teacher_logprobs, out)
    teacher = teacher_logprobs, teacher_ids, labels, ignore_index, weight
    args = _args(rows, *teacher, None, None, grad, None, None, stats, beta, tail, temperature)
    sweep_map(FORMULAS[_kind(beta)], rows, args)
    _write_entries(rows, args, out, beta)
    return out
