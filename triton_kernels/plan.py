"""How a call is cut into programs, and the one table of the numbers that decide it."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton
import triton.language as tl


class Tuning(NamedTuple):
    """The numbers; the defaults are heuristics, each for the reason given.

    `held_bytes`: of all streams, in the arithmetic type, that a program may hold in registers: a thread of 512 then has
    96 of the 128 it may use for them.

    `threads`: that sweep one row together, counted as 32 a warp, and `bytes_per_thread`, what each reads of a stream at
    a time: two 16-byte loads of the narrowest one. With three streams and a sum that keeps 96 bytes in flight in at
    most 64 registers, without spills; where streams and sums are more than FEW_TILES, one load of each has to do.

    `programs`: in flight, that keep one multiprocessor's memory pipeline busy.

    `sweep_threads`: of a program over logits. Four such programs hide the memory's latency: on an H200 one of twice the
    threads, whose rows more nearly fit the L2 together, takes a fifth longer.
    """

    held_bytes: int = 3 * 64 * 1024
    threads: int = 256
    bytes_per_thread: int = 32
    programs: int = 4
    sweep_threads: int = 256


# Other numbers that a device was measured to want, by torch.cuda.get_device_name(): ``python -m benchmarks.tune``
# prints candidates. (What the CUDA kernels take is in csrc/runtime/partition.h, and which backend serves in
# fastgen/core/dispatch.py.)
MEASURED: dict[str, Tuning] = {}

FEW_TILES = 4


@functools.cache
def tuning(device: torch.device) -> Tuning:
    return MEASURED.get(torch.cuda.get_device_name(device), Tuning()) if device.type == "cuda" else Tuning()


class Plan(NamedTuple):
    """`kind`: "held" (a group per program, in registers), "looped" (the same, block by block) or "split" (rows shared
    by several programs); `segment`: the elements of a row that a program of a split takes."""

    kind: str
    block: int
    num_warps: int
    segment: int


def _thread_bytes(tiles: int, on: torch.device) -> int:
    each = tuning(on).bytes_per_thread
    return each if tiles <= FEW_TILES else each // 2


def _num_warps(elements: int, itemsize: int, on: torch.device, tiles: int = FEW_TILES) -> int:
    return max(1, min(16, elements * itemsize // (32 * _thread_bytes(tiles, on))))


def _block(size: int, itemsize: int, on: torch.device, tiles: int = FEW_TILES) -> int:
    return min(triton.next_power_of_2(size), tuning(on).threads * _thread_bytes(tiles, on) // itemsize)


@functools.lru_cache(maxsize=4096)
def groups_plan(
    size: int, groups: int, group_rows: int, itemsize: int, width: int, streams: int, sums: int, on: torch.device
) -> Plan:
    """For a reduction of `groups` groups of `group_rows` rows of `size` elements to `sums` numbers: `streams` streams,
    `itemsize` bytes in the narrowest, `width` in arithmetic."""
    tiles = streams + sums
    block = triton.next_power_of_2(size)
    tile = block * triton.next_power_of_2(group_rows)
    if tile * width * max(streams, 3) <= tuning(on).held_bytes:
        return Plan("held", block, _num_warps(tile, itemsize, on, tiles), size)
    block = _block(size, itemsize, on, tiles)
    num_warps = _num_warps(block, itemsize, on, tiles)
    wanted = tuning(on).programs * multiprocessors(on)
    blocks = triton.cdiv(size, block)
    per_row = min(blocks, triton.cdiv(wanted, groups * group_rows))
    # Half a wave of whole groups is worth more than splitting, which takes another launch.
    if 2 * groups >= wanted or per_row * group_rows == 1:
        return Plan("looped", block, num_warps, size)
    return Plan("split", block, num_warps, triton.cdiv(blocks, per_row) * block)


@functools.lru_cache(maxsize=4096)
def map_plan(size: int, itemsize: int, streams: int, on: torch.device) -> Plan:
    """For a map of `streams` streams alone: one block per program."""
    block = _block(size, itemsize, on, streams)
    return Plan("split", block, _num_warps(block, itemsize, on, streams), block)


@functools.lru_cache(maxsize=4096)
def flat_plan(size: int, itemsize: int, on: torch.device) -> tuple[int, int, int]:
    """(block, num_warps, programs) of a sweep over `size` elements by as many programs as run at once, so that one
    with nothing to do costs a single wave."""
    block = _block(size, itemsize, on)
    return block, _num_warps(block, itemsize, on), min(triton.cdiv(size, block), 8 * multiprocessors(on))


# -- Sweeps over rows of logits

# Tiles that a program takes at a time, by the streams: two 16-byte loads a thread and more in flight, in registers for
# four programs of 256 threads.
TILES = {1: 4, 2: 1}
# Programs of a split row at most: their partial results are one tile for who adds them up.
MOST_SEGMENTS = 128


class SweepPlan(NamedTuple):
    """`segments`: the programs that share a row, each of which takes `segment` chunks."""

    lanes: int
    tiles: int
    num_warps: int
    segment: int
    segments: int


@functools.lru_cache(maxsize=4096)
def plan_sweep(rows: int, chunks: int, width: int, streams: int, on: torch.device) -> SweepPlan:
    """For `rows` rows of `chunks` chunks."""
    numbers = tuning(on)
    tiles = TILES[streams] if width > 1 else 8
    threads = numbers.sweep_threads
    lanes = max(32, min(threads, triton.next_power_of_2(triton.cdiv(chunks, tiles))))
    blocks = triton.cdiv(chunks, lanes * tiles)
    wanted = numbers.programs * multiprocessors(on)
    segments = min(MOST_SEGMENTS, blocks, triton.cdiv(wanted, max(rows, 1)))
    if 4 * rows * threads >= 3 * wanted * 256:  # enough rows to fill the device: sharing them would cost launches
        segments = 1
    segment = triton.cdiv(blocks, max(segments, 1)) * lanes * tiles
    return SweepPlan(lanes, tiles, lanes // 32, segment, max(1, triton.cdiv(chunks, max(segment, 1))))


@functools.lru_cache(maxsize=4096)
def plan_map(chunks: int, width: int, streams: int, on: torch.device) -> SweepPlan:
    """For a map of `streams` streams: a program's row scalars are worth some blocks."""
    tiles = min(2, TILES[streams]) if width > 1 else 8
    lanes = max(32, min(tuning(on).sweep_threads, triton.next_power_of_2(triton.cdiv(chunks, tiles))))
    segment = 4 * lanes * tiles
    return SweepPlan(lanes, tiles, lanes // 32, segment, max(1, triton.cdiv(chunks, segment)))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 2 if device.type == "cpu" else 132  # the interpreter runs programs one after another: keep them few


def unit_of(counts: Iterable[int], itemsize: int) -> int:
    """The largest power of two, up to the elements of a 16-byte load, that divides all `counts`."""
    unit = 16 // itemsize
    for count in counts:
        while count % unit:
            unit //= 2
    return unit


def offsets_type(size: int) -> tl.dtype:
    """The type of offsets in a row; those of rows are always 64-bit. Loops step past the end, hence the margin."""
    return tl.int64 if size >= 2**30 else tl.int32
