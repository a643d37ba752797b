"""GAN losses on a discriminator's logits, in plain PyTorch: they have no kernels, as logits are few.

A logit ℓ is positive where the discriminator says "real": D = σ(ℓ).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import checks
from ..elbo.reference import softplus
from ..schedule.reference import widened

__all__ = ["discriminator_loss", "generator_loss"]

Logits = Tensor | Sequence[Tensor]
Kind = Literal["non_saturating", "saturating", "kl", "wgan", "hinge", "relativistic"]
KINDS = ("non_saturating", "saturating", "kl", "wgan", "hinge", "relativistic")


def discriminator_loss(real_logits: Logits, fake_logits: Logits, *, kind: Kind = "non_saturating") -> Tensor:
    """What a discriminator minimises; with the same `kind`, :func:`generator_loss` is its opponent's loss.

    ================== =========================================== =======================================
    kind               discriminator                               generator
    ================== =========================================== =======================================
    ``non_saturating`` E softplus(-ℓ_real) + E softplus(ℓ_fake)    E softplus(-ℓ_fake) = -E log D
    ``saturating``     the same                                    -E softplus(ℓ_fake) = E log(1 - D)
    ``kl``             the same                                    -E ℓ_fake = E log((1 - D)/D), their sum
    ``wgan``           E ℓ_fake - E ℓ_real                         -E ℓ_fake
    ``hinge``          E max(0, 1 - ℓ_real) + E max(0, 1 + ℓ_fake) -E ℓ_fake
    ``relativistic``   E softplus(ℓ_fake - ℓ_real), in pairs       E softplus(ℓ_real - ℓ_fake), in pairs
    ================== =========================================== =======================================

    The first three are the GAN (arXiv 1406.2661; ``non_saturating`` is DMD2's, arXiv 2405.14867): the discriminator's
    loss is binary cross-entropy, 2 ln 2 at ℓ = 0, and 2 ln 2 - 2 JS at the optimum, where ``kl`` gives the reverse
    KL(fake ‖ real) and its gradient. Then WGAN (arXiv 1701.07875, with :func:`clip_weights_`) and WGAN-GP (with
    :func:`gradient_penalty`), the hinge of SAGAN (arXiv 1805.08318), and the relativistic pairing GAN
    (arXiv 1807.00734; with R1, arXiv 2501.05441).

    Args:
        real_logits, fake_logits: of real and of generated images, in any shape and floating dtype: one logit an image
            or one a patch. Only ``relativistic`` needs the same shape of both. Lists are the scales of a multi-scale
            discriminator: the mean over each scale's logits, then over scales. Detach the images, so that the generator
            gets no gradient.
        kind: one of the six.

    Returns:
        A scalar, float32 (float64 if a logit is). Finite for every finite logit in float32's range.

    Raises:
        TypeError, ValueError: for anything but floating tensors, lists of different lengths, or pairs that do not fit.

    Example::

        >>> import torch, fastgen
        >>> real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-2.0, -2.0])
        >>> fastgen.discriminator_loss(real, fake), fastgen.discriminator_loss(real, fake, kind="wgan")
        (tensor(0.3079), tensor(-4.))
    """
    checks.choice("kind", kind, KINDS)

    def loss(r: Tensor, f: Tensor) -> Tensor:
        if kind == "wgan":
            return mean(f) - mean(r)
        if kind == "hinge":
            return mean(F.relu(1 - r)) + mean(F.relu(1 + f))
        if kind == "relativistic":
            return mean(softplus(f - r))
        return mean(softplus(-r)) + mean(softplus(f))

    real, fake = _pair(real_logits, fake_logits, kind)
    return torch.stack([loss(r, f) for r, f in zip(real, fake, strict=True)]).mean()


def generator_loss(fake_logits: Logits, real_logits: Logits | None = None, *, kind: Kind = "non_saturating") -> Tensor:
    """What a generator minimises against a discriminator trained with :func:`discriminator_loss`, where the table is.

    ``saturating`` and ``kl`` are for study: the first has no gradient where the discriminator is sure, the second
    seeks modes.

    Args:
        fake_logits: the discriminator's logits of generated images, as in :func:`discriminator_loss`. In DMD2 the
            discriminator sees the noised images: :func:`fastgen.add_noise` is differentiable.
        real_logits: those of as many real images, for ``relativistic`` alone.
        kind: one of the six.

    Returns:
        A scalar, float32 (float64 if a logit is).

    Raises:
        TypeError, ValueError: as :func:`discriminator_loss`, and for `real_logits` without need.

    Example::

        >>> import torch, fastgen
        >>> fastgen.generator_loss(torch.zeros(4)), fastgen.generator_loss(torch.ones(4), kind="hinge")
        (tensor(0.6931), tensor(-1.))
    """
    checks.choice("kind", kind, KINDS)
    if (real_logits is None) == (kind == "relativistic"):
        raise ValueError(f"real_logits is for kind='relativistic', which needs it; kind is {kind!r}")

    def loss(r: Tensor, f: Tensor) -> Tensor:
        if kind == "relativistic":
            return softplus(r - f)
        if kind == "non_saturating":
            return softplus(-f)
        return -softplus(f) if kind == "saturating" else -f

    fake = scales("fake_logits", fake_logits)
    real, fake = (fake, fake) if real_logits is None else _pair(real_logits, fake_logits, kind)
    return torch.stack([mean(loss(r, f)) for r, f in zip(real, fake, strict=True)]).mean()


def mean(t: Tensor) -> Tensor:
    """0 of no elements."""
    return t.sum() / max(t.numel(), 1)


def _pair(real_logits: Logits, fake_logits: Logits, kind: str) -> tuple[list[Tensor], list[Tensor]]:
    real, fake = scales("real_logits", real_logits), scales("fake_logits", fake_logits)
    if len(real) != len(fake):
        raise ValueError(f"real_logits has {len(real)} scales, but fake_logits has {len(fake)}")
    if kind == "relativistic":
        for r, f in zip(real, fake, strict=True):
            if r.shape != f.shape:
                shapes = f"{tuple(r.shape)} and {tuple(f.shape)}"
                raise ValueError(
                    f"real_logits and fake_logits must have one shape for kind='relativistic', got {shapes}"
                )
    return real, fake


def scales(name: str, logits: Logits) -> list[Tensor]:
    """The logits of each scale, in the arithmetic dtype."""
    if not isinstance(logits, (Tensor, list, tuple)):
        raise TypeError(f"{name} must be a tensor or a list of tensors, got {type(logits).__name__}")
    found = [logits] if isinstance(logits, Tensor) else list(logits)
    if not found:
        raise ValueError(f"{name} is an empty list")
    for t in found:
        checks.floating(name, t)
    return [widened(t) for t in found]
