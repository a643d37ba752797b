"""The skeleton for rows of logits: sweeps over long rows in 16-byte pieces, and an online log-sum-exp.

A row is cut into *chunks* of WIDTH elements: a 16-byte load of the narrowest stream. A program takes LANES x TILES
chunks at a time, as TILES tiles [LANES, WIDTH] of which every thread has a row. So what is reduced along WIDTH stays in
the thread, and a sweep keeps one accumulator a thread and stream whatever it unrolls.

Rows of an odd size start anywhere. Where the rows of all streams start at the same place between two 16-byte
boundaries, the elements before the first boundary and after the last, up to WIDTH - 1 each, are an *edge* tile of
single elements, and the rest is chunks. Elsewhere WIDTH is 1.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layout, rowwise
from .plan import multiprocessors, offsets_type, tuning

LOG2E = tl.constexpr(1 / math.log(2))

# What no kernel is compiled anew for.
PLAIN = ["places", "inner", "size", "rows", "ignore", "segment", "segments", "out_size"]

Place = tuple[int, int, int]  # of rows [outer, inner]: the first row's offset, the strides; in elements

# Tiles that a program takes at a time, by the streams: two 16-byte loads a thread and more in flight, in registers for
# four programs of 256 threads.
TILES = {1: 4, 2: 1}
# Long rows that are swept again and again get programs of twice the threads (plan.Tuning says when): four programs of
# 256 threads on a multiprocessor would have four times as many rows in the L2. Told of these registers, which only one
# program of 512 threads finds, ptxas does not spill for the sake of a second.
WIDE, WIDE_REGISTERS = 512, 128
# Programs of a split row at most: their partial results are one tile for who adds them up.
MOST_SEGMENTS = 128


class Plan(NamedTuple):
    """`segments`: the programs that share a row, each of which takes `segment` chunks."""

    lanes: int
    tiles: int
    num_warps: int
    segment: int
    segments: int


@functools.lru_cache(maxsize=4096)
def plan_sweep(rows: int, chunks: int, width: int, row_bytes: int, streams: int, again: bool, on: torch.device) -> Plan:
    """For `rows` rows of `chunks` chunks, `row_bytes` over all streams; `again`: swept more than once by a program.

    Not yet measured on a GPU; the reasons are bounds.
    """
    numbers = tuning(on)
    tiles = TILES[streams] if width > 1 else 8
    wide = again and row_bytes >= numbers.wide_bytes
    if wide and width > 1:
        tiles *= 2
    threads = numbers.sweep_threads * (2 if wide else 1)
    lanes = max(32, min(threads, triton.next_power_of_2(triton.cdiv(chunks, tiles))))
    blocks = triton.cdiv(chunks, lanes * tiles)
    wanted = numbers.programs * multiprocessors(on)
    segments = min(MOST_SEGMENTS, blocks, triton.cdiv(wanted, max(rows, 1)))
    if 4 * rows * threads >= 3 * wanted * 256:  # enough rows to fill the device: sharing them would cost launches
        segments = 1
    segment = triton.cdiv(blocks, max(segments, 1)) * lanes * tiles
    return Plan(lanes, tiles, lanes // 32, segment, max(1, triton.cdiv(chunks, max(segment, 1))))


@functools.lru_cache(maxsize=4096)
def plan_map(chunks: int, width: int, streams: int, on: torch.device) -> Plan:
    """For a map of `streams` streams: a program's row scalars are worth some blocks."""
    tiles = min(2, TILES[streams]) if width > 1 else 8
    lanes = max(32, min(tuning(on).sweep_threads, triton.next_power_of_2(triton.cdiv(chunks, tiles))))
    segment = 4 * lanes * tiles
    return Plan(lanes, tiles, lanes // 32, segment, max(1, triton.cdiv(chunks, segment)))


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
        if out is not None:
            tensors.append(out.view(outer, self.inner, out.shape[-1]))
        aligned = [_aligned(t) for t in tensors]
        self.data = tuple(data for data, _ in aligned)
        self.places = tuple(place for _, place in aligned)
        itemsize = min(t.element_size() for t in tensors)
        width = 16 // itemsize
        phases = {tuple(n % width for n in place) for place in self.places}
        # A boundary for all streams, row after row. Without, single elements: neighbours for neighbouring threads.
        self.width = width if len(phases) == 1 and all(d.data_ptr() % 16 == 0 for d in self.data) else 1
        self.edges = self.width > 1 and (phases != {(0, 0, 0)} or self.size % width != 0)

    def plan(self, again: bool) -> Plan:
        row_bytes = self.size * sum(d.element_size() for d in self.data[: self.streams])
        chunks = self.size // self.width
        return plan_sweep(self.count, chunks, self.width, row_bytes, self.streams, again, self.first.device)

    def constants(self, plan: Plan) -> dict[str, Any]:
        return {
            "LANES": plan.lanes,
            "TILES": plan.tiles,
            "WIDTH": self.width,
            "EDGES": self.edges,
            "INDEX": offsets_type(self.size),
            "T": tl.float64 if self.dtype == torch.float64 else tl.float32,
            "num_warps": plan.num_warps,
            "maxnreg": WIDE_REGISTERS if plan.lanes >= WIDE else None,
        }

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


def launch_sweep(kernel: Any, programs: int, rows: LogitRows, plan: Plan, *args: Any, **constants: Any) -> None:
    common = (rows.data, rows.places, rows.inner, rows.size)
    rowwise.launch(kernel, programs, rows.first, *common, *args, plan.segment, plan.segments, **constants)


# -- In kernels


@triton.jit
def row_start(place, row, inner):
    """The offset of a row's first element."""
    return place[0] + row // inner * place[1] + row % inner * place[2]


@triton.jit
def row_span(start, size, WIDTH: tl.constexpr, EDGES: tl.constexpr, INDEX: tl.constexpr):
    """(head, chunks, tail) of a row: the elements before its chunks, the chunks, the elements after them."""
    size = size.to(INDEX)
    head = tl.zeros((), INDEX)
    if EDGES:
        head = tl.minimum(((WIDTH - start % WIDTH) % WIDTH).to(INDEX), size)
    chunks = (size - head) // WIDTH
    return head, chunks, size - head - chunks * WIDTH


@triton.jit
def load_tiles(
    data, start, first, end, AGAIN: tl.constexpr,
    LANES: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Chunks [first, end) of the row at `start`, as far as the tiles go; -inf from there. AGAIN: not the last read."""
    base = data + (start + (WIDTH - 1)) // WIDTH * WIDTH  # the compiler cannot know that this divides the start
    lanes = tl.arange(0, LANES)
    tiles = ()
    for i in tl.static_range(TILES):
        chunk = first + i * LANES + lanes
        element = chunk[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        tile = tl.load(
            base + element, mask=(chunk < end)[:, None], other=float("-inf"),
            eviction_policy="" if AGAIN else "evict_first",
        )  # fmt: skip
        tiles = tiles + (tile.to(T),)
    return tiles


@triton.jit
def store_tiles(
    data, start, first, end, tiles, LANES: tl.constexpr, TILES: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Past the caches as far as that goes: they are for rows that are read again."""
    base = data + (start + (WIDTH - 1)) // WIDTH * WIDTH
    lanes = tl.arange(0, LANES)
    for i in tl.static_range(TILES):
        chunk = first + i * LANES + lanes
        element = chunk[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        tl.store(base + element, tiles[i], mask=(chunk < end)[:, None], cache_modifier=".cs")


@triton.jit
def edge_elements(span, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Of the elements outside the chunks: their places in the row, and which lanes [LANES, 1] have one."""
    head, chunks, tail = span
    lane = tl.arange(0, LANES)[:, None]
    return tl.where(lane < head, lane, chunks * WIDTH + lane), lane < head + tail


@triton.jit
def both(mask, flag):
    """mask & flag. The comparison is for the interpreter of Triton 3.9, where a scalar makes integers of a mask."""
    return (mask & flag) != 0


@triton.jit
def load_edge(data, start, element, mask, T: tl.constexpr):
    return (tl.load(data + start + element, mask=mask, other=float("-inf")).to(T),)


@triton.jit
def normalizer_start(LANES: tl.constexpr, T: tl.constexpr):
    """An online log-sum-exp: (largest logit, sum of 2^(scale (logit - largest))), with scale > 0."""
    return tl.full((LANES,), float("-inf"), T), tl.zeros((LANES,), T)


@triton.jit
def _origin(largest):
    """What to subtract where nothing is finite yet: -inf minus -inf would be NaN."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def normalizer_add(normalizer, tiles, scale):
    """Adds tiles [LANES, …] of logits. -inf adds nothing; NaN and +inf make the sum NaN."""
    largest = normalizer[0]
    for i in tl.static_range(len(tiles)):
        largest = tl.maximum(largest, tl.max(tiles[i], axis=1))
    origin = _origin(largest)
    total = normalizer[1] * tl.exp2((normalizer[0] - origin) * scale)
    for i in tl.static_range(len(tiles)):
        total += tl.sum(tl.exp2((tiles[i] - origin[:, None]) * scale), axis=1)
    return largest, total


@triton.jit
def normalizer_total(normalizer, scale):
    """The normalizer of all lanes. Their sums are added in float64: its error would be one of all elements at once."""
    largest = tl.max(normalizer[0], axis=0)
    totals = normalizer[1] * tl.exp2((normalizer[0] - _origin(largest)) * scale)
    return largest, tl.sum(totals.to(tl.float64), axis=0).to(normalizer[1].dtype)


@triton.jit
def combined_normalizer(
    partials, row, segments, COUNT: tl.constexpr, FIRST: tl.constexpr, SEGMENTS: tl.constexpr, scale
):
    """The normalizer of a row from those of its segments, numbers FIRST and FIRST + 1 of each COUNT."""
    segment = tl.arange(0, SEGMENTS)
    part = partials + (row * segments + segment) * COUNT + FIRST
    mask = segment < segments
    largest = tl.load(part, mask=mask, other=float("-inf"))
    return normalizer_total((largest, tl.load(part + 1, mask=mask, other=0.0)), scale)


@triton.jit
def segment_of(segment, index, span, read):
    """The chunks [begin, end) of a row that its program `index` sweeps, and whether it has the edges: none of a row
    that is not read."""
    chunks = tl.where(read, span[1], 0)
    begin = tl.minimum(index.to(chunks.dtype) * segment, chunks)
    return begin, tl.minimum(begin + segment, chunks), read & (index == 0)
