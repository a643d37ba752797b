"""A Denoising Diffusion GAN (arXiv 2112.07804) of four steps, beside a GAN of one step and the same networks.

    python examples/fashion ddgan

The generator guesses x0 from x_t, noise and the class, `posterior_sample` draws x_{t-1} from the guess, and a
discriminator that knows t and the class tells these pairs (x_{t-1}, x_t) from those of `diffuse_pair`. With one step
that is an ordinary GAN. Both train for as many steps, with `discriminator_loss`, `generator_loss` and lazy
`r1_penalty`.
"""

from __future__ import annotations

import torch
from common import Table, Trainer
from torch import Tensor, nn
from tqdm import tqdm

from fashion.data import CLASSES, SIDE
from fashion.networks import UNet
from fashion.study import IN_PICTURES, Panels, Study, options
from fastgen import NoiseSchedule, diffuse_pair, discriminator_loss, generator_loss, posterior_sample, r1_penalty

STEPS, BATCH, LR, EMA, GAMMA, EVERY = 500, 64, 5e-4, 0.99, 0.1, 8
TITLE = "Samples against the test split"


class Generator(nn.Module):
    """x0 = G(x_t, z, t, class), with a second image of noise for z."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.net, self.steps = UNet(inputs=2, width=32), steps
        for parameter in self.net.out[2].parameters():
            nn.init.normal_(parameter, std=0.02)  # not 0: all images would begin the same

    def forward(self, x_t: Tensor, z: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return torch.tanh(self.net(torch.cat([x_t, z], 1), t / self.steps, label)[0])


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
        self.generator = Trainer(Generator(steps).to(study.device), LR, 1, EMA, betas)
        self.discriminator = Discriminator(steps).to(study.device)
        self.opt = torch.optim.Adam(self.discriminator.parameters(), lr=LR, betas=betas)

    def denoise(self, generator: nn.Module, x_t: Tensor, t: Tensor, label: Tensor, gen: torch.Generator) -> Tensor:
        """x_{t-1} from the generator's guess of x0; the last step is the guess itself."""
        z = torch.randn(x_t.shape, generator=gen).to(x_t.device)
        noise = torch.randn(x_t.shape, generator=gen).to(x_t.device)
        return posterior_sample(self.schedule, generator(x_t, z, t, label), x_t, t, noise=noise)

    def pairs(self, x0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        t = torch.randint(1, self.steps + 1, (len(x0),), generator=self.gen).to(x0.device)
        first, second = (torch.randn(x0.shape, generator=self.gen).to(x0.device) for _ in range(2))
        return *diffuse_pair(self.schedule, x0, t, noise=(first, second)), t

    def step(self, number: int, x0: Tensor, label: Tensor) -> None:
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
            for number in tqdm(range(study.steps(STEPS)), desc=name):
                rows = study.data.train.draw(study.batch(BATCH), gan.gen)
                gan.step(number, rows.images, rows.labels)
            table[name] = study.test.scores(gan.sample(wanted, seed), wanted)
            shown[name] = gan.sample(IN_PICTURES.to(study.device), 0)
        if not panels:
            panels.update(shown)
        return {TITLE: table}

    tables = study.over_seeds(run)
    study.finish(panels, "ddgan")
    return tables
