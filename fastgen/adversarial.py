"""Adversarial losses on a discriminator's logits. A logit is positive where the discriminator says "real"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks

Logits = Tensor | Sequence[Tensor]


def discriminator_loss(real_logits: Logits, fake_logits: Logits) -> Tensor:
    """The discriminator's loss of the non-saturating GAN, as in DMD2 (arXiv 2405.14867).

    .. math:: L = mean softplus(-ℓ_{real}) + mean softplus(ℓ_{fake})

    which is binary cross-entropy. At ℓ = 0 it is 2 ln 2.

    Args:
        real_logits, fake_logits: of real and of generated images, in any shape and floating dtype: one logit an image
            or one a patch. The two may differ in shape. Lists are the scales of a multi-scale discriminator: the mean
            over each scale's logits, then over scales. Detach the images, so that the generator gets no gradient.

    Returns:
        A scalar, float32 (float64 if a logit is).

    Raises:
        TypeError, ValueError: for anything but floating tensors, or lists of different lengths.

    Example::

        >>> import torch, fastgen
        >>> fastgen.discriminator_loss(torch.tensor([1.0, 3.0]), torch.tensor([-2.0, -2.0]))
        tensor(0.3079)
    """
    real, fake = _scales("real_logits", real_logits), _scales("fake_logits", fake_logits)
    if len(real) != len(fake):
        raise ValueError(f"real_logits has {len(real)} scales, but fake_logits has {len(fake)}")
    return _mean_softplus([-t for t in real]) + _mean_softplus(fake)


def generator_loss(fake_logits: Logits) -> Tensor:
    """The generator's non-saturating loss, as in DMD2 (arXiv 2405.14867).

    .. math:: L = mean softplus(-ℓ_{fake}) = -mean log D

    Args:
        fake_logits: the discriminator's logits of generated images, as in :func:`discriminator_loss`. In DMD2 the
            discriminator sees the noised images: :func:`fastgen.add_noise` is differentiable.

    Returns:
        A scalar, float32 (float64 if a logit is).

    Raises:
        TypeError: for anything but floating tensors.

    Example::

        >>> import torch, fastgen
        >>> fastgen.generator_loss(torch.zeros(4))
        tensor(0.6931)
    """
    return _mean_softplus([-t for t in _scales("fake_logits", fake_logits)])


def _scales(name: str, logits: Logits) -> list[Tensor]:
    scales = [logits] if isinstance(logits, Tensor) else list(logits)
    if not scales:
        raise ValueError(f"{name} is an empty list")
    for t in scales:
        _checks.tensor(name, t)
        if not t.is_floating_point():
            raise TypeError(f"{name} must be floating-point, got {t.dtype}")
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in scales]


def _mean_softplus(scales: list[Tensor]) -> Tensor:
    # F.softplus turns linear above a threshold, which costs digits in float64.
    return torch.stack([-F.logsigmoid(-t).mean() for t in scales]).mean()
