"""The row-wise skeleton in Triton: reduce a row to a few sums, run the epilogue, map the row while it is on chip.

The counterpart of ``csrc/skeleton/formula.h`` and ``csrc/skeleton/rowwise.h``. A family brings ``@triton.jit``
functions:

    row(args, row, rank, T) -> (scale, ...)      constants of a row; its sums enter the group's times the first one
    accumulate(constants, v) -> (share, ...)     what one element of the streams v adds to each sum
    epilogue(args, group, sums, T) -> slope      runs for each group; stores its results
    coefficient(args, row, rank, constants, slope, T) -> number           for each row; may store
    map(constants, coefficient, v) -> value      one output element

`args` is a NamedTuple of the family's own: tensors (or None), integers, and floats by :func:`scalar.argument`. T is the
arithmetic type; `row` and `rank` may be scalars or tiles, so functions must be elementwise. Epilogues and coefficients
may run more than once for the same group or row, then with the same numbers, so all they do is store.

A stream may be a mask (bool, read as 0 and 1) or None: then its place in `v` holds None, which functions may test. What
an epilogue and a coefficient return may be tuples.

Sums have one fixed tree for a given shape, dtype and device; there are no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layout, scalar
from .plan import Plan, groups_plan, map_plan, offsets_type, unit_of
from .scalar import rounded


class Functions(NamedTuple):
    """What of a formula the kernels call."""

    row: Any
    accumulate: Any = None
    epilogue: Any = None
    coefficient: Any = None
    map: Any = None


@dataclass(frozen=True)
class Formula:
    """`sums` numbers that a row reduces to (0: map only); the first `map_streams` streams feed the map (0: no map)."""

    functions: Functions
    sums: int = 0
    map_streams: int = 0


@dataclass(frozen=True)
class Groups:
    """Which rows belong together: row ``group * stride + rank * row_stride`` is the rank-th of its group."""

    count: int
    rows: int = 1
    stride: int = 1
    row_stride: int = 1

    @staticmethod
    def consecutive(rows: int, each: int) -> Groups:
        return Groups(rows // each, each, each, 1)

    @staticmethod
    def halves(rows: int) -> Groups:
        return Groups(rows // 2, 2, 1, rows // 2)


class Rows:
    """Tensors of one shape as rows: read in place where all share one dense row layout, else copied once.

    The first is there; others may be None. The arithmetic is float64 as soon as a tensor or `dtype` is.
    """

    def __init__(self, first: Tensor, *others: Tensor | None, dtype: torch.dtype | None = None) -> None:
        self.tensors = layout.as_rows(*(t for t in (first, *others) if t is not None))
        self.first = self.tensors[0]
        self.count = first.shape[0]
        self.size = layout.row_size(first)
        self.dtype = torch.float64 if dtype == torch.float64 else layout.arithmetic_dtype(*self.tensors)
        present = iter(self.tensors)
        self.streams = tuple(None if t is None else next(present) for t in (first, *others))

    @property
    def strides(self) -> list[int]:
        return [t.stride(0) if t is not None and self.count > 1 else 0 for t in self.streams]

    def itemsize(self, out: Tensor | None) -> int:
        """Of the narrowest, masks aside: what they need is little beside the rest, and would make tiles large."""
        of = (self.first if out is None else out, *self.tensors)
        return min((t.element_size() for t in of if t.dtype != torch.bool), default=1)

    def new_output(self, dtype: torch.dtype) -> Tensor:
        return layout.new_output(*self.tensors, dtype=dtype)

    def new_vector(self, size: int) -> Tensor:
        return self.first.new_empty((size,), dtype=self.dtype)

    def scalars(self, t: Tensor | None) -> Tensor | None:
        """Per-row numbers in the arithmetic dtype."""
        return None if t is None else t.to(self.dtype).contiguous()

    def argument(self, value: Any) -> Any:
        """An operator's argument as a kernel takes it: flags, numbers in the arithmetic dtype, an integer."""
        if isinstance(value, Tensor):
            return value.contiguous() if value.dtype == torch.bool else self.scalars(value)
        return scalar.argument(value, self.dtype) if isinstance(value, float) else value


def launch(kernel: Any, programs: int, like: Tensor, *args: Any, **constants: Any) -> None:
    """On the current stream of the device that `like` is on, which need not be the current device."""
    if like.is_cuda:
        with torch.cuda.device_of(like):
            kernel[(programs,)](*args, **constants)
    else:
        kernel[(programs,)](*args, **constants)


def run(formula: Formula, groups: Groups, rows: Rows, args: Any, out: Tensor | None = None) -> None:
    """Runs `formula` over `rows`; `out` has the layout of :meth:`Rows.new_output`."""
    if groups.count == 0:
        return
    first, strides, itemsize = rows.first, rows.strides, rows.itemsize(out)
    unit = unit_of((rows.size, *strides), itemsize)
    streams = (
        formula.functions,
        rows.streams,
        tuple(s // unit for s in strides),
        args,
        out,
        rows.size // unit,
        groups.rows,
        groups.stride,
        groups.row_stride,
    )
    constants = {
        "UNIT": unit,
        "INDEX": offsets_type(rows.size),
        "T": tl.float64 if rows.dtype == torch.float64 else tl.float32,
        "SUMS": formula.sums,
        "STREAMS": len(rows.streams),
        "MAP_STREAMS": formula.map_streams,
    }
    if formula.sums == 0:
        _launch_finish(
            map_plan(rows.size, itemsize, len(rows.tensors), first.device), first, groups, streams, None, constants
        )
        return
    width = 8 if rows.dtype == torch.float64 else 4
    plan = groups_plan(
        rows.size, groups.count, groups.rows, itemsize, width, len(rows.tensors), formula.sums, first.device
    )
    constants |= {"BLOCK": plan.block, "num_warps": plan.num_warps}
    if plan.kind == "held":
        launch(_held_groups, groups.count, first, *streams, RANKS=triton.next_power_of_2(groups.rows), **constants)
    elif plan.kind == "looped":
        launch(_looped_groups, groups.count, first, *streams, **constants)
    else:
        segments = triton.cdiv(rows.size, plan.segment)
        programs = groups.count * groups.rows * segments
        partials = first.new_empty((programs * formula.sums,), dtype=rows.dtype)
        launch(_partial_sums, programs, first, *streams, partials, segments, plan.segment // plan.block, **constants)
        _launch_finish(plan, first, groups, streams, partials, constants)


def _launch_finish(
    plan: Plan, like: Tensor, groups: Groups, streams: Sequence[Any], partials: Tensor | None, constants: dict[str, Any]
) -> None:
    _, _, _, _, out, units = streams[:6]
    segments = triton.cdiv(units * constants["UNIT"], plan.segment)
    constants = constants | {
        "BLOCK": plan.block,
        "num_warps": plan.num_warps,
        "RANKS": triton.next_power_of_2(groups.rows) if partials is not None else 1,
        "SEGMENTS": triton.next_power_of_2(segments) if partials is not None else 1,
    }
    shares = segments if out is not None else 1  # without an output only the epilogues are left to do
    programs = groups.count * groups.rows * shares
    blocks = plan.segment // plan.block
    launch(_finish, programs, like, *streams, partials, segments, blocks, shares, **constants)


# Sizes and strides come in units of UNIT elements, so that the compiler knows what divides them; each is an i32 or an
# i64 by its value. None of them is specialised: a new batch size or row size compiles nothing.
_PLAIN = ["strides", "units", "group_rows", "group_stride", "row_stride", "segments", "segment_blocks", "shares"]


# What stands for a stream that is not there: Triton 3.6 makes no tuple with a plain None in it and returns none, so
# kernels make that of a row's streams themselves. The interpreter compares it as it is.
ABSENT = None if triton.knobs.runtime.interpret else tl.constexpr(None)


@triton.jit
def _load(stream, stride, row, start, cols, mask, UNIT: tl.constexpr, T: tl.constexpr):
    """Elements start + cols of `row` in T; 0 outside the mask."""
    return tl.load(stream + row * stride * UNIT + start + cols, mask=mask, other=0).to(T)


@triton.jit
def _zeros(SHAPE: tl.constexpr, SUMS: tl.constexpr, T: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(SUMS):
        zeros = zeros + (tl.zeros(SHAPE, T),)
    return zeros


@triton.jit
def _row_sums(
    functions,
    streams,
    strides,
    constants,
    row,
    begin,
    end,
    size,
    SUMS: tl.constexpr,
    STREAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    T: tl.constexpr,
):
    """The sums of elements [begin, end) of a row. The mask uses `size`, whose divisor is known, as `end` is not."""
    cols = tl.arange(0, BLOCK)
    # What one 16-byte load brought is added up in its thread at once: an accumulator a load, not one an element.
    lanes = _zeros((BLOCK // UNIT,), SUMS, T)
    for start in range(begin, end, BLOCK):
        mask = cols < size - start
        v = [
            _load(streams[s], strides[s], row, start, cols, mask, UNIT, T) if streams[s] is not None else ABSENT
            for s in (0, 1, 2, 3, 4, 5, 6, 7)[:STREAMS]
        ]
        shares = functions.accumulate(constants, v)
        added = ()
        for k in tl.static_range(SUMS):
            share = tl.reshape(tl.where(mask, shares[k], 0.0), (BLOCK // UNIT, UNIT))
            added = added + (lanes[k] + tl.sum(share, axis=1),)
        lanes = added
    sums = ()
    for k in tl.static_range(SUMS):
        sums = sums + (tl.sum(lanes[k], axis=0),)
    return sums


@triton.jit
def _map_row(
    functions,
    streams,
    strides,
    out,
    constants,
    coefficient,
    row,
    begin,
    end,
    size,
    MAP_STREAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    T: tl.constexpr,
):
    cols = tl.arange(0, BLOCK)
    for start in range(begin, end, BLOCK):
        mask = cols < size - start
        v = [
            _load(streams[s], strides[s], row, start, cols, mask, UNIT, T) if streams[s] is not None else ABSENT
            for s in (0, 1, 2, 3, 4, 5, 6, 7)[:MAP_STREAMS]
        ]
        value = functions.map(constants, coefficient, v)
        tl.store(out + row * size + start + cols, rounded(value, out.dtype.element_ty), mask=mask)


@triton.jit
def _group_sums(sums, scale, present, SUMS: tl.constexpr):
    """Adds the sums of a group's rows, times the rows' scales. What is not present may hold NaN."""
    totals = ()
    for k in tl.static_range(SUMS):
        totals = totals + (tl.sum(tl.where(present, scale * sums[k], 0.0)),)
    return totals


@triton.jit(do_not_specialize=_PLAIN)
def _held_groups(
    functions,
    streams,
    strides,
    args,
    out,
    units,
    group_rows,
    group_stride,
    row_stride,
    SUMS: tl.constexpr,
    STREAMS: tl.constexpr,
    MAP_STREAMS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    INDEX: tl.constexpr,
    T: tl.constexpr,
):
    """A group per program, all its rows in one tile that stays in registers between the reduction and the map."""
    group = tl.program_id(0).to(tl.int64)
    size = units.to(INDEX) * UNIT
    slot = tl.arange(0, RANKS)[:, None].to(tl.int64)
    present = slot < group_rows
    rank = tl.minimum(slot, group_rows - 1)  # slots past the end read the last row again, and count for nothing
    row = group * group_stride + rank * row_stride
    cols = tl.arange(0, BLOCK)[None, :]
    mask = cols < size
    constants = functions.row(args, row, rank, T)
    v = [
        _load(streams[s], strides[s], row, 0, cols, mask, UNIT, T) if streams[s] is not None else ABSENT
        for s in (0, 1, 2, 3, 4, 5, 6, 7)[:STREAMS]
    ]
    shares = functions.accumulate(constants, v)
    sums = ()
    for k in tl.static_range(SUMS):
        sums = sums + (tl.sum(tl.where(mask, shares[k], 0.0), axis=1, keep_dims=True),)
    slope = functions.epilogue(args, group, _group_sums(sums, constants[0], present, SUMS), T)
    if MAP_STREAMS > 0:
        coefficient = functions.coefficient(args, row, rank, constants, slope, T)
        if out is not None:
            value = functions.map(constants, coefficient, v)
            tl.store(out + row * size + cols, rounded(value, out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_PLAIN)
def _looped_groups(
    functions,
    streams,
    strides,
    args,
    out,
    units,
    group_rows,
    group_stride,
    row_stride,
    SUMS: tl.constexpr,
    STREAMS: tl.constexpr,
    MAP_STREAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    INDEX: tl.constexpr,
    T: tl.constexpr,
):
    """A group per program, block by block; the map reads again what the L2 cache may still hold."""
    group = tl.program_id(0).to(tl.int64)
    size = units.to(INDEX) * UNIT
    zero = tl.zeros((), tl.int64)
    totals = _zeros((), SUMS, T)
    for r in range(0, group_rows):
        rank = zero + r
        row = group * group_stride + rank * row_stride
        constants = functions.row(args, row, rank, T)
        sums = _row_sums(functions, streams, strides, constants, row, 0, size, size, SUMS, STREAMS, BLOCK, UNIT, T)
        added = ()
        for k in tl.static_range(SUMS):
            added = added + (totals[k] + constants[0] * sums[k],)
        totals = added
    slope = functions.epilogue(args, group, totals, T)
    if MAP_STREAMS > 0:
        for r in range(0, group_rows):
            rank = zero + r
            row = group * group_stride + rank * row_stride
            constants = functions.row(args, row, rank, T)
            coefficient = functions.coefficient(args, row, rank, constants, slope, T)
            if out is not None:
                _map_row(
                    functions,
                    streams,
                    strides,
                    out,
                    constants,
                    coefficient,
                    row,
                    0,
                    size,
                    size,
                    MAP_STREAMS,
                    BLOCK,
                    UNIT,
                    T,
                )


@triton.jit(do_not_specialize=_PLAIN)
def _partial_sums(
    functions,
    streams,
    strides,
    args,
    out,
    units,
    group_rows,
    group_stride,
    row_stride,
    partials,
    segments,
    segment_blocks,
    SUMS: tl.constexpr,
    STREAMS: tl.constexpr,
    MAP_STREAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    INDEX: tl.constexpr,
    T: tl.constexpr,
):
    """Few long rows: one segment of one row per program; partials are [group, rank, segment, SUMS]."""
    program = tl.program_id(0)
    index = (program // segments).to(tl.int64)
    rank = index % group_rows
    row = index // group_rows * group_stride + rank * row_stride
    size = units.to(INDEX) * UNIT
    begin = (program % segments * segment_blocks).to(INDEX) * BLOCK
    sums = _row_sums(
        functions,
        streams,
        strides,
        functions.row(args, row, rank, T),
        row,
        begin,
        tl.minimum(begin + segment_blocks * BLOCK, size),
        size,
        SUMS,
        STREAMS,
        BLOCK,
        UNIT,
        T,
    )
    for k in tl.static_range(SUMS):
        tl.store(partials + program.to(tl.int64) * SUMS + k, sums[k])


@triton.jit
def _finish_group(
    functions,
    args,
    partials,
    group,
    group_rows,
    group_stride,
    row_stride,
    segments,
    SUMS: tl.constexpr,
    RANKS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    T: tl.constexpr,
):
    # One flat tile of [RANKS, SEGMENTS]: spread over the threads whatever the two are.
    entry = tl.arange(0, RANKS * SEGMENTS)
    slot, segment = entry // SEGMENTS, entry % SEGMENTS
    present = (slot < group_rows) & (segment < segments)
    rank = tl.minimum(slot, group_rows - 1).to(tl.int64)
    constants = functions.row(args, group * group_stride + rank * row_stride, rank, T)
    parts = partials + ((group * group_rows + rank) * segments + segment) * SUMS
    sums = ()
    for k in tl.static_range(SUMS):
        sums = sums + (tl.load(parts + k, mask=present, other=0.0),)
    return functions.epilogue(args, group, _group_sums(sums, constants[0], present, SUMS), T)


@triton.jit(do_not_specialize=_PLAIN)
def _finish(
    functions,
    streams,
    strides,
    args,
    out,
    units,
    group_rows,
    group_stride,
    row_stride,
    partials,
    segments,
    segment_blocks,
    shares,
    SUMS: tl.constexpr,
    STREAMS: tl.constexpr,
    MAP_STREAMS: tl.constexpr,
    RANKS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    INDEX: tl.constexpr,
    T: tl.constexpr,
):
    """Epilogue (where there were sums) and map of one segment of one row per program.

    Every program of a group repeats the group's epilogue from a few partial sums: cheaper than another launch.
    """
    program = tl.program_id(0)
    index = (program // shares).to(tl.int64)
    group = index // group_rows
    rank = index % group_rows
    row = group * group_stride + rank * row_stride
    size = units.to(INDEX) * UNIT
    slope = tl.zeros((), T)
    if SUMS > 0:
        slope = _finish_group(
            functions,
            args,
            partials,
            group,
            group_rows,
            group_stride,
            row_stride,
            segments,
            SUMS,
            RANKS,
            SEGMENTS,
            T,
        )
    if MAP_STREAMS > 0:
        constants = functions.row(args, row, rank, T)
        coefficient = functions.coefficient(args, row, rank, constants, slope, T)
        if out is not None:
            begin = (program % shares * segment_blocks).to(INDEX) * BLOCK
            _map_row(
                functions,
                streams,
                strides,
                out,
                constants,
                coefficient,
                row,
                begin,
                tl.minimum(begin + segment_blocks * BLOCK, size),
                size,
                MAP_STREAMS,
                BLOCK,
                UNIT,
                T,
            )
