"""Operators of ``sequence`` and the autograd Functions of its losses.

Logits are [..., V]; what there is one of per row (tokens, labels, log-probabilities) has the shape before V. The last
dimension is dense or copied once; leading dimensions may have any strides, and a gradient is always contiguous. Scalars
of rows are float32 (float64 where logits are). The kernels are in ``csrc/formulas/sequence.h`` and
``triton_kernels/sequence.py``. With m the maximum of a row's logits, its ``stats`` are m and
``sum = Σ exp((logit - m) / temperature)``: m plus the logarithm of the sum would round what logits of 10 000 leave
after the comma. Rows that are ignored are not read; their results, stats and gradients are 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _backend, _layout
from ._autograd import once_differentiable
from ._gradient import scale_gradient

IGNORE_INDEX = -100


@_backend.operator(
    "token_logprob(Tensor logits, Tensor tokens, float temperature, int ignore_index) -> (Tensor logprob, Tensor stats)"
)
def token_logprob(logits: Tensor, tokens: Tensor, temperature: float, ignore_index: int) -> tuple[Tensor, Tensor]:
    """``logprob = (logit_token - m) / temperature - log sum``; NaN outside the vocabulary. stats: [2, ...]."""
    dtype, rows = _layout.arithmetic_dtype(logits), logits.shape[:-1]
    return logits.new_empty(rows, dtype=dtype), logits.new_empty((2, *rows), dtype=dtype)


@_backend.operator(
    "token_logprob_backward(Tensor grad, Tensor logits, Tensor tokens, Tensor stats, float temperature,"
    " int ignore_index) -> Tensor"
)
def token_logprob_backward(
    grad: Tensor, logits: Tensor, tokens: Tensor, stats: Tensor, temperature: float, ignore_index: int
) -> Tensor:
    """``grad (onehot - softmax) / temperature`` per row; 0 for a token outside the vocabulary.

    `grad` may be expanded.
    """
    return logits.new_empty(logits.shape)


@_backend.operator(
    "sequence_ddo_loss(Tensor logprob, Tensor ref_logprob, Tensor is_real, Tensor? counts, float alpha, float beta,"
    " float scale, str reduction) -> (Tensor loss, Tensor delta, Tensor slope)"
)
def sequence_ddo_loss(
    logprob: Tensor,
    ref_logprob: Tensor,
    is_real: Tensor,
    counts: Tensor | None,
    alpha: float,
    beta: float,
    scale: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """DDO's terms over ``delta_i = Σ_t logprob_it - ref_logprob_it``, times `scale`; slope is d term_i / d delta_i."""
    dtype = _layout.arithmetic_dtype(logprob, ref_logprob)
    rows = logprob.shape[:1]
    loss = logprob.new_empty(rows if reduction == "none" else (), dtype=dtype)
    return loss, logprob.new_empty(rows, dtype=dtype), logprob.new_empty(rows, dtype=dtype)


@_backend.operator(
    "generalized_jsd(Tensor student, Tensor teacher, Tensor? labels, Tensor? scale, float beta, float temperature,"
    " int ignore_index, bool reduce, bool with_grad) -> (Tensor loss, Tensor stats, Tensor grad_student)"
)
def generalized_jsd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    scale: Tensor | None,
    beta: float,
    temperature: float,
    ignore_index: int,
    reduce: bool,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence of each row, or with `reduce` their sum, and the gradients, all times the 0-dimensional `scale`.

    The vocabularies may differ: columns that one of the two lacks are left out, and have gradient 0. stats [5, ...]:
    the student's m and sum, the teacher's, and the row's center: 0, KL(Q‖P) or KL(Q‖M) for
    beta = 0, 1 and between.
    """
    dtype, rows = _layout.arithmetic_dtype(student, teacher), student.shape[:-1]
    return (
        student.new_empty(() if reduce else rows, dtype=dtype),
        student.new_empty((5, *rows), dtype=dtype),
        student.new_empty(student.shape if with_grad else (0,)),
    )


@_backend.operator(
    "generalized_jsd_backward(Tensor grad, Tensor student, Tensor teacher, Tensor? labels, Tensor stats, float beta,"
    " float temperature, int ignore_index) -> Tensor"
)
def generalized_jsd_backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    stats: Tensor,
    beta: float,
    temperature: float,
    ignore_index: int,
) -> Tensor:
    """The student's gradient from one number per row, which may be expanded; 0 in ignored rows."""
    return student.new_empty(student.shape)


class TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backend: str, logits: Tensor, tokens: Tensor, temperature: float, ignore_index: int
    ) -> Tensor:
        logprob, stats = token_logprob.on(backend)(logits, tokens, temperature, ignore_index)
        ctx.save_for_backward(logits, tokens, stats)
        ctx.backend, ctx.temperature, ctx.ignore_index = backend, temperature, ignore_index
        return logprob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        run = token_logprob_backward.on(ctx.backend)
        return None, run(grad, *ctx.saved_tensors, ctx.temperature, ctx.ignore_index), None, None, None


class SequenceDdoLoss(torch.autograd.Function):
    """DDO over sums of token log-probabilities. A gradient needs the whole sequence's sum: none is written forward."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, logits: Tensor, ref_logits: Tensor, tokens: Tensor, *args: Any
    ) -> tuple[Tensor, Tensor]:
        logprob, stats = token_logprob.on(backend)(logits, tokens, 1.0, IGNORE_INDEX)
        ref_logprob, _ = token_logprob.on(backend)(ref_logits, tokens, 1.0, IGNORE_INDEX)
        loss, delta, slope = sequence_ddo_loss.on(backend)(logprob, ref_logprob, *args)
        ctx.save_for_backward(logits, tokens, stats, slope)
        ctx.mark_non_differentiable(delta)
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.unused = backend, (None,) * (2 + len(args))
        return loss, delta

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:  # the loss was not used
            return None, None, *ctx.unused
        logits, tokens, stats, slope = ctx.saved_tensors
        row_grad = (slope * grad_loss).reshape(-1, *[1] * (tokens.dim() - 1)).expand(tokens.shape)
        grad = token_logprob_backward.on(ctx.backend)(row_grad, logits, tokens, stats, 1.0, IGNORE_INDEX)
        return None, grad, *ctx.unused


class GeneralizedJsd(torch.autograd.Function):
    """Where `keep_grad`, the pass that computes the loss writes the gradient too, while the row is on chip.

    The first backward takes that buffer over and scales it in place; a later one (retain_graph) recomputes into a fresh
    one, as every backward does where `keep_grad` is off.
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        keep_grad: bool,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor | None,
        scale: Tensor | None,
        beta: float,
        temperature: float,
        ignore_index: int,
        reduce: bool,
    ) -> Tensor:
        run = generalized_jsd.on(backend)
        loss, stats, grad = run(
            student, teacher, labels, scale, beta, temperature, ignore_index, reduce, keep_grad
        )  # fmt: skip
        ctx.save_for_backward(student, teacher, labels, scale, stats)
        ctx.backend, ctx.args = backend, (beta, temperature, ignore_index)
        ctx.grad_student = grad if keep_grad else None
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad, ctx.grad_student = ctx.grad_student, None
        if grad is not None:
            scale_gradient(grad, grad_loss, ctx.backend)
        else:
            student, teacher, labels, scale, stats = ctx.saved_tensors
            row_grad = (grad_loss if scale is None else grad_loss * scale).expand(student.shape[:-1])
            grad = generalized_jsd_backward.on(ctx.backend)(row_grad, student, teacher, labels, stats, *ctx.args)
        return (None, None, grad, *[None] * 7)


def can_keep_gradient(student: Tensor) -> bool:
    # float16 would underflow before a loss scale reaches it; a compiled backward cannot take the buffer over.
    return (
        student.dtype != torch.float16
        and type(student) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
    )
