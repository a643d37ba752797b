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
    "linear_token_logprob",
    "sequence_ddo_loss",
    "token_logprob",
]

IGNORE_INDEX = -100


def token_logprob(
    logits: Tensor, tokens: Tensor, *, temperature: float = 1.0, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """``log softmax(logits / temperature)`` at the tokens."""
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
    if mask is not None:
        tokens = torch.where(mask, tokens, IGNORE_INDEX)
    difference = token_logprob(logits, tokens) - token_logprob(ref_logits.detach(), tokens)
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
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items: int | Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """``beta KL(P‖M) + (1 - beta) KL(Q‖M)``, ``M = beta P + (1 - beta) Q``; KL(P‖Q) at beta = 0, KL(Q‖P) at 1."""
    vocabulary = min(student_logits.shape[-1], teacher_logits.shape[-1])
    log_q, log_p = (log_softmax(t[..., :vocabulary], temperature) for t in (student_logits, teacher_logits.detach()))
    if beta == 0:
        rows = kl_divergence(log_p, log_q)
    elif beta == 1:
        rows = kl_divergence(log_q, log_p)
    else:
        # Finite, so that the gradient of logaddexp is one where both are -inf.
        q, p = (t.clamp(min=-1e30) for t in (log_q, log_p))
        log_m = torch.logaddexp(p + math.log(beta), q + math.log1p(-beta))
        rows = beta * kl_divergence(log_p, log_m) + (1 - beta) * kl_divergence(log_q, log_m)
    if labels is not None:
        rows = torch.where(labels != ignore_index, rows, 0.0)
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    return rows.sum() / item_count(rows, labels, num_items, ignore_index) / (vocabulary if reduction == "mean" else 1)


def linear_token_logprob(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
    round_logits: bool = False,
    max_chunk_bytes: int = 0,
) -> Tensor:
    """`token_logprob` of ``hidden weightᵀ + bias``."""
    logits = linear_logits(hidden, weight, bias, round_logits)
    return token_logprob(logits, tokens, temperature=temperature, ignore_index=ignore_index)


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
    reduction: str = "batchmean",
    num_items: int | Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    round_logits: bool = False,
    max_chunk_bytes: int = 0,
) -> Tensor:
    """`generalized_jsd_loss` of the logits ``hidden weightᵀ + bias``."""
    with torch.no_grad():
        teacher_logits = linear_logits(teacher_hidden, teacher_weight, teacher_bias, round_logits)
    return generalized_jsd_loss(
        linear_logits(student_hidden, student_weight, student_bias, round_logits),
        teacher_logits,
        labels,
        beta=beta,
        temperature=temperature,
        reduction=reduction,
        num_items=num_items,
        ignore_index=ignore_index,
    )


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, round_logits: bool) -> Tensor:
    """``hidden weightᵀ + bias`` in float32 (float64 for float64), or rounded to the operands' dtype."""
    operands = autocast_head(hidden, weight, bias)
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(*operands if round_logits else [None if t is None else widened(t) for t in operands])


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
    """``log softmax(logits / temperature)``, where the division rounds no constant that all logits share."""
    logits = widened(logits)
    largest = logits.detach().amax(-1, keepdim=True)
    return F.log_softmax((logits - torch.where(largest.isfinite(), largest, 0.0)) / temperature, -1)


def kl_divergence(log_a: Tensor, log_b: Tensor) -> Tensor:
    """``Σ a (log a - log b)`` over the last dimension, with 0 log 0 = 0."""
    a = log_a.exp()
    return (a * torch.where(a > 0, log_a - log_b, 0.0)).sum(-1)


def item_count(rows: Tensor, labels: Tensor | None, num_items: int | Tensor | None, ignore_index: int) -> int | Tensor:
    """`num_items`, or how many rows are not ignored; 1 instead of 0, where there is nothing to divide."""
    if isinstance(num_items, Tensor):
        return torch.where(num_items == 0, 1, num_items.detach())
    if num_items is not None:
        return num_items
    return max(rows.numel(), 1) if labels is None else (labels != ignore_index).sum().clamp(min=1)
