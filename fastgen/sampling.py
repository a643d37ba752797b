"""What a sampler does between two calls of its network, in one pass: guidance, x0, clamp, mean, variance and noise."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _checks, reference
from .schedule import NoiseSchedule

__all__ = ["langevin_step", "posterior_sample"]


def posterior_sample(
    schedule: NoiseSchedule,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    *,
    s: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A sample of ``q(x_s | x_t, x0)``, as Denoising Diffusion GANs take it (arXiv 2112.07804); fused, differentiable.

    .. math:: x_s = \\frac{\\sqrt{ᾱ_s} β_{t|s}}{1 - ᾱ_t} x_0 + \\frac{\\sqrt{ᾱ_t/ᾱ_s} (1 - ᾱ_s)}{1 - ᾱ_t} x_t + \\sqrt{β̃} ε

    with ``β_{t|s} = 1 - ᾱ_t/ᾱ_s`` and ``β̃ = β_{t|s} (1 - ᾱ_s)/(1 - ᾱ_t)``. At s = -1, clean data, that is x0: no noise.

    Args:
        schedule: a discrete one; DDGAN's has 2 to 4 steps of ``vp``.
        x0: the generator's output [B, …], any floating dtype.
        x_t: like `x0`.
        t: integers [B] in [0, num_timesteps), any mix of them.
        s: integers [B], ``-1 <= s < t``; t - 1 if None.
        noise: ε, like `x0`; drawn if None.
        generator: for that.

    Returns:
        x_s, in the dtype of `x_t`, computed in float32 (float64 if an input is). Gradients flow to `x0`, `x_t` and
        `noise`, any number of times. No host sync.

    Raises:
        TypeError, ValueError: naming the argument that does not fit. The values in `t` and `s` are not looked at.

    Example::

        >>> import torch, fastgen
        >>> schedule = fastgen.NoiseSchedule.from_alphas_cumprod(torch.tensor([0.9, 0.5]))
        >>> x0, x_t, t = torch.ones(2, 3), torch.zeros(2, 3), torch.tensor([0, 1])
        >>> fastgen.posterior_sample(schedule, x0, x_t, t, noise=torch.zeros(2, 3))
        tensor([[1.0000, 1.0000, 1.0000],
                [0.8433, 0.8433, 0.8433]])
    """
    _checks.streams(x0=x0, x_t=x_t, **({} if noise is None else {"noise": noise}))
    return reference.posterior_sample(schedule, x0, x_t, t, s=s, noise=noise, generator=generator)


def langevin_step(
    x: Tensor,
    grad: Tensor,
    step_size: float | Tensor,
    noise_scale: float | Tensor,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One step of Langevin dynamics, fused: ``x + step_size · grad + noise_scale · noise``.

    With `grad` the score ``∇ log p(x)``, ``step_size = ε²/2`` and ``noise_scale = ε`` this samples p; JEM
    (arXiv 1912.03263) takes ``∇ logsumexp f(x)``, 1 and 0.01.

    Args:
        x: [B, …], any floating dtype.
        grad: like `x`.
        step_size: a number, or float32 or float64 [B].
        noise_scale: likewise.
        noise: like `x`; standard normal if None.
        generator: for that.

    Returns:
        The next x, in x's dtype, computed in float32 (float64 if an input is). No gradient flows through it: samples
        of a chain are constants.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> x = torch.zeros(1, 3)
        >>> fastgen.langevin_step(x, torch.ones(1, 3), 0.5, 0.1, noise=torch.ones(1, 3))
        tensor([[0.6000, 0.6000, 0.6000]])
    """
    _checks.streams(x=x, grad=grad, **({} if noise is None else {"noise": noise}))
    return reference.langevin_step(x, grad, step_size, noise_scale, noise=noise, generator=generator)
