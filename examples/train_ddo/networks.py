"""Denoisers D(x; sigma) in EDM's sense, their sampler, and the feature networks of a Frechet distance."""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import prediction_to_x0

Features = Callable[[Tensor], Tensor]


class UNetDenoiser(nn.Module):
    """A `UNet2DModel` of DDPM's kind as D(x; sigma): it sees ``x / sqrt(1 + sigma²)``, at the time of that sigma.

    .. math:: D(x; σ) = x_0(x_t, net(x_t, t(σ))), \\quad x_t = x / \\sqrt{1 + σ²}, \\quad σ(t)² = (1 - ᾱ_t) / ᾱ_t

    Times between the discrete ones are interpolated in ln sigma; beyond the first and the last there is no other.
    """

    def __init__(self, unet: Any, alphas_cumprod: Tensor, prediction_type: str) -> None:
        super().__init__()
        self.unet, self.prediction_type = unet, prediction_type
        bar = alphas_cumprod.double().clamp(1e-12, 1 - 1e-12)  # of a schedule that ends in pure noise ᾱ is 0
        self.register_buffer("log_sigma", (((1 - bar) / bar).log() / 2).float(), persistent=False)

    def time(self, sigma: Tensor) -> Tensor:
        table, s = self.get_buffer("log_sigma"), sigma.float().log()
        above = torch.searchsorted(table, s).clamp(1, len(table) - 1)
        low, high = table[above - 1], table[above]
        return above - 1 + ((s - low) / (high - low)).clamp(0, 1)

    def forward(self, noisy: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        alpha = (1 + sigma.square()).rsqrt()
        x_t = noisy * alpha[:, None, None, None]
        pred = self.unet(x_t, self.time(sigma), class_labels=label).sample
        return prediction_to_x0(pred, x_t, alpha, sigma * alpha, self.prediction_type)


def load_object(option: str, spec: str) -> Any:
    """What ``module:name`` names."""
    module, _, name = spec.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{option} {spec}: {error}") from error


def open_network(spec: str, prediction_type: str | None, classes: int) -> nn.Module:
    """The network that --model names, on the CPU."""
    if ":" in spec:
        net = load_object("--model", spec)()
        if not isinstance(net, nn.Module):
            raise TypeError(f"--model {spec} must return a torch.nn.Module, got {type(net).__name__}")
        if not any(weight.requires_grad for weight in net.parameters()):
            raise ValueError(f"--model {spec} returned a network without weights that require gradients")
        return net
    try:
        from diffusers import DDPMScheduler, UNet2DModel
    except ImportError as error:
        raise ValueError(f"--model {spec} needs diffusers (pip install diffusers): {error}") from error
    path = Path(spec)
    if path.suffix == ".json" and path.is_file():
        unet = UNet2DModel.from_config(json.loads(path.read_text(encoding="utf-8")))
    elif path.is_dir():
        unet = UNet2DModel.from_pretrained(path / "unet" if (path / "unet").is_dir() else path)
    else:
        raise ValueError(f"--model must be a folder, a .json or module:function; there is no {spec!r}")
    config = unet.config
    if config.time_embedding_type != "positional":
        raise ValueError(f"--model: time_embedding_type must be 'positional', got {config.time_embedding_type!r}")
    if config.out_channels != config.in_channels:
        raise ValueError(
            f"--model has {config.in_channels} channels in and {config.out_channels} out: learned variances and other"
            " extra channels are not supported"
        )
    if (config.num_class_embeds or 0) < classes or (classes == 0 and config.num_class_embeds):
        raise ValueError(
            f"--classes {classes} does not fit --model, whose num_class_embeds is {config.num_class_embeds}"
        )
    folders = [path / "scheduler", path] if path.is_dir() else []
    saved = [folder for folder in folders if (folder / "scheduler_config.json").is_file()]
    scheduler = DDPMScheduler.from_pretrained(saved[0]) if saved else DDPMScheduler()
    if saved and prediction_type not in (None, scheduler.config.prediction_type):
        raise ValueError(f"--prediction-type is {prediction_type}, --model's {scheduler.config.prediction_type}")
    return UNetDenoiser(unet, scheduler.alphas_cumprod, prediction_type or scheduler.config.prediction_type)


def denoise(net: nn.Module, noisy: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
    return net(noisy, sigma) if label is None else net(noisy, sigma, label)


@torch.no_grad()
def sample(
    net: nn.Module, noise: Tensor, label: Tensor | None, *, steps: int, sigma_min: float, sigma_max: float, rho: float
) -> Tensor:
    """EDM's deterministic Heun sampler (arXiv 2206.00364), from unit noise; nothing is clamped."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    sigmas = [*((high + ramp * (low - high)) ** rho).tolist(), 0.0]

    def slope(x: Tensor, sigma: float) -> Tensor:
        return (x - denoise(net, x, x.new_full((len(x),), sigma), label)) / sigma

    x = noise * sigmas[0]
    for now, after in itertools.pairwise(sigmas):
        first = slope(x, now)
        euler = x + (after - now) * first
        if after > 0:
            first = (first + slope(euler, after)) / 2
        x = x + (after - now) * first
    return x


def pixels(x: Tensor) -> Tensor:
    """The image itself, averaged down to 8x8 where it is larger: no perception, but no weights to find either."""
    return (F.adaptive_avg_pool2d(x, 8) if min(x.shape[-2:]) > 8 else x).flatten(1)


def open_features(spec: str, fid_weights: str | None, device: torch.device) -> Features:
    """What --metric names: from images in the range of the data to rows of features."""
    if spec == "pixels":
        return pixels
    if spec == "fid":
        return _inception(fid_weights, device)
    if ":" not in spec:
        raise ValueError(f"--metric must be pixels, fid or module:function, got {spec!r}")
    net = load_object("--metric", spec)()
    return net.to(device).eval() if isinstance(net, nn.Module) else net


def _inception(weights: str | None, device: torch.device) -> Features:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ValueError(f"--metric fid needs torch-fidelity (pip install torch-fidelity): {error}") from error
    try:
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
    except OSError as error:  # URLError is one
        raise ValueError(f"--metric fid cannot load Inception's weights ({error}): give --fid-weights FILE") from error
    net = net.to(device)

    def features(x: Tensor) -> Tensor:
        x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
        return net(((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))[0]

    return features


class Moments:
    """Mean and covariance of features, added up over batches and ranks in float64."""

    def __init__(self, count: Tensor, total: Tensor, outer: Tensor) -> None:
        self.count, self.total, self.outer = count, total, outer

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        f = features.double()
        return cls(f.new_tensor(len(f)), f.sum(0), f.T @ f)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        mean = self.total / self.count
        return mean, (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)


def frechet(a: Moments, b: Moments) -> float:
    """``|m_a - m_b|² + tr(A + B - 2 sqrt(A B))``, squared as FID is."""
    (mean_a, cov_a), (mean_b, cov_b) = a.mean_and_covariance(), b.mean_and_covariance()
    # tr sqrt(A B) = the sum of the square roots of the eigenvalues of sqrt(A) B sqrt(A), which is symmetric.
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)
