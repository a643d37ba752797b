"""Analytic-DPM (arXiv 2201.06503) on scikit-learn's digits: what optimal variances and trajectories are worth.

    python examples/analytic_dpm_digits.py            # the whole demo: a minute and a half on a quiet machine
    python examples/analytic_dpm_digits.py --smoke    # the same path in seconds; its numbers mean nothing

Two DDPMs of N = 1000 steps, both told the class: a network trained on the digits, and the exact score of Gaussians, one
fitted to each class. Of each, the moments are gathered with ``ScoreMoments``; then K = 10, 25 and 50 steps are sampled
with the usual variances and with optimal ones, on evenly spaced timesteps and on the trajectory with the best bound.

What to look for; it held for seeds 0 and 1:

- *The likelihood bound* orders as theory says, for both models: at every K analytic variances have the best one, then
  β, then β̃, which is far off where steps are few; and the optimal trajectory beats even spacing.
- *Frechet distances* of the exact score follow at K = 10, on even steps and with the noise as it comes ("no cap"):
  Analytic-DDPM is at half the better DDPM's, Analytic-DDIM at 0.6 of DDIM's.
- *With the network* that is gone: Analytic-DDIM is farther than DDIM, and Analytic-DDPM level with the better DDPM. The
  optimal variance is what theory leaves uncertain of the data given x_t, which is right for likelihood; as noise, with
  the network's errors on top, it has to be undone by the calls that follow, and after the last steps there are few.
- *The last noise* of all, into the least noisy timestep, is therefore capped, as in the paper, at a grey level; but for
  "no cap" all rows do so. Then Analytic-DDIM is nearer than DDIM with the network too, except at K = 50. Where
  the score is exact that noise belonged there, and analytic variances lose by the cap at small K. Most is gained by β,
  whose last noise is far too large: with a cap it is the best DDPM here.
- *Optimal trajectories win the bound*, by spending steps at low noise, where likelihood is made. Distances go either
  way, and with the exact score's DDIM always the wrong one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Table, Trainer, argument_parser, farewell, frechet, plt, print_table, save_picture, start
from digits import CLASSES, PIXELS, Denoiser, load_images
from torch import Tensor
from tqdm import tqdm

import fastgen
from fastgen import NoiseSchedule, ScoreMoments

N = 1000
LEVELS = 17  # of a digit's pixel, evenly spaced from -1 to 1
PIXEL_CAP = 2 / 255 * math.sqrt(math.pi / 2)  # the paper's, for one level of an 8-bit image
METHODS = ("DDPM β", "DDPM β̃", "DDIM", "Analytic-DDPM", "Analytic-DDIM")
TRAJECTORIES = ("even", "optimal")

Model = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_t, t, class) -> noise


@dataclass(frozen=True)
class Config:
    """Every number one may want to change; the defaults are the demo's."""

    train_steps: int = 4000
    batch: int = 256
    lr: float = 2e-3
    ema: float = 0.999
    moment_samples: int = 50  # for each timestep
    eval_samples: int = 1500
    steps: tuple[int, ...] = (10, 25, 50)


SMOKE = Config(train_steps=5, moment_samples=3, eval_samples=100, steps=(4, 6))


class NoisePredictor(Denoiser):
    """The examples' denoiser as a DDPM's network: x_t and an integer t in, the noise out."""

    def __init__(self, schedule: NoiseSchedule, sigma_data: float) -> None:
        super().__init__(sigma_data)
        self.schedule = schedule

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        alpha, sigma = self.schedule.alpha_t(t), self.schedule.sigma_t(t)
        x0 = super().forward(x / alpha[:, None], sigma / alpha, label)
        return (x - alpha[:, None] * x0) / sigma[:, None]


def train(schedule: NoiseSchedule, images: Tensor, labels: Tensor, cfg: Config, gen: torch.Generator) -> Model:
    """DDPM's loss: the error of the noise, uniform in t."""
    trainer = Trainer(NoisePredictor(schedule, float(images.std())), cfg.lr, 100, cfg.ema)
    for _ in tqdm(range(cfg.train_steps), desc="network"):
        rows = torch.randint(len(images), (cfg.batch,), generator=gen)
        t, noise = schedule.sample_t(cfg.batch, generator=gen), torch.randn(cfg.batch, PIXELS, generator=gen)
        x_t = schedule.add_noise(images[rows], noise, t)
        trainer.step(fastgen.elbo_error(trainer.model(x_t, t, labels[rows]), noise).mean())
    return trainer.ema


class ClassGaussians:
    """A Gaussian fitted to each class: samples, and the exact noise prediction."""

    def __init__(self, schedule: NoiseSchedule, images: Tensor, labels: Tensor) -> None:
        self.schedule = schedule
        self.mean = torch.stack([images[labels == c].mean(0) for c in range(CLASSES)])
        covariances = torch.stack([torch.cov(images[labels == c].T.double()) for c in range(CLASSES)])
        values, vectors = torch.linalg.eigh(covariances)
        self.variance = values.clamp(min=1e-4).float()  # pixels that never change would be points
        self.axes = vectors.float()

    def sample(self, label: Tensor, gen: torch.Generator) -> Tensor:
        z = torch.randn(len(label), PIXELS, generator=gen) * self.variance[label].sqrt()
        return self.mean[label] + self._rotate(z, label, self.axes.mT)

    def __call__(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        alpha, sigma = (k(t)[:, None] for k in (self.schedule.alpha_t, self.schedule.sigma_t))
        y = self._rotate(x - alpha * self.mean[label], label, self.axes)
        return self._rotate(y * sigma / (alpha**2 * self.variance[label] + sigma**2), label, self.axes.mT)

    def _rotate(self, x: Tensor, label: Tensor, axes: Tensor) -> Tensor:
        out = torch.empty_like(x)
        for c in range(CLASSES):
            rows = label == c
            out[rows] = x[rows] @ axes[c]
        return out


@dataclass(frozen=True)
class Subject:
    """A model, data that it is a model of, and what the samplers and the bound need to know."""

    name: str
    model: Model
    reference: Tensor
    bounded: bool  # data in [-1, 1]
    gathered: Tensor  # ms_eps as it was gathered
    ms_eps: Tensor  # and regularised: at high noise the raw one says nothing
    mse_eps: Tensor


@torch.no_grad()
def gather(
    schedule: NoiseSchedule,
    model: Model,
    draw: Callable[[int], tuple[Tensor, Tensor]],
    samples: int,
    gen: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean squares of the predictions, the same regularised, and those of their errors: `samples` a timestep."""
    moments, errors = ScoreMoments(N), ScoreMoments(N)
    t = torch.arange(N)
    for _ in tqdm(range(samples), desc="moments"):
        x0, label = draw(N)
        noise = torch.randn(x0.shape, generator=gen)
        pred = model(schedule.add_noise(x0, noise, t), t, label)
        moments.update(t, pred)
        errors.update(t, noise - pred)
    return moments.ms_eps, fastgen.regularize_moments(schedule, moments.ms_eps), errors.ms_eps


def nodes_of(schedule: NoiseSchedule, subject: Subject, steps: int, trajectory: str) -> Tensor:
    if trajectory == "even":
        return torch.linspace(1, N, steps).round().long()
    found = fastgen.analytic_trajectory(schedule, subject.ms_eps, steps).steps
    assert isinstance(found, Tensor)
    return found


def sample(
    schedule: NoiseSchedule, subject: Subject, nodes: Tensor, method: str, cap: float | None, label: Tensor, seed: int
) -> Tensor:
    """From noise to data over `nodes`; `cap` bounds the standard deviation of the last noise."""
    gen = torch.Generator().manual_seed(seed)
    return fastgen.sample(
        lambda x, t: subject.model(x, t, label),
        schedule,
        torch.randn(len(label), PIXELS, generator=gen),
        method=method.split()[0].lower(),  # type: ignore[arg-type]
        steps=nodes,
        variance="beta" if method == "DDPM β" else "beta_tilde",
        ms_eps=subject.ms_eps if "Analytic" in method else None,
        max_last_std=cap,
        data_range=(-1.0, 1.0) if subject.bounded else None,
        generator=gen,
        progress=False,
    )


def distances(schedule: NoiseSchedule, subject: Subject, cfg: Config, label: Tensor, seed: int) -> Table:
    """Frechet distances between pixels: all methods with the last noise capped, and what that changes."""
    runs: list[tuple[str, str, float | None]] = list(itertools.product(METHODS, TRAJECTORIES, (PIXEL_CAP,)))
    runs += [(m, "even", None) for m in METHODS if m not in ("DDIM", "DDPM β̃")]
    table: Table = {}
    for method, trajectory, cap in tqdm(runs, desc=f"samples, {subject.name}"):
        row = {}
        for k in cfg.steps:
            x = sample(schedule, subject, nodes_of(schedule, subject, k, trajectory), method, cap, label, seed)
            row[f"K = {k}"] = frechet(x, subject.reference)
        table[f"{method}, {trajectory}{', no cap' if cap is None else ''}"] = row
    return table


def bounds(schedule: NoiseSchedule, subject: Subject, cfg: Config) -> Table:
    """Bits per dimension: of a pixel's level for the digits, of a density for the Gaussians."""
    names = {"DDPM β": "beta", "DDPM β̃": "beta_tilde", "Analytic-DDPM": "analytic"}
    table: Table = {}
    for (name, variance), trajectory in itertools.product(names.items(), TRAJECTORIES):
        table[f"{name}, {trajectory}"] = {
            f"K = {k}": float(
                fastgen.variational_bound(
                    schedule,
                    subject.ms_eps,
                    nodes_of(schedule, subject, k, trajectory),
                    variance=variance,  # type: ignore[arg-type]
                    mse_eps=subject.mse_eps,
                    levels=LEVELS if subject.bounded else None,
                ).total
            )
            / math.log(2)
            for k in cfg.steps
        }
    return table


def draw_picture(schedule: NoiseSchedule, subjects: Sequence[Subject], cfg: Config, path: Path) -> None:
    """A row for each model: the posterior variance, a trajectory's variances, and where the trajectories go."""
    fig, axes = plt.subplots(len(subjects), 3, figsize=(15, 4 * len(subjects)), squeeze=False)
    assert schedule.alphas_cumprod is not None
    v = (1 - schedule.alphas_cumprod) / schedule.alphas_cumprod
    few = cfg.steps[0]
    for (left, middle, right), subject in zip(axes, subjects, strict=True):
        for name, ms, style in (("as gathered", subject.gathered, "."), ("regularised", subject.ms_eps, "-")):
            left.plot(v.sqrt(), (v * (1 - ms[1:]) / ms[1:]).clamp(min=1e-6), style, markersize=2, label=f"h, {name}")
        left.set(xscale="log", yscale="log", xlabel="noise-to-signal σ/α", title=f"{subject.name}: moments")
        nodes = nodes_of(schedule, subject, few, "even")
        s, t = nodes[:-1], nodes[1:]
        bar = torch.cat([torch.ones(1), schedule.alphas_cumprod])
        beta = 1 - bar[t] / bar[s]
        lines = {"β": beta, "β̃": beta * (1 - bar[s]) / (1 - bar[t])}
        for name, eta in (("Analytic-DDPM", 1.0), ("Analytic-DDIM", 0.0)):
            lines[name] = fastgen.reverse_variance(schedule, subject.ms_eps, s, t, eta=eta)
        for name, line in lines.items():
            middle.plot(t, line, ".-", label=name)
        middle.set(yscale="log", xlabel="node t", title=f"variances of {few} even steps")
        for i, (k, trajectory) in enumerate(itertools.product(cfg.steps, TRAJECTORIES)):
            nodes = nodes_of(schedule, subject, k, trajectory)
            style = "--" if trajectory == "even" else ".-"
            right.plot(torch.linspace(0, 1, k), nodes, style, color=f"C{i // 2}", label=f"K = {k}, {trajectory}")
        right.set(yscale="log", xlabel="share of the steps", ylabel="node", title="trajectories")
        for ax in (left, middle, right):
            ax.legend(fontsize=8)
    fig.tight_layout()
    save_picture(fig, path)


def main(argv: list[str] | None = None) -> dict[str, Table]:
    """Run the demo; return its tables as {title: {row: {column: number}}}."""
    args = start(argument_parser("Optimal variances and trajectories for a diffusion model of digits."), argv)
    cfg = SMOKE if args.smoke else Config()
    images, labels = load_images()
    torch.manual_seed(args.seed)  # for the initial weights; all else draws from explicit generators
    gen = torch.Generator().manual_seed(10 * args.seed)
    schedule = NoiseSchedule.linear(N)
    network, gaussians = train(schedule, images, labels, cfg, gen), ClassGaussians(schedule, images, labels)

    def digits(n: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(images), (n,), generator=gen)
        return images[rows], labels[rows]

    def synthetic(n: int) -> tuple[Tensor, Tensor]:
        label = digits(n)[1]
        return gaussians.sample(label, gen), label

    subjects = [
        Subject("network", network, images, True, *gather(schedule, network, digits, cfg.moment_samples, gen)),
        Subject(
            "exact Gaussians",
            gaussians,
            synthetic(20 * cfg.eval_samples)[0],
            False,
            *gather(schedule, gaussians, synthetic, cfg.moment_samples, gen),
        ),
    ]
    label = digits(cfg.eval_samples)[1]
    tables: dict[str, Table] = {}
    for subject in subjects:
        tables[f"{subject.name}: Frechet distance"] = distances(schedule, subject, cfg, label, 10 * args.seed + 1)
        tables[f"{subject.name}: bound, bits per dimension"] = bounds(schedule, subject, cfg)
    floor = frechet(synthetic(cfg.eval_samples)[0], subjects[1].reference)
    picture = args.out / "analytic_dpm_digits.png"
    draw_picture(schedule, subjects, cfg, picture)
    for title, table in tables.items():
        print_table(f"{title} (lower is better)", table)
    print(f"\nAs many exact samples of the Gaussians are {floor:.4f} from the reference: the least to be had.")
    farewell(args, picture)
    return tables


if __name__ == "__main__":
    main()
