"""The losses of ``sequence`` from hidden states and output weights: no [tokens, vocabulary] tensor is ever whole.

Rows are taken in chunks whose logits, and their gradient, stay within a budget of bytes; the products are torch's, the
row operators ours. Gradients of weights and biases accumulate over the chunks in float32 (float64 for float64).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _sequence
from ._autograd import once_differentiable
from .core.gradient import scale_gradient_

MAX_CHUNK_BYTES = 96 << 20

Head = tuple[Tensor, Tensor, Tensor | None]


def flat_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
    """A linear layer and its input as rows, in the dtype that autocast gives them."""
    hidden, device = hidden.reshape(-1, hidden.shape[-1]), hidden.device.type
    if not torch.is_autocast_enabled(device) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def chunks(rows: int, row_bytes: int, max_bytes: int) -> Iterator[slice]:
    """As many rows at a time as fit, and as evenly as can be: the last chunk is no splinter."""
    count = -(-rows // max(1, max_bytes // row_bytes))
    size = -(-rows // max(1, count)) or 1
    return (slice(start, start + size) for start in range(0, max(rows, 1), size))  # one empty chunk of no rows


class HeadGradients:
    """Gradients of ``logits = hidden weightᵀ + bias``, accumulated chunk by chunk; None for what needs none."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, bool, bool]) -> None:
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.inputs = hidden, weight
        self.hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needed[0] else None
        self.weight = weight.new_zeros(weight.shape, dtype=wide) if needed[1] else None
        self.bias = bias.new_zeros(bias.shape, dtype=wide) if needed[2] and bias is not None else None

    def add(self, rows: slice, grad_logits: Tensor) -> None:
        hidden, weight = self.inputs
        if self.hidden is not None:
            torch.mm(grad_logits, weight, out=self.hidden[rows])
        if self.weight is not None:
            if self.weight.dtype == hidden.dtype:
                self.weight.addmm_(grad_logits.t(), hidden[rows])
            else:
                self.weight.add_(grad_logits.t() @ hidden[rows])
        if self.bias is not None:
            self.bias.add_(grad_logits.sum(0, dtype=self.bias.dtype))

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
        max_chunk_bytes: int,
    ) -> Tensor:
        student = (student_hidden, student_weight, student_bias)
        teacher = (teacher_hidden, teacher_weight, teacher_bias)
        ctx.backend, ctx.args = backend, (beta, temperature, ignore_index, max_chunk_bytes)
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
                _, gradients = linear_jsd(ctx.backend, (s, w, b), tuple(teacher), labels, needed, *ctx.args)
            for g in gradients:
                if g is not None:
                    scale_gradient_(ctx.backend, grad=g, scale=factor)
            scaled = list(gradients)
        typed = [None if g is None else g.to(dtype) for g, dtype in zip(scaled, ctx.dtypes, strict=True)]
        return (None, *typed, *[None] * 9)


def linear_jsd(
    backend: str,
    student: Head,
    teacher: Head,
    labels: Tensor | None,
    needed: tuple[bool, ...],
    beta: float,
    temperature: float,
    ignore_index: int,
    max_chunk_bytes: int,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """The sum of the rows' divergences and its gradients for the student's head."""
    hidden, weight, bias = student
    gradients = HeadGradients(hidden, weight, bias, needed)  # type: ignore[arg-type]
    with_grad = any(needed)
    row_bytes = (1 + with_grad) * weight.shape[0] * weight.itemsize + teacher[1].shape[0] * teacher[1].itemsize
    losses = []
    for rows in chunks(hidden.shape[0], row_bytes, max_chunk_bytes):
        student_logits = F.linear(hidden[rows], weight, bias)
        teacher_logits = F.linear(teacher[0][rows], *teacher[1:])
        loss, _, grad_logits = _sequence.generalized_jsd.operator(
            backend,
            student=student_logits,
            teacher=teacher_logits,
            labels=None if labels is None else labels[rows],
            scale=None,
            beta=beta,
            temperature=temperature,
            ignore_index=ignore_index,
            reduction="none",
            with_grad=with_grad,
        )
        losses.append(loss)
        if with_grad:
            gradients.add(rows, grad_logits)
        del student_logits, teacher_logits, grad_logits  # before the next chunk's are made
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
        max_chunk_bytes: int,
    ) -> Tensor:
        ctx.backend, ctx.args, ctx.max_chunk_bytes = backend, (temperature, ignore_index), max_chunk_bytes
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprob = hidden.new_empty(tokens.shape, dtype=wide)
        stats = hidden.new_empty((2, *tokens.shape), dtype=wide)
        for rows in chunks(hidden.shape[0], weight.shape[0] * weight.itemsize, max_chunk_bytes):
            logits = F.linear(hidden[rows], weight, bias)
            logprob[rows], stats[:, rows] = _sequence.token_logprob.operator(
                backend, logits=logits, tokens=tokens[rows], temperature=temperature, ignore_index=ignore_index
            )
        ctx.save_for_backward(hidden, weight, bias, tokens, stats)
        return logprob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens, stats = ctx.saved_tensors
        gradients = HeadGradients(hidden, weight, bias, ctx.needs_input_grad[1:4])
        temperature, ignore_index = ctx.args
        for rows in chunks(hidden.shape[0], 2 * weight.shape[0] * weight.itemsize, ctx.max_chunk_bytes):
            logits = F.linear(hidden[rows], weight, bias)
            grad_logits = _sequence.token_logprob_backward(
                ctx.backend,
                grad=grad[rows],
                logits=logits,
                tokens=tokens[rows],
                stats=stats[:, rows],
                temperature=temperature,
                ignore_index=ignore_index,
            )
            gradients.add(rows, grad_logits)
            del logits
        typed = [None if g is None else g.to(weight.dtype) for g in gradients.all()]
        return (None, *typed, None, None, None, None)
