"""JEM (arXiv 1912.03263): a classifier trained as an energy model too, beside the same net and cross-entropy alone.

    python examples/fashion jem

One small network is trained twice, on 1 000 images: by cross-entropy, and by `joint_energy_loss`, whose negative
samples come from `langevin_sample` and a `ReplayBuffer`. For both: accuracy, negative log-likelihood and expected
calibration error on the test split; and samples, which are ends of Langevin chains from noise, guided to a class.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Table, accuracy
from torch import Tensor, nn
from tqdm import tqdm

from fashion.data import CLASSES, SIDE, Split
from fashion.study import IN_PICTURES, Panels, Study, options
from fastgen import ReplayBuffer, joint_energy_loss, langevin_sample

IMAGES, STEPS, BATCH, LR, DATA_NOISE, ENERGY_WEIGHT = 1000, 1000, 64, 5e-4, 0.1, 0.3
CHAIN_STEPS, STEP_SIZE, NOISE_SCALE, BUFFER, LONG_CHAIN = 10, 0.3, 0.03, 2000, 150
CLASSIFIER, SAMPLES = "Test images", "Samples against the test split"


def network(width: int = 32) -> nn.Module:
    """Smooth, and without normalisation over the batch, which would tie the chains together."""
    return nn.Sequential(
        nn.Conv2d(1, width, 5, 2, padding=2),
        nn.SiLU(),
        nn.Conv2d(width, 2 * width, 3, 2, padding=1),
        nn.SiLU(),
        nn.Conv2d(2 * width, 4 * width, 3, 2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(16 * 4 * width, CLASSES),
    )


def train(study: Study, images: Split, seed: int, joint: bool) -> nn.Module:
    torch.manual_seed(seed)
    gen, net = torch.Generator().manual_seed(seed), network().to(study.device)
    batch = study.batch(BATCH)
    opt, steps = torch.optim.Adam(net.parameters(), lr=LR), study.steps(STEPS)
    rate = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 - step / steps)
    buffer = ReplayBuffer(study.count(BUFFER, 100), (1, SIDE, SIDE), seed=seed)
    bar = tqdm(range(steps), desc="JEM" if joint else "cross-entropy")
    for step in bar:
        rows = images.draw(batch, gen)
        x = rows.images + DATA_NOISE * torch.randn(rows.images.shape, generator=gen).to(study.device)
        if joint:
            start, index = buffer.sample(batch)
            fakes = langevin_sample(
                net,
                start.to(study.device),
                steps=study.count(CHAIN_STEPS, 2),
                step_size=STEP_SIZE,
                noise_scale=NOISE_SCALE,
                generator=torch.Generator(study.device).manual_seed(10000 * seed + step),
            )
            buffer.update(index, fakes)
            loss, real, fake = joint_energy_loss(
                net(x), rows.labels, net(fakes), energy_weight=ENERGY_WEIGHT, return_energies=True
            )
            bar.set_postfix(gap=f"{float(fake.mean() - real.mean()):.2f}")
        else:
            loss = F.cross_entropy(net(x), rows.labels)
        opt.zero_grad()
        loss.backward()
        opt.step()
        rate.step()
    return net.requires_grad_(False)


def calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected: over bins of confidence, the mean difference of confidence and accuracy."""
    confidence, predicted = logits.double().softmax(1).max(1)
    place = F.one_hot((confidence * bins).long().clamp(max=bins - 1), bins).double()
    return float(((confidence - (predicted == labels).double()) @ place).abs().sum() / len(labels))


def chains(study: Study, net: nn.Module, wanted: Tensor, seed: int) -> Tensor:
    """Guided chains from noise, clamped; an exploded one is grey."""
    noise = 2 * torch.rand(len(wanted), 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed)) - 1
    x = langevin_sample(
        net,
        noise.to(study.device),
        wanted,
        steps=study.count(LONG_CHAIN, 3),
        step_size=STEP_SIZE,
        noise_scale=NOISE_SCALE,
        generator=torch.Generator(study.device).manual_seed(seed),
    )
    return x.nan_to_num(nan=0.0).clamp(-1, 1)


def main(argv: list[str] | None = None) -> dict[str, Table]:
    study, panels = Study(options("Train a classifier of Fashion-MNIST as a joint energy model."), argv), Panels()
    wanted, test = study.wanted(1000), study.data.test

    def run(seed: int) -> dict[str, Table]:
        order = torch.randperm(len(study.data.train), generator=torch.Generator().manual_seed(seed))
        images = study.data.train[order[: study.count(IMAGES, 50)]]
        nets = {name: train(study, images, seed, joint) for name, joint in (("cross-entropy", False), ("JEM", True))}
        classified, sampled = Table(), Table()
        shown: Panels = {"test images": study.real_panel()}
        for name, net in nets.items():
            logits = torch.cat([net(x) for x in test.images.split(1000)])
            classified[name] = {
                "accuracy": accuracy(logits, test.labels),
                "NLL": float(F.cross_entropy(logits, test.labels)),
                "ECE": calibration_error(logits, test.labels),
            }
            sampled[name] = study.test.scores(chains(study, net, wanted, seed), wanted)
            shown[name] = chains(study, net, IN_PICTURES.to(study.device), 0)
        if not panels:
            panels.update(shown)
        return {CLASSIFIER: classified, SAMPLES: sampled}

    tables = study.over_seeds(run)
    study.finish(panels, "jem")
    return tables
