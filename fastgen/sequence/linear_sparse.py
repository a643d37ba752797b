"""The divergence from a teacher that is known on a few ids, from hidden states and an output layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core import checks, dispatch
from ..triton_kernels.layout import arithmetic_dtype
from . import linear, reference
from .head import chunk_bytes
from .layout import Head, layout_of_heads, whole_call
from .operators import IGNORE_INDEX, Tail
from .options import (
    Reduction,
    check_plain,
    check_rounding,
    check_rows,
    check_transform,
    labels_of,
    scale_of,
    spread_rows,
)
from .sparse import Kind, beta_of, check_kind, check_teacher


def linear_sparse_divergence_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    *,
    bias: Tensor | None = None,
    kind: Kind = "forward",
    beta: float = 0.5,
    scaled: bool = False,
    tail: Tail = "bucket",
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    num_valid: int | None = None,
    token_weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    reduction: Reduction = "batchmean",
    ignore_index: int = IGNORE_INDEX,
    round_logits: bool = False,
    max_chunk_bytes: int | None = None,
    vocab_group: Any = None,
) -> Tensor:
    """:func:`sparse_divergence_loss` of ``logits = f(hidden weightᵀ + bias)``, without ever holding the logits.

    f is what the model does with its head's output: nothing, or a scale, or a soft cap.

    Tokens are taken in chunks. Where a gradient is needed the forward pass computes it, while a chunk's logits are
    there: the backward pass only scales (but for ``reduction="none"``, with which it computes the logits once more).
    Logits of bfloat16 and float16 operands are computed and kept in float32, and so are the sums of all gradients.

    Args:
        hidden: [..., H], the output layer's input, in float32, bfloat16, float16 or float64.
        weight: [V, H], the output layer's weight, of the same dtype. It may be a DTensor, such as a parameter under
            FSDP2, beside plain hidden states of each rank: it is gathered here, and its gradient is the mean over the
            ranks, as that of FSDP2's other parameters is.
        teacher_logprobs: [..., K], the teacher's log-probabilities of the K ids, as in :func:`sparse_divergence_loss`.
        teacher_ids: int64 [..., K]; a negative id is padding.
        bias: [V], of the same dtype, or None; a DTensor as `weight` may be.
        logit_scale, softcap: logits are ``c tanh(s z / c)`` of the head's output z, or s z where c is None, as in
            :func:`linear_token_logprob`.
        kind, beta, scaled, tail, temperature, labels, mask, num_items, reduction, ignore_index: as in
            :func:`sparse_divergence_loss`.
        num_valid: how many tokens count, for the others not even to be projected: as in :func:`linear_token_logprob`.
        token_weight: [...], a factor of each token's loss, without gradient.
        round_logits: keep the logits in the dtype of `hidden`, as a layer returns them, instead of float32. In bfloat16
            that halves their memory and costs accuracy. float16 is refused: the gradient of its logits would underflow.
        max_chunk_bytes: memory for the logits of a chunk and their gradient; and a quarter more for parts of the
            weight, or of its gradient, in float32. None: 96 MiB on a CPU, 1 GiB on a GPU.
        vocab_group: as in :func:`linear_token_logprob`: `weight` and `bias` are a rank's slices of a column-parallel
            layer, ids are of the whole vocabulary.

    Returns:
        The loss, float32 (float64 if an input is). Gradients flow to `hidden`, `weight` and `bias`, once
        differentiable. Under autocast the three are cast to its dtype; the logits are float32 there too.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
        RuntimeError: on a CPU, for an id ≥ V. On a GPU it makes its token NaN.

    Example::

        >>> import torch, fastgen
        >>> head, hidden = torch.nn.Linear(16, 1000), torch.randn(2, 5, 16)
        >>> logprobs, ids = torch.randn(2, 5, 1000).log_softmax(-1).topk(8)
        >>> loss = fastgen.linear_sparse_divergence_loss(hidden, head.weight, logprobs, ids, bias=head.bias)
        >>> loss.backward()
        >>> torch.allclose(loss, fastgen.sparse_divergence_loss(head(hidden), logprobs, ids))
        True
    """
    checks.head("", hidden, weight, bias)
    transform = check_transform("", logit_scale, softcap)
    layout, parts = layout_of_heads(vocab_group, **{"": Head(hidden, weight, bias)})
    slices = None if layout is None else layout.slices
    vocabulary = weight.shape[0] if slices is None else slices.total
    check_plain(hidden, teacher_logprobs=teacher_logprobs, teacher_ids=teacher_ids)
    check_teacher(hidden, teacher_logprobs, teacher_ids, vocabulary)
    mask, num_valid = linear.valid_rows(hidden, mask, num_valid)
    check_rows(hidden, labels, mask, token_weight, reduction, num_items, ignore_index, "token_weight")
    check_kind(kind, beta, scaled, tail, temperature)
    check_rounding(round_logits, "hidden", hidden)
    max_chunk_bytes = chunk_bytes(max_chunk_bytes, hidden)
    beta, temperature = float(beta), float(temperature)
    backend = dispatch.backend_for("sparse_divergence", hidden.device.type)
    if backend == "reference":
        whole = parts[0] if layout is None or layout.mesh is None else Head(hidden, weight, bias)
        return whole_call(
            layout,
            reference.linear_sparse_divergence_loss,
            {"weight": whole.weight, "bias": whole.bias},
            0,
            hidden=whole.hidden,
            teacher_logprobs=teacher_logprobs,
            teacher_ids=teacher_ids,
            logit_scale=logit_scale,
            softcap=softcap,
            kind=kind,
            beta=beta,
            scaled=scaled,
            tail=tail,
            temperature=temperature,
            labels=labels,
            mask=mask,
            token_weight=token_weight,
            num_items=num_items,
            reduction=reduction,
            ignore_index=ignore_index,
            round_logits=round_logits,
        )
    beta = beta_of(kind, beta)
    if layout is not None:
        labels, mask, token_weight = spread_rows(layout, hidden, labels, mask, token_weight)
    labels = labels_of(hidden, labels, mask, ignore_index)
    dtype = arithmetic_dtype(hidden, teacher_logprobs)
    loss, *_ = linear.run_divided(
        linear.sparse_divergence,
        backend,
        layout,
        parts,
        {
            "teacher_logprobs": teacher_logprobs.detach(),
            "teacher_ids": teacher_ids,
            "labels": labels,
            "weight": linear.row_weights(token_weight, labels, ignore_index),
        },
        labels,
        num_valid,
        hidden.shape[:-1],
        scale=scale_of(hidden, dtype, labels, reduction, num_items, ignore_index, vocabulary, beta, scaled),
        beta=beta,
        tail=tail,
        temperature=temperature,
        ignore_index=ignore_index,
        reduction="none" if reduction == "none" else "sum",
        transform={"student_": transform},
        round_logits=round_logits,
        max_chunk_bytes=max_chunk_bytes,
    )
    return loss
