"""Images of 7x7 pixels made four times as large by pix2pix (arXiv 1611.07004): L1 alone blurs, a GAN does not.

    python examples/fashion pix2pix

A network that minimises the L1 error answers with the median of what a coarse image may have been. pix2pix adds a
discriminator of patches that sees the coarse image too (`pix2pix_loss`, `discriminator_loss`, `r1_penalty`), and a
third network also matches features of the classifier (`features` of `pix2pix_loss`); its distance is between those
very features, so that its row shows what the term does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Table, Trainer
from torch import Tensor, nn
from tqdm import tqdm

from fashion.networks import UNet, unlabelled
from fashion.study import SAMPLES, Panels, Study, options
from fastgen import discriminator_loss, elbo_error, pix2pix_loss, r1_penalty

STEPS, BATCH, LR, EMA, GAMMA, EVERY = 200, 64, 1e-3, 0.99, 0.1, 4
L1_WEIGHT, FEATURE_WEIGHT = 10.0, 1.0
METHODS = {"L1": (False, False), "L1 + GAN": (True, False), "L1 + GAN + features": (True, True)}
TITLE = "Test images from 7x7 pixels"


def coarse(x: Tensor) -> Tensor:
    """Means of 4x4 pixels, in the image's size."""
    return F.interpolate(F.avg_pool2d(x, 4), scale_factor=4.0)


class Enlarger(nn.Module):
    """(coarse image, noise) -> image: the coarse one and what the network adds."""

    def __init__(self) -> None:
        super().__init__()
        self.net = UNet(inputs=2, width=32)

    def forward(self, image: Tensor, z: Tensor) -> Tensor:
        level = image.new_zeros(len(image))
        return image + self.net(torch.cat([image, z], 1), level, unlabelled(level.long()))[0]


class PatchCritic(nn.Module):
    """Logits of overlapping patches of 22x22 pixels of an image, given the coarse one."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(2, width, 4, 2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, 2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 1),
        )

    def forward(self, image: Tensor, x: Tensor) -> Tensor:
        return self.net(torch.cat([image, x], 1))


def train(study: Study, gan: bool, features: bool, seed: int, desc: str) -> nn.Module:
    torch.manual_seed(seed)
    gen = torch.Generator().manual_seed(seed)
    enlarger = Trainer(Enlarger().to(study.device), LR, 20, EMA, betas=(0.5, 0.9))
    critic = PatchCritic().to(study.device)
    opt = torch.optim.Adam(critic.parameters(), lr=LR, betas=(0.5, 0.9))
    for step in tqdm(range(study.steps(STEPS)), desc=desc):
        x = study.data.train.draw(study.batch(BATCH), gen).images
        given = coarse(x)
        output = enlarger.model(given, torch.randn(x.shape, generator=gen).to(x.device))
        if not gan:
            enlarger.step(elbo_error(output, x, loss="l1").mean())
            continue
        lazy = step % EVERY == 0
        x_d = x.clone().requires_grad_(lazy)
        real_logits = critic(given, x_d)
        loss = discriminator_loss(real_logits, critic(given, output.detach()))
        if lazy:
            loss = loss + r1_penalty(real_logits, x_d, gamma=GAMMA, every=EVERY)
        opt.zero_grad()
        loss.backward()
        opt.step()
        critic.requires_grad_(False)
        seen = study.classifier.features
        enlarger.step(
            pix2pix_loss(
                critic(given, output),
                output,
                x,
                l1_weight=L1_WEIGHT,
                features=[seen(output)] if features else [],
                target_features=[seen(x)] if features else [],
                feature_weights=[FEATURE_WEIGHT] if features else [],
            )
        )
        critic.requires_grad_(True)
    return enlarger.ema


def roughness(x: Tensor) -> float:
    """Mean difference of neighbours."""
    return float((x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean()) / 2)


def main(argv: list[str] | None = None) -> dict[str, Table]:
    study, panels = Study(options("Enlarge Fashion-MNIST's images four times with pix2pix."), argv), Panels()
    real = study.data.test[: study.count(SAMPLES, 50)]
    given = coarse(real.images)

    def run(seed: int) -> dict[str, Table]:
        z = torch.randn(given.shape, generator=torch.Generator().manual_seed(seed)).to(study.device)
        models = {name: train(study, *how, 100 * seed, name) for name, how in METHODS.items()}

        def enlarged(image: Tensor, noise: Tensor) -> Panels:
            with torch.no_grad():
                return {name: model(image, noise) for name, model in models.items()}

        if not panels:
            shown = study.real_panel()
            panels.update(
                {"7x7": coarse(shown), **enlarged(coarse(shown), z[:1].expand(shown.shape)), "test images": shown}
            )
        table: Table = {}
        for name, x in {"7x7": given, **enlarged(given, z), "test images": real.images}.items():
            found = study.test.scores(x, real.labels)
            table[name] = {
                "L1 error": float((x - real.images).abs().mean()),
                "sharpness": roughness(x) / roughness(real.images),
                "distance": found["distance"],
                "class": found["class"],
            }
        return {TITLE: table}

    tables = study.over_seeds(run)
    study.finish(panels, "pix2pix")
    return tables
