"""Adversarial losses on a discriminator's logits, its gradient penalties and pix2pix's loss, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..elbo.reference import softplus
from ..schedule.reference import widened

__all__ = [
    "approximate_r1_penalty",
    "clip_weights_",
    "discriminator_loss",
    "feature_distance",
    "generator_loss",
    "gradient_penalty",
    "input_gradient",
    "pix2pix_loss",
    "r1_penalty",
]

Logits = Tensor | Sequence[Tensor]


def discriminator_loss(real_logits: Logits, fake_logits: Logits, *, kind: str = "non_saturating") -> Tensor:
    """The mean over logits, then over scales."""

    def loss(r: Tensor, f: Tensor) -> Tensor:
        if kind == "wgan":
            return _mean(f) - _mean(r)
        if kind == "hinge":
            return _mean(F.relu(1 - r)) + _mean(F.relu(1 + f))
        if kind == "relativistic":
            return _mean(softplus(f - r))
        return _mean(softplus(-r)) + _mean(softplus(f))

    pairs = zip(_scales(real_logits), _scales(fake_logits), strict=True)
    return torch.stack([loss(r, f) for r, f in pairs]).mean()


def generator_loss(fake_logits: Logits, real_logits: Logits | None = None, *, kind: str = "non_saturating") -> Tensor:
    """The mean over logits, then over scales."""

    def loss(f: Tensor, r: Tensor) -> Tensor:
        if kind == "relativistic":
            return softplus(r - f)
        if kind == "non_saturating":
            return softplus(-f)
        return -softplus(f) if kind == "saturating" else -f

    fake = _scales(fake_logits)
    real = fake if real_logits is None else _scales(real_logits)
    return torch.stack([_mean(loss(f, r)) for f, r in zip(fake, real, strict=True)]).mean()


def r1_penalty(logits: Logits, images: Tensor, *, gamma: float = 1.0, every: int = 1) -> Tensor:
    """``every · gamma/2 · mean |∇ℓ|²``."""
    return 0.5 * every * gamma * _mean(square_gradient(logits, images))


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
    """``every · gamma/2 · mean ((ℓ(x + σ ε) - ℓ(x)) / σ)²``."""
    x = widened(images.detach())
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
    moved = discriminator((x + sigma * noise).to(images.dtype))
    slope = (sample_logits(moved) - sample_logits(logits)) / sigma
    return 0.5 * every * gamma * _mean(slope.square())


def gradient_penalty(
    critic: Callable[[Tensor], Logits],
    real: Tensor,
    fake: Tensor,
    *,
    weight: float = 10.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``weight · mean (|∇ℓ(x̂)| - 1)²`` at ``x̂ = u real + (1 - u) fake``, u uniform per row."""
    u = torch.rand(real.shape[0], generator=generator, device=real.device, dtype=torch.float32)
    u = u.reshape(-1, *[1] * (real.dim() - 1))
    between = (u * widened(real.detach()) + (1 - u) * widened(fake.detach())).to(real.dtype).requires_grad_()
    square = square_gradient(critic(between), between)
    # The root's derivative is infinite at 0; below the clamp the gradient is zero.
    norm = square.clamp(min=torch.finfo(square.dtype).tiny).sqrt()
    return weight * _mean((norm - 1).square())


@torch.no_grad()
def clip_weights_(parameters: Iterable[Tensor], bound: float = 0.01) -> None:
    """Every weight into [-bound, bound]."""
    for p in parameters:
        p.clamp_(-bound, bound)


def feature_distance(
    features: Sequence[Tensor], target_features: Sequence[Tensor], weights: Sequence[float] | None = None
) -> Tensor:
    """``Σ w_l mean |φ_l - φ'_l|``."""
    ones = [1.0] * len(features)
    pairs = zip(weights or ones, features, target_features, strict=True)
    return torch.stack([w * (widened(a) - widened(b.detach())).abs().mean() for w, a, b in pairs]).sum()


def pix2pix_loss(
    fake_logits: Logits,
    output: Tensor,
    target: Tensor,
    *,
    kind: str = "non_saturating",
    l1_weight: float = 100.0,
    features: Sequence[Tensor] = (),
    target_features: Sequence[Tensor] = (),
    feature_weights: Sequence[float] | None = None,
) -> Tensor:
    """The generator's adversarial loss, plus ``l1_weight mean |output - target|``, plus the features' distance."""
    weights = feature_weights or [1.0] * len(features)
    pairs = [output, *features], [target, *target_features], [l1_weight, *weights]
    return generator_loss(fake_logits, kind=kind) + feature_distance(*pairs)


def input_gradient(logits: Logits, images: Tensor) -> Tensor:
    """Each sample's ∇ℓ, differentiable again."""
    try:
        return torch.autograd.grad(sample_logits(logits).sum(), images, create_graph=True)[0]
    except RuntimeError as error:
        if "not have been used" not in str(error) and "does not require grad" not in str(error):
            raise
        raise ValueError(
            "logits do not depend on images: were the images copied or detached in between, or gradients off?"
        ) from error


def square_gradient(logits: Logits, images: Tensor) -> Tensor:
    """‖∇ℓ‖² [B], differentiable again."""
    return widened(input_gradient(logits, images)).unsqueeze(-1).flatten(1).square().sum(1)


def sample_logits(logits: Logits) -> Tensor:
    """ℓ [B]: the mean of a sample's logits, then over scales."""
    return torch.stack([t.unsqueeze(-1).flatten(1).mean(1) for t in _scales(logits)]).mean(0)


def _mean(t: Tensor) -> Tensor:
    """0 of no elements."""
    return t.sum() / max(t.numel(), 1)


def _scales(logits: Logits) -> list[Tensor]:
    return [widened(t) for t in ([logits] if isinstance(logits, Tensor) else logits)]
