"""What the digit examples share: the data, a small EDM denoiser and its sampler, training, scores, pictures.

The data are scikit-learn's digits: 1797 real 8x8 images, as rows of 64 pixels in [-1, 1].
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Trainer, frechet, plt, save_picture
from matplotlib.axes import Axes
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

from fastgen import NoiseSchedule, fake_score_loss

PIXELS, CLASSES = 64, 10
NO_CLASS = CLASSES  # the label that stands for none
IN_PICTURES = torch.arange(CLASSES).repeat_interleave(8)  # the classes of a grid, row by row


def load_images() -> tuple[Tensor, Tensor]:
    """The images [1797, 64] and their classes."""
    digits = load_digits()
    return torch.tensor(digits.data / 8 - 1, dtype=torch.float32), torch.tensor(digits.target, dtype=torch.long)


def eight_of_each(labels: Tensor) -> Tensor:
    """Where the first eight of each class are: real digits for a grid."""
    return torch.cat([(labels == c).nonzero()[:8, 0] for c in range(CLASSES)])


def edm_schedule(images: Tensor) -> NoiseSchedule:
    """EDM's schedule, at noise levels a little above those for photographs: the log-mean is -0.8, there -1.2."""
    return NoiseSchedule.edm(sigma_data=float(images.std()), log_mean=-0.8, log_std=1.2)


class Denoiser(nn.Module):
    """Class-conditional residual MLP under EDM preconditioning: (noisy x, sigma, class) -> estimate of the clean x.

    `classes` counts NO_CLASS, which a model needs that is also trained or sampled without classes.
    """

    def __init__(self, sigma_data: float, width: int = 256, blocks: int = 3, classes: int = CLASSES + 1) -> None:
        super().__init__()
        self.sigma_data = sigma_data
        self.embed_class = nn.Embedding(classes, width)
        self.embed_noise = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.inp, self.out = nn.Linear(PIXELS, width), nn.Linear(width, PIXELS)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )

    def features(self, noisy: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        """What the last layer sees, [B, width]."""
        s = sigma[:, None]
        cond = self.embed_noise(s.log() / 4) + self.embed_class(label)
        h = self.inp(noisy / (s**2 + self.sigma_data**2).sqrt())
        for block in self.blocks:
            h = h + block(h + cond)
        return F.silu(h)

    def forward(self, noisy: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        s, sd = sigma[:, None], self.sigma_data
        norm = (s**2 + sd**2).sqrt()
        return noisy * (sd / norm) ** 2 + self.out(self.features(noisy, sigma, label)) * (s * sd / norm)


def unlabelled(label: Tensor) -> Tensor:
    return torch.full_like(label, NO_CLASS)


@torch.no_grad()
def sample(model: Denoiser, labels: Tensor, steps: int, gen: torch.Generator, guidance_scale: float = 1.0) -> Tensor:
    """EDM's deterministic Heun sampler; nothing is clamped. `guidance_scale` 1 is no guidance."""
    ramp = torch.linspace(0, 1, steps)
    hi, lo, rho = 80.0, 0.002, 7.0
    sigmas = torch.cat([(hi ** (1 / rho) + ramp * (lo ** (1 / rho) - hi ** (1 / rho))) ** rho, torch.zeros(1)])

    def slope(x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.expand(len(x))
        clean = model(x, level, labels)
        if guidance_scale != 1:
            base = model(x, level, unlabelled(labels))
            clean = base + guidance_scale * (clean - base)
        return (x - clean) / sigma

    x = torch.randn(len(labels), PIXELS, generator=gen) * sigmas[0]
    for now, after in itertools.pairwise(sigmas):
        first = slope(x, now)
        euler = x + (after - now) * first
        if after > 0:
            first = (first + slope(euler, after)) / 2
        x = x + (after - now) * first
    return x


def train_denoiser(
    start: Denoiser,
    images: Tensor,
    labels: Tensor,
    schedule: NoiseSchedule,
    gen: torch.Generator,
    *,
    steps: int,
    batch: int,
    lr: float,
    ema: float,
    drop_label: float,
    desc: str,
) -> Denoiser:
    """Ordinary EDM training; a share `drop_label` of the rows is trained without a class, for guidance."""
    trainer = Trainer(start, lr, warmup=min(100, steps // 3 + 1), ema_decay=ema)
    for _ in tqdm(range(steps), desc=desc):
        rows = torch.randint(len(images), (batch,), generator=gen)
        dropped = torch.rand(batch, generator=gen) < drop_label
        x, label = images[rows], labels[rows].masked_fill(dropped, NO_CLASS)
        sigma, noise = schedule.sample_t(batch, generator=gen), torch.randn(batch, PIXELS, generator=gen)
        pred = trainer.model(schedule.add_noise(x, noise, sigma), sigma, label)
        trainer.step(denoising_loss(pred, x, noise, sigma, schedule))
    return trainer.ema


def denoising_loss(pred: Tensor, x: Tensor, noise: Tensor, sigma: Tensor, schedule: NoiseSchedule) -> Tensor:
    """EDM's: the weighted error of the clean image."""
    one, weight = torch.ones_like(sigma), schedule.edm_weight(sigma)
    return fake_score_loss(pred, x, noise, one, sigma, prediction_type="sample", weight=weight)


class Classifier(nn.Module):
    """Tells the digits apart; the 32 features before its last layer are what Frechet distances compare."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(PIXELS, 128), nn.SiLU(), nn.Linear(128, 32), nn.SiLU())
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def train_classifier(images: Tensor, labels: Tensor, steps: int, gen: torch.Generator) -> Classifier:
    model = Classifier()
    opt = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in tqdm(range(steps), desc="classifier"):
        rows = torch.randint(len(images), (256,), generator=gen)
        # A little noise keeps the features from hanging on single grey levels.
        x = images[rows] + 0.1 * torch.randn(256, PIXELS, generator=gen)
        opt.zero_grad()
        F.cross_entropy(model(x), labels[rows]).backward()
        opt.step()
    return model.requires_grad_(False)


def distances(x: Tensor, images: Tensor, classifier: Classifier) -> dict[str, float]:
    """Frechet distances between samples and images, of features and of pixels: the first columns of many a table."""
    return {
        "feature distance": frechet(classifier.features(x), classifier.features(images)),
        "pixel distance": frechet(x, images),
    }


def show_grid(ax: Axes, title: str, x: Tensor) -> None:
    """Images in the order of IN_PICTURES: one row a class."""
    tiles = F.pad(x.reshape(CLASSES, -1, 8, 8), (0, 1, 0, 1), value=1.0)
    ax.imshow(tiles.permute(0, 2, 1, 3).reshape(CLASSES * 9, -1).numpy(), cmap="gray", vmin=-1, vmax=1)
    ax.set_title(title, fontsize=9)
    ax.axis("off")


def save_grid(panels: dict[str, Tensor], path: Path) -> None:
    """One panel a model; the same cell of two models starts from the same noise."""
    fig, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 4.0), layout="constrained")
    for ax, (name, x) in zip(axes, panels.items(), strict=True):
        show_grid(ax, name, x)
    save_picture(fig, path)
