"""The losses of ``sequence`` from hidden states and output weights: no [tokens, vocabulary] tensor is ever whole.

Rows are taken in chunks whose logits, and their gradient, stay within a budget of bytes; the products are torch's, the
row operators ours. Logits of half-precision operands are float32: what bfloat16 rounds off a logit is more than the
difference between a student and a teacher who are close. Gradients accumulate over the chunks in float32 (float64 for
float64), are scaled there by what comes in, and are then rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _sequence
from ._autograd import once_differentiable
from ._gradient import scale_gradient
from .reference.sequence import autocast_head

MAX_CHUNK_BYTES = 96 << 20

Head = tuple[Tensor, Tensor, Tensor | None]


def flat_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
    """A linear layer and its input as rows, in the dtype that autocast gives them."""
    hidden, weight, bias = autocast_head(hidden.reshape(-1, hidden.shape[-1]), weight, bias)
    if torch.compiler.is_compiling():  # which lets no Function take one tensor twice, such as a head that is shared
        return hidden.view_as(hidden), weight.view_as(weight), None if bias is None else bias.view_as(bias)
    return hidden, weight, bias


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
    hidden = head[0]
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
    hidden, weight, bias = head[0][rows], *head[1:]
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

    def __init__(self, head: Head, needed: tuple[bool, ...], max_bytes: int) -> None:
        hidden, weight, bias = head
        self.inputs, self.dtype, self.max_bytes = (hidden, weight), wide(weight), max_bytes
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
        if self.weight is not None:  # a mixed product cannot add to what is there: it makes a part of the gradient
            for block in blocks(weight, count, self.dtype, self.max_bytes, whole=one_dtype):
                add_product(self.weight[block], grad[:, block].t(), hidden[rows], factor)

    def all(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.hidden, self.weight, self.bias


class LinearGeneralizedJsd(torch.autograd.Function):
    """The sum over rows of the divergence, times `scale`.

    Forward computes the gradients, unscaled, while a chunk's logits are there; the first backward takes them over and
    scales them in place. A later one computes everything again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        labels: Tensor | None,
        scale: Tensor | None,
        beta: float,
        temperature: float,
        ignore_index: int,
        round_logits: bool,
        max_chunk_bytes: int,
    ) -> Tensor:
        student = (student_hidden, student_weight, student_bias)
        teacher = (teacher_hidden, teacher_weight, teacher_bias)
        ctx.backend, ctx.args = backend, (beta, temperature, ignore_index, round_logits, max_chunk_bytes)
        needed = tuple(ctx.needs_input_grad[1:4])
        total, gradients = linear_jsd(backend, student, teacher, labels, needed, *ctx.args)
        ctx.dtypes = [None if t is None else t.dtype for t in student]
        ctx.compiled = torch.compiler.is_compiling()  # a compiled backward cannot take buffers over
        kept = gradients if ctx.compiled else (None,) * 3
        ctx.gradients = None if ctx.compiled else gradients
        ctx.save_for_backward(*student, *teacher, labels, scale, *kept)
        return total if scale is None else total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        s, w, b, *teacher, labels, scale, kept_s, kept_w, kept_b = ctx.saved_tensors
        factor = grad_loss if scale is None else grad_loss * scale
        if ctx.compiled:
            scaled = [None if g is None else g * factor for g in (kept_s, kept_w, kept_b)]
        else:
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:
                needed = tuple(ctx.needs_input_grad[1:4])
                with no_autocast(w):
                    _, gradients = linear_jsd(ctx.backend, (s, w, b), tuple(teacher), labels, needed, *ctx.args)
            scaled = [None if g is None else scale_gradient(g, factor, ctx.backend) for g in gradients]
        typed = [None if g is None else g.to(dtype) for g, dtype in zip(scaled, ctx.dtypes, strict=True)]
        return (None, *typed, *[None] * 10)


def linear_jsd(
    backend: str,
    student: Head,
    teacher: Head,
    labels: Tensor | None,
    needed: tuple[bool, ...],
    beta: float,
    temperature: float,
    ignore_index: int,
    round_logits: bool,
    max_chunk_bytes: int,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The sum of the rows' divergences and its gradients for the student's head."""
    dtype, teacher_dtype = (head[0].dtype if round_logits else wide(head[0]) for head in (student, teacher))
    gradients = HeadGradients(student, needed, max_chunk_bytes // 4)
    with_grad = any(needed)
    logits_bytes = (1 + with_grad) * student[1].shape[0] * dtype.itemsize + teacher[1].shape[0] * teacher_dtype.itemsize
    losses = []
    for rows in chunks_of(student, logits_bytes, max_chunk_bytes):
        student_logits = linear_logits(student, rows, dtype, max_chunk_bytes // 4)
        teacher_logits = linear_logits(teacher, rows, teacher_dtype, max_chunk_bytes // 4)
        loss, _, grad_logits = _sequence.generalized_jsd.on(backend)(
            student_logits, teacher_logits, None if labels is None else labels[rows], None, beta, temperature,
            ignore_index, False, with_grad,
        )  # fmt: skip
        losses.append(loss)
        del student_logits, teacher_logits  # before anything else is made
        if with_grad:
            gradients.add(rows, grad_logits)
        del grad_logits
    return torch.cat(losses).sum(), gradients.all()


class LinearTokenLogprob(torch.autograd.Function):
    """Log-probabilities of tokens; backward computes each chunk's logits again."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        ignore_index: int,
        round_logits: bool,
        max_chunk_bytes: int,
    ) -> Tensor:
        ctx.backend, ctx.args, ctx.max_chunk_bytes = backend, (temperature, ignore_index), max_chunk_bytes
        ctx.dtype = dtype = hidden.dtype if round_logits else wide(hidden)
        logprob = hidden.new_empty(tokens.shape, dtype=wide(hidden))
        stats = hidden.new_empty((2, *tokens.shape), dtype=wide(hidden))
        run = _sequence.token_logprob.on(backend)
        head = hidden, weight, bias
        for rows in chunks_of(head, weight.shape[0] * dtype.itemsize, max_chunk_bytes):
            logits = linear_logits(head, rows, dtype, max_chunk_bytes // 4)
            logprob[rows], stats[:, rows] = run(logits, tokens[rows], *ctx.args)
            del logits  # before the next chunk's are made
        ctx.save_for_backward(*head, tokens, stats)
        return logprob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens, stats = ctx.saved_tensors
        head = hidden, weight, bias
        gradients = HeadGradients(head, ctx.needs_input_grad[1:4], ctx.max_chunk_bytes // 4)
        run = _sequence.token_logprob_backward.on(ctx.backend)
        with no_autocast(weight):
            for rows in chunks_of(head, 2 * weight.shape[0] * ctx.dtype.itemsize, ctx.max_chunk_bytes):
                logits = linear_logits(head, rows, ctx.dtype, ctx.max_chunk_bytes // 4)
                grad_logits = run(grad[rows], logits, tokens[rows], stats[:, rows], *ctx.args)
                del logits
                gradients.add(rows, grad_logits)
                del grad_logits
        typed = [None if g is None else g.to(weight.dtype) for g in gradients.all()]
        return (None, *typed, *[None] * 5)
