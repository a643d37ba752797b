"""Classify held-out digits with a diffusion model that was never trained to classify.

    python examples/diffusion_classifier_digits.py            # the whole demo: a minute on a quiet machine
    python examples/diffusion_classifier_digits.py --smoke    # the same path in seconds; its numbers mean nothing

The script

1. trains a small class-conditional EDM denoiser on 1437 of scikit-learn's 1797 digits;
2. classifies the other 360 with `DiffusionClassifier` (arXiv 2303.16203): which class denoises the image best, over 50
   (sigma, noise) pairs that all classes share: first every class on every pair, then in stages that drop classes, then
   also stopping for an image as soon as a paired t-test separates its best class;
3. prints accuracy and network evaluations per image, beside a classifier of the usual kind, trained on the same digits;
4. saves a picture: accuracy against evaluations, and what the denoiser makes of the images that it found hardest.

With seeds 0, 1 and 2, each with its own digits held out, it gets 99.7, 98.6 and 99.7 % right, and the usual classifier
97.5, 96.4 and 98.6 %. Stages take 28 % of the evaluations and the early stop 13 %, at the same accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Table, accuracy, argument_parser, farewell, plt, print_table, save_picture, start
from digits import CLASSES, PIXELS, Denoiser, edm_schedule, load_images, train_classifier, train_denoiser
from torch import Tensor
from tqdm import tqdm

from fastgen import DiffusionClassifier, NoiseSchedule


@dataclass(frozen=True)
class Config:
    """Every number one may want to change; the defaults are the demo's."""

    held_out: int = 360
    steps: int = 3000
    batch: int = 256
    lr: float = 1e-3
    ema: float = 0.999
    classifier_steps: int = 600
    pairs: int = 50
    stages: tuple[tuple[int, int], ...] = ((3, 4), (5, 3), (10, 2), (50, 1))
    error_probability: float = 0.01
    curve: tuple[int, ...] = (1, 2, 3, 5, 10, 20)


SMOKE = Config(held_out=40, steps=20, batch=64, classifier_steps=10, pairs=4, stages=((2, 3), (4, 1)), curve=(1, 2))


@dataclass(frozen=True)
class Outcome:
    """How well a classifier did, and the log-probabilities that it gave."""

    row: dict[str, float]
    log_prob: Tensor


def classify(
    model: Denoiser, schedule: NoiseSchedule, images: Tensor, labels: Tensor, full: int, **settings: Any
) -> Outcome:
    """Run a DiffusionClassifier with these settings; `full` is how many evaluations the full grid takes."""
    conditions = torch.arange(CLASSES)
    classifier = DiffusionClassifier(model, schedule, prediction_type="sample", batch_size=4096, **settings)
    statistics = classifier.statistics(images, conditions)
    predicted = classifier.predict(images, conditions, statistics)
    evaluations = statistics.evaluations / len(images)
    row = {
        "accuracy": float((predicted == labels).double().mean()),
        "evaluations": evaluations,
        "of full grid": evaluations / full,
    }
    return Outcome(row, classifier.log_prob(images, conditions, statistics))  # evaluates nothing again


def compare(
    model: Denoiser, schedule: NoiseSchedule, images: Tensor, labels: Tensor, cfg: Config
) -> tuple[Table, Table, Tensor]:
    """The table; the points of the curve, by name of the weighting and number of pairs; the full grid's log p(c|x)."""
    edm, full = schedule.edm_weight, CLASSES * cfg.pairs

    def run(stages: Any, weighting: Callable[[Tensor], Tensor] | None = edm, delta: float | None = None) -> Outcome:
        return classify(
            model, schedule, images, labels, full, stages=stages, weighting=weighting, error_probability=delta
        )

    whole = run([(cfg.pairs, 1)])
    stages = " ".join(f"{n}:{keep}" for n, keep in cfg.stages)
    table = {
        f"every class on {cfg.pairs} pairs": whole.row,
        "the same, unweighted errors": run([(cfg.pairs, 1)], None).row,
        f"stages {stages}": run(cfg.stages).row,
        f"the same, stop at p < {cfg.error_probability:g}": run(cfg.stages, edm, cfg.error_probability).row,
    }
    curve = {
        name: {
            str(CLASSES * n): run([(n, 1)], weighting).row["accuracy"]
            for n in tqdm((*cfg.curve, cfg.pairs), desc=f"curve, {name}")
        }
        for name, weighting in (("EDM weights", edm), ("no weights", None))
    }
    return table, curve, whole.log_prob


def draw(
    model: Denoiser, images: Tensor, labels: Tensor, log_prob: Tensor, table: Table, curve: Table, path: Path
) -> None:
    """Left the curve and the table's rows; right the hardest images, denoised from sigma = 1 under every class."""
    fig = plt.figure(figsize=(13, 5.2), layout="constrained")
    left, right = fig.subplots(1, 2, width_ratios=[1, 1.35])
    for name, points in curve.items():
        left.plot([int(n) for n in points], list(points.values()), "o-", label=f"every class, {name}")
    for name, row in list(table.items())[2:]:
        left.plot(row["evaluations"], row["accuracy"], "*", markersize=14, label=name)
    left.set(xscale="log", xlabel="network evaluations per image", ylabel="accuracy on held-out digits")
    left.legend(fontsize=8, loc="lower right")
    left.grid(alpha=0.3)

    top = log_prob.topk(2, dim=1).values
    wrong = log_prob.argmax(1) != labels
    hardest = (top[:, 0] - top[:, 1] - 1e6 * wrong).argsort()[:8]
    gen = torch.Generator().manual_seed(0)
    noisy = images[hardest] + torch.randn(PIXELS, generator=gen)
    with torch.no_grad():
        columns = [model(noisy, torch.ones(8), torch.full((8,), c)) for c in range(CLASSES)]
    tiles = torch.stack([images[hardest], noisy, *columns], 1).view(8, CLASSES + 2, 8, 8)
    canvas = torch.nn.functional.pad(tiles, (1, 1, 1, 1), value=1.0).permute(0, 2, 1, 3).reshape(80, -1).numpy()
    right.imshow(canvas, cmap="gray", vmin=-1, vmax=1)
    for k, i in enumerate(hardest.tolist()):
        for label, color in ((int(labels[i]), "tab:green"), (int(log_prob[i].argmax()), "tab:red")):
            if color == "tab:green" or wrong[i]:
                frame = plt.Rectangle((10 * label + 19.5, 10 * k - 0.5), 10, 10, fill=False, edgecolor=color, lw=2)
                right.add_patch(frame)
    right.set_xticks([4.5 + 10 * k for k in range(CLASSES + 2)], ["image", "noisy", *map(str, range(CLASSES))])
    right.set_yticks([])
    right.set_title("the hardest images, denoised as each class (green: right, red: chosen wrongly)", fontsize=9)
    save_picture(fig, path)


def main(argv: list[str] | None = None) -> Table:
    """Run the demo; return the table as {row: {column: number}}."""
    args = start(argument_parser("Classify held-out digits with a class-conditional diffusion model."), argv)
    cfg = SMOKE if args.smoke else Config()
    torch.manual_seed(args.seed)  # for the initial weights; all else draws from an explicit generator
    gen = torch.Generator().manual_seed(args.seed)
    images, labels = load_images()
    test, train = torch.randperm(len(images), generator=gen).tensor_split([cfg.held_out])
    schedule = edm_schedule(images[train])
    model = train_denoiser(
        Denoiser(schedule.sigma_data),
        images[train],
        labels[train],
        schedule,
        gen,
        steps=cfg.steps,
        batch=cfg.batch,
        lr=cfg.lr,
        ema=cfg.ema,
        drop_label=0.0,
        desc="denoiser",
    )
    table, curve, log_prob = compare(model, schedule, images[test], labels[test], cfg)
    usual = train_classifier(images[train], labels[train], cfg.classifier_steps, gen)
    table["a classifier of the usual kind"] = {
        "accuracy": accuracy(usual(images[test]), labels[test]),
        "evaluations": 1.0,
        "of full grid": 1 / (CLASSES * cfg.pairs),
    }

    picture = args.out / "diffusion_classifier_digits.png"
    draw(model, images[test], labels[test], log_prob, table, curve, picture)
    print_table(f"{len(test)} held-out digits; evaluations of the network per image", table)
    farewell(args, picture)
    return table


if __name__ == "__main__":
    main()
