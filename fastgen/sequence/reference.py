"""Losses over the logits of token sequences, in plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.distributed import group_counts
from ..elbo.reference import softplus
from ..schedule.reference import widened

__all__ = [
    "generalized_jsd_loss",
    "linear_generalized_jsd_loss",
    "linear_sparse_divergence_loss",
    "linear_token_logprob",
    "sequence_ddo_loss",
    "sparse_divergence_loss",
    "token_logprob",
]

IGNORE_INDEX = -100
ROUNDED_MASS = 1 / 32  # what rounding to 16 bits may put a log-probability above 0, or a sum of probabilities above 1


def token_logprob(
    logits: Tensor,
    tokens: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    return_entropy: bool = False,
) -> Any:
    """``log softmax(logits / temperature)`` at the tokens."""
    tokens = masked(tokens, mask, ignore_index)
    logprob = picked_logprob(logits, tokens, temperature, ignore_index)
    return (logprob, entropy(logits, tokens != ignore_index, temperature)) if return_entropy else logprob


def picked_logprob(logits: Tensor, tokens: Tensor, temperature: float, ignore_index: int) -> Tensor:
    """``log softmax(logits / temperature)`` at the tokens; 0 where they are ignored."""
    logprobs = log_softmax(logits, temperature)
    inside = (tokens >= 0) & (tokens < logits.shape[-1])
    picked = logprobs.gather(-1, torch.where(inside, tokens, 0).unsqueeze(-1)).squeeze(-1)
    picked = torch.where(inside, picked, math.nan)
    return torch.where(tokens != ignore_index, picked, 0.0)


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
    reduction: str = "mean",
    return_delta: bool = False,
    group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """DDO with ``delta_i = Σ_t mask (log p(token) - log p_ref(token))``."""
    tokens = masked(tokens, mask, IGNORE_INDEX)
    model, ref = (picked_logprob(t, tokens, 1.0, IGNORE_INDEX) for t in (logits, ref_logits.detach()))
    difference = model - ref
    delta = difference.flatten(1).sum(1)
    term = torch.where(is_real, softplus(-beta * delta), alpha * softplus(beta * delta))
    if normalize:
        term = term / max(alpha, 1.0)
    if reduction == "mean":
        n_real, n_fake = group_counts(is_real, group)
        term = term / torch.where(is_real, n_real, n_fake).to(term.dtype)
    loss = term if reduction == "none" else term.sum()
    return (loss, delta.detach()) if return_delta else loss


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
    reduction: str = "batchmean",
    num_items: float | Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    return_entropy: bool = False,
    cross_entropy_weight: float = 0.0,
    return_cross_entropy: bool = False,
) -> Any:
    """``beta KL(P‖M) + (1 - beta) KL(Q‖M)``, ``M = beta P + (1 - beta) Q``; KL(P‖Q) at beta = 0, KL(Q‖P) at 1."""
    vocabulary = min(student_logits.shape[-1], teacher_logits.shape[-1])
    log_q, log_p = (log_softmax(t[..., :vocabulary], temperature) for t in (student_logits, teacher_logits.detach()))
    rows = _divergence(log_q, log_p, beta, scaled)
    counted, others = _counted(rows, labels, mask, ignore_index), []
    if return_entropy:
        others.append(entropy(student_logits, counted, temperature))
    if cross_entropy_weight != 0:
        assert labels is not None
        hard = -picked_logprob(student_logits, labels, 1.0, ignore_index)
        rows = rows + cross_entropy_weight * hard
        if return_cross_entropy:
            others.append(hard.detach())
    loss = _reduced(rows, counted, weight, num_items, reduction, vocabulary)
    return (loss, *others) if others else loss


def _divergence(log_q: Tensor, log_p: Tensor, beta: float, scaled: bool) -> Tensor:
    """Of each row; `scaled`: a mixture's is divided by beta (1 - beta)."""
    if beta == 0:
        return kl_divergence(log_p, log_q)
    if beta == 1:
        return kl_divergence(log_q, log_p)
    # Finite, so that the gradient of logaddexp is one where both are -inf.
    q, p = (t.clamp(min=-1e30) for t in (log_q, log_p))
    log_m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
    rows = beta * kl_divergence(log_p, log_m) + (1 - beta) * kl_divergence(log_q, log_m)
    return rows / (beta * (1 - beta)) if scaled else rows


def _counted(rows: Tensor, labels: Tensor | None, mask: Tensor | None, ignore_index: int) -> Tensor | None:
    """Which rows count; None: all."""
    if mask is not None:
        return mask.expand(rows.shape)
    return None if labels is None else labels != ignore_index


def _reduced(
    rows: Tensor,
    counted: Tensor | None,
    weight: Tensor | None,
    num_items: float | Tensor | None,
    reduction: str,
    vocabulary: int,
) -> Tensor:
    if weight is not None:  # that of a row that does not count may be anything
        rows = rows * (weight.detach() if counted is None else torch.where(counted, weight.detach(), 0))
    if counted is not None:
        rows = torch.where(counted, rows, 0.0)
    loss = rows if reduction == "none" else rows.sum()
    if num_items is not None or reduction in ("batchmean", "mean"):
        loss = loss / item_count(rows.numel(), counted, num_items)
    return loss / vocabulary if reduction == "mean" else loss


def sparse_divergence_loss(
    student_logits: Tensor,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    *,
    kind: str = "forward",
    beta: float = 0.5,
    scaled: bool = False,
    tail: str = "bucket",
    temperature: float = 1.0,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    num_items: float | Tensor | None = None,
    reduction: str = "batchmean",
    ignore_index: int = IGNORE_INDEX,
    return_masses: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The divergence of the student from a teacher's K entries, and a category of all other ids (``"bucket"``)."""
    vocabulary = student_logits.shape[-1]
    present = teacher_ids >= 0
    on_cpu = teacher_ids.device.type == "cpu"  # gather raises there
    inside = present if on_cpu else present & (teacher_ids < vocabulary)
    log_q = log_softmax(student_logits, temperature).gather(-1, torch.where(inside, teacher_ids, 0))
    log_p = widened(teacher_logprobs.detach()).to(torch.promote_types(log_q.dtype, widened(teacher_logprobs).dtype))
    log_p = torch.where(inside & (log_p <= ROUNDED_MASS), log_p.clamp(max=0), math.nan)
    log_q, log_p = (torch.where(present, t, -math.inf) for t in (log_q, log_p))
    mass_q, mass_p = log_q.exp().sum(-1), log_p.exp().sum(-1)
    mass_p = torch.where(mass_p <= 1 + ROUNDED_MASS, mass_p, math.nan)
    masses = torch.stack([mass_q.clamp(max=1), mass_p.clamp(max=1)])
    if tail == "bucket":
        most = 1 - torch.finfo(log_q.dtype).eps / 2
        log_q, log_p = (
            torch.cat([t, torch.log1p(-m.clamp(max=most)).unsqueeze(-1)], -1)
            for t, m in ((log_q, mass_q), (log_p, mass_p))
        )
    elif tail == "renormalize":
        # Not the masses' logarithms: probabilities of entries that all underflow have ratios.
        log_q, log_p = (t - t.logsumexp(-1, keepdim=True) for t in (log_q, log_p))
    rows = _divergence(log_q, log_p, {"forward": 0, "reverse": 1}.get(kind, beta), scaled)
    rows = torch.where(present.any(-1), rows * (1 + 0 * mass_p), 0.0)  # NaN, as its gradient, of what is no teacher
    counted = _counted(rows, labels, mask, ignore_index)
    if counted is not None:
        masses = torch.where(counted, masses, 0.0)
    loss = _reduced(rows, counted, weight, num_items, reduction, vocabulary)
    return (loss, masses.detach()) if return_masses else loss


def linear_token_logprob(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    num_valid: int | None = None,
    round_logits: bool = False,
    max_chunk_bytes: int = 0,
    **options: Any,
) -> Any:
    """`token_logprob` of ``hidden weightᵀ + bias``."""
    return token_logprob(
        transformed(linear_logits(hidden, weight, bias, round_logits), logit_scale, softcap), tokens, **options
    )


def linear_generalized_jsd_loss(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    token_weight: Tensor | None = None,
    num_valid: int | None = None,
    round_logits: bool = False,
    max_chunk_bytes: int = 0,
    **options: Any,
) -> Any:
    """`generalized_jsd_loss` of the logits ``hidden weightᵀ + bias``."""
    with torch.no_grad():
        teacher_logits = linear_logits(teacher_hidden, teacher_weight, teacher_bias, round_logits)
        teacher_logits = transformed(teacher_logits, teacher_logit_scale, teacher_softcap)
    student_logits = linear_logits(student_hidden, student_weight, student_bias, round_logits)
    student_logits = transformed(student_logits, logit_scale, softcap)
    return generalized_jsd_loss(student_logits, teacher_logits, labels, weight=token_weight, **options)


def linear_sparse_divergence_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_logprobs: Tensor,
    teacher_ids: Tensor,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    token_weight: Tensor | None = None,
    num_valid: int | None = None,
    round_logits: bool = False,
    max_chunk_bytes: int = 0,
    **options: Any,
) -> Tensor:
    """`sparse_divergence_loss` of the logits ``hidden weightᵀ + bias``."""
    logits = transformed(linear_logits(hidden, weight, bias, round_logits), logit_scale, softcap)
    loss = sparse_divergence_loss(logits, teacher_logprobs, teacher_ids, weight=token_weight, **options)
    assert isinstance(loss, Tensor)  # without masses
    return loss


def masked(tokens: Tensor, mask: Tensor | None, ignore_index: int) -> Tensor:
    """`tokens`, of which those that do not count are to be ignored."""
    return tokens if mask is None else torch.where(mask, tokens, ignore_index)


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, round_logits: bool) -> Tensor:
    """``hidden weightᵀ + bias`` in float32 (float64 for float64), or rounded to the operands' dtype."""
    operands = autocast_head(hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(*operands if round_logits else [None if t is None else widened(t) for t in operands])


def transformed(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """``softcap tanh(scale logits / softcap)``, or ``scale logits`` without a cap."""
    return scale * logits if softcap is None else softcap * torch.tanh(scale * logits / softcap)


def autocast_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """A linear layer's operands in the dtype that autocast gives them."""
    dtype = autocast_dtype(hidden)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def autocast_dtype(t: Tensor) -> torch.dtype:
    """What autocast, where it is on, makes of an operand of a matrix product. It takes no float64 along."""
    device = t.device.type
    on = torch.is_autocast_enabled(device) and t.dtype != torch.float64
    return torch.get_autocast_dtype(device) if on else t.dtype


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """``log softmax(logits / temperature)``, where the division rounds no constant that all logits share.

    By way of halves: the difference of two logits may be beyond all numbers where over the temperature it is not.
    """
    half = widened(logits) / 2
    largest = half.detach().amax(-1, keepdim=True)
    return F.log_softmax((half - torch.where(largest.isfinite(), largest, 0.0)) / temperature * 2, -1)


def entropy(logits: Tensor, counted: Tensor | None, temperature: float) -> Tensor:
    """Of softmax(logits / temperature), in nats, without gradient; 0 in rows that do not count."""
    logprobs = log_softmax(logits.detach(), temperature)
    found = -(logprobs.exp() * logprobs.clamp(min=-1e30)).sum(-1)
    return found if counted is None else torch.where(counted, found, 0.0)


def kl_divergence(log_a: Tensor, log_b: Tensor) -> Tensor:
    """``Σ a (log a - log b)`` over the last dimension, with 0 log 0 = 0."""
    a = log_a.exp()
    return (a * torch.where(a > 0, log_a - log_b, 0.0)).sum(-1)


def item_count(rows: int, counted: Tensor | None, num_items: float | Tensor | None) -> float | Tensor:
    """`num_items`, or how many of `rows` count; 1 instead of 0, where there is nothing to divide."""
    if isinstance(num_items, Tensor):
        return torch.where(num_items == 0, 1, num_items.detach())
    if num_items is not None:
        return num_items
    return max(rows, 1) if counted is None else counted.sum().clamp(min=1)
