"""The forward process and conversions between prediction types, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["add_noise", "diffuse_pair", "noise_pair", "prediction_to_x0"]


def add_noise(x0: Tensor, noise: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """``x_t = alpha_t x0 + sigma_t noise``, with [B] coefficients."""
    dtype = torch.promote_types(x0.dtype, noise.dtype)
    return (_rows(alpha_t, x0) * widened(x0) + _rows(sigma_t, x0) * widened(noise)).to(dtype)


def prediction_to_x0(
    pred: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, prediction_type: str = "epsilon"
) -> Tensor:
    """The x0 that a network's output implies at x_t."""
    dtype = torch.promote_types(pred.dtype, x_t.dtype)
    alpha, sigma = _rows(alpha_t, x_t), _rows(sigma_t, x_t)
    p, x = widened(pred), widened(x_t)
    if prediction_type == "epsilon":
        x0 = (x - sigma * p) / alpha
    elif prediction_type == "v_prediction":
        x0 = (alpha * x - sigma * p) / (alpha**2 + sigma**2)
    elif prediction_type == "flow_prediction":
        x0 = (x - sigma * p) / (alpha + sigma)
    else:
        x0 = p
    return x0.to(dtype)


def diffuse_pair(
    schedule: Any,
    x0: Tensor,
    t: Tensor,
    *,
    s: Tensor | None = None,
    noise: tuple[Tensor, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """``x_s`` from x0, then ``x_t`` from x_s."""
    s = t.long() - 1 if s is None else s
    bar_s, bar_t = schedule._alphas_cumprod_at(s), schedule._alphas_cumprod_at(t)
    first, second = noise_pair(x0, generator) if noise is None else noise
    x_s = add_noise(x0, first, bar_s.sqrt(), (1 - bar_s).sqrt())
    return x_s, add_noise(x_s, second, (bar_t / bar_s).sqrt(), ((bar_s - bar_t) / bar_s).sqrt())


def noise_pair(like: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    first, second = (
        torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device) for _ in range(2)
    )
    return first, second


def widened(t: Tensor) -> Tensor:
    """At least float32: the arithmetic type of every function here."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def _rows(scalar: Tensor, like: Tensor) -> Tensor:
    # The images decide between float32 and float64; a float64 coefficient does not widen them.
    dtype = torch.promote_types(like.dtype, torch.float32)
    return scalar.detach().to(dtype).reshape(*scalar.shape, *[1] * (like.dim() - scalar.dim()))
