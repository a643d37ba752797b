"""Which modes a generator finds: the KL divergences, GANs and WGAN on mixtures of Gaussians.

    python examples/gan_modes.py            # the whole demo: a minute on a quiet machine
    python examples/gan_modes.py --smoke    # the same path in seconds; its numbers mean nothing

First, one Gaussian is fitted to a mixture of two that are apart. The forward KL(p ‖ q) covers both modes and the gap
between them; the reverse KL(q ‖ p) takes the nearer mode and drops the other. These two are computed from the
densities. The GANs have only samples and a discriminator (`discriminator_loss`), whose logit estimates log p/q:
`generator_loss` of the kind "kl" then follows the reverse KL, "saturating" descends the Jensen-Shannon divergence,
"non_saturating" is what one uses, and WGAN (`clip_weights_`) the Wasserstein distance.

Then networks that could fit all of a ring of eight Gaussians, with R1 (`r1_penalty`) or without, and with clipping:
how many modes get samples, how many of the samples are within three standard deviations of a mode, and how unevenly
the modes share them.

With seed 0 "kl" and "non-saturating" end in the mode that the reverse KL takes, and "saturating" covers both as the
forward KL does: what counts is which divergence the loss descends. On the ring all find all modes, and join them with
samples that are of none, WGAN most: half of its samples are near a mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Table, argument_parser, farewell, plt, print_table, save_picture, start
from torch import Tensor, nn
from tqdm import tqdm

from fastgen import clip_weights_, discriminator_loss, generator_loss, r1_penalty
from fastgen.adversarial.gan import Kind


@dataclass(frozen=True)
class Config:
    """Every number one may want to change; the defaults are the demo's."""

    batch: int = 256
    line_steps: int = 600
    ring_steps: int = 2500
    critic_steps: int = 5  # for each of the generator's: of WGAN, and of all on the line, where log p/q must be right
    clip: float = 0.1
    gamma: float = 0.2  # of R1, on the ring
    r1_every: int = 4
    width: int = 64
    samples: int = 4000


SMOKE = Config(line_steps=5, ring_steps=5, samples=200)

WEIGHTS, MEANS, STD = torch.tensor([0.6, 0.4]), torch.tensor([-2.0, 2.0]), 0.5
RING, RING_STD = 8, 0.05
Draw = Callable[[int, torch.Generator], Tensor]
GRID = torch.linspace(-6, 6, 2401)


def net(inputs: int, outputs: int, width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, outputs),
    )


def log_p(x: Tensor) -> Tensor:
    return torch.logsumexp(WEIGHTS.log() + log_normal(x[..., None], MEANS, torch.tensor(STD)), -1)


def log_normal(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return -0.5 * ((x - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)


class Gaussian(nn.Module):
    """q = N(mean, std²), at first between the modes of p and nearer to its smaller one."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_std = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(-0.5))

    def forward(self, z: Tensor) -> Tensor:
        return self.mean + self.log_std.exp() * z

    def log_prob(self, x: Tensor) -> Tensor:
        return log_normal(x, self.mean, self.log_std.exp())


def line_samples(count: int, gen: torch.Generator) -> Tensor:
    mode = torch.multinomial(WEIGHTS, count, replacement=True, generator=gen)
    return (MEANS[mode] + STD * torch.randn(count, generator=gen))[:, None]


def ring_samples(count: int, gen: torch.Generator) -> Tensor:
    return ring_modes()[torch.randint(RING, (count,), generator=gen)] + RING_STD * torch.randn(count, 2, generator=gen)


def ring_modes() -> Tensor:
    angle = torch.arange(RING) * (2 * math.pi / RING)
    return torch.stack([angle.cos(), angle.sin()], 1)


def fit_by_density(forward: bool, cfg: Config) -> Gaussian:
    """Minimise KL(p ‖ q) or KL(q ‖ p), integrated on a grid."""
    q = Gaussian()
    opt = torch.optim.Adam(q.parameters(), lr=1e-2)
    for _ in range(cfg.line_steps):
        opt.zero_grad()
        divergence(q, forward).backward()
        opt.step()
    return q


def divergence(q: Gaussian, forward: bool) -> Tensor:
    log_q, target = q.log_prob(GRID), log_p(GRID)
    a, b = (target, log_q) if forward else (log_q, target)
    return (a.exp() * (a - b)).sum() * (GRID[1] - GRID[0])


def train_gan(
    generator: nn.Module,
    critic: nn.Module,
    kind: Kind,
    draw_real: Draw,
    draw_noise: Draw,
    steps: int,
    lr: float,
    cfg: Config,
    gamma: float,
    critic_steps: int,
    gen: torch.Generator,
) -> None:
    """The same loop for all kinds: WGAN clips its weights, the others may have R1."""
    wgan = kind == "wgan"
    opts: list[torch.optim.Optimizer] = [  # WGAN's as its paper has it: momentum upsets a clipped critic
        torch.optim.RMSprop(m.parameters(), lr=lr)
        if wgan
        else torch.optim.Adam(m.parameters(), lr=lr, betas=(0.5, 0.9))
        for m in (generator, critic)
    ]
    opt_g, opt_d = opts
    for step in tqdm(range(steps), desc=kind):
        for _ in range(critic_steps):
            lazy = gamma > 0 and not wgan and step % cfg.r1_every == 0
            real = draw_real(cfg.batch, gen).requires_grad_(lazy)
            logits = critic(real)
            loss = discriminator_loss(logits, critic(generator(draw_noise(cfg.batch, gen)).detach()), kind=kind)
            if lazy:
                loss = loss + r1_penalty(logits, real, gamma=gamma, every=cfg.r1_every)
            opt_d.zero_grad()
            loss.backward()
            opt_d.step()
            if wgan:
                clip_weights_(critic.parameters(), cfg.clip)
        opt_g.zero_grad()
        generator_loss(critic(generator(draw_noise(cfg.batch, gen))), kind=kind).backward()
        opt_g.step()


def measure_line(q: Gaussian) -> dict[str, float]:
    normal = torch.distributions.Normal(q.mean, q.log_std.exp())
    p, step = log_p(GRID).exp(), GRID[1] - GRID[0]
    cdf_q = normal.cdf(GRID)
    return {
        "mean": float(q.mean),
        "std": float(q.log_std.exp()),
        "mass at left": float(normal.cdf(torch.tensor(0.0))),
        "KL(p‖q)": float(divergence(q, True)),
        "KL(q‖p)": float(divergence(q, False)),
        "Wasserstein-1": float((cdf_q - (p * step).cumsum(0)).abs().sum() * step),
    }


def measure_ring(x: Tensor) -> dict[str, float]:
    distance, mode = torch.cdist(x, ring_modes()).min(1)
    good = distance < 3 * RING_STD
    share = torch.bincount(mode, minlength=RING) / len(x)
    return {
        "modes hit": float((torch.bincount(mode[good], minlength=RING) >= 0.01 * len(x)).sum()),
        "near a mode": float(good.double().mean()),
        "KL to uniform": float(torch.special.xlogy(share, share * RING).sum()),
    }


def draw(fits: dict[str, Gaussian], rings: dict[str, Tensor], path: Path) -> None:
    fig, axes = plt.subplots(
        1, 1 + len(rings), figsize=(4.5 + 2.6 * len(rings), 2.8), width_ratios=[1.7] + [1] * len(rings)
    )
    axes[0].fill_between(GRID, log_p(GRID).exp(), color="0.85", label="data")
    for name, q in fits.items():
        axes[0].plot(GRID, q.log_prob(GRID).exp(), label=name, lw=1.2)
    axes[0].legend(fontsize=7)
    axes[0].set_ylim(0, 0.9)
    axes[0].set_title("one Gaussian for two modes", fontsize=9)
    for ax, (name, x) in zip(axes[1:], rings.items(), strict=True):
        ax.scatter(*x[:1500].T, s=1)
        ax.scatter(*ring_modes().T, marker="+", color="black")
        ax.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), aspect="equal", xticks=[], yticks=[])
        ax.set_title(name, fontsize=9)
    fig.tight_layout()
    save_picture(fig, path)


def main(argv: list[str] | None = None) -> dict[str, Table]:
    """Run the demo; return its two tables as {name: {row: {column: number}}}."""
    args = start(argument_parser("Which modes generators find."), argv)
    cfg = SMOKE if args.smoke else Config()
    torch.manual_seed(args.seed)
    gen = torch.Generator().manual_seed(args.seed)
    fits = {"forward KL": fit_by_density(True, cfg), "reverse KL": fit_by_density(False, cfg)}
    line: list[tuple[str, Kind]] = [
        ("GAN, kl", "kl"),
        ("GAN, saturating", "saturating"),
        ("GAN, non-saturating", "non_saturating"),
        ("WGAN, clipped", "wgan"),
    ]
    for name, kind in line:
        fits[name] = Gaussian()
        train_gan(
            fits[name],
            net(1, 1, cfg.width),
            kind,
            line_samples,
            lambda n, g: torch.randn(n, 1, generator=g),
            cfg.line_steps,
            5e-3 if kind == "wgan" else 1e-2,
            cfg,
            0.0,
            cfg.critic_steps,
            gen,
        )
    rings = {"data": ring_samples(cfg.samples, gen)}
    kinds: list[tuple[str, Kind, float]] = [
        ("non-saturating", "non_saturating", 0.0),
        ("non-saturating + R1", "non_saturating", cfg.gamma),
        ("kl + R1", "kl", cfg.gamma),
        ("WGAN, clipped", "wgan", 0.0),
    ]
    for name, kind, gamma in kinds:
        generator = net(2, 2, cfg.width)
        noise = lambda n, g: torch.randn(n, 2, generator=g)  # noqa: E731
        train_gan(
            generator,
            net(2, 1, cfg.width),
            kind,
            ring_samples,
            noise,
            cfg.ring_steps,
            1e-3,
            cfg,
            gamma,
            cfg.critic_steps if kind == "wgan" else 1,
            gen,
        )
        with torch.no_grad():
            rings[name] = generator(noise(cfg.samples, gen))
    with torch.no_grad():
        picture = args.out / "gan_modes.png"
        draw(fits, rings, picture)
        tables = {
            "line": {name: measure_line(q) for name, q in fits.items()},
            "ring": {name: measure_ring(x) for name, x in rings.items()},
        }
    print_table("One Gaussian fitted to a mixture of two: N(-2, 1/4) with weight 0.6 and N(2, 1/4)", tables["line"])
    print_table("A ring of eight Gaussians", tables["ring"])
    farewell(args, picture)
    return tables


if __name__ == "__main__":
    main()
