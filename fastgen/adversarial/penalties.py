"""Penalties on a discriminator's slope, by gradients of its logits or by differences of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..core import checks
from ..elbo import elbo_error
from ..schedule.reference import widened
from .gan import Logits, mean, scales

__all__ = ["approximate_r1_penalty", "clip_weights_", "gradient_penalty", "r1_penalty"]


def r1_penalty(logits: Logits, images: Tensor, *, gamma: float = 1.0, every: int = 1) -> Tensor:
    """R1 (arXiv 1801.04406): the discriminator's squared gradient at real images, exact, by double backward.

    .. math:: every · \\frac{γ}{2} · E_{real} ‖∇_x ℓ(x)‖²

    An image's ℓ is the mean of its logits, over patches and then over scales, as in the losses. (Where other code
    *sums* P patches, its γ is P² times smaller than this one's for the same penalty.) On generated images it is R2.

    Lazy R1 (arXiv 1912.04958) adds it in one step of k only and times k, which costs a k-th::

        if step % 16 == 0:
            loss = loss + fastgen.r1_penalty(logits, images, gamma=1.0, every=16)

    Args:
        logits: the discriminator's at `images`, with their graph: [B, …], or a list of scales.
        images: [B, …] what the discriminator saw, with ``requires_grad_()`` called before it saw them. Where it saw
            noised images, these are the noised ones.
        gamma: γ ≥ 0.
        every: k, the number of steps between two calls.

    Returns:
        A scalar, float32 (float64 for float64 images), to be added to the loss. The gradients are taken in the
        dtype of `images`: float16 may underflow. It runs between the graphs of ``torch.compile``, not within one.

    Raises:
        TypeError, ValueError: naming the argument that does not fit; where `images` need no gradient, or the logits do
            not come from them.

    Example::

        >>> import torch, fastgen
        >>> critic, x = torch.nn.Linear(3, 1), torch.randn(5, 3).requires_grad_()
        >>> penalty = fastgen.r1_penalty(critic(x), x, gamma=2.0)
        >>> torch.allclose(penalty, critic.weight.square().sum())
        True
    """
    gamma = checks.number("gamma", gamma, low=0)
    every = checks.positive_int("every", every)
    return 0.5 * every * gamma * mean(_square_gradient(logits, images))


def approximate_r1_penalty(
    discriminator: Callable[[Tensor], Logits],
    images: Tensor,
    logits: Logits,
    *,
    sigma: float = 0.01,
    gamma: float = 1.0,
    every: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """R1 by a finite difference in a random direction: one more forward pass, no double backward.

    .. math:: every · \\frac{γ}{2} · E \\left(\\frac{ℓ(x + σ ε) - ℓ(x)}{σ}\\right)^2

    Its expectation goes to :func:`r1_penalty` as σ → 0. For discriminators that cannot be differentiated
    twice, with fused attention or FSDP (arXiv 2501.08316, which leaves 1/σ² out: its weight is γ/(2σ²)).

    Args:
        discriminator: called once, on ``images + σ ε``.
        images: [B, …] **what the discriminator saw**: where it saw noised images x_t, these, and not the clean ones.
        logits: what it said, with the graph.
        sigma: σ > 0. Mind rounding: the images' must be finer than σ, and so must the logits' be than σ ‖∇ℓ‖, so
            compute logits in float32.
        gamma, every: as in :func:`r1_penalty`.
        generator: for ε.

    Returns:
        A scalar, float32 (float64 for float64 logits). Gradients flow to the discriminator through both logits;
        to the images none flow through the perturbed ones.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> critic, x = torch.nn.Linear(3, 1), torch.randn(5000, 3)
        >>> penalty = fastgen.approximate_r1_penalty(critic, x, critic(x), gamma=2.0)
        >>> torch.allclose(penalty, critic.weight.square().sum(), rtol=0.15)
        True
    """
    sigma = checks.number("sigma", sigma, low=0, open_low=True)
    gamma = checks.number("gamma", gamma, low=0)
    every = checks.positive_int("every", every)
    checks.streams(images=images)
    logits = _sample_logits(_checked_rows(logits, images))
    discriminator = _checked_network("discriminator", discriminator)
    x = widened(images.detach())
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    moved = discriminator((x + sigma * noise).to(images.dtype))
    slope = (_sample_logits(moved) - logits) / sigma
    return 0.5 * every * gamma * mean(slope.square())


def gradient_penalty(
    critic: Callable[[Tensor], Logits],
    real: Tensor,
    fake: Tensor,
    *,
    weight: float = 10.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """WGAN-GP (arXiv 1704.00028): the critic's slope between real and generated images is drawn to 1.

    .. math:: weight · E (‖∇ℓ(x̂)‖ - 1)^2, \\quad x̂ = u x_{real} + (1 - u) x_{fake}, \\quad u ∼ U(0, 1)

    Args:
        critic: called once, on x̂; a logit an image, or several of which the mean counts.
        real, fake: [B, …]; no gradient flows to them.
        weight: at least 0.
        generator: for u.

    Returns:
        A scalar, float32 (float64 for float64 images), by double backward. A slope of 0 gives no NaN.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> critic = torch.nn.Linear(3, 1)
        >>> penalty = fastgen.gradient_penalty(critic, torch.randn(5, 3), torch.randn(5, 3))
        >>> torch.allclose(penalty, 10 * (critic.weight.norm() - 1) ** 2)
        True
    """
    checks.streams(real=real, fake=fake)
    critic = _checked_network("critic", critic)
    weight = checks.number("weight", weight, low=0)
    u = torch.rand(real.shape[0], generator=generator, device=real.device, dtype=torch.float32)
    u = u.reshape(-1, *[1] * (real.dim() - 1))
    between = (u * widened(real.detach()) + (1 - u) * widened(fake.detach())).to(real.dtype).requires_grad_()
    square = _square_gradient(critic(between), between)
    # The root's derivative is infinite at 0; below the clamp the gradient is zero.
    norm = square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()
    return weight * mean((norm - 1).square())


def clip_weights_(parameters: Iterable[Tensor], bound: float = 0.01) -> None:
    """WGAN's constraint (arXiv 1701.07875): every weight into [-bound, bound], in place, after a critic's step.

    Args:
        parameters: ``critic.parameters()``.
        bound: above 0.

    Raises:
        TypeError, ValueError: for anything but floating tensors, or a bad `bound`.

    Example::

        >>> import torch, fastgen
        >>> critic = torch.nn.Linear(8, 1)
        >>> fastgen.clip_weights_(critic.parameters())
        >>> bool(critic.weight.abs().max() <= 0.01)
        True
    """
    if not isinstance(parameters, Iterable):
        raise TypeError(f"parameters must be tensors, as critic.parameters(); got {type(parameters).__name__}")
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    for p in parameters:
        checks.floating("parameters", p)
    bound = checks.number("bound", bound, low=0, open_low=True)
    with torch.no_grad():
        for p in parameters:
            p.clamp_(-bound, bound)


def _square_gradient(logits: Logits, images: Tensor) -> Tensor:
    """‖∇ℓ‖² [B], with the graph of the discriminator's second derivative."""
    checks.streams(images=images)
    if not images.requires_grad:
        raise ValueError("images must require a gradient: call images.requires_grad_() before the discriminator")
    try:
        total = _sample_logits(_checked_rows(logits, images)).sum()
        gradient = torch.autograd.grad(total, images, create_graph=True)[0]
    except RuntimeError as error:
        if "not have been used" not in str(error) and "does not require grad" not in str(error):
            raise
        raise ValueError(
            "logits do not depend on images: were the images copied or detached in between, or gradients off?"
        ) from error
    zero = torch.zeros_like(gradient[:1]).expand_as(gradient)
    return elbo_error(gradient, zero, element_reduction="sum")


def _sample_logits(logits: Sequence[Tensor]) -> Tensor:
    """ℓ [B]: the mean of a sample's logits, then over scales."""
    return torch.stack([t.unsqueeze(-1).flatten(1).mean(1) for t in logits]).mean(0)


def _checked_rows(logits: Logits, images: Tensor) -> list[Tensor]:
    found = scales("logits", logits)
    for t in found:
        if t.shape[:1] != images.shape[:1]:
            raise ValueError(f"logits must have shape [{images.shape[0]}, ...] as images have, got {list(t.shape)}")
    return found


def _checked_network(name: str, network: Callable[[Tensor], Logits]) -> Callable[[Tensor], list[Tensor]]:
    """`network`, whose logits must be as many as its images: one for all would be broadcast."""
    checks.function(name, network)
    return lambda images: _checked_rows(network(images), images)
