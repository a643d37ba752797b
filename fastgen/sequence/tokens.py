"""The log-probabilities of tokens."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor

from ..core import checks, dispatch
from . import operators, parallel, reference
from .layout import Layout, layout_of, whole_call
from .operators import IGNORE_INDEX
from .options import check_plain, expanded


@overload
def token_logprob(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = ...,
    temperature: float = ...,
    ignore_index: int = ...,
    return_entropy: Literal[False] = ...,
    vocab_group: Any = ...,
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
    vocab_group: Any = ...,
) -> tuple[Tensor, Tensor]: ...
def token_logprob(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    return_entropy: bool = False,
    vocab_group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The log-probability of each token: ``logit_token / τ - log Σ exp(logits / τ)``.

    What supervised fine-tuning, sequence-level distillation, policy gradients, DPO on tokens, CCA and DDO are made of.
    Each row is read once for the value and once for the gradient, and nothing of the size of `logits` exists besides
    that gradient; neither does a float32 copy of bfloat16 logits. What a layer of bfloat16 has rounded off its logits
    is lost, though: up to 0.016 nats where they spread with a standard deviation of 3, and more where they are larger.
    :func:`linear_token_logprob` takes the layer instead, and keeps float32 logits.

    Logits may be divided among ranks: DTensors whose rows and vocabulary are sharded as you like, evenly or not (what
    ``parallelize_module`` leaves with ``output_layouts=Shard(-1)``), beside which `tokens` are DTensors that are
    sharded as the rows are, or plain tensors where these are whole; or plain slices of a `vocab_group`. Ranks exchange
    a few numbers a row, never logits. Every rank has the whole loss, the same to the bit, and the gradient of its
    slice: under a `vocab_group` do not multiply or divide by its size.

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
        vocab_group: a ``torch.distributed`` process group whose ranks have equal slices of the vocabulary, in their
            order: `logits` is a rank's slice; `tokens` are of the whole vocabulary, and the same on all ranks.

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
    check_plain(logits, tokens=tokens, mask=mask)
    layout = layout_of(vocab_group, logits=logits)
    backend = dispatch.backend_for("token_logprob", logits.device.type)
    if backend == "reference":
        return whole_call(
            layout,
            reference.token_logprob,
            {"logits": logits},
            -1,
            tokens=tokens,
            mask=mask,
            temperature=temperature,
            ignore_index=ignore_index,
            return_entropy=return_entropy,
        )
    if layout is None:
        tokens = reference.masked(tokens, mask, ignore_index)
        logprob = logprob_of(backend, None, logits, tokens, temperature, ignore_index)
        if not return_entropy:
            return logprob
        return logprob, operators.entropy(backend, logits, tokens, temperature, ignore_index)
    tokens = tokens_of(layout, tokens, mask, ignore_index)
    logprob = logprob_of(backend, layout, logits, tokens, temperature, ignore_index)
    if not return_entropy:
        return logprob
    return logprob, parallel.entropy_of_rows(backend, layout, logits, tokens, temperature, ignore_index)


def tokens_of(layout: Layout, tokens: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor:
    """The tokens beside divided logits, of which those that do not count are to be ignored."""
    spread = layout.spread("tokens", tokens)
    assert spread is not None
    mask = layout.spread("mask", expanded(mask, tokens.shape))
    return reference.masked(spread, mask, ignore_index)


def logprob_of(
    backend: str, layout: Layout | None, logits: Tensor, tokens: Tensor, temperature: float, ignore_index: int
) -> Tensor:
    options: dict[str, Any] = {"temperature": temperature, "ignore_index": ignore_index}
    if layout is None:
        found = operators.token_logprob(backend, logits=logits, tokens=tokens, **options)
    else:
        found = parallel.of_rows(
            operators.token_logprob, backend, layout, {"logits": logits}, {"tokens": tokens}, **options
        )
    assert isinstance(found, Tensor)
    return found
