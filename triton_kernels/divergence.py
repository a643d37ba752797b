"""The generalized Jensen-Shannon divergence of logits (arXiv 2306.13649), forward and backward KL among its ends.

With P the teacher's and Q the student's softmax(logits / τ) and M = βP + (1 - β)Q, a row's loss is β KL(P‖M) +
(1 - β) KL(Q‖M); for β = 0 it is KL(P‖Q), for β = 1 KL(Q‖P). Streams: student, teacher, and the student's gradient.

The floor is student and teacher read once, the gradient written once. A row of 128 256 bfloat16 logits of each is
512 KB, more than a multiprocessor's registers and shared memory, so a program sweeps it again for each number that the
next sweep needs: the two normalizers, then the divergence of Q (with the gradient for β = 0), then the gradient. Each
sweep runs against the direction of the one before and finds what that read last in the caches. CUDA's clusters
(``csrc/skeleton/sweep.cuh``) keep the row.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rowwise, scalar
from .scalar import divide, exp2m1, log2_near, number, rounded
from .sweep import (
    LOG2E,
    PLAIN,
    LogitRows,
    both,
    combined_normalizer,
    edge_elements,
    launch_sweep,
    load_edge,
    load_tiles,
    normalizer_add,
    normalizer_start,
    normalizer_total,
    plan_map,
    row_span,
    row_start,
    segment_of,
    store_tiles,
)

LN2 = tl.constexpr(math.log(2))

FORWARD, REVERSE, BETWEEN = (tl.constexpr(kind) for kind in range(3))  # KL(P‖Q), KL(Q‖P), and 0 < β < 1


class Numbers(NamedTuple):
    """Of a call, by :func:`scalar.argument`."""

    slope: Any  # 1 / τ
    scale: Any  # log2(e) / τ: from differences of logits to base-2 logarithms of probabilities
    temperature: Any
    beta: Any
    rest: Any  # 1 - β


def _numbers(dtype: torch.dtype, temperature: float, beta: float) -> Numbers:
    numbers = (1 / temperature, LOG2E.value / temperature, temperature, beta, 1 - beta)
    return Numbers(*(scalar.argument(x, dtype) for x in numbers))


@triton.jit
def _is_read(labels, row, ignore):
    if labels is None:
        return tl.full((), 1, tl.int1)
    else:
        return tl.load(labels + row) != ignore


@triton.jit
def _exact_offset(high, low, numbers, T: tl.constexpr):
    """What `high` lies above `low`, rounded to a multiple of the last place of all logits of these maxima that matter
    (from 16 temperatures below): it can be subtracted from the logits of larger magnitude without rounding them."""
    reach = tl.maximum(tl.abs(high), tl.abs(low)) + 16.0 * number(numbers.temperature, T)
    grain = 24.0 * tl.minimum(reach, 1e29)  # adding it rounds to its last place, 16 to 32 of reach's
    return ((high - low) + grain) - grain


@triton.jit
def _norms(student, teacher, numbers, T: tl.constexpr):
    """Of two normalizers, what :func:`_divergence` takes: offset, largest logit without it and 1 / sum, of Q then of P,
    and in units of the logits how much smaller log P is for equal logits without the offsets.

    What the one row lies above the other means nothing. The offsets, of which one is 0, take it from the row of the
    larger logits. Of the sums it takes one logarithm: the difference of two of some 10 would round it.
    """
    of_teacher = tl.abs(teacher[0]) > tl.abs(student[0])
    above = _exact_offset(teacher[0], student[0], numbers, T)
    s, t = tl.where(of_teacher, 0.0, -above), tl.where(of_teacher, above, 0.0)
    sums = divide(tl.log2(divide(student[1], teacher[1])), number(numbers.scale, T))
    one = tl.full((), 1.0, T)
    shift = ((teacher[0] - t) - (student[0] - s)) - sums
    return s, student[0] - s, divide(one, student[1]), t, teacher[0] - t, divide(one, teacher[1]), shift


@triton.jit
def _read_norms(student, teacher, read, numbers, T: tl.constexpr):
    """The same, with numbers that make zeros of a row that was not read."""
    student = tl.where(read, student[0], 0.0), tl.where(read, student[1], 1.0)
    teacher = tl.where(read, teacher[0], 0.0), tl.where(read, teacher[1], 1.0)
    return _norms(student, teacher, numbers, T)


@triton.jit
def _unit(numbers, KIND: tl.constexpr, T: tl.constexpr):
    """What turns sums into base e. KL divergences have theirs in units of the logits, where τ = 1 rounds nothing;
    logarithms of the mixture are base 2."""
    if KIND == BETWEEN:
        return tl.full((), LN2, T)
    else:
        return number(numbers.slope, T)


@triton.jit
def _divergence(s, t, norms, numbers, KIND: tl.constexpr, T: tl.constexpr):
    """Of elements: their share of the loss, that of the center, and q, the first two in :func:`_unit`; for FORWARD the
    second is Q - P. The gradient is (second - center q) / τ, times 1 - β between.

    Everything follows from d = log P - log Q, of the logits' own difference, from the larger of the two probabilities
    and the ratio 2^-|d| of the other to it: nothing overflows, and where Q is close to P no digits cancel. In the KL
    divergences Q - P, which sums to 0, makes every share non-negative and cancels what the rounding of the sums adds.
    """
    scale = number(numbers.scale, T)
    s_offset, s_largest, s_share, t_offset, t_largest, t_share, shift = norms
    # Of logits that are not normalised: those of close models subtract exactly. Equal ones may both be -inf.
    s, t = s - s_offset, t - t_offset
    raw = tl.where(s == t, 0.0, t - s) - shift
    d = raw * scale
    above = d > 0.0  # the teacher's is the larger
    gap = -tl.abs(d)
    ratio, minus_one = exp2m1(gap)
    larger = tl.exp2(tl.where(above, t - t_largest, s - s_largest) * scale) * tl.where(above, t_share, s_share)
    smaller = larger * ratio
    q, p = tl.where(above, smaller, larger), tl.where(above, larger, smaller)
    if KIND == BETWEEN:
        beta, rest = number(numbers.beta, T), number(numbers.rest, T)
        other = tl.where(above, rest, beta)
        mixture = log2_near(tl.where(above, beta, rest) + other * ratio, other * minus_one)  # of M / larger
        from_smaller = gap - mixture
        from_q = tl.where(q == 0.0, 0.0, q * tl.where(above, from_smaller, -mixture))
        from_p = tl.where(p == 0.0, 0.0, p * tl.where(above, -mixture, from_smaller))
        return beta * from_p + rest * from_q, from_q, q
    else:
        difference = larger * tl.where(above, minus_one, -minus_one)
        balance = difference * number(numbers.temperature, T)
        if KIND == REVERSE:
            from_q = tl.where(q == 0.0, 0.0, -q * raw)
            return from_q - balance, from_q, q
        else:
            return tl.where(p == 0.0, 0.0, p * raw) + balance, difference, q


@triton.jit
def _divergence_add(sums, s, t, norms, numbers, KIND: tl.constexpr, T: tl.constexpr):
    loss, center = sums
    for i in tl.static_range(len(s)):
        shares = _divergence(s[i], t[i], norms, numbers, KIND, T)
        loss += tl.sum(shares[0], axis=1)
        if KIND != FORWARD:
            center += tl.sum(shares[1], axis=1)
    return loss, center


@triton.jit
def _divergence_gradient(s, t, norms, numbers, center, factor, KIND: tl.constexpr, OUT: tl.constexpr, T: tl.constexpr):
    values = ()
    for i in tl.static_range(len(s)):
        _, second, q = _divergence(s[i], t[i], norms, numbers, KIND, T)
        if KIND != FORWARD:
            second = second * _unit(numbers, KIND, T) - center * q
        values = values + (rounded(second * factor, OUT),)
    return values


@triton.jit
def _normalizers(
    data, starts, begin, end, element, mask, scale,
    LANES: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr, EDGES: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """(largest, total) of the student and of the teacher over chunks [begin, end) and an edge."""
    student, teacher = normalizer_start(LANES, T), normalizer_start(LANES, T)
    for chunk in range(begin, end, LANES * TILES):
        s = load_tiles(data[0], starts[0], chunk, end, True, LANES, TILES, WIDTH, T)
        t = load_tiles(data[1], starts[1], chunk, end, True, LANES, TILES, WIDTH, T)
        student, teacher = normalizer_add(student, s, scale), normalizer_add(teacher, t, scale)
    if EDGES:
        student = normalizer_add(student, load_edge(data[0], starts[0], element, mask, T), scale)
        teacher = normalizer_add(teacher, load_edge(data[1], starts[1], element, mask, T), scale)
    return normalizer_total(student, scale), normalizer_total(teacher, scale)


@triton.jit
def _sweep(
    data, starts, begin, end, element, mask, read, norms, numbers, center, factor, BACKWARDS: tl.constexpr,
    SUM: tl.constexpr, GRAD: tl.constexpr, AGAIN: tl.constexpr, KIND: tl.constexpr,
    LANES: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr, EDGES: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The sums of loss and center (SUM), in :func:`_unit`, and the gradient (GRAD), of chunks [begin, end) and an edge.

    A row that is not to be read has zeros for a gradient: it counts as -inf, whose probability is 0."""
    stop = tl.where(read, end, begin)
    sums = tl.zeros((LANES,), T), tl.zeros((LANES,), T)
    blocks = tl.cdiv(end - begin, LANES * TILES)
    for block in range(0, blocks):
        chunk = begin + (blocks - 1 - block if BACKWARDS else block) * (LANES * TILES)
        s = load_tiles(data[0], starts[0], chunk, stop, AGAIN, LANES, TILES, WIDTH, T)
        t = load_tiles(data[1], starts[1], chunk, stop, AGAIN, LANES, TILES, WIDTH, T)
        if SUM:
            sums = _divergence_add(sums, s, t, norms, numbers, KIND, T)
        if GRAD:
            values = _divergence_gradient(s, t, norms, numbers, center, factor, KIND, data[2].dtype.element_ty, T)
            store_tiles(data[2], starts[2], chunk, end, values, LANES, TILES, WIDTH)
    if EDGES:
        s = load_edge(data[0], starts[0], element, both(mask, read), T)
        t = load_edge(data[1], starts[1], element, both(mask, read), T)
        if SUM:
            sums = _divergence_add(sums, s, t, norms, numbers, KIND, T)
        if GRAD:
            values = _divergence_gradient(s, t, norms, numbers, center, factor, KIND, data[2].dtype.element_ty, T)
            tl.store(data[2] + starts[2] + element, values[0], mask=mask)
    center = tl.zeros((), T) if KIND == FORWARD else tl.sum(sums[1].to(tl.float64), axis=0).to(T)
    return tl.sum(sums[0].to(tl.float64), axis=0).to(T), center


@triton.jit
def _zero(data, begin, end, LANES: tl.constexpr):
    for first in range(begin, end, LANES):
        element = first + tl.arange(0, LANES)
        tl.store(data + element, tl.zeros((LANES,), data.dtype.element_ty), mask=element < end)


@triton.jit
def _divergence_starts(data, places, row, inner):
    starts = ()
    for i in tl.static_range(len(data)):
        starts = starts + (row_start(places[i], row, inner),)
    return starts


@triton.jit
def _factor(grad, scale, row, numbers, KIND: tl.constexpr, T: tl.constexpr):
    """What the gradient is times: 1 / τ, (1 - β), the row's gradient, the call's scale."""
    factor = number(numbers.slope, T)
    if KIND == BETWEEN:
        factor *= number(numbers.rest, T)
    if grad is not None:
        factor *= tl.load(grad + row)
    if scale is not None:
        factor *= tl.load(scale)
    return factor


@triton.jit
def _store_divergence(
    read, student, teacher, sums, scale, loss, stats, rows, row, KIND: tl.constexpr, numbers, T: tl.constexpr
):  # fmt: skip
    """Returns the center as it is stored."""
    unit = _unit(numbers, KIND, T)
    value, center = sums[0] * unit, sums[1] * unit
    if scale is not None:
        value *= tl.load(scale)
    tl.store(loss + row, tl.where(read, value, 0.0))
    stored = (student[0], student[1], teacher[0], teacher[1], center)
    for i in tl.static_range(5):
        tl.store(stats + i * rows + row, tl.where(read, stored[i], 0.0))
    return center


@triton.jit(do_not_specialize=PLAIN)
def _divergence_rows(
    data, places, inner, size, labels, scale, loss, stats, rows, numbers, ignore, segment, segments, out_size,
    KIND: tl.constexpr, LANES: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr, EDGES: tl.constexpr,
    INDEX: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """A row per program: normalizers, divergence, gradient if there is a place for it."""
    row = tl.program_id(0).to(tl.int64)
    read = _is_read(labels, row, ignore)
    starts = _divergence_starts(data, places, row, inner)
    span = row_span(starts[0], size, WIDTH, EDGES, INDEX)
    element, mask = edge_elements(span, LANES, WIDTH)
    end = span[1]
    begin = tl.zeros_like(end)
    student, teacher = _normalizers(
        data,
        starts,
        begin,
        tl.where(read, end, begin),
        element,
        both(mask, read),
        number(numbers.scale, T),
        LANES,
        TILES,
        WIDTH,
        EDGES,
        T,
    )
    norms = _read_norms(student, teacher, read, numbers, T)
    GRAD: tl.constexpr = len(data) == 3
    WITH: tl.constexpr = GRAD and KIND == FORWARD  # that gradient needs no sum of this sweep
    factor = _factor(None, scale, row, numbers, KIND, T)
    sums = _sweep(
        data, starts, begin, end, element, mask, read, norms, numbers, begin.to(T), factor, True, True, WITH,
        GRAD and not WITH, KIND, LANES, TILES, WIDTH, EDGES, T,
    )  # fmt: skip
    center = _store_divergence(
        read, student, teacher, sums, scale, loss, stats, rows, row, KIND, numbers, T
    )  # fmt: skip
    if GRAD:
        out = data[2] + starts[2]
        if not WITH:
            _sweep(
                data, starts, begin, end, element, mask, read, norms, numbers, center, factor, False, False, True,
                False, KIND, LANES, TILES, WIDTH, EDGES, T,
            )  # fmt: skip
        _zero(out, size.to(INDEX), out_size.to(INDEX), LANES)


@triton.jit(do_not_specialize=PLAIN)
def _divergence_normalizers(
    data, places, inner, size, labels, partials, numbers, ignore, segment, segments,
    LANES: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr, EDGES: tl.constexpr, INDEX: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """Few rows: normalizers of one segment of a row per program; [row, segment, 4]."""
    program = tl.program_id(0)
    row = (program // segments).to(tl.int64)
    starts = _divergence_starts(data, places, row, inner)
    span = row_span(starts[0], size, WIDTH, EDGES, INDEX)
    element, mask = edge_elements(span, LANES, WIDTH)
    begin, end, edge = segment_of(segment, program % segments, span, _is_read(labels, row, ignore))
    student, teacher = _normalizers(
        data, starts, begin, end, element, both(mask, edge), number(numbers.scale, T), LANES, TILES, WIDTH, EDGES, T
    )
    part = partials + 4 * program.to(tl.int64)
    tl.store(part, student[0])
    tl.store(part + 1, student[1])
    tl.store(part + 2, teacher[0])
    tl.store(part + 3, teacher[1])


@triton.jit
def _combined_pair(partials, row, segments, SEGMENTS: tl.constexpr, numbers, T: tl.constexpr):
    scale = number(numbers.scale, T)
    student = combined_normalizer(partials, row, segments, 4, 0, SEGMENTS, scale)
    return student, combined_normalizer(partials, row, segments, 4, 2, SEGMENTS, scale)


@triton.jit(do_not_specialize=PLAIN)
def _divergence_sums(
    data, places, inner, size, labels, partials, sums, numbers, ignore, segment, segments,
    KIND: tl.constexpr, SEGMENTS: tl.constexpr, LANES: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr,
    EDGES: tl.constexpr, INDEX: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The sums of one segment of a row per program; [row, segment, 2]."""
    program = tl.program_id(0)
    row = (program // segments).to(tl.int64)
    starts = _divergence_starts(data, places, row, inner)
    span = row_span(starts[0], size, WIDTH, EDGES, INDEX)
    element, mask = edge_elements(span, LANES, WIDTH)
    begin, end, edge = segment_of(segment, program % segments, span, _is_read(labels, row, ignore))
    student, teacher = _combined_pair(partials, row, segments, SEGMENTS, numbers, T)
    norms = _norms(student, teacher, numbers, T)
    own = _sweep(
        data, starts, begin, end, element, both(mask, edge), True, norms, numbers, norms[1], norms[1], True, True,
        False, True, KIND, LANES, TILES, WIDTH, EDGES, T,
    )  # fmt: skip
    tl.store(sums + 2 * program.to(tl.int64), own[0])
    tl.store(sums + 2 * program.to(tl.int64) + 1, own[1])


@triton.jit(do_not_specialize=PLAIN)
def _divergence_finish(
    labels, scale, loss, stats, partials, sums, rows, numbers, ignore, segments,
    KIND: tl.constexpr, SEGMENTS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student, teacher = _combined_pair(partials, row, segments, SEGMENTS, numbers, T)
    segment = tl.arange(0, SEGMENTS)
    part = sums + 2 * (row * segments + segment)
    mask = segment < segments
    totals = tl.sum(tl.load(part, mask=mask, other=0.0)), tl.sum(tl.load(part + 1, mask=mask, other=0.0))
    _store_divergence(
        _is_read(labels, row, ignore), student, teacher, totals, scale, loss, stats, rows, row, KIND, numbers, T
    )  # fmt: skip


@triton.jit(do_not_specialize=PLAIN)
def _divergence_backward(
    data, places, inner, size, labels, scale, grad, stats, rows, numbers, ignore, segment, segments, out_size,
    KIND: tl.constexpr, LANES: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr, EDGES: tl.constexpr,
    INDEX: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The gradient of one segment of a row per program, from the row's stats."""
    program = tl.program_id(0)
    row = (program // segments).to(tl.int64)
    index = program % segments
    read = _is_read(labels, row, ignore)
    starts = _divergence_starts(data, places, row, inner)
    span = row_span(starts[0], size, WIDTH, EDGES, INDEX)
    element, mask = edge_elements(span, LANES, WIDTH)
    begin, end, edge = segment_of(segment, index, span, tl.full((), 1, tl.int1))
    student = tl.load(stats + row), tl.load(stats + rows + row)
    teacher = tl.load(stats + 2 * rows + row), tl.load(stats + 3 * rows + row)
    norms = _read_norms(student, teacher, read, numbers, T)
    center = tl.load(stats + 4 * rows + row)
    factor = _factor(grad, scale, row, numbers, KIND, T)
    _sweep(
        data, starts, begin, end, element, both(mask, edge), read, norms, numbers, center, factor, False, False, True,
        False, KIND, LANES, TILES, WIDTH, EDGES, T,
    )  # fmt: skip
    if index == segments - 1:
        _zero(data[2] + starts[2], size.to(INDEX), out_size.to(INDEX), LANES)


def _kind(beta: float) -> Any:
    return FORWARD if beta == 0 else REVERSE if beta == 1 else BETWEEN


def _gradients(
    rows: LogitRows, out: Tensor, labels: Tensor | None, scale: Tensor | None, grad: Tensor | None, stats: Tensor,
    numbers: Numbers, beta: float, ignore_index: int,
) -> None:  # fmt: skip
    plan = plan_map(rows.size // rows.width, rows.width, 2, rows.first.device)
    args = (labels, scale, grad, stats, rows.count, numbers, ignore_index)
    launch_sweep(
        _divergence_backward, rows.count * plan.segments, rows, plan, *args, out_size=out.shape[-1], KIND=_kind(beta),
        **rows.constants(plan),
    )  # fmt: skip


def _shared_vocabulary(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    size = min(student.shape[-1], teacher.shape[-1])
    return student[..., :size], teacher[..., :size]


def generalized_jsd(
    student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor | None, beta: float, temperature: float,
    ignore_index: int, reduction: str, with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad = student.new_empty(student.shape if with_grad else (0,))
    rows = LogitRows(*_shared_vocabulary(student, teacher), out=grad if with_grad else None)
    shape = student.shape[:-1]
    loss, stats = rows.new_vector(*shape), rows.new_vector(5, *shape)
    if rows.count > 0:
        numbers = _numbers(rows.dtype, temperature, beta)
        labels = None if labels is None else labels.contiguous()
        scale = None if scale is None else scale.to(rows.dtype)
        _run_divergence(rows, grad, labels, scale, loss, stats, numbers, beta, ignore_index)
    return loss if reduction == "none" else loss.sum(), stats, grad


def _run_divergence(
    rows: LogitRows, grad: Tensor, labels: Tensor | None, scale: Tensor | None, loss: Tensor, stats: Tensor,
    numbers: Numbers, beta: float, ignore_index: int,
) -> None:  # fmt: skip
    plan = rows.plan(again=True)
    constants = rows.constants(plan) | {"KIND": _kind(beta)}
    if plan.segments == 1:
        args = (labels, scale, loss, stats, rows.count, numbers, ignore_index)
        launch_sweep(_divergence_rows, rows.count, rows, plan, *args, out_size=grad.shape[-1], **constants)
        return
    programs, segments = rows.count * plan.segments, triton.next_power_of_2(plan.segments)
    partials, sums = rows.new_vector(4 * programs), rows.new_vector(2 * programs)
    kind = constants.pop("KIND")
    launch_sweep(_divergence_normalizers, programs, rows, plan, labels, partials, numbers, ignore_index, **constants)
    launch_sweep(
        _divergence_sums, programs, rows, plan, labels, partials, sums, numbers, ignore_index, KIND=kind,
        SEGMENTS=segments, **constants,
    )  # fmt: skip
    rowwise.launch(
        _divergence_finish, rows.count, rows.first, labels, scale, loss, stats, partials, sums, rows.count, numbers,
        ignore_index, plan.segments, KIND=kind, SEGMENTS=segments, T=constants["T"], num_warps=1,
    )  # fmt: skip
    if len(rows.data) == 3:
        _gradients(rows, grad, labels, scale, None, stats, numbers, beta, ignore_index)


def generalized_jsd_backward(
    grad: Tensor, student: Tensor, teacher: Tensor, labels: Tensor | None, stats: Tensor, beta: float,
    temperature: float, ignore_index: int,
) -> Tensor:  # fmt: skip
    out = student.new_empty(student.shape)
    rows = LogitRows(*_shared_vocabulary(student, teacher), out=out)
    if rows.count > 0:
        numbers = _numbers(rows.dtype, temperature, beta)
        labels = None if labels is None else labels.contiguous()
        _gradients(rows, out, labels, None, rows.scalars(grad), stats.contiguous(), numbers, beta, ignore_index)
    return out
