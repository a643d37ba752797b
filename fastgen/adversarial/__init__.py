"""Adversarial losses on a discriminator's logits, its gradient penalties, and pix2pix's loss.

A logit ℓ is positive where the discriminator says "real": D = σ(ℓ).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..core import checks, dispatch
from ..elbo import elbo_error
from . import distance, reference

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
    return reference.discriminator_loss(*_checked_pair(real_logits, fake_logits, kind), kind=kind)


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
    if real_logits is None:
        return reference.generator_loss(_scales("fake_logits", fake_logits), kind=kind)
    real_logits, fake_logits = _checked_pair(real_logits, fake_logits, kind)
    return reference.generator_loss(fake_logits, real_logits, kind=kind)


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
    return 0.5 * every * gamma * _square_gradient(logits, images).sum() / max(images.shape[0], 1)


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
    logits = _checked_rows(logits, images)
    discriminator = _checked_network("discriminator", discriminator)
    return reference.approximate_r1_penalty(
        discriminator, images, logits, sigma=sigma, gamma=gamma, every=every, generator=generator
    )


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
    return reference.gradient_penalty(
        _checked_network("critic", critic),
        real,
        fake,
        weight=checks.number("weight", weight, low=0),
        generator=generator,
    )


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
    reference.clip_weights_(parameters, checks.number("bound", bound, low=0, open_low=True))


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


def _square_gradient(logits: Logits, images: Tensor) -> Tensor:
    """‖∇ℓ‖² [B], with the graph of the discriminator's second derivative."""
    checks.streams(images=images)
    if not images.requires_grad:
        raise ValueError("images must require a gradient: call images.requires_grad_() before the discriminator")
    gradient = reference.input_gradient(_checked_rows(logits, images), images)
    zero = torch.zeros_like(gradient[:1]).expand_as(gradient)
    return elbo_error(gradient, zero, element_reduction="sum")


def _checked_pair(real_logits: Logits, fake_logits: Logits, kind: str) -> tuple[list[Tensor], list[Tensor]]:
    real, fake = _scales("real_logits", real_logits), _scales("fake_logits", fake_logits)
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


def _checked_rows(logits: Logits, images: Tensor) -> list[Tensor]:
    scales = _scales("logits", logits)
    for t in scales:
        if t.shape[:1] != images.shape[:1]:
            raise ValueError(f"logits must have shape [{images.shape[0]}, ...] as images have, got {list(t.shape)}")
    return scales


def _checked_network(name: str, network: Callable[[Tensor], Logits]) -> Callable[[Tensor], Logits]:
    """`network`, whose logits must be as many as its images: one for all would be broadcast."""
    checks.function(name, network)
    return lambda images: _checked_rows(network(images), images)


def _scales(name: str, logits: Logits) -> list[Tensor]:
    if not isinstance(logits, (Tensor, list, tuple)):
        raise TypeError(f"{name} must be a tensor or a list of tensors, got {type(logits).__name__}")
    scales = [logits] if isinstance(logits, Tensor) else list(logits)
    if not scales:
        raise ValueError(f"{name} is an empty list")
    for t in scales:
        checks.floating(name, t)
    return scales
