"""Distil the base into generators of one, two and four steps: DMD (arXiv 2311.18828) and DMD2 (2405.14867).

    python examples/fashion dmd

The base's own one-step sampler, x = D(s0 z, s0), is the generator's start and the first row to beat; the base in 16
steps is the teacher. A fake-score network follows the generator step by step. "DMD2" adds a discriminator of noised
real and generated images, a small head on the fake network's features; its generators of two and four steps are
trained on their own intermediate samples (backward simulation), which they meet again when sampling.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import Table, Trainer
from torch import Tensor, nn
from tqdm import tqdm

from fashion.data import SIDE
from fashion.networks import SCHEDULE, Denoiser, denoising_loss, guided, unlabelled
from fashion.study import IN_PICTURES, Panels, Study, options
from fastgen import (
    ScorePair,
    backward_simulation,
    decoupled_dmd_loss,
    discriminator_loss,
    dmd_loss,
    generator_loss,
    renoise_times,
)

LEVELS = {1: (4.0,), 2: (4.0, 0.8), 4: (4.0, 1.6, 0.6, 0.2)}  # what a generator of so many steps is given
LOW, HIGH = 0.05, 8.0  # levels at which the two score networks are compared
BATCH = 16  # many such steps came nearer than a quarter as many of 64


@dataclass(frozen=True)
class Method:
    """What distinguishes the generators."""

    levels: tuple[float, ...] = LEVELS[1]
    steps: int = 400  # of the generator
    guidance_scale: float = 1.0  # 1 is none
    decoupled: bool = False
    adversarial: float = 0.0  # weight of DMD2's discriminator in the generator's loss; 10 times that in its own
    reward: float = 0.0  # weight of DMDR's reward
    lr: float = 1e-4
    fake_lr: float = 3e-4
    ema: float = 0.95


class FakeScore(nn.Module):
    """The network that follows the generator, and DMD2's discriminator: a head on its features."""

    def __init__(self, teacher: Denoiser) -> None:
        super().__init__()
        self.denoiser = copy.deepcopy(teacher)
        self.head = nn.Sequential(nn.GroupNorm(8, 96), nn.SiLU(), nn.Conv2d(96, 64, 3), nn.SiLU(), nn.Conv2d(64, 1, 1))

    def forward(self, noisy: Tensor, sigma: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """The clean estimate and logits of patches."""
        clean, features = self.denoiser.with_features(noisy, sigma, label)
        return clean, self.head(features)


def generate(
    generator: nn.Module, noise: Tensor, labels: Tensor, method: Method, rng: torch.Generator, step: int | None = None
) -> tuple[Tensor, int]:
    """A sample of one of the method's steps, the last or, in training, one chosen at random, and which."""
    levels = torch.tensor(method.levels)
    made = backward_simulation(
        lambda x, sigma: generator(x, sigma, labels), SCHEDULE, levels, noise, step=step, rng=rng
    )
    return made.x0, made.step


def noise_levels(like: Tensor, gen: torch.Generator, below: float | None = None) -> Tensor:
    """Uniform in their logarithm; cleaner than `below` if given."""
    ratio = torch.tensor(HIGH / LOW)
    times = None if below is None else torch.log(torch.tensor(below / LOW)).div(torch.log(ratio)).expand(len(like))
    rule = "uniform" if below is None else "cleaner"
    tau = renoise_times(len(like), rule, low=0.0, high=1.0, generator_times=times, generator=gen)  # type: ignore[arg-type]
    return (LOW * ratio**tau).to(like.device)


def distillation_loss(
    x: Tensor, labels: Tensor, level: float, fake: FakeScore, method: Method, study: Study, gen: torch.Generator
) -> Tensor:
    """The gradient that moves x from what the fake network knows to what the teacher knows."""
    one, teacher = torch.ones(len(x), device=x.device), study.base

    def pair(sigma: Tensor, with_fake: bool) -> ScorePair:
        x_t = SCHEDULE.add_noise(x.detach(), torch.randn(x.shape, generator=gen).to(x.device), sigma)
        with torch.no_grad():
            other = fake(x_t, sigma, labels)[0] if with_fake else teacher(x_t, sigma, unlabelled(labels))
            return ScorePair(x_t, one, sigma, teacher(x_t, sigma, labels), other)

    dm = pair(noise_levels(x, gen), True)
    if method.decoupled:
        ca = pair(noise_levels(x, gen, level), False)
        return decoupled_dmd_loss(x, dm, ca, guidance_scale=method.guidance_scale, prediction_type="sample")
    with torch.no_grad():
        uncond = teacher(dm.x_t, dm.sigma_t, unlabelled(labels)) if method.guidance_scale != 1 else None
    return dmd_loss(
        x,
        dm.x_t,
        dm.real,
        dm.contrast,
        alpha_t=one,
        sigma_t=dm.sigma_t,
        prediction_type="sample",
        real_uncond=uncond,
        guidance_scale=method.guidance_scale,
    )


def distil(study: Study, method: Method, seed: int, name: str) -> Denoiser:
    """The generator, its weights averaged; it and the fake network start from the teacher's weights."""
    torch.manual_seed(seed)  # for the discriminator's weights; all else draws from explicit generators
    gen, teacher, batch = torch.Generator().manual_seed(seed), study.base, study.batch(BATCH)
    rng = torch.Generator(study.device).manual_seed(seed)
    student = Trainer(teacher, method.lr, 1, method.ema, betas=(0.0, 0.99))
    fake = Trainer(FakeScore(teacher), method.fake_lr, 1, 0.0, betas=(0.0, 0.99))

    def samples() -> tuple[Tensor, float, Tensor]:
        wanted = study.data.train.draw(batch, gen).labels
        noise = torch.randn(batch, 1, SIDE, SIDE, generator=gen).to(study.device)
        x, step = generate(student.model, noise, wanted, method, rng)
        return x, method.levels[step], wanted

    def noisy(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sigma, noise = noise_levels(x, gen), torch.randn(x.shape, generator=gen).to(x.device)
        return SCHEDULE.add_noise(x, noise, sigma), sigma, noise

    for _ in tqdm(range(study.steps(method.steps)), desc=name):
        with torch.no_grad():
            x, _, wanted = samples()
        x_t, sigma, noise = noisy(x)
        clean, fake_logits = fake.model(x_t, sigma, wanted)
        loss = denoising_loss(clean, x, noise, sigma)
        if method.adversarial:
            real = study.data.train.draw(batch, gen)
            real_t, level, _ = noisy(real.images)
            logits = fake.model(real_t, level, real.labels)[1]
            loss = loss + 10 * method.adversarial * discriminator_loss(logits, fake_logits)
        fake.step(loss)
        x, own, wanted = samples()
        loss = distillation_loss(x, wanted, own, fake.model, method, study, gen)
        if method.adversarial:
            x_t, sigma, _ = noisy(x)
            fake.model.requires_grad_(False)
            loss = loss + method.adversarial * generator_loss(fake.model(x_t, sigma, wanted)[1])
            fake.model.requires_grad_(True)
        if method.reward:
            loss = loss + method.reward * F.cross_entropy(study.classifier(x), wanted)
        student.step(loss)
    return student.ema


def compare(
    study: Study, methods: dict[str, Method], scales: tuple[float, ...], title: str, picture: str
) -> dict[str, Table]:
    """The table of the methods beside the teacher: in 16 steps, for each guidance scale, and untrained in one."""
    wanted, panels = study.wanted(), Panels()

    def draws(models: dict[str, tuple[Denoiser, Method]], labels: Tensor, seed: int) -> Panels:
        shown = {}
        for scale in scales:
            name = "teacher, 16 steps" + (f", s = {scale:g}" if scale != 1 else "")
            shown[name] = study.sample(guided(study.base, scale), labels, seed)
        for name, (model, method) in models.items():
            noise = torch.randn(len(labels), 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
            rng = torch.Generator(study.device).manual_seed(seed)
            with torch.no_grad():
                last = len(method.levels) - 1
                shown[name] = generate(model, noise.to(study.device), labels, method, rng, last)[0]
        return shown

    def run(seed: int) -> dict[str, Table]:
        models = {"one step, untrained": (study.base, Method())}
        for k, (name, method) in enumerate(methods.items()):
            models[name] = (distil(study, method, 100 * seed + k, name), method)
        found = draws(models, wanted, 100 * seed + 99)
        if not panels:
            panels.update({"test images": study.real_panel(), **draws(models, IN_PICTURES.to(study.device), 0)})
        return {title: {name: study.test.scores(x, wanted) for name, x in found.items()}}

    tables = study.over_seeds(run)
    study.finish(panels, picture)
    return tables


def main(argv: list[str] | None = None) -> dict[str, Table]:
    methods = {
        "DMD, 1 step": Method(),
        "DMD2, 1 step": Method(adversarial=0.003),
        "DMD2, 2 steps": Method(LEVELS[2], adversarial=0.003, lr=5e-5, ema=0.98),
        "DMD2, 4 steps": Method(LEVELS[4], adversarial=0.003, lr=5e-5, ema=0.98),
    }
    study = Study(options("Distil a diffusion model of Fashion-MNIST into generators of few steps."), argv)
    return compare(study, methods, (1.0,), "Generators of few steps against the test split", "dmd")
