"""How a row-wise call is cut into programs. Heuristics, not measured on a GPU yet; the bounds have the reasons given."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Bytes of one stream, in the arithmetic type, that a program may hold in registers: of 512 threads, 128 registers
# each, three streams then take half.
HELD_BYTES = 64 * 1024
# Elements of each stream that a thread reads at a time: four 16-byte loads of float32, two of 16-bit types, a stream.
PER_THREAD = 16
LOOP_BLOCK = 4096
MAP_BLOCK = 2048
# Programs in flight that keep one multiprocessor's memory pipeline busy.
PROGRAMS_PER_MULTIPROCESSOR = 4


class Plan(NamedTuple):
    """`kind`: "held" (a group per program, in registers), "looped" (the same, block by block) or "split" (rows shared
    by several programs); `segment`: the elements of a row that a program of a split takes."""

    kind: str
    block: int
    num_warps: int
    segment: int


def _num_warps(elements: int, width: int) -> int:
    return max(1, min(16, elements * width // (4 * PER_THREAD * 32)))


@functools.lru_cache(maxsize=4096)
def groups_plan(size: int, groups: int, group_rows: int, width: int, multiprocessors: int) -> Plan:
    """For a reduction of `groups` groups of `group_rows` rows of `size` elements, `width` bytes in arithmetic."""
    block = triton.next_power_of_2(size)
    tile = block * triton.next_power_of_2(group_rows)
    if tile * width <= HELD_BYTES:
        return Plan("held", block, _num_warps(tile, width), size)
    block = min(block, LOOP_BLOCK * 4 // width)
    wanted = PROGRAMS_PER_MULTIPROCESSOR * multiprocessors
    blocks = triton.cdiv(size, block)
    per_row = min(blocks, triton.cdiv(wanted, groups * group_rows))
    # Half a wave of programs is worth more than the extra launch of a split.
    if 2 * groups >= wanted or (per_row == 1 and group_rows == 1):
        return Plan("looped", block, _num_warps(block, width), size)
    return Plan("split", block, _num_warps(block, width), triton.cdiv(blocks, per_row) * block)


@functools.lru_cache(maxsize=4096)
def map_plan(size: int, width: int) -> Plan:
    """For a map alone: one block per program."""
    block = min(triton.next_power_of_2(size), MAP_BLOCK * 4 // width)
    return Plan("split", block, _num_warps(block, width), block)


def flat_plan(size: int, width: int, multiprocessors: int) -> tuple[int, int, int]:
    """(block, num_warps, programs) of a sweep over `size` elements by as many programs as run at once, so that one
    with nothing to do costs a single wave."""
    block = MAP_BLOCK * 4 // width
    return block, _num_warps(block, width), min(triton.cdiv(size, block), 8 * multiprocessors)


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
