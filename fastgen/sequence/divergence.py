"""The divergences of distillation, over logits of the whole vocabulary."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor

from ..core import checks, dispatch
from ..triton_kernels.layout import arithmetic_dtype
from . import operators, parallel, reference
from .layout import layout_of, whole_call
from .operators import IGNORE_INDEX
from .options import (
    Reduction,
    check_cross_entropy,
    check_divergence,
    check_rows,
    labels_of,
    reduced,
    scale_of,
    spread_rows,
    unscaled,
)
from .tokens import logprob_of


@overload
def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = ...,
    *,
    mask: Tensor | None = ...,
    weight: Tensor | None = ...,
    beta: float = ...,
    scaled: bool = ...,
    temperature: float = ...,
    reduction: Reduction = ...,
    num_items: float | Tensor | None = ...,
    ignore_index: int = ...,
    return_entropy: Literal[False] = ...,
    cross_entropy_weight: float = ...,
    return_cross_entropy: Literal[False] = ...,
    vocab_group: Any = ...,
) -> Tensor: ...
@overload
def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = ...,
    *,
    mask: Tensor | None = ...,
    weight: Tensor | None = ...,
    beta: float = ...,
    scaled: bool = ...,
    temperature: float = ...,
    reduction: Reduction = ...,
    num_items: float | Tensor | None = ...,
    ignore_index: int = ...,
    return_entropy: bool = ...,
    cross_entropy_weight: float = ...,
    return_cross_entropy: bool = ...,
    vocab_group: Any = ...,
) -> Any: ...
def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    beta: float = 0.5,
    scaled: bool = False,
    temperature: float = 1.0,
    reduction: Reduction = "batchmean",
    num_items: float | Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    return_entropy: bool = False,
    cross_entropy_weight: float = 0.0,
    return_cross_entropy: bool = False,
    vocab_group: Any = None,
) -> Tensor | tuple[Tensor, ...]:
    """The divergences of knowledge distillation and GKD (arXiv 2306.13649) between a teacher P and a student Q.

    With P and Q the softmax of ``logits / τ`` and M = β P + (1 - β) Q, for each token::

        0 < beta < 1   beta KL(P‖M) + (1 - beta) KL(Q‖M)     generalized Jensen-Shannon
        beta = 0       KL(P‖Q)      forward KL: supervised distillation; covers the teacher's modes
        beta = 1       KL(Q‖P)      reverse KL; seeks them

    The convention is TRL's (``GKDTrainer``) and Liger-Kernel's: beta weighs the teacher, and the two ends are KL
    divergences themselves. They are *not* the limits: between them the loss tends to 0, like β KL(P‖Q) as β → 0, so
    that beta = 0.01 is a hundredth of beta = 0, about. Nothing is multiplied by τ².

    Both rows are read from memory once, for value and gradient together. Besides the inputs there is no tensor of their
    size but the gradient; neither do float32 copies of bfloat16 logits, log-probabilities or the mixture exist. Terms
    are computed from log P - log Q directly, so that a student close to its teacher gets an accurate gradient, as far
    as the logits are accurate: where bfloat16 layers have rounded them, it is off by 2 % far from the teacher, by 30 %
    where the two models differ by 2 %, and by 66 % at 1 %. :func:`linear_generalized_jsd_loss` takes the layers
    instead, and keeps float32 logits.

    Logits may be divided among ranks: DTensors whose rows and vocabulary are sharded as you like, evenly or not (what
    ``parallelize_module`` leaves with ``output_layouts=Shard(-1)``), beside which `labels`, `mask` and `weight` are
    DTensors that are sharded as the rows are, or plain tensors where these are whole; or plain slices of a
    `vocab_group`. Ranks exchange a few numbers a row, never logits. Every rank has the whole loss, the same to the bit,
    and the gradient of its slice: under a `vocab_group` do not multiply or divide by its size.

    Args:
        student_logits: [..., V] (such as [B, T, V]) in float32, bfloat16, float16 or float64, before any softmax. The
            leading dimensions may have any strides: ``logits[:, :-1]`` is not copied. Gradients flow to it alone.
        teacher_logits: [..., V'], of any of those dtypes. Where V' ≠ V (output layers padded to different sizes), the
            columns that only one of the two has are masked: they have probability 0 and gradient 0.
        labels: int64 [...], of which only ``labels == ignore_index`` matters: those rows are not read, and count for
            nothing. None: all rows count. Logits at position t belong to the label at t: shift them as for a
            cross-entropy.
        mask: bool, broadcasting to [...], instead of labels: the rows that count.
        weight: [...], a factor of each row's loss, such as an importance ratio; no gradient flows to it. Where it is
            given, the backward pass makes the gradient, and reads both rows again.
        beta: in [0, 1].
        scaled: divide by β (1 - β) where 0 < β < 1, for a loss that tends to the KL divergences of both ends: four
            times the Jensen-Shannon divergence at β = ½.
        temperature: τ > 0.
        reduction: ``"batchmean"``: the sum over the valid tokens, divided by their number (at least 1); ``"sum"``;
            ``"mean"``: ``"batchmean"`` divided by the size of the vocabulary, as in ``torch.nn.functional.kl_div``; or
            ``"none"``: the loss of each token [...]. (Without labels, releases of TRL divide ``"batchmean"`` by B·T or
            by B.)
        num_items: divides instead of the number of valid tokens, and under the other reductions too: a number > 0, or a
            0-dimensional tensor, such as Transformers' ``num_items_in_batch``. With the number of valid tokens of all
            micro-batches of an optimizer step, accumulated gradients equal those of one large batch.
        ignore_index: see `labels`.
        return_entropy: also return the entropy [...] in nats of the student's softmax(logits / τ), for logging: without
            gradient, 0 for rows that do not count. It reads the student's logits twice more.
        cross_entropy_weight: ≥ 0: adds this times the cross-entropy of the student and the labels, which must then be
            tokens, at temperature 1, to each token's loss: Hinton's hard targets. Where τ = 1 too, and the vocabulary
            is not divided, that takes no pass over the logits of its own.
        return_cross_entropy: also return that cross-entropy [...], not times its weight, for logging: without gradient,
            0 for rows that do not count.
        vocab_group: a ``torch.distributed`` process group whose ranks have equal slices of the vocabulary, in their
            order, and the same rows: both logits are a rank's slices, of the same columns.

    Returns:
        The loss, float32 (float64 if an input is), or a tuple of it and what else is asked for: ``(loss, entropy,
        cross_entropy)``. Once differentiable. No rows, or none valid,
        give 0 and gradients 0.
        Masked entries (-inf) count as probability 0, and 0 log 0 = 0; where the student has probability and the teacher
        none, reverse KL is inf and its gradient not finite, as is forward KL's value the other way round: mask both, or
        take beta between.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> student = torch.zeros(1, 2, 4, requires_grad=True)
        >>> teacher = torch.tensor([[[2.0, 0.0, 0.0, 0.0], [9.0, 9.0, 9.0, 9.0]]])
        >>> loss = fastgen.generalized_jsd_loss(student, teacher, torch.tensor([[3, -100]]), beta=0.0)
        >>> loss.backward()
        >>> print(f"{loss:.4f}")
        0.4680
        >>> torch.allclose(student.grad[0], torch.stack([0.25 - teacher[0, 0].softmax(0), torch.zeros(4)]))
        True
    """
    checks.logits(student_logits=student_logits, teacher_logits=teacher_logits)
    check_rows(student_logits, labels, mask, weight, reduction, num_items, ignore_index)
    check_divergence(beta, scaled, temperature)
    cross_entropy_weight = check_cross_entropy(labels, cross_entropy_weight, return_cross_entropy)
    beta, temperature = float(beta), float(temperature)
    layout = layout_of(vocab_group, student_logits=student_logits, teacher_logits=teacher_logits)
    backend = dispatch.backend_for("generalized_jsd", student_logits.device.type)
    if backend == "reference":
        return whole_call(
            layout,
            reference.generalized_jsd_loss,
            {"student_logits": student_logits, "teacher_logits": teacher_logits},
            -1,
            labels=labels,
            mask=mask,
            weight=weight,
            beta=beta,
            scaled=scaled,
            temperature=temperature,
            reduction=reduction,
            num_items=num_items,
            ignore_index=ignore_index,
            return_entropy=return_entropy,
            cross_entropy_weight=cross_entropy_weight,
            return_cross_entropy=return_cross_entropy,
        )
    vocabulary = min(student_logits.shape[-1], teacher_logits.shape[-1])
    if layout is not None:
        labels, mask, weight = spread_rows(layout, student_logits, labels, mask, weight)
        vocabulary = vocabulary if layout.slices is None else layout.slices.total
    labels = labels_of(student_logits, labels, mask, ignore_index)
    dtype = arithmetic_dtype(student_logits, teacher_logits)
    scale = scale_of(student_logits, dtype, labels, reduction, num_items, ignore_index, vocabulary, beta, scaled)
    # What the sum is multiplied by because of `scaled` is the divergence's alone.
    hard_weight, divided = cross_entropy_weight * unscaled(beta, scaled), layout is not None
    sizes = student_logits.shape[-1], teacher_logits.shape[-1]
    apart = hard_weight > 0 and not operators.has_cross_entropy(temperature, *sizes, divided)
    options: dict[str, Any] = {"beta": beta, "temperature": temperature, "ignore_index": ignore_index}
    options["cross_entropy_weight"] = 0.0 if apart else hard_weight
    if layout is not None:
        logits = {"student": student_logits, "teacher": teacher_logits.detach()}
        rows = parallel.of_rows(operators.generalized_jsd, backend, layout, logits, {"labels": labels}, **options)
        loss = reduced(rows, labels, weight, scale, reduction, ignore_index)
    else:
        shows = return_cross_entropy and not apart
        found = (operators.jsd_and_cross_entropy if shows else operators.generalized_jsd)(
            backend,
            student=student_logits,
            teacher=teacher_logits,
            labels=labels,
            normals=None,
            scale=scale,
            reduction="none" if reduction == "none" or weight is not None else "sum",
            **options,
        )
        loss, hard = found if shows else (found, None)
        if weight is not None:
            loss = reduced(loss, labels, weight, None, reduction, ignore_index)
    if apart:
        assert labels is not None
        hard = -logprob_of(backend, layout, student_logits, labels, 1.0, ignore_index)
        loss = loss + reduced(hard_weight * hard, labels, weight, scale, reduction, ignore_index)
    others = []
    if return_entropy:
        of_entropy = student_logits, labels, temperature, ignore_index
        others.append(
            operators.entropy(backend, *of_entropy)
            if layout is None
            else parallel.entropy_of_rows(backend, layout, *of_entropy)
        )
    if return_cross_entropy:
        assert hard is not None
        others.append(hard.detach())
    return (loss, *others) if others else loss
