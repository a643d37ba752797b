"""The divergence from a teacher that is known on a few ids of the vocabulary."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..core import checks, dispatch
from ..triton_kernels.layout import arithmetic_dtype
from . import operators, parallel, reference
from .layout import layout_of, whole_call
from .operators import IGNORE_INDEX, Tail
from .options import (
    Reduction,
    check_divergence,
    check_plain,
    check_rows,
    labels_of,
    reduced,
    scale_of,
    spread_rows,
)

KINDS = ("forward", "reverse", "jsd")
TAILS = ("bucket", "renormalize", "none")

Kind = Literal["forward", "reverse", "jsd"]


@overload
def sparse_divergence_loss(
    student_logits: Tensor,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    *,
    kind: Kind = ...,
    beta: float = ...,
    scaled: bool = ...,
    tail: Tail = ...,
    temperature: float = ...,
    labels: Tensor | None = ...,
    mask: Tensor | None = ...,
    weight: Tensor | None = ...,
    num_items: float | Tensor | None = ...,
    reduction: Reduction = ...,
    ignore_index: int = ...,
    return_masses: Literal[False] = ...,
    vocab_group: Any = ...,
) -> Tensor: ...
@overload
def sparse_divergence_loss(
    student_logits: Tensor,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    *,
    kind: Kind = ...,
    beta: float = ...,
    scaled: bool = ...,
    tail: Tail = ...,
    temperature: float = ...,
    labels: Tensor | None = ...,
    mask: Tensor | None = ...,
    weight: Tensor | None = ...,
    num_items: float | Tensor | None = ...,
    reduction: Reduction = ...,
    ignore_index: int = ...,
    return_masses: Literal[True],
    vocab_group: Any = ...,
) -> tuple[Tensor, Tensor]: ...
def sparse_divergence_loss(
    student_logits: Tensor,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    *,
    kind: Kind = "forward",
    beta: float = 0.5,
    scaled: bool = False,
    tail: Tail = "bucket",
    temperature: float = 1.0,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    reduction: Reduction = "batchmean",
    ignore_index: int = IGNORE_INDEX,
    return_masses: bool = False,
    vocab_group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The divergence of a student from a teacher of whom K log-probabilities a token are known.

    Such as the top K that an inference server returns, or those of the student's own top K tokens. The student
    Q = softmax(logits / τ) is normalised over the whole vocabulary, and of it the K ids count, of mass
    Q_S = Σ q_k as the teacher's P_S = Σ p_k. What is compared depends on `tail`::

        "bucket"       p_1 … p_K, 1 - P_S  against  q_1 … q_K, 1 - Q_S     all other ids are one category
        "renormalize"  p_k / P_S           against  q_k / Q_S              other ids get no gradient
        "none"         p_k                 against  q_k                    the sum over the K ids alone

    and how on `kind`: ``"forward"`` KL(P‖Q), ``"reverse"`` KL(Q‖P), ``"jsd"`` β KL(P‖M) + (1 - β) KL(Q‖M) with
    M = βP + (1 - β)Q. With the bucket it is never negative, 0 where the two agree on all K, and at most the divergence
    over the whole vocabulary. The raw sum of ``"none"`` is no divergence: its forward KL is below 0 where the student
    puts more on the ids than the teacher, and its reverse KL falls by driving Q_S to 0.

    The student's row is read once for the loss and the gradient together; nothing else of its size exists.

    The student's logits may be divided among ranks: DTensors whose rows and vocabulary are sharded as you like, evenly
    or not (what ``parallelize_module`` leaves with ``output_layouts=Shard(-1)``), beside which all else are DTensors
    that are sharded as the rows are, or plain tensors where these are whole; or plain slices of a `vocab_group`. Ranks
    exchange a few numbers a row, never logits. Every rank has the whole loss, the same to the bit, and the gradient of
    its slice: under a `vocab_group` do not multiply or divide by its size.

    Args:
        student_logits: [..., V] in float32, bfloat16, float16 or float64, before any softmax; the leading dimensions
            may have any strides. Gradients flow to it alone.
        teacher_logprobs: [..., K], 1 ≤ K ≤ V, of any of those dtypes: logarithms of the teacher's probabilities over
            its whole vocabulary, at the temperature that is meant. -inf is probability 0. What rounding puts above 0,
            or above 1 in sum (up to 1/32), counts as 0 and 1; a row that lies further above is NaN.
        teacher_ids: int64 [..., K], the ids of the vocabulary that these are of. A negative id is padding: its entry is
            not read. An id that occurs twice in a row counts twice.
        kind: see above.
        beta: of ``"jsd"``, in (0, 1): what weighs the teacher.
        scaled: divide ``"jsd"`` by β (1 - β), for a loss that tends to the KL divergences of both ends.
        tail: see above.
        temperature: τ > 0, the student's.
        labels: int64 [...], of which only ``labels == ignore_index`` matters: those rows are not read, and count for
            nothing. None: all rows count.
        mask: bool, broadcasting to [...], instead of labels: the rows that count.
        weight: [...], a factor of each row's loss, such as an importance ratio; no gradient flows to it.
        num_items: a number > 0 or a 0-dimensional tensor: divides instead of the number of rows that count, and under
            the other reductions too.
        reduction: ``"batchmean"``: the sum over the rows that count, divided by their number (at least 1); ``"sum"``;
            ``"mean"``: ``"batchmean"`` divided by V; or ``"none"``: [...].
        ignore_index: see `labels`.
        return_masses: also return Q_S and P_S as one tensor [2, ...], without gradient.
        vocab_group: a ``torch.distributed`` process group whose ranks have equal slices of the vocabulary, in their
            order: `student_logits` is a rank's slice; ids are of the whole vocabulary, and the same on all ranks.

    Returns:
        The loss, float32 (float64 if an input is), or ``(loss, masses)``. Once differentiable. Rows without any entry
        count, with loss 0. Where only one of the two has probability 0, a KL divergence is as infinite as it is.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
        RuntimeError: on a CPU, for an id ≥ V. On a GPU, where nobody looks, and over a divided vocabulary it makes its
            row NaN.

    Example::

        >>> import torch, fastgen
        >>> student, teacher = torch.randn(2, 5, 100), torch.randn(2, 5, 100)
        >>> logprobs, ids = teacher.log_softmax(-1).topk(8)
        >>> loss = fastgen.sparse_divergence_loss(student.requires_grad_(), logprobs, ids)
        >>> loss.backward()
        >>> bool(loss <= fastgen.generalized_jsd_loss(student, teacher, beta=0.0))
        True
    """
    checks.logits(student_logits=student_logits)
    layout = layout_of(vocab_group, student_logits=student_logits)
    divided = None if layout is None else layout.slices
    vocabulary = student_logits.shape[-1] if divided is None else divided.total
    check_plain(student_logits, teacher_logprobs=teacher_logprobs, teacher_ids=teacher_ids)
    check_teacher(student_logits, teacher_logprobs, teacher_ids, vocabulary)
    check_rows(student_logits, labels, mask, weight, reduction, num_items, ignore_index)
    check_kind(kind, beta, scaled, tail, temperature)
    beta, temperature = float(beta), float(temperature)
    backend = dispatch.backend_for("sparse_divergence", student_logits.device.type)
    if backend == "reference":
        return whole_call(
            layout,
            reference.sparse_divergence_loss,
            {"student_logits": student_logits},
            -1,
            teacher_logprobs=teacher_logprobs,
            teacher_ids=teacher_ids,
            kind=kind,
            beta=beta,
            scaled=scaled,
            tail=tail,
            temperature=temperature,
            labels=labels,
            mask=mask,
            weight=weight,
            num_items=num_items,
            reduction=reduction,
            ignore_index=ignore_index,
            return_masses=return_masses,
        )
    beta = beta_of(kind, beta)
    if layout is not None:
        labels, mask, weight = spread_rows(layout, student_logits, labels, mask, weight)
    labels = labels_of(student_logits, labels, mask, ignore_index)
    dtype = arithmetic_dtype(student_logits, teacher_logprobs)
    scale = scale_of(student_logits, dtype, labels, reduction, num_items, ignore_index, vocabulary, beta, scaled)
    rows: dict[str, Any] = {
        "teacher_logprobs": teacher_logprobs.detach(),
        "teacher_ids": teacher_ids,
        "labels": labels,
        "weight": None if weight is None else weight.detach(),
    }
    options: dict[str, Any] = {"beta": beta, "tail": tail, "temperature": temperature, "ignore_index": ignore_index}
    if layout is None:
        loss, masses = operators.sparse_divergence(
            backend,
            student=student_logits,
            normals=None,
            scale=scale,
            reduction="none" if reduction == "none" else "sum",
            **rows,
            **options,
        )
    else:
        student = {"student": student_logits}
        loss, masses = parallel.of_rows(operators.sparse_divergence, backend, layout, student, rows, **options)
        loss = reduced(loss, labels, None, scale, reduction, ignore_index)
    return (loss, masses) if return_masses else loss


def check_teacher(rows: Tensor, logprobs: Tensor, ids: Tensor, vocabulary: int) -> None:
    """A teacher's entries, [..., K], for `rows` [..., N]."""
    checks.floating("teacher_logprobs", logprobs)
    checks.tensor("teacher_ids", ids)
    if ids.dtype != torch.int64:
        raise TypeError(f"teacher_ids must be int64, got {ids.dtype}")
    for name, value in (("teacher_logprobs", logprobs), ("teacher_ids", ids)):
        if value.dim() != rows.dim() or value.shape[:-1] != rows.shape[:-1]:
            raise ValueError(f"{name} must have shape {[*rows.shape[:-1], 'K']}, got {list(value.shape)}")
        if value.device != rows.device:
            raise ValueError(f"{name} is on {value.device}, but the batch is on {rows.device}")
    if not 0 < logprobs.shape[-1] <= vocabulary:
        raise ValueError(f"teacher_logprobs must have 1 to {vocabulary} entries a row, got {logprobs.shape[-1]}")
    if ids.shape != logprobs.shape:
        raise ValueError(
            f"teacher_ids has {ids.shape[-1]} entries a row, but teacher_logprobs has {logprobs.shape[-1]}"
        )


def check_kind(kind: str, beta: float, scaled: bool, tail: str, temperature: float) -> None:
    checks.choice("kind", kind, KINDS)
    checks.choice("tail", tail, TAILS)
    check_divergence(beta, scaled, temperature)
    if kind == "jsd" and not 0 < beta < 1:
        raise ValueError(f"beta must be in (0, 1) for kind='jsd', got {beta}: the ends are 'forward' and 'reverse'")


def beta_of(kind: str, beta: float) -> float:
    """The beta that stands for a kind in operators."""
    return {"forward": 0.0, "reverse": 1.0}.get(kind, beta)
