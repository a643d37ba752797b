"""Sample real digits in four steps with a Denoising Diffusion GAN.

    python examples/ddgan_digits.py            # the whole demo: two and a half minutes on a quiet machine
    python examples/ddgan_digits.py --smoke    # the same path in seconds; its numbers mean nothing

A diffusion model needs many steps because each of them draws from a Gaussian. A Denoising Diffusion GAN (arXiv
2112.07804) takes a few big ones: its generator guesses x0 from x_t and a latent z, `posterior_sample` draws x_{t-1}
from the guess, and a discriminator that knows t tells these pairs (x_{t-1}, x_t) from those of `diffuse_pair`.
Without classes, the script trains on scikit-learn's digits

1. a Denoising Diffusion GAN of four steps, with `discriminator_loss`, `generator_loss` and lazy `r1_penalty`;
2. the same two networks with one step, which is an ordinary GAN, for as many steps;
3. an ordinary diffusion model, sampled in 18 of Heun's steps (35 calls of its network),

and prints Frechet distances to the real digits (lower is better) between features of a small classifier and between
pixels; mode coverage: how many of the ten classes make up at least 1 % of the samples, the KL divergence of the classes
from uniform (both by that classifier), and the share of the training images that are nearest to some sample; and the
seconds that 1000 samples take. "real digits" draws as many from the data themselves: there a perfect model would be.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import Table, Trainer, argument_parser, farewell, print_table, start
from digits import (
    CLASSES,
    PIXELS,
    Classifier,
    Denoiser,
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

from fastgen import NoiseSchedule, diffuse_pair, discriminator_loss, generator_loss, posterior_sample, r1_penalty


@dataclass(frozen=True)
class Config:
    """Every number one may want to change; the defaults are the demo's."""

    batch: int = 128
    steps: int = 6000  # of the discriminator and of the generator
    lr: float = 1e-3
    ema: float = 0.995
    gamma: float = 0.05  # of R1
    r1_every: int = 8
    latent: int = 32
    diffusion_steps: int = 4000
    diffusion_batch: int = 256
    diffusion_lr: float = 1e-3
    classifier_steps: int = 600
    eval_samples: int = 5000
    sampler_steps: int = 18


SMOKE = Config(
    batch=32, steps=6, r1_every=2, diffusion_steps=10, classifier_steps=10, eval_samples=100, sampler_steps=4
)


class Blocks(nn.Module):
    """A residual MLP that is told the step t."""

    def __init__(self, inputs: int, outputs: int, steps: int, width: int = 128, blocks: int = 3) -> None:
        super().__init__()
        self.embed_step = nn.Embedding(steps + 1, width)
        self.inp, self.out = nn.Linear(inputs, width), nn.Linear(width, outputs)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(blocks)
        )

    def forward(self, t: Tensor, *inputs: Tensor) -> Tensor:
        h = self.inp(torch.cat(inputs, 1)) + self.embed_step(t)
        for block in self.blocks:
            h = h + block(h)
        return self.out(F.silu(h))


class DenoisingGAN:
    """The generator x0 = G(x_t, z, t), the discriminator ℓ(x_{t-1}, x_t, t), and their training step."""

    def __init__(self, steps: int, cfg: Config, gen: torch.Generator) -> None:
        self.steps, self.cfg, self.gen = steps, cfg, gen
        self.schedule = NoiseSchedule.ddgan(steps)
        betas = (0.5, 0.9)
        self.generator = Trainer(Blocks(PIXELS + cfg.latent, PIXELS, steps), cfg.lr, 1, cfg.ema, betas)
        self.discriminator = Blocks(2 * PIXELS, 1, steps)
        self.opt = torch.optim.Adam(self.discriminator.parameters(), lr=cfg.lr, betas=betas, fused=True)

    def denoise(self, generator: nn.Module, x_t: Tensor, t: Tensor, rng: torch.Generator) -> Tensor:
        """x_{t-1} from the generator's guess of x0; the last step is the guess itself."""
        z = torch.randn(len(x_t), self.cfg.latent, generator=rng)
        x0 = torch.tanh(generator(t, x_t, z))
        return posterior_sample(self.schedule, x0, x_t, t, generator=rng)

    def step(self, number: int, x0: Tensor) -> None:
        t = torch.randint(1, self.steps + 1, (len(x0),), generator=self.gen)
        x_s, x_t = diffuse_pair(self.schedule, x0, t, generator=self.gen)
        with torch.no_grad():
            fake = self.denoise(self.generator.model, x_t, t, self.gen)
        critic, lazy = self.discriminator, number % self.cfg.r1_every == 0
        x_s.requires_grad_(lazy)
        real_logits = critic(t, x_s, x_t)
        loss = discriminator_loss(real_logits, critic(t, fake, x_t))
        if lazy:
            loss = loss + r1_penalty(real_logits, x_s, gamma=self.cfg.gamma, every=self.cfg.r1_every)
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()

        t = torch.randint(1, self.steps + 1, (len(x0),), generator=self.gen)
        _, x_t = diffuse_pair(self.schedule, x0, t, generator=self.gen)
        fake = self.denoise(self.generator.model, x_t, t, self.gen)
        critic.requires_grad_(False)
        self.generator.step(generator_loss(critic(t, fake, x_t)))
        critic.requires_grad_(True)

    @torch.no_grad()
    def sample(self, count: int, rng: torch.Generator) -> Tensor:
        x = torch.randn(count, PIXELS, generator=rng)
        for k in range(self.steps, 0, -1):
            x = self.denoise(self.generator.ema, x, torch.full((count,), k), rng)
        return x


def train_gan(steps: int, images: Tensor, cfg: Config, seed: int) -> DenoisingGAN:
    gen = torch.Generator().manual_seed(seed)
    gan = DenoisingGAN(steps, cfg, gen)
    for number in tqdm(range(cfg.steps), desc=f"GAN of {steps} step(s)"):
        gan.step(number, images[torch.randint(len(images), (cfg.batch,), generator=gen)])
    return gan


def measure(x: Tensor, images: Tensor, classifier: Classifier) -> dict[str, float]:
    """One row of the table, but for its time."""
    share = torch.bincount(classifier(x).argmax(1), minlength=CLASSES) / len(x)
    nearest = torch.cdist(x, images).argmin(1)
    return distances(x, images, classifier) | {
        "classes": float((share >= 0.01).sum()),
        "KL to uniform": float(torch.special.xlogy(share, share * CLASSES).sum()),
        "images covered": float(len(nearest.unique()) / len(images)),
    }


def main(argv: list[str] | None = None) -> Table:
    """Run the demo; return the table as {row: {column: number}}."""
    parser = argument_parser("Sample digits in four steps with a Denoising Diffusion GAN.")
    parser.add_argument("--steps", type=int, default=4, help="of the Denoising Diffusion GAN")
    args = start(parser, argv)
    cfg = SMOKE if args.smoke else Config()
    images, labels = load_images()
    torch.manual_seed(args.seed)  # for the initial weights; all else draws from explicit generators
    gen = torch.Generator().manual_seed(10 * args.seed)
    classifier = train_classifier(images, labels, cfg.classifier_steps, gen)
    schedule = edm_schedule(images)
    samplers: dict[str, Callable[[int, torch.Generator], Tensor]] = {
        "real digits": lambda n, rng: images[torch.randint(len(images), (n,), generator=rng)]
    }
    diffusion = train_denoiser(
        Denoiser(schedule.sigma_data),
        images,
        labels,
        schedule,
        gen,
        steps=cfg.diffusion_steps,
        batch=cfg.diffusion_batch,
        lr=cfg.diffusion_lr,
        ema=0.999,
        drop_label=1.0,
        desc="diffusion model",
    )

    def diffuse(count: int, rng: torch.Generator) -> Tensor:
        return sample(diffusion, unlabelled(torch.zeros(count, dtype=torch.long)), cfg.sampler_steps, rng)

    samplers[f"diffusion model, {cfg.sampler_steps} steps"] = diffuse
    for steps in (args.steps, 1):
        name = "GAN, 1 step" if steps == 1 else f"DDGAN, {steps} steps"
        samplers[name] = train_gan(steps, images, cfg, 10 * args.seed + steps).sample

    table: Table = {}
    for name, draw in samplers.items():
        draw(1000, gen)  # warms up
        before = time.perf_counter()
        draw(1000, gen)
        seconds = time.perf_counter() - before
        x = draw(cfg.eval_samples, torch.Generator().manual_seed(10 * args.seed + 9))
        table[name] = measure(x, images, classifier) | {"s / 1000": seconds}
    panels = {name: draw(80, torch.Generator().manual_seed(10 * args.seed + 8)) for name, draw in samplers.items()}
    picture = args.out / "ddgan_digits.png"
    save_grid(panels, picture)
    print_table("Digits without classes: Frechet distances to the real ones (lower is better), coverage, speed", table)
    farewell(args, picture)
    return table


if __name__ == "__main__":
    main()
