"""ELBO errors and the losses over their differences, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.distributed import group_counts
from ..schedule.reference import widened


def elbo_error(
    pred: Tensor, target: Tensor, *, weight: Tensor | None = None, loss: str = "l2", element_reduction: str = "mean"
) -> Tensor:
    """``w_i red_D penalty(pred - target)``, one number per row."""
    d = _rows(pred) - _rows(target.detach())
    penalty = {"l2": d.square, "l1": d.abs, "huber": lambda: F.huber_loss(d, torch.zeros_like(d), reduction="none")}[
        loss
    ]()
    return _weighted(_reduced(penalty, element_reduction), weight)


def elbo_difference(
    pred: Tensor, ref_pred: Tensor, target: Tensor, *, weight: Tensor | None = None, element_reduction: str = "sum"
) -> Tensor:
    """``delta_i = w_i red_D (q - p)(q + p - 2y)``, which is ``-w_i (|p - y|² - |q - y|²)`` without the cancellation."""
    p, q, y = (_rows(t) for t in (pred, ref_pred.detach(), target.detach()))
    return _weighted(_reduced((q - p) * ((q - y) + (p - y)), element_reduction), weight)


def ddo_loss(
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    is_real: Tensor,
    *,
    weight: Tensor | None = None,
    alpha: float = 1.0,
    beta: float = 0.05,
    mc_samples: int = 1,
    element_reduction: str = "sum",
    reduction: str = "mean",
    return_delta: bool = False,
    group: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``mean_real softplus(-beta delta) + alpha mean_fake softplus(beta delta)``."""
    delta = elbo_difference(pred, ref_pred, target, weight=weight, element_reduction=element_reduction)
    delta = delta.reshape(-1, mc_samples).mean(1)
    term = torch.where(is_real, softplus(-beta * delta), alpha * softplus(beta * delta))
    if reduction == "mean":
        n_real, n_fake = group_counts(is_real, group)
        term = term / torch.where(is_real, n_real, n_fake).to(term.dtype)
    loss = term if reduction == "none" else term.sum()
    return (loss, delta.detach()) if return_delta else loss


def diffusion_dpo_loss(
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    beta: float = 5000.0,
    kind: str = "sigmoid",
    element_reduction: str = "mean",
    reduction: str = "mean",
    return_delta: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``-log sigmoid(beta (delta_w - delta_l) / 2)`` over pairs of winners (first half) and losers (second half)."""
    delta = elbo_difference(pred, ref_pred, target, weight=weight, element_reduction=element_reduction)
    winner, loser = delta.chunk(2) if len(delta) else (delta, delta)
    margin = winner - loser
    if kind == "sigmoid":
        term = softplus(-0.5 * beta * margin)
    elif kind == "ipo":
        term = (margin - 1 / (2 * beta)).square()
    else:
        term = F.relu(1 - beta * margin)
    if reduction == "none":
        loss = term
    elif reduction == "sum" or len(term) == 0:
        loss = term.sum()
    else:
        loss = term.mean()
    return (loss, margin.detach()) if return_delta else loss


def softplus(x: Tensor) -> Tensor:
    # F.softplus turns linear above a threshold, which costs digits in float64; log(1 + exp(x)) overflows.
    return -F.logsigmoid(-x)


def _rows(t: Tensor) -> Tensor:
    return widened(t).unsqueeze(-1).flatten(1)  # [B, D], also where t is [B]


def _reduced(penalty: Tensor, element_reduction: str) -> Tensor:
    return penalty.mean(1) if element_reduction == "mean" else penalty.sum(1)


def _weighted(rows: Tensor, weight: Tensor | None) -> Tensor:
    return rows if weight is None else weight.detach().to(rows.dtype) * rows
