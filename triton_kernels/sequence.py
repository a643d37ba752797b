"""Losses over the tokens of sequences: log-probabilities, DDO of their sums (arXiv 2503.01103), and the operators of
the divergences in ``divergence.py``. Logarithms inside kernels are base 2: the hardware's 2^x then takes one
multiplication less, and its error does not grow with the exponent."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import scalar
from .divergence import generalized_jsd, generalized_jsd_backward
from .elbo import ddo_link, ddo_term
from .rowwise import Formula, Functions, Groups, Rows, run
from .scalar import divide, expm1, number, rounded
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

__all__ = [
    "generalized_jsd",
    "generalized_jsd_backward",
    "sequence_ddo_loss",
    "token_logprob",
    "token_logprob_backward",
]


class Numbers(NamedTuple):
    """Of a call, by :func:`scalar.argument`."""

    slope: Any  # 1 / τ
    scale: Any  # log2(e) / τ: from differences of logits to base-2 logarithms of probabilities


def _numbers(dtype: torch.dtype, temperature: float) -> Numbers:
    return Numbers(*(scalar.argument(x / temperature, dtype) for x in (1.0, LOG2E.value)))


# -- Log-probabilities of tokens


@triton.jit
def _store_logprob(
    logits, start, size, token, read, largest, total, logprob, stats, rows, row, numbers, T: tl.constexpr
):
    inside = (token >= 0) & (token < size)
    picked = tl.load(logits + start + token, mask=both(inside, read), other=float("nan")).to(T)
    value = (picked - largest) * number(numbers.slope, T) - tl.log(tl.where(read, total, 1.0))
    tl.store(logprob + row, tl.where(read, value, 0.0))
    tl.store(stats + row, tl.where(read, largest, 0.0))
    tl.store(stats + rows + row, tl.where(read, total, 0.0))


@triton.jit(do_not_specialize=PLAIN)
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
    begin, end, edge = segment_of(segment, program % segments, span, read)
    scale = number(numbers.scale, T)
    normalizer = normalizer_start(LANES, T)
    for chunk in range(begin, end, LANES * TILES):
        normalizer = normalizer_add(
            normalizer, load_tiles(data[0], start, chunk, end, False, LANES, TILES, WIDTH, T), scale
        )
    if EDGES:
        element, mask = edge_elements(span, LANES, WIDTH)
        normalizer = normalizer_add(normalizer, load_edge(data[0], start, element, both(mask, edge), T), scale)
    largest, total = normalizer_total(normalizer, scale)
    if partials is None:
        _store_logprob(data[0], start, size, token, read, largest, total, logprob, stats, rows, row, numbers, T)
    else:
        tl.store(partials + 2 * program.to(tl.int64), largest)
        tl.store(partials + 2 * program.to(tl.int64) + 1, total)


@triton.jit(do_not_specialize=PLAIN)
def _token_finish(
    data, places, inner, size, tokens, logprob, stats, partials, rows, numbers, ignore, segment, segments,
    SEGMENTS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + row)
    start = row_start(places[0], row, inner)
    largest, total = combined_normalizer(partials, row, segments, 2, 0, SEGMENTS, number(numbers.scale, T))
    _store_logprob(
        data[0], start, size, token, token != ignore, largest, total, logprob, stats, rows, row, numbers, T
    )  # fmt: skip


@triton.jit
def _token_gradient(tiles, element, token, largest, share, picked, scale, OUT: tl.constexpr):
    """The gradient, rounded: share 2^…, at the token `picked`. `element`: the place in the row of each element of the
    first tile, and how far the next tile's are."""
    values = ()
    for i in tl.static_range(len(tiles)):
        value = tl.exp2((tiles[i] - largest) * scale) * share
        values = values + (rounded(tl.where(element[0] + i * element[1] == token, picked, value), OUT),)
    return values


@triton.jit(do_not_specialize=PLAIN)
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
    begin, end, edge = segment_of(segment, program % segments, span, tl.full((), 1, tl.int1))
    scale = number(numbers.scale, T)
    largest = tl.load(stats + row)
    total = tl.where(read, tl.load(stats + rows + row), 1.0)
    slope = number(numbers.slope, T)
    factor = tl.where(read, tl.load(grad + row) * slope, 0.0)
    share = divide(-factor, total)
    logit = tl.load(data[0] + start + token, mask=read, other=0.0).to(T)
    picked = -factor * expm1((logit - largest) * slope - tl.log(total))  # 1 - softmax, which may be near 0
    OUT: tl.constexpr = data[1].dtype.element_ty
    lane = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    for chunk in range(begin, end, LANES * TILES):
        tiles = load_tiles(data[0], start, chunk, tl.where(read, end, 0), False, LANES, TILES, WIDTH, T)
        places_here = (span[0] + chunk * WIDTH + lane, LANES * WIDTH)
        values = _token_gradient(tiles, places_here, token, largest, share, picked, scale, OUT)
        store_tiles(data[1], out, chunk, end, values, LANES, TILES, WIDTH)
    if EDGES:
        element, mask = edge_elements(span, LANES, WIDTH)
        tiles = load_edge(data[0], start, element, both(both(mask, edge), read), T)
        values = _token_gradient(tiles, (element, 0), token, largest, share, picked, scale, OUT)
        tl.store(data[1] + out + element, values[0], mask=both(mask, edge))


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
    launch_sweep(_token_rows, rows.count * plan.segments, rows, plan, *args, **constants)
    if split:
        segments = triton.next_power_of_2(plan.segments)
        launch_sweep(_token_finish, rows.count, rows, plan, *args, SEGMENTS=segments, T=constants["T"], num_warps=1)
    return logprob, stats


def token_logprob_backward(
    grad: Tensor, logits: Tensor, tokens: Tensor, stats: Tensor, temperature: float, ignore_index: int
) -> Tensor:
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    rows = LogitRows(logits, out=out)
    if rows.count == 0:
        return out
    plan = plan_map(rows.size // rows.width, rows.width, 1, rows.first.device)
    args = (
        tokens.contiguous(),
        stats.contiguous(),
        rows.scalars(grad),
        rows.count,
        _numbers(rows.dtype, temperature),
        ignore_index,
    )
    launch_sweep(_token_backward, rows.count * plan.segments, rows, plan, *args, **rows.constants(plan))
    return out


# -- DDO over the sums of token log-probabilities


class DdoArgs(NamedTuple):
    link: Any
    scale: Any
    term: Tensor
    delta: Tensor
    slope: Tensor


@triton.jit
def _ddo_row(args, row, rank, T: tl.constexpr):
    return (tl.full((), 1.0, T),)


@triton.jit
def _accumulate_difference(constants, v):
    return (v[0] - v[1],)


@triton.jit
def _ddo_epilogue(args, group, sums, T: tl.constexpr):
    term, slope = ddo_term(args.link, group, sums[0], T)
    scale = number(args.scale, T)
    tl.store(args.delta + group, sums[0])
    tl.store(args.term + group, scale * term)
    tl.store(args.slope + group, scale * slope)
    return slope


SEQUENCE_DDO = Formula(Functions(_ddo_row, _accumulate_difference, _ddo_epilogue), sums=1)


def sequence_ddo_loss(
    logprob: Tensor, ref_logprob: Tensor, is_real: Tensor, counts: Tensor | None, alpha: float, beta: float,
    scale: float, reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows = Rows(logprob, ref_logprob)
    term, delta, slope = (rows.new_vector(rows.count) for _ in range(3))
    link = ddo_link(rows, is_real, counts, alpha, beta, 1.0, reduction)
    args = DdoArgs(link, scalar.argument(scale, rows.dtype), term, delta, slope)
    run(SEQUENCE_DDO, Groups(rows.count), rows, args)
    return term if reduction == "none" else term.sum(), delta, slope
