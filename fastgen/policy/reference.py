"""Post-training by reward, in plain PyTorch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..schedule.reference import prediction_to_x0, widened

__all__ = ["NftStats", "diffusion_nft_loss", "optimality_probability"]


class NftStats(NamedTuple):
    """What :func:`fastgen.diffusion_nft_loss` saw of each sample: device tensors without a graph.

    `positive` and `negative` [B] are the branches' errors over their normalisers, ``mean (x0± - x0)² / n±``;
    `normalizer` [2, B] is n₊ and n₋; `kl` [B] is ``mean (pred - ref_pred)²``, 0 without a reference.

    Example::

        >>> import torch, fastgen
        >>> v, one = torch.ones(1, 4), torch.ones(1)
        >>> _, stats = fastgen.diffusion_nft_loss(
        ...     v, v, v, -v, one, alpha_t=0 * one, sigma_t=one, return_stats=True
        ... )
        >>> stats.positive, stats.kl
        (tensor([1.]), tensor([0.]))
    """

    positive: Tensor
    negative: Tensor
    normalizer: Tensor
    kl: Tensor


def optimality_probability(advantages: Tensor, *, clip: float = 5.0) -> Tensor:
    """``clamp(A / (2 clip) + 1/2, 0, 1)``."""
    return (advantages / (2 * clip) + 0.5).clamp(0, 1)


def diffusion_nft_loss(
    pred: Tensor,
    old_pred: Tensor,
    x_t: Tensor,
    x0: Tensor,
    r: Tensor,
    *,
    alpha_t: Tensor,
    sigma_t: Tensor,
    beta: float = 1.0,
    ref_pred: Tensor | None = None,
    kl_weight: float = 0.0,
    scale: float = 1.0,
    prediction_type: str = "flow_prediction",
    normalizer_min: float = 1e-5,
    reduction: str = "mean",
    return_stats: bool = False,
) -> Any:
    """``scale (r/beta mean (x0+ - x0)²/n+ + (1-r)/beta mean (x0- - x0)²/n-) + kl_weight mean (pred - ref_pred)²``."""
    v, old, noisy, clean = (widened(t) for t in (pred, old_pred.detach(), x_t.detach(), x0.detach()))
    r = r.detach().to(v.dtype)

    def branch(signed_beta: float) -> tuple[Tensor, Tensor]:
        """``mean (x0± - x0)² / n±``, and n±."""
        mixed = old + signed_beta * (v - old)
        error = _elements(prediction_to_x0(mixed, noisy, alpha_t, sigma_t, prediction_type) - clean)
        n = error.detach().abs().mean(1).clamp(min=normalizer_min)
        return error.square().mean(1) / n, n

    (positive, n_positive), (negative, n_negative) = branch(beta), branch(-beta)
    kl = torch.zeros_like(positive) if ref_pred is None else _elements(v - widened(ref_pred.detach())).square().mean(1)
    term = scale * (r * positive + (1 - r) * negative) / beta + kl_weight * kl
    loss = {"none": term, "sum": term.sum(), "mean": term.sum() / max(len(term), 1)}[reduction]
    if not return_stats:
        return loss
    normalizer = torch.stack([n_positive, n_negative])
    return loss, NftStats(positive.detach(), negative.detach(), normalizer, kl.detach())


def _elements(t: Tensor) -> Tensor:
    return t.unsqueeze(-1).flatten(1)  # [B, D], also where t is [B]
