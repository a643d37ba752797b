"""Direct Discriminative Optimization of sequences of tokens."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor

from ..core import checks, distributed
from . import operators, reference
from .layout import Layout, layout_of, whole_call
from .operators import IGNORE_INDEX
from .options import check_plain
from .tokens import logprob_of, tokens_of

REDUCTIONS = ("mean", "sum", "none")


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
    vocab_group: Any = ...,
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
    vocab_group: Any = ...,
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
    vocab_group: Any = ...,
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
    vocab_group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Direct Discriminative Optimization (arXiv 2503.01103) of an autoregressive model, such as VAR.

    .. math:: L = mean_{real} softplus(-βΔ) + α · mean_{fake} softplus(βΔ), Δ_i = Σ_t log p(y_{it}) / p_{ref}(y_{it})

    over the tokens y. The likelihood is exact, where :func:`fastgen.ddo_loss` bounds it. The same loss is CCA (arXiv
    2410.09347) where "real" are images with their own label, "fake" the same images with another one, and rows whose
    label was dropped, or is the right one by chance, count as real.

    Where the model still is the reference, fakes drawn from it (at temperature 1, unguided) have no mean gradient, and
    the loss pulls by β / 2 of what NLL does: it starts with nothing to gain over a model that NLL cannot improve.

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
        vocab_group: a process group that divides the vocabulary of both models' logits, as in :func:`token_logprob`.
            They may be DTensors too, as there, whose sequences are whole.

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
    check_plain(logits, tokens=tokens, mask=mask, is_real=is_real)
    layout = layout_of(vocab_group, logits=logits, ref_logits=ref_logits)
    backend = distributed.backend_of("sequence_ddo_loss", logits)
    if backend == "reference":
        return whole_call(
            layout,
            reference.sequence_ddo_loss,
            {"logits": logits, "ref_logits": ref_logits},
            -1,
            tokens=tokens,
            is_real=is_real,
            mask=mask,
            alpha=alpha,
            beta=beta,
            normalize=normalize,
            reduction=reduction,
            return_delta=return_delta,
            group=group,
        )
    if layout is None:
        tokens = reference.masked(tokens, mask, IGNORE_INDEX)
        options: dict[str, Any] = {"tokens": tokens, "temperature": 1.0, "ignore_index": IGNORE_INDEX}
        logprob, ref_logprob = (
            operators.token_logprob(backend, logits=t, **options) for t in (logits, ref_logits.detach())
        )
    else:
        tokens = tokens_of(layout, tokens, mask, IGNORE_INDEX)
        logprob, ref_logprob = (
            logprob_of(backend, layout, t, tokens, 1.0, IGNORE_INDEX) for t in (logits, ref_logits.detach())
        )
        is_real = _sequences_of(layout, is_real)
    loss, delta = operators.sequence_ddo_loss(
        backend,
        logprob=logprob,
        ref_logprob=ref_logprob,
        is_real=is_real,
        counts=distributed.loss_counts(is_real, group) if reduction == "mean" else None,
        alpha=alpha,
        beta=beta,
        scale=1 / max(alpha, 1.0) if normalize else 1.0,
        reduction=reduction,
    )
    return (loss, delta) if return_delta else loss


def _sequences_of(layout: Layout, is_real: Tensor) -> Tensor:
    """What there is one of per sequence, beside divided logits [B, T, V]."""
    if any(p.is_shard() and p.dim != 0 for p in layout.placements):
        raise ValueError(
            "logits are sharded along their sequences, which the loss adds up: pass token log-probabilities, or"
            " logits.redistribute(...) with their rows sharded over the batch alone"
        )
    spread = layout.spread("is_real", is_real)
    assert spread is not None
    return spread
