"""The kernels of the row-wise skeleton, which ``rowwise.py`` launches; what they call is described there."""

from __future__ import annotations

import triton
import triton.language as tl

from .scalar import rounded

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
    second,
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
    """Backwards: what the sums have read last is what the caches still hold."""
    cols = tl.arange(0, BLOCK)
    blocks = (end - begin + BLOCK - 1) // BLOCK
    for block in range(0, blocks):
        start = begin + (blocks - 1 - block) * BLOCK
        mask = cols < size - start
        v = [
            _load(streams[s], strides[s], row, start, cols, mask, UNIT, T) if streams[s] is not None else ABSENT
            for s in (0, 1, 2, 3, 4, 5, 6, 7)[:MAP_STREAMS]
        ]
        value = functions.map(constants, coefficient, v)
        tl.store(out + row * size + start + cols, rounded(value, out.dtype.element_ty), mask=mask)
        if second is not None:
            value = functions.second(constants, v)
            tl.store(second + row * size + start + cols, rounded(value, second.dtype.element_ty), mask=mask)


@triton.jit
def _group_sums(sums, scale, present, SUMS: tl.constexpr):
    """Adds the sums of a group's rows, times the rows' scales. What is not present may hold NaN."""
    totals = ()
    for k in tl.static_range(SUMS):
        totals = totals + (tl.sum(tl.where(present, scale * sums[k], 0.0)),)
    return totals


@triton.jit(do_not_specialize=_PLAIN)
def held_groups(
    functions,
    streams,
    strides,
    args,
    out,
    second,
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
            if second is not None:
                value = functions.second(constants, v)
                tl.store(second + row * size + cols, rounded(value, second.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=_PLAIN)
def looped_groups(
    functions,
    streams,
    strides,
    args,
    out,
    second,
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
            rank = zero + (group_rows - 1 - r)
            row = group * group_stride + rank * row_stride
            constants = functions.row(args, row, rank, T)
            coefficient = functions.coefficient(args, row, rank, constants, slope, T)
            if out is not None:
                _map_row(
                    functions,
                    streams,
                    strides,
                    out,
                    second,
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
def partial_sums(
    functions,
    streams,
    strides,
    args,
    out,
    second,
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
def finish(
    functions,
    streams,
    strides,
    args,
    out,
    second,
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
                second,
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
