"""The losses of ``sequence`` from hidden states and output weights: no [tokens, vocabulary] tensor is ever whole.

Rows are taken in chunks whose logits, and their gradient, stay within a budget of bytes; the products are torch's, the
row operators ours. Logits of half-precision operands are float32: what bfloat16 rounds off a logit is more than the
difference between a student and a teacher who are close. Gradients accumulate over the chunks in float32 (float64 for
float64), are scaled there by what comes in, and are then rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.autograd import Differentiable, Forward, Gradients, apply
from . import operators
from .reference import autocast_head

MAX_CHUNK_BYTES = 96 << 20


class Head(NamedTuple):
    """A linear layer and its input."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def flat_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Head:
    """A linear layer and its input as rows, in the dtype that autocast gives them."""
    return Head(*autocast_head(hidden.reshape(-1, hidden.shape[-1]), weight, bias))


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


class _LinearLogprob:
    """Log-probabilities of tokens; the backward pass computes each chunk's logits again."""

    tensors = (*Head._fields, "tokens", "stats")
    options = ("temperature", "ignore_index", "round_logits", "max_chunk_bytes")

    def forward(self, backend: str, keep: bool, needed: tuple[bool, ...], arguments: dict[str, Any]) -> Forward:
        head, tokens = _head(arguments), arguments["tokens"]
        logprob = head.hidden.new_empty(tokens.shape, dtype=wide(head.hidden))
        stats = head.hidden.new_empty((2, *tokens.shape), dtype=wide(head.hidden))
        for rows, logits in self.chunks(head, 1, arguments):
            logprob[rows], stats[:, rows] = operators.token_logprob.operator(
                backend,
                logits=logits.pop(),  # freed before the next chunk's are made
                tokens=tokens[rows],
                temperature=arguments["temperature"],
                ignore_index=arguments["ignore_index"],
            )
        return Forward((logprob,), arguments | {"stats": stats}, (None,) * 3)

    def backward(self, backend: str, needed: tuple[bool, ...], saved: Mapping[str, Any], grad: Tensor) -> Gradients:
        head = _head(saved)
        gradients = HeadGradients(head, needed, saved["max_chunk_bytes"] // 4)
        for rows, logits in self.chunks(head, 2, saved):
            grad_logits = operators.token_logprob_backward(
                backend,
                grad=grad[rows],
                logits=logits.pop(),
                tokens=saved["tokens"][rows],
                stats=saved["stats"][:, rows],
                temperature=saved["temperature"],
                ignore_index=saved["ignore_index"],
            )
            gradients.add(rows, grad_logits)
            del grad_logits
        return gradients.all()

    @staticmethod
    def chunks(head: Head, copies: int, options: Mapping[str, Any]) -> Iterator[tuple[slice, list[Tensor]]]:
        """Chunks of rows and their logits, of which there are so many `copies` in memory at once."""
        dtype, max_bytes = logits_dtype(head, options), options["max_chunk_bytes"]
        for rows in chunks_of(head, copies * head.weight.shape[0] * dtype.itemsize, max_bytes):
            with no_autocast(head.weight):
                yield rows, [linear_logits(head, rows, dtype, max_bytes // 4)]


class _LinearJsd:
    """The sum over rows of the divergence, times `scale`, and its gradients while a chunk's logits are there."""

    tensors = (*Head._fields, *(f"teacher_{name}" for name in Head._fields), "labels", "scale")
    options = ("beta", "temperature", "ignore_index", "round_logits", "max_chunk_bytes")

    def forward(self, backend: str, keep: bool, needed: tuple[bool, ...], arguments: dict[str, Any]) -> Forward:
        total, gradients = self.run(backend, needed, arguments)
        scale = arguments["scale"]
        return Forward((total if scale is None else total * scale,), arguments, gradients, scale)

    def backward(self, backend: str, needed: tuple[bool, ...], saved: Mapping[str, Any], grad: Tensor) -> Gradients:
        _, gradients = self.run(backend, needed, saved)
        factor = grad if saved["scale"] is None else grad * saved["scale"]
        return tuple(None if g is None else g.mul_(factor) for g in gradients)

    @staticmethod
    def run(backend: str, needed: tuple[bool, ...], arguments: Mapping[str, Any]) -> tuple[Tensor, Gradients]:
        """The sum of the rows' divergences and its gradients for the student's head."""
        student, teacher, labels = _head(arguments), _head(arguments, "teacher_"), arguments["labels"]
        student_dtype, teacher_dtype = (logits_dtype(head, arguments) for head in (student, teacher))
        max_bytes, with_grad = arguments["max_chunk_bytes"], any(needed)
        gradients = HeadGradients(student, needed, max_bytes // 4)
        logits_bytes = (1 + with_grad) * student.weight.shape[0] * student_dtype.itemsize
        logits_bytes += teacher.weight.shape[0] * teacher_dtype.itemsize
        losses = []
        with no_autocast(student.weight):
            for rows in chunks_of(student, logits_bytes, max_bytes):
                student_logits = linear_logits(student, rows, student_dtype, max_bytes // 4)
                teacher_logits = linear_logits(teacher, rows, teacher_dtype, max_bytes // 4)
                found = operators.generalized_jsd.operator(
                    backend,
                    student=student_logits,
                    teacher=teacher_logits,
                    labels=None if labels is None else labels[rows],
                    scale=None,
                    beta=arguments["beta"],
                    temperature=arguments["temperature"],
                    ignore_index=arguments["ignore_index"],
                    reduction="none",
                    with_grad=with_grad,
                )
                losses.append(found.loss)
                del student_logits, teacher_logits  # before anything else is made
                if with_grad:
                    gradients.add(rows, found.grad_student)
                del found
        return torch.cat(losses).sum(), gradients.all()


def _head(arguments: Mapping[str, Any], prefix: str = "") -> Head:
    return Head(*(arguments[f"{prefix}{name}"] for name in Head._fields))


def logits_dtype(head: Head, options: Mapping[str, Any]) -> torch.dtype:
    return head.hidden.dtype if options["round_logits"] else wide(head.hidden)


def run(loss: Differentiable, backend: str, head: Head, **arguments: Any) -> Any:
    """`loss` of a head, differentiable in its three tensors where one of them needs it."""
    return apply(loss, backend, True, head, arguments | head._asdict())


token_logprob, generalized_jsd = _LinearLogprob(), _LinearJsd()
