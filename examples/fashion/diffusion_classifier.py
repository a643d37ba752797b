"""The Diffusion Classifier (arXiv 2303.16203): test images told apart by the base, which never learnt to classify.

    python examples/fashion diffusion_classifier

An image's class is the one under which the base denoises it best, over 25 pairs of noise level and noise that all
classes share: first every class on every pair, then in stages that drop classes, then also stopping for an image as
soon as a paired t-test separates its best class. Each seed has 500 test images of its own. The last row is the
convolutional classifier whose features the other scripts compare; it is trained on the same images, to classify.
"""

from __future__ import annotations

from typing import Any

import torch
from common import Table, accuracy, farewell, plt, save_picture

from fashion.data import CLASSES, Split
from fashion.networks import SCHEDULE
from fashion.study import Study, options
from fastgen import DiffusionClassifier

TITLE = "500 test images; evaluations of the network per image"


def main(argv: list[str] | None = None) -> dict[str, Table]:
    study = Study(options("Classify Fashion-MNIST with a class-conditional diffusion model."), argv)
    pairs = study.count(25, 4)
    stages = [(2, 3), (4, 1)] if study.smoke else [(3, 4), (5, 3), (10, 2), (25, 1)]
    classes = torch.arange(CLASSES, device=study.device)

    def classify(images: Split, seed: int, **settings: Any) -> dict[str, float]:
        classifier = DiffusionClassifier(
            study.base,
            SCHEDULE,
            prediction_type="sample",
            weighting=SCHEDULE.edm_weight,
            batch_size=500,
            seed=seed,
            progress=True,
            **settings,
        )
        statistics = classifier.statistics(images.images, classes)
        predicted = classifier.predict(images.images, classes, statistics)
        evaluations = statistics.evaluations / len(images)
        return {"accuracy": float((predicted == images.labels).double().mean()), "evaluations": evaluations}

    def run(seed: int) -> dict[str, Table]:
        order = torch.randperm(len(study.data.test), generator=torch.Generator().manual_seed(seed))
        images = study.data.test[order[: study.count(500)]]
        with torch.no_grad():
            usual = accuracy(study.classifier(images.images), images.labels)
        table = {
            f"every class on {pairs} pairs": classify(images, seed, stages=[(pairs, 1)]),
            f"stages {' '.join(f'{n}:{keep}' for n, keep in stages)}": classify(images, seed, stages=stages),
            "the same, stop at p < 0.01": classify(images, seed, stages=stages, error_probability=0.01),
            "the convolutional classifier": {"accuracy": usual, "evaluations": 1.0},
        }
        return {TITLE: table}

    tables = study.over_seeds(run)
    fig, ax = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, row in tables[TITLE].items():
        ax.plot(row["evaluations"], row["accuracy"], "o", label=name)
    ax.set(xscale="log", xlabel="evaluations per image", ylabel="accuracy on test images")
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)
    picture = study.args.out / "diffusion_classifier.png"
    save_picture(fig, picture)
    farewell(study.args, picture)
    return tables
