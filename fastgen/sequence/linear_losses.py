"""The losses of ``sequence`` from hidden states and output layers: the public functions over ``linear.py``."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor

from ..core import checks, dispatch
from ..triton_kernels.layout import arithmetic_dtype
from . import linear, reference
from .head import chunk_bytes, flat_head
from .layout import Head, layout_of_heads, whole_call
from .operators import IGNORE_INDEX
from .options import (
    Reduction,
    check_cross_entropy,
    check_divergence,
    check_plain,
    check_rounding,
    check_rows,
    check_transform,
    expanded,
    labels_of,
    scale_of,
    spread_rows,
    unscaled,
)

__all__ = ["linear_generalized_jsd_loss", "linear_token_logprob"]


@overload
def linear_token_logprob(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    num_valid: int | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    temperature: float = ...,
    ignore_index: int = ...,
    return_entropy: Literal[False] = ...,
    round_logits: bool = ...,
    max_chunk_bytes: int | None = ...,
    vocab_group: Any = ...,
) -> Tensor: ...
@overload
def linear_token_logprob(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    num_valid: int | None = ...,
    logit_scale: float = ...,
    softcap: float | None = ...,
    temperature: float = ...,
    ignore_index: int = ...,
    return_entropy: Literal[True],
    round_logits: bool = ...,
    max_chunk_bytes: int | None = ...,
    vocab_group: Any = ...,
) -> tuple[Tensor, Tensor]: ...
def linear_token_logprob(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    num_valid: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    return_entropy: bool = False,
    round_logits: bool = False,
    max_chunk_bytes: int | None = None,
    vocab_group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`token_logprob` of ``logits = f(hidden weightᵀ + bias)``, without ever holding the logits.

    f is what the model does with its head's output: nothing, or a scale, or a soft cap.

    Tokens are taken in chunks; the backward pass computes each chunk's logits once more. Logits of bfloat16 and float16
    operands are computed and kept in float32, and so are the sums of all gradients.

    Args:
        hidden: [..., H], the output layer's input, in float32, bfloat16, float16 or float64.
        weight: [V, H], the output layer's weight, of the same dtype. It may be a DTensor, such as a parameter under
            FSDP2, beside plain hidden states of each rank: it is gathered here, and its gradient is the mean over the
            ranks, as that of FSDP2's other parameters is. (For their sum pass
            ``weight.full_tensor(grad_placements=[Partial()])``.) A layer wrapped by LoRA has its frozen base here,
            without the adapter: pass ``base + scaling B A``.
        tokens: int64 [...].
        bias: [V], of the same dtype, or None; a DTensor as `weight` may be.
        logit_scale: s > 0, which multiplies the head's output z (Cohere's models have one; Granite's divide by 1 / s).
        softcap: c > 0: the logits are ``c tanh(s z / c)``, as Gemma 2's with ``final_logit_softcapping`` c; None: s z.
            A model's own logits, for the functions that take logits, have been through both.
        mask, temperature, ignore_index: as in :func:`token_logprob`.
        num_valid: how many tokens count; rows of the others are then not even projected. Known here without it where
            `hidden` is on a CPU, and where `mask` is: that may stay there beside hidden states on a GPU. Elsewhere
            finding out would wait for the device, and without it all rows are projected. It may be too large; where it
            is too small, the last tokens that count are left out.
        return_entropy: also return the entropy [...], as :func:`token_logprob` does.
        round_logits: keep the logits in the dtype of `hidden`, as a layer returns them, instead of float32. In bfloat16
            that halves their memory and costs accuracy, as :func:`token_logprob` says. float16 is refused: the gradient
            of its logits would underflow.
        max_chunk_bytes: memory for the logits of a chunk and, in the backward pass, their gradient; and a quarter more
            for parts of the weight, or of its gradient, in float32. None: 96 MiB on a CPU, 1 GiB on a GPU.
        vocab_group: a ``torch.distributed`` process group whose ranks have equal slices of the layer's rows, in their
            order, as a column-parallel layer has them: `weight` and `bias` are a rank's slice, or are DTensors that are
            sharded so over that dimension of their mesh; all else is the same on all ranks. The gradient of `hidden` is
            complete on every rank: summed here, once a chunk, while the next chunk is computed. Or pass DTensors for
            all: `hidden` whole, or sharded along rows, and `weight` and `bias` ``Shard(0)`` over a dimension of the
            mesh along which `hidden` is whole.

    Returns:
        [...], float32 (float64 for float64), or ``(logprob, entropy)``. Gradients flow to `hidden`, `weight` and
        `bias`, once differentiable. Under autocast the three are cast to its dtype; the logits are float32 there too.

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
    transform = check_transform("", logit_scale, softcap)
    checks.row_indices("tokens", tokens, hidden)
    mask, num_valid = linear.valid_rows(hidden, mask, num_valid)
    if mask is not None:
        checks.mask("mask", mask, tokens)
    temperature = checks.number("temperature", temperature, low=0, open_low=True)
    ignore_index = checks.integer("ignore_index", ignore_index)
    check_rounding(round_logits, "hidden", hidden)
    max_chunk_bytes = chunk_bytes(max_chunk_bytes, hidden)
    check_plain(hidden, tokens=tokens, mask=mask)
    layout, (parts,) = layout_of_heads(vocab_group, **{"": Head(hidden, weight, bias)})
    backend = dispatch.backend_for("token_logprob", hidden.device.type)
    if backend == "reference":
        whole = parts if layout is None or layout.mesh is None else Head(hidden, weight, bias)
        return whole_call(
            layout,
            reference.linear_token_logprob,
            {"weight": whole.weight, "bias": whole.bias},
            0,
            hidden=whole.hidden,
            tokens=tokens,
            logit_scale=logit_scale,
            softcap=softcap,
            mask=mask,
            temperature=temperature,
            ignore_index=ignore_index,
            return_entropy=return_entropy,
            round_logits=round_logits,
        )
    shape = tokens.shape
    if layout is not None:
        mask, tokens = layout.local("mask", expanded(mask, shape)), layout.own("tokens", tokens)
    tokens = reference.masked(tokens, mask, ignore_index)
    logprob, *entropy = linear.run_counted(
        linear.token_logprob,
        backend,
        [flat_head(*parts)],
        {"tokens": tokens},
        tokens != ignore_index,
        num_valid,
        hidden.dim() - 1,
        scale=None,
        temperature=temperature,
        ignore_index=ignore_index,
        reduction="none",
        entropy=return_entropy,
        transform={"student_": transform},
        round_logits=round_logits,
        max_chunk_bytes=max_chunk_bytes,
        slices=None if layout is None else layout.slices,
    )
    found = [t.view(tokens.shape) for t in (logprob, *entropy)]
    if layout is not None:
        found = [layout.rows(t, shape) for t in found]
    return (found[0], found[1]) if return_entropy else found[0]


@overload
def linear_generalized_jsd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = ...,
    *,
    student_bias: Tensor | None = ...,
    teacher_bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    num_valid: int | None = ...,
    token_weight: Tensor | None = ...,
    beta: float = ...,
    scaled: bool = ...,
    temperature: float = ...,
    reduction: Reduction = ...,
    num_items: float | Tensor | None = ...,
    ignore_index: int = ...,
    return_entropy: Literal[False] = ...,
    cross_entropy_weight: float = ...,
    return_cross_entropy: Literal[False] = ...,
    round_logits: bool = ...,
    max_chunk_bytes: int | None = ...,
    vocab_group: Any = ...,
) -> Tensor: ...
@overload
def linear_generalized_jsd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = ...,
    *,
    student_bias: Tensor | None = ...,
    teacher_bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    num_valid: int | None = ...,
    token_weight: Tensor | None = ...,
    beta: float = ...,
    scaled: bool = ...,
    temperature: float = ...,
    reduction: Reduction = ...,
    num_items: float | Tensor | None = ...,
    ignore_index: int = ...,
    return_entropy: bool = ...,
    cross_entropy_weight: float = ...,
    return_cross_entropy: bool = ...,
    round_logits: bool = ...,
    max_chunk_bytes: int | None = ...,
    vocab_group: Any = ...,
) -> Any: ...
def linear_generalized_jsd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    mask: Tensor | None = None,
    num_valid: int | None = None,
    token_weight: Tensor | None = None,
    beta: float = 0.5,
    scaled: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    temperature: float = 1.0,
    reduction: Reduction = "batchmean",
    num_items: float | Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    return_entropy: bool = False,
    cross_entropy_weight: float = 0.0,
    return_cross_entropy: bool = False,
    round_logits: bool = False,
    max_chunk_bytes: int | None = None,
    vocab_group: Any = None,
) -> Tensor | tuple[Tensor, ...]:
    """:func:`generalized_jsd_loss` of ``logits = f(hidden weightᵀ + bias)``, without ever holding the logits.

    f is what a model does with its head's output: nothing, or a scale, or a soft cap.

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
        logit_scale, softcap: of the student: logits are ``c tanh(s z / c)`` of its head's output z, or s z where c is
            None, as in :func:`linear_token_logprob`.
        teacher_logit_scale, teacher_softcap: of the teacher.
        mask, beta, scaled, temperature, reduction, num_items, ignore_index: as in :func:`generalized_jsd_loss`. With
            ``"none"`` the backward pass computes the logits once more.
        token_weight: [...], the `weight` of that function.
        num_valid: how many tokens count, for the others not even to be projected: as in :func:`linear_token_logprob`.
        return_entropy: also return the entropy [...] in nats of the student's softmax(logits / τ), for logging: without
            gradient, 0 for tokens that do not count. It reads the logits of a chunk once more.
        cross_entropy_weight: ≥ 0: adds this times the cross-entropy of the student and the labels, which must then be
            tokens, at temperature 1, to each token's loss: of the same logits, which are not projected again.
        return_cross_entropy: also return that cross-entropy [...], not times its weight, for logging.
        round_logits: keep the logits in the dtype of the hidden states, as a layer returns them, instead of float32. In
            bfloat16 that halves their memory and costs accuracy, as :func:`generalized_jsd_loss` says. A float16
            student is refused: the gradient of its logits would underflow.
        max_chunk_bytes: memory for a chunk's logits, the teacher's, and the gradient of the student's; and a quarter
            more for parts of a weight, or of its gradient, in float32. None: 96 MiB on a CPU, 1 GiB on a GPU, whose
            matrix products want to be large.
        vocab_group: a ``torch.distributed`` process group whose ranks have equal slices of the layer's rows, in their
            order, as a column-parallel layer has them: weights and biases are a rank's slice, or are DTensors that are
            sharded so over that dimension of their mesh; all else is the same on all ranks. The gradient of hidden
            states is complete on every rank: summed here, once a chunk, while the next chunk is computed. Or pass
            DTensors for all: hidden states whole, or sharded along rows, and weights and biases ``Shard(0)`` over a
            dimension of the mesh along which they are whole.

    Returns:
        The loss, float32 (float64 if an input is), or a tuple of it and what else is asked for: ``(loss, entropy,
        cross_entropy)``. Gradients flow to the student's hidden states, weight and bias, once differentiable. Under
        autocast all are cast to its dtype; the logits are float32 there too.

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
    transform = {
        "student_": check_transform("", logit_scale, softcap),
        "teacher_": check_transform("teacher_", teacher_logit_scale, teacher_softcap),
    }
    if teacher_hidden.shape[:-1] != student_hidden.shape[:-1]:
        raise ValueError(
            f"teacher_hidden has rows {list(teacher_hidden.shape[:-1])}, but student_hidden has"
            f" {list(student_hidden.shape[:-1])}"
        )
    mask, num_valid = linear.valid_rows(student_hidden, mask, num_valid)
    check_rows(student_hidden, labels, mask, token_weight, reduction, num_items, ignore_index, "token_weight")
    check_divergence(beta, scaled, temperature)
    check_rounding(round_logits, "student_hidden", student_hidden)
    cross_entropy_weight = check_cross_entropy(labels, cross_entropy_weight, return_cross_entropy)
    max_chunk_bytes = chunk_bytes(max_chunk_bytes, student_hidden)
    beta, temperature = float(beta), float(temperature)
    heads = {
        "student_": Head(student_hidden, student_weight, student_bias),
        "teacher_": Head(teacher_hidden, teacher_weight, teacher_bias),
    }
    layout, parts = layout_of_heads(vocab_group, **heads)
    backend = dispatch.backend_for("generalized_jsd", student_hidden.device.type)
    if backend == "reference":
        student, teacher = parts if layout is None or layout.mesh is None else heads.values()
        return whole_call(
            layout,
            reference.linear_generalized_jsd_loss,
            {
                "student_weight": student.weight,
                "teacher_weight": teacher.weight,
                "student_bias": student.bias,
                "teacher_bias": teacher.bias,
            },
            0,
            student_hidden=student.hidden,
            teacher_hidden=teacher.hidden,
            labels=labels,
            logit_scale=logit_scale,
            softcap=softcap,
            teacher_logit_scale=teacher_logit_scale,
            teacher_softcap=teacher_softcap,
            mask=mask,
            token_weight=token_weight,
            beta=beta,
            scaled=scaled,
            temperature=temperature,
            reduction=reduction,
            num_items=num_items,
            ignore_index=ignore_index,
            return_entropy=return_entropy,
            cross_entropy_weight=cross_entropy_weight,
            return_cross_entropy=return_cross_entropy,
            round_logits=round_logits,
        )
    vocabulary = min(part.weight.shape[0] for part in parts)
    if layout is not None:
        labels, mask, token_weight = spread_rows(layout, student_hidden, labels, mask, token_weight)
        vocabulary = vocabulary if layout.slices is None else layout.slices.total
    labels = labels_of(student_hidden, labels, mask, ignore_index)
    dtype = arithmetic_dtype(student_hidden, teacher_hidden)
    scale = scale_of(student_hidden, dtype, labels, reduction, num_items, ignore_index, vocabulary, beta, scaled)
    loss, *others = linear.run_divided(
        linear.generalized_jsd,
        backend,
        layout,
        parts,
        {"labels": labels, "weight": linear.row_weights(token_weight, labels, ignore_index)},
        labels,
        num_valid,
        student_hidden.shape[:-1],
        scale=scale,
        beta=beta,
        temperature=temperature,
        ignore_index=ignore_index,
        reduction="none" if reduction == "none" else "sum",
        entropy=return_entropy,
        cross_entropy_weight=cross_entropy_weight * unscaled(beta, scaled),
        transform=transform,
        round_logits=round_logits,
        max_chunk_bytes=max_chunk_bytes,
    )
    cross_entropy = others.pop(0)
    results = (loss, *others, *((cross_entropy,) if return_cross_entropy else ()))
    return results if len(results) > 1 else loss
