"""What torch.set_default_dtype says changes no result: neither its dtype nor its bits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Any

import pytest
import torch
from conftest import DEVICE
from torch import Tensor

import fastgen
from fastgen import NoiseSchedule
from fastgen.cases import CASES

SCHEDULE = NoiseSchedule.linear(20)


def generator() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(3)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(DEVICE)


def moments() -> Tensor:
    v = 1 / SCHEDULE._alphas_cumprod_at(torch.arange(-1, 20, device=DEVICE)) - 1
    return v / (v + 0.5)


def critic(x: Tensor) -> Tensor:
    return x.square().sum(1, keepdim=True)


def replayed() -> Any:
    buffer = fastgen.ReplayBuffer(8, (3,), device=DEVICE)
    return buffer.sample(4)


def classified() -> Any:
    conditions = numbers(3, 3, seed=1)
    classifier = fastgen.DiffusionClassifier(lambda x, t, c: x - c, SCHEDULE, stages=[(4, 2), (8, 1)])
    return classifier.predict(numbers(2, 3), conditions)


def penalised() -> Any:
    x = X.clone().requires_grad_()
    return fastgen.r1_penalty(critic(x), x)


def score_moments() -> Any:
    m = fastgen.ScoreMoments(4, device=DEVICE)
    m.update(torch.tensor([0, 1, 1, 3], device=DEVICE), numbers(4, 3))
    return m.ms_eps, m.standard_error, m.count


X, Y, HALF = numbers(4, 3), numbers(4, 3, seed=1), numbers(4).abs() + 0.1
T = torch.tensor([1, 2, 5, 19], device=DEVICE)
CALLS: dict[str, Callable[[], Any]] = {
    "add_noise": lambda: fastgen.add_noise(X, Y, HALF, HALF),
    "prediction_to_x0": lambda: fastgen.prediction_to_x0(X, Y, HALF, HALF),
    "schedules": lambda: [
        (s.sample_t(4, generator=generator()), s.quantile_t(HALF / 4))
        for s in (SCHEDULE, NoiseSchedule.vp(), NoiseSchedule.edm(), NoiseSchedule.flow(logit_std=1.0))
    ],
    "coefficients": lambda: [
        (s.alpha_t(t), s.sigma_t(t), s.edm_weight(t))
        for s, t in ((NoiseSchedule.cosine(20), T), (NoiseSchedule.ddgan(19), T), (NoiseSchedule.vp(), HALF / 4))
    ],
    "diffuse_pair": lambda: fastgen.diffuse_pair(SCHEDULE, X, T, generator=generator()),
    "step_coefficients": lambda: [
        fastgen.step_coefficients(SCHEDULE, T - 1, T),
        fastgen.step_coefficients(SCHEDULE, 3, 5, method="ddim", eta=0.5, device=DEVICE),
    ],
    "reverse_step": lambda: fastgen.reverse_step(
        X,
        Y,
        fastgen.step_coefficients(SCHEDULE, 3, 5, device=DEVICE),
        uncond=X,
        guidance_scale=2.0,
        noise=Y,
        clamp=(-1.0, 1.0),
    ),
    "guidance": lambda: fastgen.guidance(X, Y, 7.5),
    "posterior_sample": lambda: fastgen.posterior_sample(SCHEDULE, X, Y, T, generator=generator()),
    "langevin_step": lambda: fastgen.langevin_step(X, Y, 0.5, 0.1, generator=generator()),
    "langevin_sample": lambda: fastgen.langevin_sample(critic, X, steps=2, generator=generator()),
    "classifier_guidance": lambda: fastgen.classifier_guidance(
        critic, X, torch.zeros(4, dtype=torch.int64, device=DEVICE)
    ),
    "joint_energy_loss": lambda: fastgen.joint_energy_loss(X, T % 3, Y, return_energies=True),
    "ReplayBuffer": replayed,
    "renoise_times": lambda: [
        fastgen.renoise_times(4, "uniform", generator=generator()),
        fastgen.renoise_times(4, "cleaner", generator_times=HALF / 4, generator=generator()),
        fastgen.renoise_times(4, "beta", generator=generator()),
    ],
    "fake_score_loss": lambda: fastgen.fake_score_loss(X, Y, X, HALF, HALF, prediction_type="flow_prediction"),
    "backward_simulation": lambda: fastgen.backward_simulation(
        lambda x, t: x, SCHEDULE, torch.tensor([19, 10, 3], device=DEVICE), X, step=2, rng=generator()
    ),
    "sample": lambda: fastgen.sample(
        lambda x, t: x,
        SCHEDULE,
        X,
        method="analytic-ddpm",
        steps=5,
        ms_eps=moments(),
        generator=generator(),
        progress=False,
    ),
    "ScoreMoments": score_moments,
    "regularize_moments": lambda: fastgen.regularize_moments(SCHEDULE, moments()),
    "reverse_variance": lambda: fastgen.reverse_variance(SCHEDULE, moments(), 3, 5),
    "pixel_reverse_variance": lambda: fastgen.pixel_reverse_variance(SCHEDULE, X.square(), 3, 5, pred=Y),
    "variational_bound": lambda: fastgen.variational_bound(
        SCHEDULE, moments(), torch.tensor([1, 5, 20], device=DEVICE)
    ),
    "trajectory_cost": lambda: fastgen.trajectory_cost(SCHEDULE, moments()).matrix(),
    "analytic_trajectory": lambda: fastgen.analytic_trajectory(SCHEDULE, moments(), 5),
    "optimal_trajectory": lambda: fastgen.optimal_trajectory(numbers(5, 5), [2, 3]).total_cost,
    "discriminator_loss": lambda: [
        fastgen.discriminator_loss(X[:, 0], Y[:, 0], kind=kind)
        for kind in ("non_saturating", "wgan", "hinge", "relativistic")
    ],
    "gradient_penalty": lambda: fastgen.gradient_penalty(critic, X, Y, generator=generator()),
    "r1_penalty": penalised,
    "approximate_r1_penalty": lambda: fastgen.approximate_r1_penalty(critic, X, critic(X), generator=generator()),
    "pix2pix_loss": lambda: fastgen.pix2pix_loss(X[:, :1], X, Y),
    "ddo_loss": lambda: fastgen.ddo_loss(X, Y, Y, T > 2, return_delta=True),
    "diffusion_dpo_loss": lambda: fastgen.diffusion_dpo_loss(X, Y, Y, return_delta=True),
    "sds_loss": lambda: fastgen.sds_loss(X, Y, X, return_stats=True),
    "vsd_loss": lambda: fastgen.vsd_loss(X, Y, X, return_stats=True),
    "dmd_loss": lambda: fastgen.dmd_loss(X, Y, X, Y, alpha_t=HALF, sigma_t=HALF, mask=X > 0, return_stats=True),
    "DiffusionClassifier": classified,
    **{name: functools.partial(case, fastgen, **case.inputs((4, 3), device=DEVICE)) for name, case in CASES.items()},
}


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from tensors(v)
    elif is_dataclass(value):
        for v in vars(value).values():
            yield from tensors(v)


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", CALLS)
def test_results_do_not_follow_the_default_dtype(name: str, float64_by_default: None, backend: str) -> None:
    expected = list(tensors(CALLS[name]()))
    torch.set_default_dtype(torch.float64)
    results = list(tensors(CALLS[name]()))
    assert expected
    assert [t.dtype for t in results] == [t.dtype for t in expected]
    for result, like in zip(results, expected, strict=True):
        torch.testing.assert_close(result, like, rtol=0, atol=0, equal_nan=True)
