"""A Denoising Diffusion GAN (arXiv 2112.07804) of four steps, beside a GAN of one step and the same networks.

    python examples/fashion ddgan

The generator guesses x0 from x_t, a latent z and the class, `posterior_sample` draws x_{t-1} from the guess, and a
discriminator that knows t and the class tells these pairs (x_{t-1}, x_t) from those of `diffuse_pair`. With one step
that is an ordinary GAN. Both generators start as the base, which guesses the mean of all x0 that x_t may come from, and
is so blurred as it needs many steps: what the discriminator teaches is to guess one of them. Both train for as many
steps, with `discriminator_loss`, `generator_loss` and lazy `r1_penalty`.
"""

from __future__ import annotations

import copy

import torch
from common import Table, Trainer
from torch import Tensor, nn
from tqdm import tqdm

from fashion.data import CLASSES, SIDE
from fashion.networks import HIGHEST, Denoiser, zero
from fashion.study import IN_PICTURES, Panels, Study, options
from fastgen import NoiseSchedule, diffuse_pair, discriminator_loss, generator_loss, posterior_sample, r1_penalty

STEPS, BATCH, EMA, GAMMA, EVERY, LATENT = 400, 32, 0.98, 1.0, 8, 32
LR, CRITIC_LR, ALONE = 2e-5, 5e-4, 0.25  # of the steps the discriminator, which starts from nothing, learns alone
TITLE = "Samples against the test split"


class Generator(nn.Module):
    """x0 = G(x_t, z, t, class): the base, where a small network maps z to a part of what conditions all blocks."""

    def __init__(self, base: Denoiser, schedule: NoiseSchedule, steps: int) -> None:
        super().__init__()
        self.denoiser = copy.deepcopy(base)
        self.map = nn.Sequential(nn.Linear(LATENT, 128), nn.SiLU(), nn.Linear(128, 128))
        zero(self.map[2])
        t = torch.arange(steps + 1)
        alpha, self.sigma = schedule.alpha_t(t).float(), schedule.sigma_t(t).float()
        self.level = (self.sigma / alpha).clamp(max=HIGHEST)  # beyond it the base has seen none

    def forward(self, x_t: Tensor, z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        level, sigma = (v.to(t.device)[t] for v in (self.level, self.sigma))
        noisy = x_t * (level / sigma)[:, None, None, None]
        return self.denoiser.with_features(noisy, level, label, self.map(z))[0].clamp(-1, 1)


class Discriminator(nn.Module):
    """A logit for each patch of a pair (x_{t-1}, x_t), given t and the class."""

    def __init__(self, steps: int, width: int = 32) -> None:
        super().__init__()
        self.inp = nn.Conv2d(2, width, 4, 2, padding=1)
        self.embed = nn.Embedding((steps + 1) * CLASSES, 2 * width)
        self.middle = nn.Conv2d(width, 2 * width, 4, 2, padding=1)
        self.last = nn.Sequential(nn.Conv2d(2 * width, 4 * width, 3), nn.LeakyReLU(0.2), nn.Conv2d(4 * width, 1, 5))

    def forward(self, x_s: Tensor, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        h = nn.functional.leaky_relu(self.inp(torch.cat([x_s, x_t], 1)), 0.2)
        h = self.middle(h) + self.embed(t * CLASSES + label)[:, :, None, None]
        return self.last(nn.functional.leaky_relu(h, 0.2)).flatten(1)


class DenoisingGAN:
    """The two networks and their training step."""

    def __init__(self, steps: int, study: Study, seed: int) -> None:
        torch.manual_seed(seed)  # for the initial weights; all else draws from an explicit generator
        self.steps, self.gen, self.schedule = steps, torch.Generator().manual_seed(seed), NoiseSchedule.ddgan(steps)
        betas = (0.5, 0.9)
        start = Generator(study.base, self.schedule, steps).to(study.device)
        self.generator = Trainer(start, LR, 10, EMA, betas, decay_steps=study.steps(round(STEPS * (1 - ALONE))))
        self.discriminator = Discriminator(steps).to(study.device)
        self.opt = torch.optim.Adam(self.discriminator.parameters(), lr=CRITIC_LR, betas=betas)

    def denoise(self, generator: nn.Module, x_t: Tensor, t: Tensor, label: Tensor, gen: torch.Generator) -> Tensor:
        """x_{t-1} from the generator's guess of x0; the last step is the guess itself."""
        z = torch.randn(len(x_t), LATENT, generator=gen).to(x_t.device)
        noise = torch.randn(x_t.shape, generator=gen).to(x_t.device)
        return posterior_sample(self.schedule, generator(x_t, z, t, label), x_t, t, noise=noise)

    def pairs(self, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = torch.randint(1, self.steps + 1, (len(x0),), generator=self.gen).to(x0.device)
        first, second = (torch.randn(x0.shape, generator=self.gen).to(x0.device) for _ in range(2))
        return *diffuse_pair(self.schedule, x0, t, noise=(first, second)), t

    def step(self, number: int, x0: Tensor, label: Tensor, alone: bool) -> None:
        """Of the discriminator, and of the generator where that is not `alone`."""
        x_s, x_t, t = self.pairs(x0)
        with torch.no_grad():
            fake = self.denoise(self.generator.model, x_t, t, label, self.gen)
        critic, lazy = self.discriminator, number % EVERY == 0
        x_s.requires_grad_(lazy)
        real_logits = critic(x_s, x_t, t, label)
        loss = discriminator_loss(real_logits, critic(fake, x_t, t, label))
        if lazy:
            loss = loss + r1_penalty(real_logits, x_s, gamma=GAMMA, every=EVERY)
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        if alone:
            return
        _, x_t, t = self.pairs(x0)
        fake = self.denoise(self.generator.model, x_t, t, label, self.gen)
        critic.requires_grad_(False)
        self.generator.step(generator_loss(critic(fake, x_t, t, label)))
        critic.requires_grad_(True)

    @torch.no_grad()
    def sample(self, label: Tensor, seed: int) -> Tensor:
        gen = torch.Generator().manual_seed(seed)
        x = torch.randn(len(label), 1, SIDE, SIDE, generator=gen).to(label.device)
        for k in range(self.steps, 0, -1):
            x = self.denoise(self.generator.ema, x, torch.full_like(label, k), label, gen)
        return x


def main(argv: list[str] | None = None) -> dict[str, Table]:
    study, panels = Study(options("Sample Fashion-MNIST in four steps with a Denoising Diffusion GAN."), argv), Panels()
    wanted = study.wanted()

    def run(seed: int) -> dict[str, Table]:
        table: Table = {"floor: training images": study.floor(seed)}
        shown: Panels = {"test images": study.real_panel()}
        for steps, name in ((1, "GAN, 1 step"), (4, "DDGAN, 4 steps")):
            gan = DenoisingGAN(steps, study, 100 * seed + steps)
            start = f"base, {name.partition(', ')[2]}"
            table[start] = study.test.scores(gan.sample(wanted, seed), wanted)
            shown[start] = gan.sample(IN_PICTURES.to(study.device), 0)
            total = study.steps(STEPS)
            for number in tqdm(range(total), desc=name):
                rows = study.data.train.draw(study.batch(BATCH), gan.gen)
                gan.step(number, rows.images, rows.labels, number < ALONE * total)
            table[name] = study.test.scores(gan.sample(wanted, seed), wanted)
            shown[name] = gan.sample(IN_PICTURES.to(study.device), 0)
        if not panels:
            panels.update(shown)
        return {TITLE: table}

    tables = study.over_seeds(run)
    study.finish(panels, "ddgan")
    return tables
