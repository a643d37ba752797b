"""Losses over logits: log-probabilities of tokens, and the generalized Jensen-Shannon divergence (arXiv 2306.13649).

With P the teacher's and Q the student's softmax(logits / τ) and M = βP + (1 - β)Q, a row's loss is β KL(P‖M) +
(1 - β) KL(Q‖M); for β = 0 it is KL(P‖Q), for β = 1 KL(Q‖P). Logarithms in the kernels are base 2: the hardware's 2^x
then takes one multiplication less, and its error does not grow with the exponent.

The floor is student and teacher read once, the gradient written once. A row of 128 256 bfloat16 logits of each is 512 KB,
more than a multiprocessor's registers and shared memory, so a program sweeps it again for each number that the next
sweep needs: the two normalizers, then the divergence of Q (not for β = 0), then the gradient. Later sweeps run against
the direction of the one before and find what it read last in the L2; CUDA's clusters (csrc/cuda/sweep.cuh) keep the row.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rowwise, scalar
from .elbo import ddo_link, ddo_term
from .rowwise import Formula, Functions, Groups, Rows
from .scalar import divide, exp_negative, number, rounded
from .sweep import (
    LogitRows, Plan, edge_elements, load_edge, load_tiles, normalizer_add, normalizer_start, normalizer_total,
    plan_map, row_span, row_start, store_tiles,
)  # fmt: skip

# What no kernel is compiled anew for.
_PLAIN = ["places", "inner", "size", "rows", "ignore", "segment", "segments", "out_size"]

LN2 = tl.constexpr(math.log(2))
LOG2E = tl.constexpr(1 / math.log(2))

FORWARD, REVERSE, BETWEEN = (tl.constexpr(kind) for kind in range(3))  # KL(P‖Q), KL(Q‖P), and 0 < β < 1


class Numbers(NamedTuple):
    """Of a call, by :func:`scalar.argument`."""

    slope: Any  # 1 / τ
    scale: Any  # log2(e) / τ: from differences of logits to base-2 logarithms of probabilities
    log_beta: Any = None  # base 2
    log_rest: Any = None  # of 1 - β


def _numbers(dtype: torch.dtype, temperature: float, beta: float = 0.0) -> Numbers:
    slope, scale = (scalar.argument(x / temperature, dtype) for x in (1.0, LOG2E.value))
    if not 0 < beta < 1:
        return Numbers(slope, scale)
    logs = (scalar.argument(x * LOG2E.value, dtype) for x in (math.log(beta), math.log1p(-beta)))
    return Numbers(slope, scale, *logs)


@triton.jit
def _is_read(labels, row, ignore):
    if labels is None:
        return tl.full((), 1, tl.int1)
    else:
        return tl.load(labels + row) != ignore


@triton.jit
def _segment(segment, index, span, read, EDGES: tl.constexpr):
    """The chunks [begin, end) of a row that its program `index` sweeps, and whether it has the edges: none of a row
    that is not read."""
    chunks = tl.where(read, span[1], 0)
    begin = tl.minimum(index.to(chunks.dtype) * segment, chunks)
    return begin, tl.minimum(begin + segment, chunks), read & (index == 0)


# -- Log-probabilities of tokens


@triton.jit
def _store_logprob(logits, start, size, token, read, largest, total, logprob, stats, rows, row, numbers, T: tl.constexpr):
    inside = (token >= 0) & (token < size)
    picked = tl.load(logits + start + token, mask=inside & read, other=float("nan")).to(T)
    log_sum = tl.log(total)
    value = (picked - largest) * number(numbers.slope, T) - log_sum
    tl.store(logprob + row, tl.where(read, value, 0.0))
    tl.store(stats + row, tl.where(read, largest, 0.0))
    tl.store(stats + rows + row, tl.where(read, log_sum, 0.0))


@triton.jit(do_not_specialize=_PLAIN)
def _token_rows(
    data, places, inner, size, tokens, logprob, stats, partials, rows, numbers, ignore, segment, segments,
    LANES: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr, EDGES: tl.constexpr, INDEX: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """One sweep of a segment of a row: the whole row and its results, or a partial normalizer."""
    program = tl.program_id(0)
    row = (program // segments).to(tl.int64)
    token = tl.load(tokens + row)
    read = token != ignore
    start = row_start(places[0], row, inner)
    span = row_span(start, size, WIDTH, EDGES, INDEX)
    begin, end, edge = _segment(segment, program % segments, span, read, EDGES)
    scale = number(numbers.scale, T)
    normalizer = normalizer_start(LANES, T)
    for chunk in range(begin, end, LANES * TILES):
        normalizer = normalizer_add(
            normalizer, load_tiles(data[0], start, chunk, end, False, LANES, TILES, WIDTH, T), scale
        )
    if EDGES:
        element, mask = edge_elements(span, LANES, WIDTH)
        normalizer = normalizer_add(normalizer, load_edge(data[0], start, element, mask & edge, T), scale)
    largest, total = normalizer_total(normalizer, scale)
    if partials is None:
        _store_logprob(data[0], start, size, token, read, largest, total, logprob, stats, rows, row, numbers, T)
    else:
        tl.store(partials + 2 * program.to(tl.int64), largest)
        tl.store(partials + 2 * program.to(tl.int64) + 1, total)


@triton.jit
def _combined(partials, row, segments, COUNT: tl.constexpr, FIRST: tl.constexpr, SEGMENTS: tl.constexpr, scale):
    """The normalizer of a row from those of its segments, numbers FIRST and FIRST + 1 of each COUNT."""
    segment = tl.arange(0, SEGMENTS)
    part = partials + (row * segments + segment) * COUNT + FIRST
    mask = segment < segments
    largest = tl.load(part, mask=mask, other=float("-inf"))
    return normalizer_total((largest, tl.load(part + 1, mask=mask, other=0.0)), scale)


@triton.jit(do_not_specialize=_PLAIN)
def _token_finish(
    data, places, inner, size, tokens, logprob, stats, partials, rows, numbers, ignore, segment, segments,
    SEGMENTS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + row)
    start = row_start(places[0], row, inner)
    largest, total = _combined(partials, row, segments, 2, 0, SEGMENTS, number(numbers.scale, T))
    _store_logprob(
        data[0], start, size, token, token != ignore, largest, total, logprob, stats, rows, row, numbers, T
    )  # fmt: skip


@triton.jit
def _token_gradient(tiles, element, token, largest, share, factor, scale, OUT: tl.constexpr):
    """factor (onehot - softmax), rounded; `element`: the place in the row of each element of the first tile, and how
    far the next tile's are."""
    values = ()
    for i in tl.static_range(len(tiles)):
        onehot = tl.where(element[0] + i * element[1] == token, factor, 0.0)
        values = values + (rounded(onehot - tl.exp2((tiles[i] - largest) * scale) * (share * factor), OUT),)
    return values


@triton.jit(do_not_specialize=_PLAIN)
def _token_backward(
    data, places, inner, size, tokens, stats, grad, rows, numbers, ignore, segment, segments,
    LANES: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr, EDGES: tl.constexpr, INDEX: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = (program // segments).to(tl.int64)
    token = tl.load(tokens + row)
    read = (token != ignore) & (token >= 0) & (token < size)
    start, out = row_start(places[0], row, inner), row_start(places[1], row, inner)
    span = row_span(start, size, WIDTH, EDGES, INDEX)
    begin, end, edge = _segment(segment, program % segments, span, tl.full((), 1, tl.int1), EDGES)
    scale = number(numbers.scale, T)
    largest = tl.load(stats + row)
    share = exp_negative(-tl.load(stats + rows + row))
    factor = tl.where(read, tl.load(grad + row) * number(numbers.slope, T), 0.0)
    OUT: tl.constexpr = data[1].dtype.element_ty
    lane = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    for chunk in range(begin, end, LANES * TILES):
        tiles = load_tiles(data[0], start, chunk, tl.where(read, end, 0), False, LANES, TILES, WIDTH, T)
        places_here = (span[0] + chunk * WIDTH + lane, LANES * WIDTH)
        values = _token_gradient(tiles, places_here, token, largest, share, factor, scale, OUT)
        store_tiles(data[1], out, chunk, end, values, LANES, TILES, WIDTH)
    if EDGES:
        element, mask = edge_elements(span, LANES, WIDTH)
        tiles = load_edge(data[0], start, element, mask & edge & read, T)
        values = _token_gradient(tiles, (element, 0), token, largest, share, factor, scale, OUT)
        tl.store(data[1] + out + element, values[0], mask=mask & edge)


def _launch(kernel: Any, programs: int, rows: LogitRows, plan: Plan, *args: Any, **constants: Any) -> None:
    common = (rows.data, rows.places, rows.inner, rows.size)
    rowwise.launch(kernel, programs, rows.first, *common, *args, plan.segment, plan.segments, **constants)


def token_logprob(logits: Tensor, tokens: Tensor, temperature: float, ignore_index: int) -> tuple[Tensor, Tensor]:
    rows = LogitRows(logits)
    shape = logits.shape[:-1]
    logprob, stats = rows.new_vector(*shape), rows.new_vector(2, *shape)
    if rows.count == 0:
        return logprob, stats
    plan = rows.plan(again=False)
    split = plan.segments > 1
    partials = rows.new_vector(2 * rows.count * plan.segments) if split else None
    args = (tokens.contiguous(), logprob, stats, partials, rows.count, _numbers(rows.dtype, temperature), ignore_index)
    constants = rows.constants(plan)
    _launch(_token_rows, rows.count * plan.segments, rows, plan, *args, **constants)
    if split:
        segments = triton.next_power_of_2(plan.segments)
        _launch(_token_finish, rows.count, rows, plan, *args, SEGMENTS=segments, T=constants["T"], num_warps=1)
    return logprob, stats


def token_logprob_backward(
    grad: Tensor, logits: Tensor, tokens: Tensor, stats: Tensor, temperature: float, ignore_index: int
) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    rows = LogitRows(logits, out=out)
    if rows.count == 0:
        return out
    plan = plan_map(rows.size // rows.width, rows.width, 1)
    args = (tokens.contiguous(), stats, rows.scalars(grad), rows.count, _numbers(rows.dtype, temperature), ignore_index)
    _launch(_token_backward, rows.count * plan.segments, rows, plan, *args, **rows.constants(plan))
    return out


# -- The generalized Jensen-Shannon divergence. Streams: student, teacher; and the student's gradient.


@triton.jit
def _finite(x):
    """-inf as a number so low that 2^x is 0 and differences stay finite; NaN passes."""
    return tl.where(x < -1e30, -1e30, x)


@triton.jit
def _divergence(s, t, norms, numbers, KIND: tl.constexpr, T: tl.constexpr):
    """Of elements: (share of the loss, share of the center, weight, height), logarithms base 2. The gradient is
    weight (height - center) / τ, with the center 0 for FORWARD. `norms`: the largest logit and log2 of the sum, of Q
    then of P."""
    scale = number(numbers.scale, T)
    x = (s - norms[0]) * scale - norms[1]
    y = (t - norms[2]) * scale - norms[3]
    if KIND == FORWARD:
        p = tl.exp2(y)
        share = tl.where(p == 0.0, 0.0, p * (y - x))
        return share, tl.zeros_like(share), tl.exp2(x) - p, tl.full(share.shape, 1.0, T)
    elif KIND == REVERSE:
        q = tl.exp2(x)
        height = tl.where(q == 0.0, 0.0, x - y)
        return q * height, q * height, q, height
    else:
        # With a = log βP, b = log (1-β)Q and D = a - b: log M = max(a, b) + log(1 + 2^-|D|), and what is summed are the
        # differences of log P and log Q from it, in which a and b themselves cancel exactly.
        log_beta, log_rest = number(numbers.log_beta, T), number(numbers.log_rest, T)
        x, y = _finite(x), _finite(y)
        d = (y - x) + (log_beta - log_rest)
        ratio = tl.exp2(-tl.abs(d))
        above = tl.log2(1.0 + ratio)
        larger = tl.exp2(tl.maximum(y + log_beta, x + log_rest))
        q = larger * tl.where(d > 0.0, ratio, 1.0)
        p = larger * tl.where(d > 0.0, 1.0, ratio)
        from_q = -log_rest - tl.where(d > 0.0, d, 0.0) - above
        from_p = -log_beta - tl.where(d > 0.0, 0.0, -d) - above
        return q * from_q + p * from_p, q * from_q, q, from_q


@triton.jit
def _divergence_add(sums, s, t, norms, numbers, KIND: tl.constexpr, T: tl.constexpr):
    loss, center = sums
    for i in tl.static_range(len(s)):
        shares = _divergence(s[i], t[i], norms, numbers, KIND, T)
        loss += tl.sum(shares[0], axis=1)
        center += tl.sum(shares[1], axis=1)
    return loss, center


@triton.jit
def _divergence_gradient(s, t, norms, numbers, center, factor, KIND: tl.constexpr, OUT: tl.constexpr, T: tl.constexpr):
    values = ()
    for i in tl.static_range(len(s)):
        _, _, weight, height = _divergence(s[i], t[i], norms, numbers, KIND, T)
        if KIND == FORWARD:
            value = weight * factor
        else:
            value = weight * (height * LN2 - center) * factor
        values = values + (rounded(tl.where(weight == 0.0, 0.0, value), OUT),)
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
    """The sums of loss and center (SUM), base 2, and the gradient (GRAD), of chunks [begin, end) and an edge. A row that
    is not to be read has zeros for a gradient: it counts as -inf, whose weight is 0."""
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
        s = load_edge(data[0], starts[0], element, mask & read, T)
        t = load_edge(data[1], starts[1], element, mask & read, T)
        if SUM:
            sums = _divergence_add(sums, s, t, norms, numbers, KIND, T)
        if GRAD:
            values = _divergence_gradient(s, t, norms, numbers, center, factor, KIND, data[2].dtype.element_ty, T)
            tl.store(data[2] + starts[2] + element, values[0], mask=mask)
    return tl.sum(sums[0], axis=0), tl.sum(sums[1], axis=0)


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
def _factor(grad, scale, row, numbers, T: tl.constexpr):
    """1 / τ times the row's gradient and the call's scale, where there are any."""
    factor = number(numbers.slope, T)
    if grad is not None:
        factor *= tl.load(grad + row)
    if scale is not None:
        factor *= tl.load(scale)
    return factor


@triton.jit
def _store_divergence(
    read, largest_s, log_s, largest_t, log_t, sums, scale, loss, stats, rows, row, KIND: tl.constexpr, numbers,
    T: tl.constexpr,
):  # fmt: skip
    """Logarithms and sums come base 2 and are stored base e. Returns the center as it is stored."""
    value, center = sums[0] * LN2, sums[1] * LN2
    if KIND == BETWEEN:
        center = divide(center, tl.exp2(number(numbers.log_rest, T)))
    if scale is not None:
        value *= tl.load(scale)
    tl.store(loss + row, tl.where(read, value, 0.0))
    stored = (largest_s, log_s * LN2, largest_t, log_t * LN2, center)
    for i in tl.static_range(5):
        tl.store(stats + i * rows + row, tl.where(read, stored[i], 0.0))
    return center


@triton.jit(do_not_specialize=_PLAIN)
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
    end = tl.where(read, span[1], 0)
    begin = tl.zeros_like(end)
    student, teacher = _normalizers(
        data, starts, begin, end, element, mask & read, number(numbers.scale, T), LANES, TILES, WIDTH, EDGES, T
    )
    norms = (student[0], tl.log2(student[1]), teacher[0], tl.log2(teacher[1]))
    if not read:
        norms = (0.0 * begin.to(T), 0.0 * begin.to(T), 0.0 * begin.to(T), 0.0 * begin.to(T))
    GRAD: tl.constexpr = len(data) == 3
    WITH: tl.constexpr = GRAD and KIND == FORWARD  # that gradient needs no sum of this sweep
    factor = _factor(None, scale, row, numbers, T)
    sums = _sweep(
        data, starts, begin, end, element, mask & read, norms, numbers, begin.to(T), factor, True, True, WITH,
        GRAD and not WITH, KIND, LANES, TILES, WIDTH, EDGES, T,
    )  # fmt: skip
    center = _store_divergence(
        read, norms[0], norms[1], norms[2], norms[3], sums, scale, loss, stats, rows, row, KIND, numbers, T
    )  # fmt: skip
    if GRAD:
        out = data[2] + starts[2]
        if not WITH:
            _sweep(
                data, starts, begin, end, element, mask & read, norms, numbers, center, factor, False, False, True,
                False, KIND, LANES, TILES, WIDTH, EDGES, T,
            )  # fmt: skip
        _zero(out, tl.where(read, size, 0).to(INDEX), out_size.to(INDEX), LANES)


@triton.jit(do_not_specialize=_PLAIN)
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
    begin, end, edge = _segment(segment, program % segments, span, _is_read(labels, row, ignore), EDGES)
    student, teacher = _normalizers(
        data, starts, begin, end, element, mask & edge, number(numbers.scale, T), LANES, TILES, WIDTH, EDGES, T
    )
    part = partials + 4 * program.to(tl.int64)
    tl.store(part, student[0])
    tl.store(part + 1, student[1])
    tl.store(part + 2, teacher[0])
    tl.store(part + 3, teacher[1])


@triton.jit
def _combined_norms(partials, row, segments, SEGMENTS: tl.constexpr, numbers, T: tl.constexpr):
    scale = number(numbers.scale, T)
    student = _combined(partials, row, segments, 4, 0, SEGMENTS, scale)
    teacher = _combined(partials, row, segments, 4, 2, SEGMENTS, scale)
    return student[0], tl.log2(student[1]), teacher[0], tl.log2(teacher[1])


@triton.jit(do_not_specialize=_PLAIN)
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
    begin, end, edge = _segment(segment, program % segments, span, _is_read(labels, row, ignore), EDGES)
    norms = _combined_norms(partials, row, segments, SEGMENTS, numbers, T)
    own = _sweep(
        data, starts, begin, end, element, mask & edge, norms, numbers, norms[1], norms[1], True, True, False, True,
        KIND, LANES, TILES, WIDTH, EDGES, T,
    )  # fmt: skip
    tl.store(sums + 2 * program.to(tl.int64), own[0])
    tl.store(sums + 2 * program.to(tl.int64) + 1, own[1])


@triton.jit(do_not_specialize=_PLAIN)
def _divergence_finish(
    labels, scale, loss, stats, partials, sums, rows, numbers, ignore, segments,
    KIND: tl.constexpr, SEGMENTS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    norms = _combined_norms(partials, row, segments, SEGMENTS, numbers, T)
    segment = tl.arange(0, SEGMENTS)
    part = sums + 2 * (row * segments + segment)
    mask = segment < segments
    totals = tl.sum(tl.load(part, mask=mask, other=0.0)), tl.sum(tl.load(part + 1, mask=mask, other=0.0))
    _store_divergence(
        _is_read(labels, row, ignore), norms[0], norms[1], norms[2], norms[3], totals, scale, loss, stats, rows, row,
        KIND, numbers, T,
    )  # fmt: skip


@triton.jit(do_not_specialize=_PLAIN)
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
    begin, end, edge = _segment(segment, index, span, read, EDGES)
    largest_s, log_s = tl.load(stats + row), tl.load(stats + rows + row)
    largest_t, log_t = tl.load(stats + 2 * rows + row), tl.load(stats + 3 * rows + row)
    norms = (largest_s, log_s * LOG2E, largest_t, log_t * LOG2E)
    center = tl.load(stats + 4 * rows + row)
    factor = _factor(grad, scale, row, numbers, T)
    _sweep(
        data, starts, begin, end, element, mask & edge, norms, numbers, center, factor, False, False, True, False,
        KIND, LANES, TILES, WIDTH, EDGES, T,
    )  # fmt: skip
    if index == segments - 1:
        _zero(data[2] + starts[2], tl.where(read, size, 0).to(INDEX), out_size.to(INDEX), LANES)


def _kind(beta: float) -> Any:
    return FORWARD if beta == 0 else REVERSE if beta == 1 else BETWEEN


def _gradients(
    rows: LogitRows, out: Tensor, labels: Tensor | None, scale: Tensor | None, grad: Tensor | None, stats: Tensor,
    numbers: Numbers, beta: float, ignore_index: int,
) -> None:  # fmt: skip
    plan = plan_map(rows.size // rows.width, rows.width, 2)
    args = (labels, scale, grad, stats, rows.count, numbers, ignore_index)
    _launch(
        _divergence_backward, rows.count * plan.segments, rows, plan, *args, out_size=out.shape[-1], KIND=_kind(beta),
        **rows.constants(plan),
    )  # fmt: skip


def _shared_vocabulary(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    size = min(student.shape[-1], teacher.shape[-1])
    return student[..., :size], teacher[..., :size]


def generalized_jsd(
    student: Tensor, teacher: Tensor, labels: Tensor | None, scale: Tensor | None, beta: float, temperature: float,
    ignore_index: int, reduce: bool, with_grad: bool,
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
    return loss.sum() if reduce else loss, stats, grad


def _run_divergence(
    rows: LogitRows, grad: Tensor, labels: Tensor | None, scale: Tensor | None, loss: Tensor, stats: Tensor,
    numbers: Numbers, beta: float, ignore_index: int,
) -> None:  # fmt: skip
    plan = rows.plan(again=True)
    constants = rows.constants(plan) | {"KIND": _kind(beta)}
    if plan.segments == 1:
        args = (labels, scale, loss, stats, rows.count, numbers, ignore_index)
        _launch(_divergence_rows, rows.count, rows, plan, *args, out_size=grad.shape[-1], **constants)
        return
    programs, segments = rows.count * plan.segments, triton.next_power_of_2(plan.segments)
    partials, sums = rows.new_vector(4 * programs), rows.new_vector(2 * programs)
    kind = constants.pop("KIND")
    _launch(_divergence_normalizers, programs, rows, plan, labels, partials, numbers, ignore_index, **constants)
    _launch(
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
        _gradients(rows, out, labels, None, rows.scalars(grad), stats, numbers, beta, ignore_index)
    return out
