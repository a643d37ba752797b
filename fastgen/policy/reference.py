"""Post-training by reward, in plain PyTorch."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..schedule.reference import prediction_to_x0, widened

__all__ = ["FlowStep", "NftStats", "diffusion_nft_loss", "flow_sde_step"]


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


class FlowStep(NamedTuple):
    """What :func:`fastgen.flow_sde_step` returns.

    `sample` [B, …] as given or drawn, without a graph; `log_prob` [B], the mean of its elements' log-probabilities;
    `mean` [B, …] in float32 or float64; `std` [B], without a graph.

    Example::

        >>> import torch, fastgen
        >>> x = torch.zeros(1, 4)
        >>> fastgen.flow_sde_step(x, x, 0.5, 0.25, sample=x).std
        tensor([0.3500])
    """

    sample: Tensor
    log_prob: Tensor
    mean: Tensor
    std: Tensor


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


def flow_sde_step(
    pred: Tensor,
    x_t: Tensor,
    t: Tensor,
    t_next: Tensor,
    *,
    noise_level: float = 0.7,
    noise: Tensor | None = None,
    sample: Tensor | None = None,
    t_max: float | None = None,
) -> FlowStep:
    """``mean = k_x x_t + k_v pred``, ``sample = mean + std noise``, and the sample's log-probability, an element."""
    k_x, k_v, std = flow_sde_coefficients(t, t_next, noise_level, t_max)
    v, x = widened(pred), widened(x_t.detach())
    mean = _rows(k_x, x) * x + _rows(k_v, v) * v
    if sample is None:
        assert noise is not None
        sample = (mean + _rows(std, mean) * widened(noise)).to(x_t.dtype)
    sample = sample.detach()
    deviation = std.to(mean.dtype)
    square = _elements(widened(sample) - mean).square().mean(1)
    log_prob = -square / (2 * deviation.square()) - deviation.log() - 0.5 * math.log(2 * math.pi)
    return FlowStep(sample, log_prob, mean, deviation)


def flow_sde_coefficients(
    t: Tensor, t_next: Tensor, noise_level: float, t_max: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """k_x, k_v and std of ``x_next = k_x x_t + k_v v + std noise``, float64 [B]; NaN where a time is out of range."""
    t, t_next = t.detach().double(), t_next.detach().double()
    dt = t_next - t
    top = torch.where(t == 1, t_next if t_max is None else t_max, t)  # else the rate of the noise is infinite
    square = noise_level**2 * t / (1 - top)
    std = (square * -dt).sqrt()
    std = torch.where((std > 0) & (t_next >= 0), std, torch.nan)
    pull = square / (2 * t) * dt + 0 * std
    return 1 + pull, dt + pull * (1 - t), std


def _rows(numbers: Tensor, like: Tensor) -> Tensor:
    return numbers.to(like.dtype).reshape(-1, *[1] * (like.dim() - 1))


def _elements(t: Tensor) -> Tensor:
    return t.unsqueeze(-1).flatten(1)  # [B, D], also where t is [B]
