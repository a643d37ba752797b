"""ELBO errors and the losses over their differences, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.distributed import batch_mean, group_counts
from ..schedule.reference import widened

__all__ = ["ddo_loss", "diffusion_dpo_loss", "diffusion_kto_loss", "elbo_difference", "elbo_error", "mapo_loss"]


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
    alpha: float | Tensor = 1.0,
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
    alpha = alpha.detach().to(delta.dtype) if isinstance(alpha, Tensor) else alpha
    term = torch.where(is_real, softplus(-beta * delta), alpha * softplus(beta * delta))
    if reduction == "mean":
        n_real, n_fake = group_counts(is_real, group)
        term = term / torch.where(is_real, n_real, n_fake).to(term.dtype)
    loss = term if reduction == "none" else term.sum()
    return (loss, delta.detach()) if return_delta else loss


def _of_difference(element_reduction: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function of ELBO differences a loss of predictions, reduced by default as said.

    The function returns the terms, and what `return_delta` shows where that is not the differences themselves.
    """
    default = element_reduction

    def decorated(terms: Callable[..., Any]) -> Callable[..., Any]:
        def loss(
            pred: Tensor,
            ref_pred: Tensor,
            target: Tensor,
            *own: Any,
            weight: Tensor | None = None,
            element_reduction: str = default,
            reduction: str = "mean",
            return_delta: bool = False,
            **options: Any,
        ) -> Tensor | tuple[Tensor, Tensor]:
            delta = elbo_difference(pred, ref_pred, target, weight=weight, element_reduction=element_reduction)
            result = terms(delta, *own, **options)
            term, shown = result if isinstance(result, tuple) else (result, delta)
            value = _total(term, reduction)
            return (value, shown.detach()) if return_delta else value

        loss.__name__, loss.__doc__ = terms.__name__, terms.__doc__
        return loss

    return decorated


@_of_difference("mean")
def diffusion_dpo_loss(
    delta: Tensor, *, beta: float = 5000.0, kind: str = "sigmoid", interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """``-log sigmoid(beta (delta_w - delta_l) / 2)`` over pairs of winners (first half) and losers (second half)."""
    winner, loser = delta.view(-1, 2).unbind(1) if interleaved else delta.view(2, -1)
    margin = winner - loser
    if kind == "sigmoid":
        return softplus(-0.5 * beta * margin), margin
    if kind == "ipo":
        return (margin - 1 / (2 * beta)).square(), margin
    return F.relu(1 - beta * margin), margin


@_of_difference("mean")
def diffusion_kto_loss(
    delta: Tensor,
    is_desirable: Tensor,
    *,
    beta: float = 1000.0,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    baseline: float | Tensor | None = None,
    group: Any = None,
) -> Tensor:
    """``w (1 - sigmoid(±beta (delta - z)))``; z is `baseline`, or the batch's mean delta where that is positive."""
    z = batch_mean(delta.detach(), group).clamp(min=0) if baseline is None else baseline
    x = beta * (delta - z)
    return torch.where(is_desirable, desirable_weight * torch.sigmoid(-x), undesirable_weight * torch.sigmoid(x))


def mapo_loss(
    pred: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    beta: float = 0.1,
    scale: float = 0.5,
    timesteps: int = 1000,
    element_reduction: str = "mean",
    reduction: str = "mean",
) -> Tensor:
    """``error_w - beta log sigmoid(T (f(s error_w) - f(s error_l)))`` over pairs, with ``f(x) = x / expm1(x)``."""
    error = elbo_error(pred, target, weight=weight, element_reduction=element_reduction)
    winner, loser = error.chunk(2) if len(error) else (error, error)
    log_odds = timesteps * (odds(scale * winner) - odds(scale * loser))
    return _total(winner + beta * softplus(-log_odds), reduction)


# Of x / expm1(x): the Bernoulli numbers B_2k / (2k)!.
ODDS_SERIES = (1 / 12, -1 / 720, 1 / 30240, -1 / 1209600, 1 / 47900160, -691 / 1307674368000)


def odds(x: Tensor) -> Tensor:
    """``x / expm1(x) - 1``; near 0 by its series, as the quotient cancels there and so does its derivative."""
    near = x.abs() < 0.3
    small, large = torch.where(near, x, 0), torch.where(near, 1, x)
    series, square = torch.zeros_like(x), small * small
    for coefficient in reversed(ODDS_SERIES):
        series = (series + coefficient) * square
    size = large.abs()  # expm1(x) overflows; and f(-x) = f(x) + x
    quotient = size * torch.exp(-size) / -torch.expm1(-size) + F.relu(-large)
    return torch.where(near, series - small / 2, quotient - 1)


def softplus(x: Tensor) -> Tensor:
    # F.softplus turns linear above a threshold, which costs digits in float64; log(1 + exp(x)) overflows.
    return -F.logsigmoid(-x)


def _rows(t: Tensor) -> Tensor:
    return widened(t).unsqueeze(-1).flatten(1)  # [B, D], also where t is [B]


def _reduced(penalty: Tensor, element_reduction: str) -> Tensor:
    return penalty.mean(1) if element_reduction == "mean" else penalty.sum(1)


def _total(term: Tensor, reduction: str) -> Tensor:
    """The terms, their sum or their mean; of none, 0."""
    if reduction == "none":
        return term
    return term.sum() if reduction == "sum" or len(term) == 0 else term.mean()


def _weighted(rows: Tensor, weight: Tensor | None) -> Tensor:
    return rows if weight is None else weight.detach().to(rows.dtype) * rows
