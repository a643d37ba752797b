"""The skeleton for rows of logits: sweeps over long rows in 16-byte pieces, and an online log-sum-exp.

The counterpart of ``csrc/skeleton/sweep.h``. A family brings ``@triton.jit`` functions:

    ignored(args, row) -> bool                      the row is not read; its output is 0
    row(args, rows, row, normals, read, T) -> constants         of a row
    element(constants, v) -> (parts, shares)        of an element of each stream: what map() wants, what it adds to sums
    epilogue(args, rows, row, constants, sums, read, T) -> constants      stores results, completes the row for map()
    map(constants, parts) -> value                  one output element
    picked(args, row) -> column                     optional: the one column of which these two want to know:
    pick(args, row, constants, v, read)             stores, of its element; NaN where the column is out of range
    map_picked(constants, v) -> value               its output, instead of map()

`args` is a NamedTuple of the family's own, with log2(e) / τ as `scale`. `normals` has the largest logit and the sum
of exponentials of each stream, or is None where an earlier sweep has stored them. `rows`, their number, is for vectors
with several numbers a row. An ignored row passes through all functions, its logits as -inf: what they store is 0.
Sums have one fixed tree for a given shape, dtype, alignment and device; there are no atomics.

A row is cut into *chunks* of WIDTH elements: a 16-byte load of the narrowest stream. A program takes LANES x TILES
chunks at a time, as TILES tiles [LANES, WIDTH] of which every thread has a row. So what is reduced along WIDTH stays in
the thread, and a sweep keeps one accumulator a thread and stream whatever it unrolls.

Rows of an odd size start anywhere. Where the rows of all streams start at the same place between two 16-byte
boundaries, the elements before the first boundary and after the last, up to WIDTH - 1 each, are an *edge* tile of
single elements, and the rest is chunks. Elsewhere WIDTH is 1.

The floor is every stream read once, the output written once. A row of 128 256 bfloat16 logits of two models is 512 KB,
more than a multiprocessor's registers and shared memory, so a program sweeps it again for each number that the next
sweep needs: the normalizers, the sums, the map. Each sweep runs against the direction of the one before and finds what
that read last in the caches. CUDA's clusters (``csrc/skeleton/sweep_kernels.cuh``) keep the row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layout, rowwise
from .normalizers import (
    any_enormous,
    combined_normalizer,
    normalizer_add,
    normalizer_add_enormous,
    normalizer_settled,
    normalizer_start,
    normalizer_total,
)
from .plan import SweepPlan, offsets_type, plan_map, plan_sweep
from .scalar import number, rounded
from .tiles import both, edge_elements, load_edge, load_tiles, row_span, row_start, segment_of, store_tiles

LOG2E = tl.constexpr(1 / math.log(2))

# What no kernel is compiled anew for.
PLAIN = ["places", "inner", "size", "rows", "segment", "segments", "shares", "out_size"]

Place = tuple[int, int, int]  # of rows [outer, inner]: the first row's offset, the strides; in elements

# The steps of a sweep.
NORMALIZERS, SUMS, RESULTS, MAP = (tl.constexpr(step) for step in range(4))


class SweepFunctions(NamedTuple):
    """What of a formula the kernels call."""

    ignored: Any
    row: Any
    element: Any = None
    epilogue: Any = None
    map: Any = None
    picked: Any = None
    pick: Any = None
    map_picked: Any = None


@dataclass(frozen=True)
class SweepFormula:
    """`sums` numbers that a row adds up to. `maps_at_once`: the map waits for no sum."""

    functions: SweepFunctions
    sums: int = 0
    maps_at_once: bool = False


class Shape(NamedTuple):
    """What kernels are compiled for."""

    STREAMS: int
    SUMS: int
    LANES: int
    TILES: int
    WIDTH: int
    EDGES: bool
    INDEX: Any
    T: Any


def as_logits(t: Tensor) -> Tensor:
    """`t` as [outer, inner, size] with unit stride over `size`: a view where its strides allow one, else a copy."""
    if t.dim() > 3:
        t = t.flatten(0, -3)
    while t.dim() < 3:
        t = t.unsqueeze(0)
    return t if t.stride(2) == 1 or t.shape[2] == 1 else t.contiguous()


class LogitRows:
    """Tensors [..., size] of one shape as rows, read in place. `out`, if any, is written in place."""

    def __init__(self, *inputs: Tensor, out: Tensor | None = None) -> None:
        tensors = [as_logits(t) for t in inputs]
        outer, self.inner, self.size = tensors[0].shape
        self.first, self.count = tensors[0], outer * self.inner
        self.dtype = layout.arithmetic_dtype(*inputs)
        self.streams = len(tensors)
        self.out_size = 0 if out is None else out.shape[-1]
        if out is not None:
            tensors.append(out.view(outer, self.inner, self.out_size))
        aligned = [_aligned(t) for t in tensors]
        self.data = tuple(data for data, _ in aligned)
        self.places = tuple(place for _, place in aligned)
        itemsize = min(t.element_size() for t in tensors)
        width = 16 // itemsize
        phases = {tuple(n % width for n in place) for place in self.places}
        # A boundary for all streams, row after row. Without, single elements: neighbours for neighbouring threads.
        self.width = width if len(phases) == 1 and all(d.data_ptr() % 16 == 0 for d in self.data) else 1
        self.edges = self.width > 1 and (phases != {(0, 0, 0)} or self.size % width != 0)

    def plan(self) -> SweepPlan:
        return plan_sweep(self.count, self.size // self.width, self.width, self.streams, self.first.device)

    def scalars(self, t: Tensor) -> Tensor:
        """One number a row, in the arithmetic dtype."""
        return t.to(self.dtype).contiguous()

    def new_vector(self, *shape: int) -> Tensor:
        return self.first.new_empty(shape, dtype=self.dtype)


def _aligned(t: Tensor) -> tuple[Tensor, Place]:
    """What starts at the last 16-byte boundary at or before `t`, and where the rows of `t` are from there."""
    outer, inner, _ = t.shape
    strides = (t.stride(0) if outer > 1 else 0, t.stride(1) if inner > 1 else 0)
    offset, rest = divmod(t.data_ptr() % 16, t.element_size())
    if offset == 0 or rest or offset > t.storage_offset():
        return t, (0, *strides)
    return t.as_strided((1,), (1,), t.storage_offset() - offset), (offset, *strides)


def sweep(formula: SweepFormula, rows: LogitRows, args: Any, normalized: bool = False) -> None:
    """Runs `formula` over `rows`: normalizers unless `normalized`, sums, results, the map where they have an output.

    A program does all for its row; of few long rows each step is a launch, for which programs share a row.
    """
    plan, split = rows.plan(), None
    last = MAP if rows.out_size > 0 else RESULTS
    steps = (() if normalized else (NORMALIZERS,)) + ((SUMS,) if formula.sums > 0 else ())
    if plan.segments > 1:
        split = tuple(rows.new_vector(rows.count, plan.segments, n) for n in (2 * rows.streams, formula.sums))
        for step in steps:
            _launch(formula, rows, plan, args, step, step, split, normalized=normalized)
    first, last_of = (RESULTS, RESULTS) if split else (steps[0], last)
    _launch(formula, rows, plan, args, first, last_of, split, shares=1, normalized=normalized)
    if split and last == MAP:
        sweep_map(formula, rows, args)


def sweep_map(formula: SweepFormula, rows: LogitRows, args: Any) -> None:
    """The map alone, of what an earlier sweep has stored of the rows."""
    plan = plan_map(rows.size // rows.width, rows.width, rows.streams, rows.first.device)
    _launch(formula, rows, plan, args, MAP, MAP)


def _launch(
    formula: SweepFormula,
    rows: LogitRows,
    plan: SweepPlan,
    args: Any,
    first: Any,
    last: Any,
    split: Any = None,
    shares: int | None = None,
    normalized: bool = False,
) -> None:
    """Steps `first` to `last`, by `shares` programs a row."""
    if rows.count == 0:
        return
    shares = plan.segments if shares is None else shares
    alone = first == last == RESULTS
    T = tl.float64 if rows.dtype == torch.float64 else tl.float32
    tile = plan.lanes, plan.tiles, rows.width, rows.edges
    rowwise.launch(
        _sweep,
        rows.count * shares,
        rows.first,
        formula.functions,
        rows.data,
        rows.places,
        rows.inner,
        rows.size,
        rows.out_size,
        args,
        rows.count,
        split,
        plan.segment,
        plan.segments,
        shares,
        FIRST=first,
        LAST=last,
        AT_ONCE=formula.maps_at_once,
        NORMALIZED=normalized,
        SEGMENTS=triton.next_power_of_2(plan.segments) if split else 1,
        S=Shape(rows.streams, formula.sums, *tile, offsets_type(rows.size), T),
        num_warps=1 if alone else plan.num_warps,
    )


# -- In kernels


@triton.jit
def _zeros(LANES: tl.constexpr, T: tl.constexpr):
    return tl.zeros((LANES,), T)


@triton.jit
def _load(data, starts, first, end, MASKED: tl.constexpr, AGAIN: tl.constexpr, TILES: tl.constexpr, S: tl.constexpr):
    """The tiles of every stream."""
    return [
        load_tiles(data[s], starts[s], first, end, MASKED, AGAIN, S.LANES, TILES, S.WIDTH, S.T)
        for s in (0, 1)[: S.STREAMS]
    ]


@triton.jit
def _end_of_blocks(begin, end, read, BLOCK: tl.constexpr):
    """Where the last whole block of chunks [begin, end) ends: of a row that is not read, at their begin."""
    return begin + tl.where(read, (end - begin) // BLOCK, 0) * BLOCK


@triton.jit
def _normalizers(data, starts, span, begin, end, read, edge, scale, AGAIN: tl.constexpr, S: tl.constexpr):
    """(largest, total) of each stream over chunks [begin, end) and, where `edge`, the edges."""
    normalizers = [normalizer_start(S.LANES, S.T) for _ in (0, 1)[: S.STREAMS]]
    TILES: tl.constexpr = max(2, S.TILES)  # there are registers for them
    BLOCK: tl.constexpr = S.LANES * TILES
    rest = _end_of_blocks(begin, end, read, BLOCK)
    for chunk in range(begin, rest, BLOCK):
        tiles = _load(data, starts, chunk, end, False, AGAIN, TILES, S)
        normalizers = [normalizer_add(normalizers[s], tiles[s], scale) for s in (0, 1)[: S.STREAMS]]
    for chunk in range(rest, tl.where(read, end, rest), S.LANES * S.TILES):
        tiles = _load(data, starts, chunk, end, True, AGAIN, S.TILES, S)
        normalizers = [normalizer_add(normalizers[s], tiles[s], scale) for s in (0, 1)[: S.STREAMS]]
    element, mask = edge_elements(span, S.LANES, S.WIDTH)
    if S.EDGES:
        edges = [load_edge(data[s], starts[s], element, both(mask, read & edge), S.T) for s in (0, 1)[: S.STREAMS]]
        normalizers = [normalizer_add(normalizers[s], edges[s], scale) for s in (0, 1)[: S.STREAMS]]
    largest = [tl.max(normalizers[s][0], axis=0) for s in (0, 1)[: S.STREAMS]]
    # Rows of enormous logits once more.
    again = any_enormous(largest, scale, S.STREAMS)
    normalizers = [normalizer_settled(normalizers[s], again, scale) for s in (0, 1)[: S.STREAMS]]
    for chunk in range(begin, tl.where(read & again, end, begin), S.LANES * S.TILES):
        tiles = _load(data, starts, chunk, end, True, AGAIN, S.TILES, S)
        normalizers = [normalizer_add_enormous(normalizers[s], tiles[s], scale) for s in (0, 1)[: S.STREAMS]]
    if S.EDGES:
        mask = both(mask, read & edge & again)
        edges = [load_edge(data[s], starts[s], element, mask, S.T) for s in (0, 1)[: S.STREAMS]]
        normalizers = [normalizer_add_enormous(normalizers[s], edges[s], scale) for s in (0, 1)[: S.STREAMS]]
    return [normalizer_total(normalizers[s], largest[s], scale, read) for s in (0, 1)[: S.STREAMS]]


@triton.jit
def _elements(
    functions, constants, tiles, sums, column, stride, picked, SUM: tl.constexpr, OUT: tl.constexpr, S: tl.constexpr
):
    """The sums with those of the tiles (SUM), and the tiles' map (OUT: its dtype). `column`: of the first tile's
    elements, `stride`: how far the next tile's are."""
    values = ()
    for i in tl.static_range(len(tiles[0])):
        parts, shares = functions.element(constants, [tiles[s][i] for s in (0, 1)[: S.STREAMS]])
        if SUM:
            sums = [sums[k] + tl.sum(shares[k], axis=1) for k in (0, 1, 2)[: S.SUMS]]
        if OUT is not None:
            value = functions.map(constants, parts)
            if functions.map_picked is not None:
                value = tl.where(column + i * stride == picked[0], picked[1], value)
            values = values + (rounded(value, OUT),)
    return sums, values


@triton.jit
def _block(
    functions,
    row,
    chunk,
    end,
    stop,
    constants,
    picked,
    sums,
    MASKED: tl.constexpr,
    AGAIN: tl.constexpr,
    SUM: tl.constexpr,
    OUT: tl.constexpr,
    S: tl.constexpr,
):
    """The sums with those of the tiles at `chunk`, whose map is stored. Chunks from `stop` on are not read."""
    data, starts, span = row
    tiles = _load(data, starts, chunk, stop, MASKED, AGAIN, S.TILES, S)
    lane = tl.arange(0, S.LANES)[:, None] * S.WIDTH + tl.arange(0, S.WIDTH)[None, :]
    column = span[0] + chunk * S.WIDTH + lane
    sums, values = _elements(functions, constants, tiles, sums, column, S.LANES * S.WIDTH, picked, SUM, OUT, S)
    if OUT is not None:
        store_tiles(data[S.STREAMS], starts[S.STREAMS], chunk, end, values, MASKED, S.LANES, S.TILES, S.WIDTH)
    return sums


@triton.jit
def _pass(
    functions,
    data,
    starts,
    span,
    begin,
    end,
    read,
    edge,
    constants,
    picked,
    BACKWARDS: tl.constexpr,
    AGAIN: tl.constexpr,
    SUM: tl.constexpr,
    MAPS: tl.constexpr,
    S: tl.constexpr,
):
    """The sums of chunks [begin, end) and, where `edge`, the edges (SUM), and their map (MAPS).

    A row that is not to be read counts as -inf, whose probability is 0."""
    OUT: tl.constexpr = data[S.STREAMS].dtype.element_ty if MAPS else None
    stop = tl.where(read, end, begin)
    BLOCK: tl.constexpr = S.LANES * S.TILES
    rest = _end_of_blocks(begin, end, read, BLOCK)
    row = data, starts, span
    sums = [_zeros(S.LANES, S.T) for _ in (0, 1, 2)[: S.SUMS]]
    # What fills no block comes last, or first.
    if BACKWARDS:
        for chunk in range(rest, end, BLOCK):
            sums = _block(functions, row, chunk, end, stop, constants, picked, sums, True, AGAIN, SUM, OUT, S)
        for chunk in range(rest - BLOCK, begin - 1, -BLOCK):
            sums = _block(functions, row, chunk, end, stop, constants, picked, sums, False, AGAIN, SUM, OUT, S)
    else:
        for chunk in range(begin, rest, BLOCK):
            sums = _block(functions, row, chunk, end, stop, constants, picked, sums, False, AGAIN, SUM, OUT, S)
        for chunk in range(rest, end, BLOCK):
            sums = _block(functions, row, chunk, end, stop, constants, picked, sums, True, AGAIN, SUM, OUT, S)
    if S.EDGES:
        element, mask = edge_elements(span, S.LANES, S.WIDTH)
        tiles = [load_edge(data[s], starts[s], element, both(mask, read & edge), S.T) for s in (0, 1)[: S.STREAMS]]
        sums, values = _elements(functions, constants, tiles, sums, element, 0, picked, SUM, OUT, S)
        if MAPS:
            tl.store(data[S.STREAMS] + starts[S.STREAMS] + element, values[0], mask=both(mask, edge))
    return [tl.sum(sums[k].to(tl.float64), axis=0).to(S.T) for k in (0, 1, 2)[: S.SUMS]]


@triton.jit
def _picked(functions, args, data, start, size, row, read, INDEX: tl.constexpr, T: tl.constexpr):
    """The column that is picked, -1 if none is, and its element, NaN if none is."""
    if functions.picked is None:
        return -1, 0.0
    else:
        column = functions.picked(args, row)
        inside = both((column >= 0) & (column < size), read)
        v = tl.load(data + start + column, mask=inside, other=float("nan")).to(T)
        return tl.where(inside, column, -1).to(INDEX), v


@triton.jit(do_not_specialize=PLAIN)
def _sweep(
    functions,
    data,
    places,
    inner,
    size,
    out_size,
    args,
    rows,
    split,
    segment,
    segments,
    shares,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    AT_ONCE: tl.constexpr,
    NORMALIZED: tl.constexpr,
    SEGMENTS: tl.constexpr,
    S: tl.constexpr,
):
    """Steps FIRST to LAST of a segment of a row per program. What earlier steps found of its segments is in `split`:
    normalizers [row, segment, stream, 2] and sums [row, segment, sum]."""
    program = tl.program_id(0)
    row = (program // shares).to(tl.int64)
    read = functions.ignored(args, row) == 0
    starts = [row_start(places[i], row, inner) for i in (0, 1, 2)[: len(data)]]
    span = row_span(starts[0], size, S.WIDTH, S.EDGES, S.INDEX)
    begin, end, edge = segment_of(segment, program % shares, span)
    scale = number(args.scale, S.T)
    normals = None
    if FIRST == NORMALIZERS:
        normals = _normalizers(data, starts, span, begin, end, read, edge, scale, S.SUMS > 0, S)
    elif FIRST != MAP and not NORMALIZED:
        part = split[0] + row * segments * 2 * S.STREAMS
        normals = [
            combined_normalizer(part + 2 * s, segments, scale, read, SEGMENTS, S.STREAMS) for s in (0, 1)[: S.STREAMS]
        ]
    if LAST == NORMALIZERS:
        STREAMS: tl.constexpr = S.STREAMS
        for s in tl.static_range(STREAMS):
            part = split[0] + 2 * (program.to(tl.int64) * STREAMS + s)
            tl.store(part, normals[s][0])
            tl.store(part + 1, normals[s][1])
    else:
        constants = functions.row(args, rows, row, normals, read, S.T)
        picked = _picked(functions, args, data[0], starts[0], size, row, read, S.INDEX, S.T)
        LATER: tl.constexpr = LAST == MAP and not (AT_ONCE and FIRST == NORMALIZERS)
        sums = ()
        if S.SUMS > 0 and FIRST <= SUMS:
            sums = _pass(
                functions,
                data,
                starts,
                span,
                begin,
                end,
                read,
                edge,
                constants,
                picked,
                True,
                LATER or LAST == SUMS,
                True,
                LAST == MAP and not LATER,
                S,
            )
        elif FIRST == RESULTS:
            place = tl.arange(0, SEGMENTS)
            part, mask = split[1] + (row * segments + place) * S.SUMS, place < segments
            sums = [tl.sum(tl.load(part + k, mask=mask, other=0.0)) for k in (0, 1, 2)[: S.SUMS]]
        if LAST == SUMS:
            for k in tl.static_range(len(sums)):
                tl.store(split[1] + program.to(tl.int64) * S.SUMS + k, sums[k])
        if FIRST <= RESULTS and RESULTS <= LAST:
            constants = functions.epilogue(args, rows, row, constants, sums, read, S.T)
            if functions.pick is not None:
                functions.pick(args, row, constants, picked[1], read)
        if LATER:
            if functions.map_picked is not None:
                picked = picked[0], functions.map_picked(constants, picked[1])
            _pass(
                functions,
                data,
                starts,
                span,
                begin,
                end,
                read,
                edge,
                constants,
                picked,
                False,
                False,
                False,
                True,
                S,
            )
        if LAST == MAP:
            out, last = data[S.STREAMS] + starts[S.STREAMS], tl.where(program % shares == shares - 1, out_size, 0)
            for first in range(size.to(S.INDEX), last.to(S.INDEX), S.LANES):  # beyond the narrower stream
                element = first + tl.arange(0, S.LANES)
                tl.store(out + element, _zeros(S.LANES, out.dtype.element_ty), mask=element < last)
