"""Rows of logits as a kernel sees them: 16-byte chunks, tiles of chunks, edges before and after (``sweep.py``)."""

from __future__ import annotations

import triton
import triton.language as tl

from .scalar import widened


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
    data,
    start,
    first,
    end,
    MASKED: tl.constexpr,
    AGAIN: tl.constexpr,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
    T: tl.constexpr,
):
    """Chunks [first, end) of the row at `start`, as far as the tiles go; -inf from there (MASKED), where they are fewer
    than the tiles'. AGAIN: not the last read."""
    POLICY: tl.constexpr = "" if AGAIN else "evict_first"
    base = data + (start + (WIDTH - 1)) // WIDTH * WIDTH  # the compiler cannot know that this divides the start
    lanes = tl.arange(0, LANES)
    tiles = ()
    for i in tl.static_range(TILES):
        chunk = first + i * LANES + lanes
        element = chunk[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        if MASKED:
            mask = (chunk < end)[:, None]
            tile = tl.load(base + element, mask=mask, other=float("-inf"), eviction_policy=POLICY)
        else:
            tile = tl.load(base + element, eviction_policy=POLICY)
        tiles = tiles + (widened(tile, T),)
    return tiles


@triton.jit
def store_tiles(
    data,
    start,
    first,
    end,
    tiles,
    MASKED: tl.constexpr,
    LANES: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Past the caches as far as that goes: they are for rows that are read again."""
    base = data + (start + (WIDTH - 1)) // WIDTH * WIDTH
    lanes = tl.arange(0, LANES)
    for i in tl.static_range(TILES):
        chunk = first + i * LANES + lanes
        element = chunk[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        mask = (chunk < end)[:, None] if MASKED else None
        tl.store(base + element, tiles[i], mask=mask, cache_modifier=".cs")


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
def segment_of(segment, index, span):
    """The chunks [begin, end) of a row that its program `index` sweeps, and whether it has the edges."""
    begin = tl.minimum(index.to(span[1].dtype) * segment, span[1])
    return begin, tl.minimum(begin + segment, span[1]), index == 0
