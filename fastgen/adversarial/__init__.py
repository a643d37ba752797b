"""Adversarial losses on a discriminator's logits, its gradient penalties, and pix2pix's loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..core import checks, dispatch
from . import distance, reference
from .gan import KINDS, Kind, Logits, discriminator_loss, generator_loss
from .penalties import approximate_r1_penalty, clip_weights_, gradient_penalty, r1_penalty

__all__ = [
    "approximate_r1_penalty",
    "clip_weights_",
    "discriminator_loss",
    "feature_distance",
    "generator_loss",
    "gradient_penalty",
    "pix2pix_loss",
    "r1_penalty",
]


def feature_distance(
    features: Sequence[Tensor], target_features: Sequence[Tensor], weights: Sequence[float] | None = None
) -> Tensor:
    """The L1 distance of two images' features over layers: the perceptual loss, and feature matching.

    .. math:: \\sum_l w_l · mean |φ_l(a) - φ_l(b)|

    One pass over a layer gives its distance and, where it requires one, its gradient; nothing else of its size exists.
    (In float16, which a loss scale has to reach first, and under torch.compile, the gradient takes a pass of its own.)

    Args:
        features: φ_l(a), [B, …] a layer, of any floating dtypes. Gradients flow to them alone.
        target_features: φ_l(b), of the same shapes.
        weights: w_l; 1 if None. VGG's layers usually take 1/32, 1/16, 1/8, 1/4 and 1 (arXiv 1711.11585).

    Returns:
        A scalar, float32 (float64 if an input is).

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> a, b = [torch.zeros(2, 3), torch.ones(2, 4)], [torch.ones(2, 3), torch.zeros(2, 4)]
        >>> fastgen.feature_distance(a, b, [0.5, 2.0])
        tensor(2.5000)
    """
    features = checks.tensors("features", features)
    target_features = checks.tensors("target_features", target_features)
    weights = [1.0] * len(features) if weights is None else list(weights)
    if not features:
        raise ValueError("features is empty")
    if not len(features) == len(target_features) == len(weights):
        counts = f"{len(features)}, {len(target_features)} and {len(weights)}"
        raise ValueError(f"features, target_features and weights must have one length, got {counts}")
    for a, b in zip(features, target_features, strict=True):
        checks.streams(features=a, target_features=b)
    weights = [checks.number("weights", w, low=0) for w in weights]
    return _weighted_l1(features, target_features, weights)


def pix2pix_loss(
    fake_logits: Logits,
    output: Tensor,
    target: Tensor,
    *,
    kind: Kind = "non_saturating",
    l1_weight: float = 100.0,
    features: Sequence[Tensor] = (),
    target_features: Sequence[Tensor] = (),
    feature_weights: Sequence[float] | None = None,
) -> Tensor:
    """The generator's loss of pix2pix (arXiv 1611.07004): adversarial, L1, and a perceptual distance if wanted.

    .. math:: L = L_G(ℓ_{fake}) + λ · mean |output - target| + \\sum_l w_l · mean |φ_l - φ'_l|

    The discriminator's is :func:`discriminator_loss`.

    Args:
        fake_logits: the (conditional, usually patch) discriminator's at `output`.
        output: the generator's, [B, …]. Gradients flow to it, to `features` and to the logits.
        target: like `output`.
        kind: as in :func:`generator_loss`, but not ``relativistic``.
        l1_weight: λ ≥ 0.
        features, target_features, feature_weights: as in :func:`feature_distance`.

    Returns:
        A scalar, float32 (float64 if an input is).

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> fastgen.pix2pix_loss(torch.zeros(2, 1, 4, 4), torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), 0.1))
        tensor(10.6931)
    """
    checks.choice("kind", kind, [k for k in KINDS if k != "relativistic"])
    checks.streams(output=output, target=target)
    loss = generator_loss(fake_logits, kind=kind)
    loss = loss + _weighted_l1([output], [target], [checks.number("l1_weight", l1_weight, low=0)])
    features = checks.tensors("features", features)
    target_features = checks.tensors("target_features", target_features)
    if features or target_features or (feature_weights is not None and len(feature_weights)):
        loss = loss + feature_distance(features, target_features, feature_weights)
    return loss


def _weighted_l1(a: Sequence[Tensor], b: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    backend = dispatch.backend_for("l1_distance", a[0].device.type)
    if backend == "reference":
        return reference.feature_distance(a, b, weights)
    return distance.weighted_l1(backend, a, b, weights)
