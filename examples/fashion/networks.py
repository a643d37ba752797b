"""The networks: a denoiser under EDM preconditioning, small enough for two cores, and a classifier for its features."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fashion.data import CLASSES, SIDE, SIGMA_DATA
from fastgen import NoiseSchedule, fake_score_loss

Network = TypeVar("Network", bound=nn.Module)
WEIGHTS = Path(__file__).parent / "weights"
NO_CLASS = CLASSES  # the label that stands for none
SCHEDULE = NoiseSchedule.edm(sigma_data=SIGMA_DATA, log_mean=-0.8, log_std=1.2)
LOWEST, HIGHEST = 0.02, 40.0  # noise levels of samplers: half a grey level is 0.004, the data's norm about 20


def zero(layer: nn.Module) -> None:
    """So that a network begins as one without this layer."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class Block(nn.Module):
    """Two convolutions; noise level and class scale and shift what lies between them."""

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.norm = nn.GroupNorm(8, width, affine=False)
        self.modulate = nn.Linear(condition, 2 * width)
        self.second = nn.Sequential(nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        zero(self.second[1])

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulate(condition)[:, :, None, None].chunk(2, dim=1)
        return x + self.second(torch.addcmul(shift, self.norm(self.first(x)), 1 + scale))


class UNet(nn.Module):
    """On patches of 2x2 pixels: one block at 14x14, three at 7x7, one more at 14x14; 0.7 million weights."""

    def __init__(self, inputs: int = 1, width: int = 48, condition: int = 128) -> None:
        super().__init__()
        self.embed_class = nn.Embedding(CLASSES + 1, condition)
        self.embed_noise = nn.Sequential(nn.Linear(32, condition), nn.SiLU(), nn.Linear(condition, condition))
        self.inp = nn.Conv2d(4 * inputs, width, 3, padding=1)
        self.before = Block(width, condition)
        self.down = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.middle = nn.ModuleList(Block(2 * width, condition) for _ in range(3))
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.after = Block(width, condition)
        self.out = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 4, 3, padding=1))
        zero(self.out[2])
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.exp(torch.linspace(-2, 3, 16)), persistent=False)
        # On a CPU a quarter faster in sampling, and what a GPU's convolutions like.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def condition(self, level: Tensor, label: Tensor, latent: Tensor | None = None) -> Tensor:
        """From any number that tells the noise level, of order 1, the class, and what else there is [B, condition]."""
        angles = level[:, None] * self.frequencies
        found = self.embed_noise(torch.cat([angles.cos(), angles.sin()], dim=1)) + self.embed_class(label)
        return F.silu(found if latent is None else found + latent)

    def forward(self, x: Tensor, level: Tensor, label: Tensor, latent: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The output, and the 7x7 level's last features [B, 2 width, 7, 7]."""
        condition = self.condition(level, label, latent)
        early = self.before(self.inp(F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)), condition)
        h = self.down(early)
        for block in self.middle:
            h = block(h, condition)
        return F.pixel_shuffle(self.out(self.after(early + self.up(h), condition)), 2), h


class Denoiser(nn.Module):
    """EDM's preconditioning (arXiv 2206.00364): (noisy x, sigma [B], class [B]) -> estimate of the clean x."""

    def __init__(self) -> None:
        super().__init__()
        self.net = UNet()

    def forward(self, noisy: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        return self.with_features(noisy, sigma, label)[0]

    def with_features(
        self, noisy: Tensor, sigma: Tensor, label: Tensor, latent: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Also what a discriminator on this network sees, [B, 96, 7, 7]."""
        s = sigma[:, None, None, None]
        norm = (s**2 + SIGMA_DATA**2).sqrt()
        out, features = self.net(noisy / norm, sigma.log() / 2, label, latent)
        return noisy * (SIGMA_DATA / norm) ** 2 + out * (s * SIGMA_DATA / norm), features


class Classifier(nn.Module):
    """Tells the classes apart; Frechet distances compare the 64 features before its last layer."""

    def __init__(self) -> None:
        super().__init__()

        def layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

        self.body = nn.Sequential(layer(1, 32, 2), layer(32, 64, 1), layer(64, 64, 2), layer(64, 64, 1))
        self.head = nn.Linear(64, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def save_weights(model: nn.Module, path: Path) -> None:
    """In half precision; all scripts use the weights as rounded so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.half().contiguous() for name, value in model.state_dict().items()}, path)


def load_weights(model: Network, path: Path) -> Network:
    """The model with these weights, ready for use."""
    model.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return model.eval().requires_grad_(False)


def denoising_loss(pred: Tensor, x: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """EDM's: the weighted error of the clean image."""
    one, weight = torch.ones_like(sigma), SCHEDULE.edm_weight(sigma)
    return fake_score_loss(pred, x, noise, one, sigma, prediction_type="sample", weight=weight)


def noised(x: Tensor, gen: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x with noise, its level and the noise; all draws are the CPU's, so that a device changes none."""
    sigma = SCHEDULE.sample_t(len(x), generator=gen).to(x.device)
    noise = torch.randn(x.shape, generator=gen).to(x.device)
    return SCHEDULE.add_noise(x, noise, sigma), sigma, noise


def unlabelled(label: Tensor) -> Tensor:
    return torch.full_like(label, NO_CLASS)


def karras(steps: int, lowest: float = LOWEST, highest: float = HIGHEST, rho: float = 7.0) -> Tensor:
    """EDM's noise levels, from the highest to the lowest."""
    ramp = torch.linspace(0, 1, steps)
    return (highest ** (1 / rho) + ramp * (lowest ** (1 / rho) - highest ** (1 / rho))) ** rho


Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]


def guided(model: Denoise, scale: float) -> Denoise:
    """With classifier-free guidance; 1 is none."""

    def denoise(x: Tensor, sigma: Tensor, label: Tensor) -> Tensor:
        base = model(x, sigma, unlabelled(label))
        return base + scale * (model(x, sigma, label) - base)

    return denoise if scale != 1 else model


@torch.no_grad()
def sample(
    model: Denoise,
    label: Tensor,
    gen: torch.Generator,
    *,
    sigmas: Tensor,
    order: int = 2,
    batch: int = 500,
) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095), or DDIM by `order` 1. Nothing is clamped."""
    noise = torch.randn(len(label), 1, SIDE, SIDE, generator=gen).to(label.device)
    return torch.cat(
        [solve(model, z, y, sigmas, order) for z, y in zip(noise.split(batch), label.split(batch), strict=True)]
    )


def solve(model: Denoise, noise: Tensor, label: Tensor, sigmas: Tensor, order: int) -> Tensor:
    x, before, last = noise * sigmas[0], None, 0.0
    for now, after in itertools.pairwise([*sigmas.tolist(), 0.0]):
        clean = model(x, x.new_full((len(x),), now), label)
        if after == 0:
            return clean
        step, ahead = float(torch.log(torch.tensor(now / after))), clean
        if order == 2 and before is not None:
            ahead = clean + (clean - before) * (step / (2 * last))
        x = torch.lerp(ahead, x, after / now)
        before, last = clean, step
    raise ValueError("sigmas has no levels: give at least one above 0")
