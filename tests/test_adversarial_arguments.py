"""What the adversarial losses refuse, and what they make of no images at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICE

import fastgen
from fastgen import NoiseSchedule
from fastgen.adversarial import KINDS

LOGITS = torch.zeros(4, 1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastgen.discriminator_loss(LOGITS, LOGITS, kind="lsgan"), ValueError, "kind must be one of"),
        (lambda: fastgen.generator_loss(LOGITS, kind="relativistic"), ValueError, "real_logits is for"),
        (lambda: fastgen.generator_loss(LOGITS, LOGITS), ValueError, "real_logits is for"),
        (lambda: fastgen.discriminator_loss(LOGITS, LOGITS[:2], kind="relativistic"), ValueError, "one shape"),
        (lambda: fastgen.discriminator_loss([LOGITS], [LOGITS] * 2), ValueError, "real_logits has 1 scales"),
        (lambda: fastgen.generator_loss([]), ValueError, "fake_logits is an empty list"),
        (lambda: fastgen.generator_loss(LOGITS.long()), TypeError, "fake_logits must be float32"),
        (lambda: fastgen.generator_loss(None), TypeError, "fake_logits must be a tensor or a list"),
        (lambda: fastgen.discriminator_loss(1.0, LOGITS), TypeError, "real_logits must be a tensor or a list"),
        (lambda: fastgen.discriminator_loss(iter([LOGITS]), LOGITS), TypeError, "real_logits must be a tensor or"),
        (lambda: fastgen.r1_penalty(LOGITS, LOGITS), ValueError, "images must require a gradient"),
        (lambda: fastgen.r1_penalty(LOGITS, LOGITS.clone().requires_grad_()), ValueError, "do not depend on images"),
        (lambda: fastgen.r1_penalty(LOGITS[:2], LOGITS.clone().requires_grad_()), ValueError, "logits must have shape"),
        (lambda: fastgen.r1_penalty(LOGITS, LOGITS, gamma=-1.0), ValueError, "gamma must be >= 0"),
        (lambda: fastgen.r1_penalty(LOGITS, LOGITS, every=0), ValueError, "every must be at least 1"),
        (lambda: fastgen.approximate_r1_penalty(torch.sin, LOGITS, LOGITS, sigma=0.0), ValueError, "sigma must be > 0"),
        (lambda: fastgen.approximate_r1_penalty(torch.sin, LOGITS, LOGITS[:1]), ValueError, "logits must have shape"),
        (lambda: fastgen.gradient_penalty(torch.sin, LOGITS, LOGITS[:2]), ValueError, "fake has shape"),
        (lambda: fastgen.approximate_r1_penalty(None, LOGITS, LOGITS), TypeError, "discriminator must be callable"),
        (lambda: fastgen.approximate_r1_penalty(lambda x: x[:1], LOGITS, LOGITS), ValueError, "logits must have shape"),
        (lambda: fastgen.approximate_r1_penalty(lambda x: None, LOGITS, LOGITS), TypeError, "logits must be a tensor"),
        (lambda: fastgen.gradient_penalty(None, LOGITS, LOGITS), TypeError, "critic must be callable"),
        (lambda: fastgen.gradient_penalty(torch.zeros_like, LOGITS, LOGITS), ValueError, "do not depend on images"),
        (lambda: fastgen.gradient_penalty(lambda x: x[:1], LOGITS, LOGITS), ValueError, "logits must have shape"),
        (lambda: fastgen.clip_weights_(torch.nn.Linear(1, 1)), TypeError, "parameters must be tensors, as critic"),
        (lambda: fastgen.clip_weights_([LOGITS.long()]), TypeError, "parameters must be float32"),
        (lambda: fastgen.clip_weights_(LOGITS, 0.0), ValueError, "bound must be > 0"),
        (lambda: fastgen.feature_distance(LOGITS, LOGITS), TypeError, "features must be a list of tensors, got Tensor"),
        (lambda: fastgen.feature_distance([LOGITS], LOGITS), TypeError, "target_features must be a list of tensors"),
        (lambda: fastgen.pix2pix_loss(LOGITS, LOGITS, LOGITS, features=LOGITS), TypeError, "features must be a list"),
        (lambda: fastgen.feature_distance([], []), ValueError, "features is empty"),
        (lambda: fastgen.feature_distance([LOGITS], [LOGITS] * 2), ValueError, "must have one length"),
        (lambda: fastgen.feature_distance([LOGITS], [LOGITS], [-1.0]), ValueError, "weights must be >= 0"),
        (lambda: fastgen.feature_distance([LOGITS], [LOGITS[:2]]), ValueError, "target_features has shape"),
        (lambda: fastgen.pix2pix_loss(LOGITS, LOGITS, LOGITS[:2]), ValueError, "target has shape"),
        (lambda: fastgen.pix2pix_loss(LOGITS, LOGITS, LOGITS, kind="relativistic"), ValueError, "kind must be one of"),
        (lambda: fastgen.pix2pix_loss(LOGITS, LOGITS, LOGITS, features=[LOGITS]), ValueError, "one length"),
        (lambda: fastgen.diffuse_pair(None, LOGITS, torch.ones(4).long()), TypeError, "schedule must be a"),
        (
            lambda: fastgen.diffuse_pair(NoiseSchedule.ddgan(), LOGITS, torch.ones(4).long(), noise=LOGITS),
            TypeError,
            "noise must be a pair",
        ),
        (lambda: fastgen.diffuse_pair(NoiseSchedule.flow(), LOGITS, torch.ones(4)), ValueError, "must be discrete"),
        (lambda: fastgen.diffuse_pair(NoiseSchedule.ddgan(), LOGITS, torch.ones(4)), TypeError, "t must hold integers"),
        (lambda: fastgen.diffuse_pair(NoiseSchedule.ddgan(), LOGITS, torch.ones(3).long()), ValueError, "t must have"),
        (lambda: NoiseSchedule.ddgan(0), ValueError, "steps must be at least 1"),
    ],
)
def test_bad_arguments_are_named(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("kind", KINDS)
def test_no_images_lose_nothing(kind: Any, backend: str) -> None:
    """As a rank's share of a last, short batch may have none: NaN would spread to all ranks with the gradients."""
    critic = torch.nn.Linear(3, 1, device=DEVICE)
    images = torch.zeros(0, 3, device=DEVICE, requires_grad=True)
    logits = critic(images)
    losses = [
        fastgen.discriminator_loss(logits, logits, kind=kind),
        fastgen.generator_loss(logits, logits if kind == "relativistic" else None, kind=kind),
        fastgen.r1_penalty(logits, images),
        fastgen.approximate_r1_penalty(critic, images, logits),
        fastgen.gradient_penalty(critic, images, images),
    ]
    assert [loss.item() for loss in losses] == [0.0] * 5
    torch.stack(losses).sum().backward()
    assert not critic.weight.grad.any()
