"""Losses over the logits of token sequences: log-probabilities, DDO, and divergences for distillation."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor

from ..core import checks, dispatch, distributed
from ..triton_kernels.layout import arithmetic_dtype
from . import operators, reference
from .linear_losses import linear_generalized_jsd_loss, linear_sparse_divergence_loss, linear_token_logprob
from .operators import IGNORE_INDEX
from .options import Reduction, check_divergence, check_rows, labels_of, scale_of, weighted
from .sparse import sparse_divergence_loss

__all__ = [
    "generalized_jsd_loss",
    "linear_generalized_jsd_loss",
    "linear_sparse_divergence_loss",
    "linear_token_logprob",
    "sequence_ddo_loss",
    "sparse_divergence_loss",
    "token_logprob",
]

REDUCTIONS = ("mean", "sum", "none")


@overload
def token_logprob(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = ...,
    temperature: float = ...,
    ignore_index: int = ...,
    return_entropy: Literal[False] = ...,
) -> Tensor: ...
@overload
def token_logprob(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = ...,
    temperature: float = ...,
    ignore_index: int = ...,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def token_logprob(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The log-probability of each token: ``logit_token / τ - log Σ exp(logits / τ)``.

    What supervised fine-tuning, sequence-level distillation, policy gradients, DPO on tokens, CCA and DDO are made of.
    Each row is read once for the value and once for the gradient, and nothing of the size of `logits` exists besides
    that gradient; neither does a float32 copy of bfloat16 logits. What a layer of bfloat16 has rounded off its logits
    is lost, though: up to 0.016 nats where they spread with a standard deviation of 3, and more where they are larger.
    :func:`linear_token_logprob` takes the layer instead, and keeps float32 logits.

    Args:
        logits: [..., V] in float32, bfloat16, float16 or float64, before any softmax. -inf masks an entry of the
            vocabulary. The leading dimensions may have any strides: ``logits[:, :-1]`` is not copied. Gradients flow to
            it alone: ``grad (onehot - softmax) / τ``, contiguous.
        tokens: int64 [...], the index of each row's token.
        mask: bool, broadcasting to `tokens`: those that count; all, if None.
        temperature: τ > 0, which divides the logits: the one that the tokens were sampled with.
        ignore_index: rows with this token, and those that `mask` leaves out, are not read; their log-probability and
            gradient are 0.
        return_entropy: also return the entropy [...] in nats of each row's softmax(logits / τ), for logging: without
            gradient, 0 for tokens that do not count. It reads the logits twice more.

    Returns:
        [...], float32 (float64 for float64), or ``(logprob, entropy)``. It is computed in that precision, with the
        maximum split off: logits of ±10⁴ lose nothing. -inf where the token's logit is; NaN, with gradient 0, where a
        token is neither in [0, V) nor `ignore_index`; NaN with a NaN gradient in a row with NaN or +inf, or of -inf
        alone. Once differentiable.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> logits = torch.zeros(1, 3, 4, requires_grad=True)  # [B, T, V], uniform over 4 tokens
        >>> logprob = fastgen.token_logprob(logits, torch.tensor([[2, 0, -100]]))
        >>> print(logprob.exp()[0, :2].tolist(), logprob[0, 2].item())
        [0.25, 0.25] 0.0
        >>> loss = -logprob.sum() / 2  # the usual cross-entropy over two tokens
        >>> loss.backward()
    """
    checks.logits(logits=logits)
    checks.row_indices("tokens", tokens, logits)
    temperature = checks.number("temperature", temperature, low=0, open_low=True)
    ignore_index = checks.integer("ignore_index", ignore_index)
    if mask is not None:
        checks.mask("mask", mask, tokens)
        tokens = reference.masked(tokens, mask, ignore_index)
    backend = dispatch.backend_for("token_logprob", logits.device.type)
    if backend == "reference":
        return reference.token_logprob(
            logits, tokens, temperature=temperature, ignore_index=ignore_index, return_entropy=return_entropy
        )
    logprob = operators.token_logprob(
        backend, logits=logits, tokens=tokens, temperature=temperature, ignore_index=ignore_index
    )
    if not return_entropy:
        return logprob
    return logprob, operators.entropy(backend, logits, tokens, temperature, ignore_index)


@overload
def sequence_ddo_loss(
    logits: Tensor,
    ref_logits: Tensor,
    tokens: Tensor,
    is_real: Tensor,
    *,
    mask: Tensor | None = ...,
    alpha: float = ...,
    beta: float = ...,
    normalize: bool = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    return_delta: Literal[False] = ...,
    group: Any = ...,
) -> Tensor: ...
@overload
def sequence_ddo_loss(
    logits: Tensor,
    ref_logits: Tensor,
    tokens: Tensor,
    is_real: Tensor,
    *,
    mask: Tensor | None = ...,
    alpha: float = ...,
    beta: float = ...,
    normalize: bool = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    return_delta: Literal[True],
    group: Any = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def sequence_ddo_loss(
    logits: Tensor,
    ref_logits: Tensor,
    tokens: Tensor,
    is_real: Tensor,
    *,
    mask: Tensor | None = ...,
    alpha: float = ...,
    beta: float = ...,
    normalize: bool = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    return_delta: bool,
    group: Any = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def sequence_ddo_loss(
    logits: Tensor,
    ref_logits: Tensor,
    tokens: Tensor,
    is_real: Tensor,
    *,
    mask: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.05,
    normalize: bool = False,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_delta: bool = False,
    group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Direct Discriminative Optimization (arXiv 2503.01103) of an autoregressive model, such as VAR.

    .. math:: L = mean_{real} softplus(-βΔ) + α · mean_{fake} softplus(βΔ), Δ_i = Σ_t log p(y_{it}) / p_{ref}(y_{it})

    over the tokens y. The likelihood is exact, where :func:`fastgen.ddo_loss` bounds it. The same loss is CCA (arXiv
    2410.09347) where "real" are images with their own label, "fake" the same images with another one, and rows whose
    label was dropped, or is the right one by chance, count as real.

    Logits that a layer of bfloat16 has rounded are off by up to 0.016 nats a token where they spread with a standard
    deviation of 3, and Δ adds that up; take them from a float32 layer, or Δ from :func:`linear_token_logprob`.

    Args:
        logits: [B, T, V], the model's, in float32, bfloat16, float16 or float64; the leading dimensions may have any
            strides (``logits[:, :-1]`` is not copied). Gradients flow to it alone.
        ref_logits: [B, T, V], the frozen reference's, of any of those dtypes.
        tokens: int64 [B, T]: data, or samples of the reference. Tokens of -100 do not count.
        is_real: bool [B], True for data, False for samples of the reference.
        mask: bool [B, T]: the tokens that count; all, if None. Rows of the others are not read.
        alpha: weight of the fakes, ≥ 0.
        beta: inverse temperature, > 0. Δ sums over tokens: the longer the sequences, the smaller.
        normalize: divide the loss by max(α, 1), as the authors' code does for VAR.
        reduction: ``"mean"``: each group's own mean, an absent group contributing 0; ``"sum"``; or ``"none"``: the
            terms [B], with α applied to the fakes.
        return_delta: also return Δ [B], detached, for logging.
        group: a ``torch.distributed`` process group over which the two means are taken, as in
            :func:`fastgen.ddo_loss`.

    Returns:
        The loss, float32 (float64 if an input is), or ``(loss, delta)``; ``(1 + α) ln 2`` where both models agree. Once
        differentiable. B = 0 gives 0. A token outside the vocabulary makes its sequence's term NaN.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> logits, tokens = torch.randn(4, 10, 32), torch.randint(32, (4, 10))
        >>> is_real = torch.tensor([True, True, False, False])
        >>> loss = fastgen.sequence_ddo_loss(logits.clone().requires_grad_(), logits, tokens, is_real, alpha=2.0)
        >>> loss.backward()
        >>> print(f"{loss:.4f}")
        2.0794
    """
    checks.logits(logits=logits, ref_logits=ref_logits)
    if logits.dim() != 3:
        raise ValueError(f"logits must have shape [B, T, V], got {list(logits.shape)}")
    if ref_logits.shape[-1] != logits.shape[-1]:
        raise ValueError(f"ref_logits has {ref_logits.shape[-1]} columns, but logits has {logits.shape[-1]}")
    checks.row_indices("tokens", tokens, logits)
    checks.flags("is_real", is_real, logits.shape[0], logits)
    if mask is not None:
        checks.mask("mask", mask, tokens)
    alpha = checks.number("alpha", alpha, low=0)
    beta = checks.number("beta", beta, low=0, open_low=True)
    checks.choice("reduction", reduction, REDUCTIONS)
    backend = dispatch.backend_for("sequence_ddo_loss", logits.device.type)
    if backend == "reference":
        return reference.sequence_ddo_loss(
            logits,
            ref_logits,
            tokens,
            is_real,
            mask=mask,
            alpha=alpha,
            beta=beta,
            normalize=normalize,
            reduction=reduction,
            return_delta=return_delta,
            group=group,
        )
    tokens = reference.masked(tokens, mask, IGNORE_INDEX)
    counts = distributed.loss_counts(is_real, group) if reduction == "mean" else None
    scale = 1 / max(alpha, 1.0) if normalize else 1.0
    options: dict[str, Any] = {"tokens": tokens, "temperature": 1.0, "ignore_index": IGNORE_INDEX}
    loss, delta = operators.sequence_ddo_loss(
        backend,
        logprob=operators.token_logprob(backend, logits=logits, **options),
        ref_logprob=operators.token_logprob(backend, logits=ref_logits.detach(), **options),
        is_real=is_real,
        counts=counts,
        alpha=alpha,
        beta=beta,
        scale=scale,
        reduction=reduction,
    )
    return (loss, delta) if return_delta else loss


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
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...
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
) -> Tensor | tuple[Tensor, Tensor]:
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

    Returns:
        The loss, float32 (float64 if an input is), or ``(loss, entropy)``. Once differentiable. No rows, or none valid,
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
    beta, temperature = float(beta), float(temperature)
    backend = dispatch.backend_for("generalized_jsd", student_logits.device.type)
    if backend == "reference":
        return reference.generalized_jsd_loss(
            student_logits,
            teacher_logits,
            labels,
            mask=mask,
            weight=weight,
            beta=beta,
            scaled=scaled,
            temperature=temperature,
            reduction=reduction,
            num_items=num_items,
            ignore_index=ignore_index,
            return_entropy=return_entropy,
        )
    labels = labels_of(student_logits, labels, mask, ignore_index)
    vocabulary = min(student_logits.shape[-1], teacher_logits.shape[-1])
    dtype = arithmetic_dtype(student_logits, teacher_logits)
    scale = scale_of(student_logits, dtype, labels, reduction, num_items, ignore_index, vocabulary, beta, scaled)
    loss = operators.generalized_jsd(
        backend,
        student=student_logits,
        teacher=teacher_logits,
        labels=labels,
        scale=scale,
        beta=beta,
        temperature=temperature,
        ignore_index=ignore_index,
        reduction="none" if reduction == "none" or weight is not None else "sum",
    )
    loss = loss if weight is None else weighted(loss, labels, weight, reduction, ignore_index)
    if not return_entropy:
        return loss
    return loss, operators.entropy(backend, student_logits, labels, temperature, ignore_index)
