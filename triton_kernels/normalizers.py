"""Online log-sum-exps of rows of logits: what a thread, or a lane, keeps of those that it has seen.

A normalizer is (largest logit, sum of 2^(scale (logit - largest))), with scale > 0. While tiles are added it is
relative to a *base* instead, what the largest logit is scaled, rounded: then one operation takes a logit there. Rows of
logits so large that this rounding could be beyond any power are swept once more, by :func:`normalizer_add_enormous`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .scalar import enormous_from, is_enormous, origin


@triton.jit
def normalizer_start(LANES: tl.constexpr, T: tl.constexpr):
    """(largest logit, base, sum of 2^(scale logit - base)) of none."""
    return tl.full((LANES,), float("-inf"), T), tl.full((LANES,), -enormous_from(T), T), tl.zeros((LANES,), T)


@triton.jit
def _origin(largest):
    """Where 0 is: not at -inf, where nothing is finite yet, as -inf minus -inf would be NaN."""
    return tl.where(largest == float("-inf"), 0.0, largest)


@triton.jit
def _largest(largest, tiles):
    for i in tl.static_range(len(tiles)):
        largest = tl.maximum(largest, tl.max(tiles[i], axis=1))
    return largest


@triton.jit
def normalizer_add(normalizer, tiles, scale):
    """Adds tiles [LANES, …] of logits. The base is what the largest one is scaled, rounded, so that one operation takes
    a logit there; those that are enormous below 0 are nothing beside others. -inf adds nothing; NaN and +inf make the
    sum NaN."""
    largest = _largest(normalizer[0], tiles)
    base = tl.maximum(largest * scale, -enormous_from(scale.dtype))
    total = normalizer[2] * tl.exp2(normalizer[1] - base)
    for i in tl.static_range(len(tiles)):
        total += tl.sum(tl.exp2(tl.fma(tiles[i], scale, -base[:, None])), axis=1)
    return largest, base, total


@triton.jit
def normalizer_add_enormous(normalizer, tiles, scale):
    """Adds tiles to a sum that is relative to the largest logit itself, whose product with the scale is not rounded."""
    largest = _largest(normalizer[0], tiles)
    zero_at = _origin(largest)
    total = normalizer[1] * tl.exp2((normalizer[0] - zero_at) * scale)
    for i in tl.static_range(len(tiles)):
        total += tl.sum(tl.exp2((tiles[i] - zero_at[:, None]) * scale), axis=1)
    return largest, total


@triton.jit
def normalizer_settled(normalizer, again, scale):
    """The sum relative to the largest logit itself; the start where it is to be found `again`."""
    total = normalizer[2] * origin(normalizer[0], scale)[2]
    return tl.where(again, float("-inf"), normalizer[0]), tl.where(again, 0.0, total)


@triton.jit
def any_enormous(largest, scale, STREAMS: tl.constexpr):
    """Whether the largest logit of a stream is."""
    found = is_enormous(largest[0], scale)
    if STREAMS == 2:
        found = found | is_enormous(largest[1], scale)
    return found


@triton.jit
def normalizer_total(normalizer, largest, scale, read):
    """The normalizer of all lanes, given their largest logit. Their sums are added in float64: its error would be one
    of all elements at once. Of a row that is not read, numbers that make zeros."""
    totals = normalizer[1] * tl.exp2((normalizer[0] - _origin(largest)) * scale)
    total = tl.sum(totals.to(tl.float64), axis=0).to(normalizer[1].dtype)
    return tl.where(read, largest, 0.0), tl.where(read, total, 1.0)


@triton.jit
def combined_normalizer(part, segments, scale, read, SEGMENTS: tl.constexpr, STREAMS: tl.constexpr):
    """The normalizer of a row from those of its segments, of which the first lies at `part`."""
    segment = tl.arange(0, SEGMENTS)
    part, mask = part + segment * 2 * STREAMS, segment < segments
    largest = tl.load(part, mask=mask, other=float("-inf"))
    return normalizer_total((largest, tl.load(part + 1, mask=mask, other=0.0)), tl.max(largest, axis=0), scale, read)
