"""The losses of ``sequence`` from hidden states and output layers: the public functions over ``linear.py``."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..core import checks, dispatch, distributed
from ..triton_kernels.layout import arithmetic_dtype
from . import linear, reference
from .linear import MAX_CHUNK_BYTES
from .operators import IGNORE_INDEX
from .options import check_divergence, check_rounding, check_rows, scale_of

__all__ = ["linear_generalized_jsd_loss", "linear_token_logprob"]


def linear_token_logprob(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    round_logits: bool = False,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
) -> Tensor:
    """:func:`token_logprob` of ``logits = hidden weightᵀ + bias``, without ever holding the logits.

    Tokens are taken in chunks; the backward pass computes each chunk's logits once more. Logits of bfloat16 and float16
    operands are computed and kept in float32, and so are the sums of all gradients.

    Args:
        hidden: [..., H], the output layer's input, in float32, bfloat16, float16 or float64.
        weight: [V, H], the output layer's weight, of the same dtype. It may be a DTensor, such as a parameter under
            FSDP2, beside plain hidden states of each rank: it is gathered here, and its gradient is the mean over the
            ranks, as that of FSDP2's other parameters is. (For their sum pass
            ``weight.full_tensor(grad_placements=[Partial()])``.)
        tokens: int64 [...].
        bias: [V], of the same dtype, or None; a DTensor as `weight` may be.
        temperature, ignore_index: as in :func:`token_logprob`.
        round_logits: keep the logits in the dtype of `hidden`, as a layer returns them, instead of float32. In bfloat16
            that halves their memory and costs accuracy, as :func:`token_logprob` says. float16 is refused: the gradient
            of its logits would underflow.
        max_chunk_bytes: memory for the logits of a chunk and, in the backward pass, their gradient; and a quarter more
            for parts of the weight, or of its gradient, in float32.

    Returns:
        [...], float32 (float64 for float64). Gradients flow to `hidden`, `weight` and `bias`, once differentiable.
        Under autocast the three are cast to its dtype; the logits are float32 there too.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> head = torch.nn.Linear(16, 1000)
        >>> hidden, tokens = torch.randn(2, 5, 16), torch.randint(1000, (2, 5))
        >>> logprob = fastgen.linear_token_logprob(hidden, head.weight, tokens, bias=head.bias)
        >>> torch.allclose(logprob, fastgen.token_logprob(head(hidden), tokens), atol=1e-5)
        True
        >>> (-logprob.mean()).backward()
    """
    checks.head("", hidden, weight, bias)
    checks.row_indices("tokens", tokens, hidden)
    temperature = checks.number("temperature", temperature, low=0, open_low=True)
    ignore_index = checks.integer("ignore_index", ignore_index)
    check_rounding(round_logits, "hidden", hidden)
    max_chunk_bytes = checks.positive_int("max_chunk_bytes", max_chunk_bytes)
    weight, bias = distributed.whole_parameters(weight, bias)
    backend = dispatch.backend_for("token_logprob", hidden.device.type)
    if backend == "reference":
        return reference.linear_token_logprob(
            hidden,
            weight,
            tokens,
            bias=bias,
            temperature=temperature,
            ignore_index=ignore_index,
            round_logits=round_logits,
        )
    head = linear.flat_head(hidden, weight, bias)
    logprob = linear.run(
        linear.token_logprob,
        backend,
        head,
        tokens=tokens.flatten(),
        temperature=temperature,
        ignore_index=ignore_index,
        round_logits=round_logits,
        max_chunk_bytes=max_chunk_bytes,
    )
    return logprob.view(tokens.shape)


def linear_generalized_jsd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: Literal["batchmean", "sum", "mean"] = "batchmean",
    num_items: int | Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    round_logits: bool = False,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
) -> Tensor:
    """:func:`generalized_jsd_loss` of ``logits = hidden weightᵀ + bias``, without ever holding the logits.

    Tokens are taken in chunks. Where a gradient is needed the forward pass computes it, while a chunk's logits are
    there: the backward pass only scales. At 4 096 tokens and a vocabulary of 128 000 the logits of a student and a
    teacher and their gradient are 6 GB in float32; here they are `max_chunk_bytes`.

    Logits of bfloat16 and float16 operands are computed and kept in float32, and so are the sums of all gradients: the
    gradient of a bfloat16 head is off by 0.25 %, of which 0.17 % is its own rounding, however close the student is to
    the teacher. Rounded logits would make it 66 % where the two differ by 1 %.

    Args:
        student_hidden: [..., H], the input of the student's output layer, in float32, bfloat16, float16 or float64.
        student_weight: [V, H], that layer's weight, of the same dtype. A frozen one (``requires_grad=False``) costs no
            gradient. It may be a DTensor, such as a parameter under FSDP2, beside plain hidden states of each rank: it
            is gathered here, and its gradient is the mean over the ranks, as that of FSDP2's other parameters is. (For
            their sum pass ``student_weight.full_tensor(grad_placements=[Partial()])``.)
        teacher_hidden: [..., H'], the teacher's; H' and the dtype may differ from the student's.
        teacher_weight: [V', H'], of the dtype of `teacher_hidden`, or a DTensor. V' may differ from V, as in
            :func:`generalized_jsd_loss`.
        labels: int64 [...] or None, as there.
        student_bias, teacher_bias: [V], [V'] or None; DTensors as the weights may be.
        beta, temperature, num_items, ignore_index: as in :func:`generalized_jsd_loss`.
        reduction: as there, but for ``"none"``.
        round_logits: keep the logits in the dtype of the hidden states, as a layer returns them, instead of float32. In
            bfloat16 that halves their memory and costs accuracy, as :func:`generalized_jsd_loss` says. A float16
            student is refused: the gradient of its logits would underflow.
        max_chunk_bytes: memory for a chunk's logits, the teacher's, and the gradient of the student's; and a quarter
            more for parts of a weight, or of its gradient, in float32. On a GPU a larger budget makes for larger matrix
            products.

    Returns:
        The loss, float32 (float64 if an input is). Gradients flow to the student's hidden states, weight and bias, once
        differentiable. Under autocast all are cast to its dtype; the logits are float32 there too.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> student, teacher = torch.nn.Linear(16, 1000, bias=False), torch.nn.Linear(32, 1000, bias=False)
        >>> s, t = torch.randn(2, 5, 16), torch.randn(2, 5, 32)
        >>> loss = fastgen.linear_generalized_jsd_loss(s, student.weight, t, teacher.weight, beta=0.5)
        >>> loss.backward()
        >>> torch.allclose(loss, fastgen.generalized_jsd_loss(student(s), teacher(t), beta=0.5))
        True
    """
    checks.head("student_", student_hidden, student_weight, student_bias)
    checks.head("teacher_", teacher_hidden, teacher_weight, teacher_bias)
    if teacher_hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"teacher_hidden has rows {list(teacher_hidden.shape[:-1])}, but student_hidden has"
            f" {list(student_hidden.shape[:-1])}"
        )
    check_rows(student_hidden, labels, None, None, reduction, num_items, ignore_index)
    checks.choice("reduction", reduction, ("batchmean", "sum", "mean"))
    check_divergence(beta, False, temperature)
    check_rounding(round_logits, "student_hidden", student_hidden)
    max_chunk_bytes = checks.positive_int("max_chunk_bytes", max_chunk_bytes)
    beta, temperature = float(beta), float(temperature)
    student_weight, student_bias = distributed.whole_parameters(student_weight, student_bias)
    teacher_weight, teacher_bias = distributed.whole_parameters(teacher_weight, teacher_bias)
    backend = dispatch.backend_for("generalized_jsd", student_hidden.device.type)
    if backend == "reference":
        return reference.linear_generalized_jsd_loss(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            beta=beta,
            temperature=temperature,
            reduction=reduction,
            num_items=num_items,
            ignore_index=ignore_index,
            round_logits=round_logits,
        )
    vocabulary = min(student_weight.shape[0], teacher_weight.shape[0])
    dtype = arithmetic_dtype(student_hidden, teacher_hidden)
    scale = scale_of(student_hidden, dtype, labels, reduction, num_items, ignore_index, vocabulary, beta, False)
    student = linear.flat_head(student_hidden, student_weight, student_bias)
    teacher = linear.flat_head(teacher_hidden, teacher_weight, teacher_bias)
    return linear.run(
        linear.generalized_jsd,
        backend,
        student,
        **{f"teacher_{name}": value for name, value in teacher._asdict().items()},
        labels=None if labels is None else labels.flatten(),
        scale=scale,
        beta=beta,
        temperature=temperature,
        ignore_index=ignore_index,
        round_logits=round_logits,
        max_chunk_bytes=max_chunk_bytes,
    )
