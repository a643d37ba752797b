"""An output layer taken in chunks of rows: its logits, what a model makes of them, and the layer's gradients.

Chunks' logits, and their gradient, stay within a budget of bytes. Logits of half-precision operands are float32: what
bfloat16 rounds off a logit is more than the difference between a student and a teacher who are close. Gradients
accumulate over the chunks in float32 (float64 for float64), are scaled there by what comes in, and are then rounded
once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import checks
from .layout import Head, Slices, ready, summed_later
from .reference import autocast_head

# On an H200 chunks of 96 MiB took five times as long as what other libraries do in larger ones: a thousand rows of a
# large vocabulary, and large parts of a gradient, keep a GPU's matrix units busy.
CHUNK_BYTES = {"cpu": 96 << 20}
CHUNK_BYTES_ELSEWHERE = 1 << 30


class LogitTransform(NamedTuple):
    """What a model does with its head's output: ``softcap tanh(scale z / softcap)``, or ``scale z`` without a cap."""

    scale: float
    softcap: float | None

    def apply_(self, z: Tensor) -> Tensor:
        z = z if self.scale == 1 else z.mul_(self.scale)
        # Not times scale / softcap, whose rounding would scale all logits alike: a temperature that nobody asked for.
        return z if self.softcap is None else z.div_(self.softcap).tanh_().mul_(self.softcap)

    def chain_(self, grad: Tensor, logits: Tensor) -> Tensor:
        """The gradient of z from that of the logits, which it overwrites as well: who needs it has used them."""
        if self.softcap is not None:
            grad.mul_(logits.div_(self.softcap).square_().neg_().add_(1))
        return grad if self.scale == 1 else grad.mul_(self.scale)


def flat_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
    """A linear layer and its input as rows, in the dtype that autocast gives them."""
    return Head(*autocast_head(hidden.reshape(-1, hidden.shape[-1]), weight, bias))


def chunk_bytes(max_chunk_bytes: int | None, hidden: Tensor) -> int:
    """The budget that was asked for, or that of the device."""
    if max_chunk_bytes is None:
        return CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES_ELSEWHERE)
    return checks.positive_int("max_chunk_bytes", max_chunk_bytes)


def no_autocast(t: Tensor) -> torch.autocast:
    """Around all products: autocast, on around a ``backward()`` too, would round float32 operands to half precision."""
    return torch.autocast(t.device.type, enabled=False)


def wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def chunks(rows: int, row_bytes: int, max_bytes: int) -> Iterator[slice]:
    """As many rows at a time as fit, and as evenly as can be: the last chunk is no splinter."""
    count = -(-rows // max(1, max_bytes // row_bytes))
    size = -(-rows // max(1, count)) or 1
    return (slice(start, start + size) for start in range(0, max(rows, 1), size))  # one empty chunk of no rows


def chunks_of(head: Head, logits_bytes: int, max_bytes: int) -> Iterator[slice]:
    """Chunks of a head's rows, of which each has `logits_bytes` and a copy of its hidden state."""
    hidden = head.hidden
    return chunks(hidden.shape[0], logits_bytes + hidden.shape[1] * wide(hidden).itemsize, max_bytes)


def has_mixed_products(device: torch.device) -> bool:
    """Whether torch multiplies half-precision matrices into a float32 one there: tensor cores sum in float32 anyway."""
    return device.type == "cuda"


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a b`` of two matrices of one dtype, summed and returned in `dtype`, which is theirs or a wider one.

    Devices without mixed products get copies, which are exact; who calls keeps them small (:func:`blocks`).
    """
    if a.dtype == dtype:
        return torch.mm(a, b)
    if has_mixed_products(a.device):
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a.to(dtype), b.to(dtype))


def add_product(out: Tensor, a: Tensor, b: Tensor, factor: Tensor | None) -> None:
    """``out += factor a b``."""
    if factor is not None:
        out.addcmul_(product(a, b, out.dtype), factor)
    elif a.dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out.add_(product(a, b, out.dtype))


def blocks(weight: Tensor, rows: int, dtype: torch.dtype, max_bytes: int, whole: bool) -> Iterator[slice]:
    """The vocabulary: all of it if `whole`, else as much at a time as fits into `max_bytes` in `dtype`, of the weight
    [V, H] and of logits [rows, V] together."""
    size, width = weight.shape
    return iter((slice(None),)) if whole else chunks(size, (width + rows) * dtype.itemsize, max_bytes)


def linear_logits(head: Head, rows: slice, dtype: torch.dtype, max_bytes: int) -> Tensor:
    """``hidden weightᵀ + bias`` in `dtype`, with copies of at most `max_bytes`."""
    hidden, weight, bias = head.hidden[rows], head.weight, head.bias
    if dtype == hidden.dtype:
        return F.linear(hidden, weight, bias)
    if has_mixed_products(weight.device):
        logits = product(hidden, weight.t(), dtype)
    else:
        logits = hidden.new_empty((hidden.shape[0], weight.shape[0]), dtype=dtype)
        for block in blocks(weight, hidden.shape[0], dtype, max_bytes, whole=False):
            logits[:, block] = product(hidden, weight[block].t(), dtype)
    return logits if bias is None else logits.add_(bias)


def narrowed(grad_logits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """A gradient of logits as the operand of products with a head of `dtype`, and what to multiply these by.

    The products need one dtype, and in half precision they are several times as fast and a chunk's gradient is half as
    large. Rounding it is as harmless as rounding logits is not: it changes each element by at most one part in 2⁸
    (2¹¹ in float16), independently, where rounding a logit changes the difference from the teacher's by an amount that
    does not shrink with that difference. The errors average out over a product's sum, so that they add to a gradient
    about what rounding the gradient itself to `dtype` does.

    float16 has no exponents for most elements of a softmax: there the largest element of the chunk becomes almost
    2¹⁵. Its power of two is exact, and is taken out again in float32. One factor does for all rows: what underflows
    beside the largest element would do so in the float16 gradients of the head as well.
    """
    if grad_logits.dtype == dtype:
        return grad_logits, None
    if dtype != torch.float16:
        return grad_logits.to(dtype), None
    largest = torch.linalg.vector_norm(grad_logits, torch.inf, 1)
    # A row that is not finite has no say in the others' factor.
    largest = torch.where(largest < torch.inf, largest, 0).amax()
    exponent = torch.frexp(largest).exponent.clamp(min=-100) - 15  # its negative is an exponent of float32 too
    return grad_logits.mul_(torch.ldexp(torch.ones_like(largest), -exponent)).to(dtype), torch.ldexp(
        torch.ones_like(largest), exponent
    )


class HeadGradients:
    """Gradients of ``logits = hidden weightᵀ + bias``, accumulated chunk by chunk in float32 (float64 for float64), for
    whose range and precision no scale is wrong; None for what needs none."""

    def __init__(self, head: Head, needed: tuple[bool, ...], max_bytes: int, slices: Slices | None) -> None:
        hidden, weight, bias = head
        self.inputs, self.dtype, self.max_bytes = (hidden, weight), wide(weight), max_bytes
        self.slices = slices
        self.sums: list[tuple[slice, Tensor]] = []  # on their way: other ranks' columns make gradients of hidden too
        self.hidden = hidden.new_zeros(hidden.shape, dtype=self.dtype) if needed[0] else None
        self.weight = weight.new_zeros(weight.shape, dtype=self.dtype) if needed[1] else None
        self.bias = bias.new_zeros(bias.shape, dtype=self.dtype) if needed[2] and bias is not None else None

    def add(self, rows: slice, grad_logits: Tensor) -> None:
        """Overwrites `grad_logits`."""
        hidden, weight = self.inputs
        count = grad_logits.shape[0]
        if count == 0:
            return
        if self.bias is not None:
            self.bias.add_(grad_logits.sum(0, dtype=self.dtype))
        grad, factor = narrowed(grad_logits, weight.dtype)
        one_dtype = weight.dtype == self.dtype
        no_copy = one_dtype or has_mixed_products(weight.device)
        if self.hidden is not None:
            for block in blocks(weight, count, self.dtype, self.max_bytes, whole=no_copy):
                add_product(self.hidden[rows], grad[:, block], weight[block], factor)
            if self.slices is not None:
                self.sums.append((rows, summed_later(self.hidden[rows], self.slices)))
        if self.weight is not None:  # a mixed product cannot add to what is there: it makes a part of the gradient
            for block in blocks(weight, count, self.dtype, self.max_bytes, whole=one_dtype):
                add_product(self.weight[block], grad[:, block].t(), hidden[rows], factor)

    def all(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        for rows, total in self.sums:
            assert self.hidden is not None
            assert self.slices is not None
            self.hidden[rows] = ready(total, self.slices)
        return self.hidden, self.weight, self.bias
