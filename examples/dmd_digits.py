"""Distil a diffusion model of real digits into a one-step generator.

    python examples/dmd_digits.py               # the whole demo: a few minutes on a quiet machine
    python examples/dmd_digits.py --smoke       # the same path in seconds; its numbers mean nothing
    python examples/dmd_digits.py --reward 0    # without the DMDR generator

The script

1. trains a small class-conditional EDM denoiser on scikit-learn's digits: the *teacher*;
2. takes the teacher's own one-step sampler, x = D(s0 z, s0), as a generator and distils the teacher into it with
   `dmd_loss` (DMD2, arXiv 2405.14867), a fake-score network following the generator (two steps for each of its own);
3. does the same with DMD2's discriminator of noised real and generated digits, a layer on the fake network's features;
4. does the same with guidance, once by `dmd_loss` and once by `decoupled_dmd_loss` (arXiv 2511.22677), which takes
   guidance at levels cleaner than the generator's input and distribution matching at all levels;
5. with `--reward w > 0` also adds DMDR's reward term (arXiv 2511.13649): here the classifier's log-probability;
6. prints Frechet distances to the real digits (lower is better), between features of a small classifier and between
   pixels, and how often that classifier sees the wanted digit.

With seed 0 DMD brings the feature distance of the one-step sampler from 11.1 to 1.4 (the teacher's, with 18 Heun
steps: 0.5) and the pixel distance from 3.4 to 0.50 (0.07): most of the way, but nothing here beats the teacher.
DMD2's discriminator brings them to 0.91 and 0.31, from 1.44 and 0.50. It needs ten times the weight that it has on
ImageNet; with that one it gained little (1.54 to 1.27 and 0.50 to 0.47 in one pair of runs, 1.60 to 1.60 and 0.52 to
0.47 in another; a feature distance varies by 0.1 from run to run).
Guidance trades diversity for typical digits: it raises accuracy and distances, in the teacher too, which is the row
to compare with; the generators lose more than it does (about 5 by DMD, 3.1 to 3.4 by Decoupled DMD, against 1.1). The
reward is the log-probability of the very classifier that measures the accuracy, so that number shows that the term
works, not that the digits are better. All distances are to the training images.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import Table, Trainer, accuracy, argument_parser, farewell, print_table, start
from digits import (
    IN_PICTURES,
    PIXELS,
    Classifier,
    Denoiser,
    denoising_loss,
    distances,
    edm_schedule,
    load_images,
    sample,
    save_grid,
    train_classifier,
    train_denoiser,
    unlabelled,
)
from torch import Tensor, nn
from tqdm import tqdm

from fastgen import (
    NoiseSchedule,
    ScorePair,
    decoupled_dmd_loss,
    discriminator_loss,
    dmd_loss,
    generator_loss,
    renoise_times,
)


@dataclass(frozen=True)
class Config:
    """Every number one may want to change; the defaults are the demo's."""

    batch: int = 256
    teacher_steps: int = 5000
    teacher_lr: float = 1e-3
    teacher_ema: float = 0.999
    drop_label: float = 0.1
    level: float = 3.0  # s0: the generator's input is s0 times noise
    steps: int = 500  # of the generator
    fake_steps: int = 2  # for each of the generator's: the fake scores must follow it
    generator_lr: float = 3e-4
    fake_lr: float = 1e-3
    adversarial: float = 0.03  # the weight of the generator's adversarial loss, ten times that of DMD2 on ImageNet
    discriminator: float = 0.01  # that of the discriminator's loss beside the fake network's: as there
    generator_ema: float = 0.98
    lowest: float = 0.05  # the range of levels at which real and fake scores are compared
    highest: float = 5.0
    guidance_scale: float = 1.5
    classifier_steps: int = 600
    eval_samples: int = 5000
    sampler_steps: int = 18


SMOKE = Config(batch=64, teacher_steps=20, steps=3, classifier_steps=10, eval_samples=128, sampler_steps=4)


@dataclass(frozen=True)
class Method:
    """How a generator is distilled."""

    guidance_scale: float = 1.0
    decoupled: bool = False
    reward: float = 0.0
    adversarial: bool = False


class FakeScore(nn.Module):
    """The fake network and DMD2's discriminator, which is one layer on its features and trains them too."""

    def __init__(self, teacher: Denoiser) -> None:
        super().__init__()
        self.denoiser = copy.deepcopy(teacher)
        self.head = nn.Linear(teacher.out.in_features, 1)

    def forward(self, noisy: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        return self.denoiser(noisy, sigma, label)

    def logits(self, noisy: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        return self.head(self.denoiser.features(noisy, sigma, label))


def generate(generator: Denoiser, z: Tensor, labels: Tensor, cfg: Config) -> Tensor:
    return generator(cfg.level * z, z.new_full((len(z),), cfg.level), labels)


def levels(cfg: Config, gen: torch.Generator, cleaner: bool = False) -> Tensor:
    """Noise levels, uniform in their logarithm; `cleaner` than the generator's input if asked."""
    ratio = torch.tensor(cfg.highest / cfg.lowest)
    own = torch.log(torch.tensor(cfg.level / cfg.lowest)) / torch.log(ratio)
    times = own.expand(cfg.batch) if cleaner else None
    tau = renoise_times(
        cfg.batch, "cleaner" if cleaner else "uniform", low=0.0, high=1.0, generator_times=times, generator=gen
    )
    return cfg.lowest * ratio**tau


def distillation_loss(
    x: Tensor,
    labels: Tensor,
    real: Denoiser,
    fake: FakeScore,
    method: Method,
    schedule: NoiseSchedule,
    cfg: Config,
    gen: torch.Generator,
) -> Tensor:
    """The gradient that moves x from what the fake network knows to what the teacher knows."""
    one = torch.ones(cfg.batch)

    def renoised(sigma: Tensor) -> Tensor:
        return schedule.add_noise(x.detach(), torch.randn(x.shape, generator=gen), sigma)

    sigma = levels(cfg, gen)
    x_t = renoised(sigma)
    with torch.no_grad():
        real_cond, fake_cond = real(x_t, sigma, labels), fake(x_t, sigma, labels)
        real_uncond = real(x_t, sigma, unlabelled(labels)) if method.guidance_scale != 1 else None
    if not method.decoupled:
        return dmd_loss(
            x,
            x_t,
            real_cond,
            fake_cond,
            alpha_t=one,
            sigma_t=sigma,
            prediction_type="sample",
            real_uncond=real_uncond,
            guidance_scale=method.guidance_scale,
        )
    cleaner = levels(cfg, gen, cleaner=True)
    x_c = renoised(cleaner)
    with torch.no_grad():
        ca = ScorePair(x_c, one, cleaner, real(x_c, cleaner, labels), real(x_c, cleaner, unlabelled(labels)))
    dm = ScorePair(x_t, one, sigma, real_cond, fake_cond)
    return decoupled_dmd_loss(x, dm, ca, guidance_scale=method.guidance_scale, prediction_type="sample")


def distil(
    teacher: Denoiser,
    method: Method,
    images: Tensor,
    labels: Tensor,
    schedule: NoiseSchedule,
    classifier: Classifier,
    cfg: Config,
    seed: int,
    name: str,
) -> Denoiser:
    """A one-step generator; it and the fake network start from the teacher's weights."""
    gen = torch.Generator().manual_seed(seed)
    student = Trainer(teacher, cfg.generator_lr, 1, cfg.generator_ema, betas=(0.0, 0.99))
    fake = Trainer(FakeScore(teacher), cfg.fake_lr, 1, 0.0, betas=(0.0, 0.99))

    def noisy(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sigma, noise = levels(cfg, gen), torch.randn(x.shape, generator=gen)
        return schedule.add_noise(x, noise, sigma), sigma, noise

    def samples() -> tuple[Tensor, Tensor]:
        wanted = labels[torch.randint(len(labels), (cfg.batch,), generator=gen)]
        return generate(student.model, torch.randn(cfg.batch, PIXELS, generator=gen), wanted, cfg), wanted

    for _ in tqdm(range(cfg.steps), desc=name):
        for _ in range(cfg.fake_steps):
            with torch.no_grad():
                x, wanted = samples()
            x_t, sigma, noise = noisy(x)
            loss = denoising_loss(fake.model(x_t, sigma, wanted), x, noise, sigma, schedule)
            if method.adversarial:
                rows = torch.randint(len(images), (cfg.batch,), generator=gen)
                real_t, level, _ = noisy(images[rows])
                real_logits = fake.model.logits(real_t, level, labels[rows])
                loss = loss + cfg.discriminator * discriminator_loss(real_logits, fake.model.logits(x_t, sigma, wanted))
            fake.step(loss)
        x, wanted = samples()
        loss = distillation_loss(x, wanted, teacher, fake.model, method, schedule, cfg, gen)
        if method.reward > 0:
            loss = loss + method.reward * F.cross_entropy(classifier(x), wanted)
        if method.adversarial:
            x_t, sigma, _ = noisy(x)
            loss = loss + cfg.adversarial * generator_loss(fake.model.logits(x_t, sigma, wanted))
        student.step(loss)
    return student.ema


def main(argv: list[str] | None = None) -> Table:
    """Run the demo; return the table as {row: {column: number}}."""
    parser = argument_parser("Distil a diffusion model of the digits into a one-step generator.", threads=2)
    parser.add_argument("--reward", type=float, default=0.005, help="weight of DMDR's reward term; 0 leaves it out")
    args = start(parser, argv)
    cfg = SMOKE if args.smoke else Config()
    images, labels = load_images()
    torch.manual_seed(args.seed)  # for the initial weights; all else draws from explicit generators
    gen = torch.Generator().manual_seed(10 * args.seed)
    schedule = edm_schedule(images)
    classifier = train_classifier(images, labels, cfg.classifier_steps, gen)
    teacher = train_denoiser(
        Denoiser(schedule.sigma_data),
        images,
        labels,
        schedule,
        gen,
        steps=cfg.teacher_steps,
        batch=cfg.batch,
        lr=cfg.teacher_lr,
        ema=cfg.teacher_ema,
        drop_label=cfg.drop_label,
        desc="teacher",
    )

    s = cfg.guidance_scale
    methods = {"DMD": Method(), "DMD + discriminator": Method(adversarial=True)}
    methods |= {f"DMD, s = {s:g}": Method(s), f"Decoupled DMD, s = {s:g}": Method(s, decoupled=True)}
    if args.reward > 0:
        methods[f"DMD + reward ({args.reward:g})"] = Method(reward=args.reward)
    one_step = {"one step, untrained": teacher}
    for name, method in methods.items():
        one_step[name] = distil(teacher, method, images, labels, schedule, classifier, cfg, 10 * args.seed + 1, name)

    def draw(wanted: Tensor) -> dict[str, Tensor]:
        def noise() -> torch.Generator:
            return torch.Generator().manual_seed(10 * args.seed + 2)

        z = torch.randn(len(wanted), PIXELS, generator=noise())
        with torch.no_grad():
            rows = {name: generate(model, z, wanted, cfg) for name, model in one_step.items()}
        for scale in (1.0, s):
            name = f"teacher, {cfg.sampler_steps} steps" + (f", s = {s:g}" if scale != 1 else "")
            rows[name] = sample(teacher, wanted, cfg.sampler_steps, noise(), scale)
        return rows

    wanted = labels[torch.randint(len(labels), (cfg.eval_samples,), generator=gen)]
    table = {
        name: distances(x, images, classifier) | {"accuracy": accuracy(classifier(x), wanted)}
        for name, x in draw(wanted).items()
    }
    picture = args.out / "dmd_digits.png"
    save_grid(draw(IN_PICTURES), picture)
    print_table("Frechet distances to the real digits (lower is better), accuracy of the wanted digit", table)
    farewell(args, picture)
    return table


if __name__ == "__main__":
    main()
