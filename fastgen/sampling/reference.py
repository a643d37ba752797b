"""Reverse diffusion steps, posteriors, guidance and Langevin steps, in plain PyTorch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..schedule.reference import widened

__all__ = ["StepCoefficients", "guidance", "langevin_step", "posterior_sample", "reverse_step", "step_coefficients"]


class StepCoefficients(NamedTuple):
    """A reverse step's numbers, of :func:`fastgen.step_coefficients`: each one for every row, [B], or one for all, [1].

    ``x_s = x0 · x̂0 + x_t · x_t + eps · ε̂ + noise · z``, where x̂0 and ε̂ are what the network's output means at
    ``x_t = alpha_t x0 + sigma_t ε``, and z is standard normal.

    Example::

        >>> import torch, fastgen
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> k = fastgen.StepCoefficients(alpha_t=0.6 * one, sigma_t=0.8 * one, x0=one, x_t=zero, eps=zero, noise=zero)
        >>> fastgen.reverse_step(torch.ones(1, 2), torch.zeros(1, 2), k)  # x0 alone: (1 - 0.8 · 0) / 0.6
        tensor([[1.6667, 1.6667]])
    """

    alpha_t: Tensor
    sigma_t: Tensor
    x0: Tensor
    x_t: Tensor
    eps: Tensor
    noise: Tensor


def step_coefficients(
    schedule: Any,
    s: Tensor,
    t: Tensor,
    *,
    method: str = "ddpm",
    eta: float = 0.0,
    variance: str | Tensor = "beta_tilde",
    use_clipped_model_output: bool = False,
    dtype: torch.dtype = torch.float32,
) -> StepCoefficients:
    """The coefficients of ``p(x_s | x_t)``, in float64 until the end."""
    bar_s, bar_t = schedule._alphas_cumprod_at(s), schedule._alphas_cumprod_at(t)  # ᾱ; ᾱ = 1 at s = -1
    noise_s, noise_t = 1 - bar_s, 1 - bar_t  # β̄
    beta = (bar_s - bar_t) / bar_s  # β_{t|s}
    # A schedule may start with a t of no noise at all; its x_t is x0.
    ratio = torch.where(noise_t > 0, noise_s / noise_t, 0.0)
    share = torch.where(noise_t > 0, beta / noise_t, 1.0)
    small = ratio * beta  # β̃
    alpha_t, sigma_t, zero = bar_t.sqrt(), noise_t.sqrt(), torch.zeros_like(bar_t)
    if method == "ddpm":  # the mean of q(x_s | x_t, x0)
        x0, x_t, eps = bar_s.sqrt() * share, (bar_t / bar_s).sqrt() * ratio, zero
        own = torch.where(s < 0, 0.0, beta) if variance == "beta" else small
    else:
        own = eta**2 * small
        x0, x_t, eps = bar_s.sqrt(), zero, (noise_s - own).clamp(min=0).sqrt()
        if use_clipped_model_output:  # ε̂ = (x_t - alpha_t x̂0) / sigma_t of the clamped x̂0
            x_t = torch.where(sigma_t > 0, eps / sigma_t, 0.0)
            x0, eps = x0 - alpha_t * x_t, zero
    noise = (own if isinstance(variance, str) else variance.to(bar_t)).sqrt()
    return StepCoefficients(*(k.to(dtype) for k in (alpha_t, sigma_t, x0, x_t, eps, noise)))


def reverse_step(
    x_t: Tensor,
    cond: Tensor,
    coefficients: StepCoefficients,
    *,
    prediction_type: str = "epsilon",
    uncond: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    noise: Tensor | None = None,
    clamp: tuple[float, float] | None = None,
) -> Tensor:
    """``x_s = x0 · clamp(x̂0) + x_t · x_t + eps · ε̂ + noise · z``."""
    dtype = _arithmetic(x_t, cond, uncond, noise)
    k = StepCoefficients(*(_rows(k, x_t, dtype) for k in coefficients))
    x, pred = x_t.to(dtype), cond.to(dtype)
    if uncond is not None:
        pred = _guided(pred, uncond.to(dtype), guidance_scale)
    x0, eps = _clean_and_noise(pred, x, k.alpha_t, k.sigma_t, prediction_type)
    if clamp is not None:
        x0 = x0.clamp(*clamp)
    x_s = k.x0 * x0 + k.x_t * x + torch.where(k.eps == 0, 0.0, k.eps * eps)  # ε̂ is infinite where sigma_t is 0
    if noise is not None:
        x_s = x_s + k.noise * noise.to(dtype)
    return x_s.to(x_t.dtype)


def guidance(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """``uncond + scale (cond - uncond)``."""
    scale = scale.detach() if isinstance(scale, Tensor) else scale
    return _guided(widened(cond), widened(uncond), scale).to(torch.promote_types(cond.dtype, uncond.dtype))


def posterior_sample(
    schedule: Any,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    *,
    s: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A sample of ``q(x_s | x_t, x0)``."""
    if noise is None:
        noise = randn_like(x_t, generator)
    dtype = _arithmetic(x0, x_t, noise)
    k = step_coefficients(schedule, t.long() - 1 if s is None else s, t, dtype=dtype)
    mean = _rows(k.x0, x_t, dtype) * x0.to(dtype) + _rows(k.x_t, x_t, dtype) * x_t.to(dtype)
    return (mean + _rows(k.noise, x_t, dtype) * noise.to(dtype)).to(x_t.dtype)


def langevin_step(
    x: Tensor,
    grad: Tensor,
    step_size: float | Tensor,
    noise_scale: float | Tensor,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``x + step_size · grad + noise_scale · noise``."""
    if noise is None:
        noise = randn_like(x, generator)
    dtype = _arithmetic(x, grad, noise)
    step, scale = (_rows(k, x, dtype) if isinstance(k, Tensor) else k for k in (step_size, noise_scale))
    return (x.to(dtype) + step * grad.to(dtype) + scale * noise.to(dtype)).to(x.dtype).detach()


def randn_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def _clean_and_noise(pred: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """x̂0 and ε̂, by what the network predicts."""
    if kind == "epsilon":
        return (x - sigma * pred) / alpha, pred
    if kind == "sample":
        return pred, (x - alpha * pred) / sigma
    if kind == "v_prediction":
        norm = alpha**2 + sigma**2
        return (alpha * x - sigma * pred) / norm, (sigma * x + alpha * pred) / norm
    total = alpha + sigma
    return (x - sigma * pred) / total, (x + alpha * pred) / total


def _guided(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    if isinstance(scale, Tensor):
        scale = _rows(scale, cond, torch.promote_types(cond.dtype, uncond.dtype))
    return uncond + scale * (cond - uncond)


def _arithmetic(*tensors: Tensor | None) -> torch.dtype:
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def _rows(scalar: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    return scalar.to(dtype).reshape(-1, *[1] * (like.dim() - 1))
