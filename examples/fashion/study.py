"""What the scripts share: their options, runs over seeds, scores against held-out images, and pictures."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Table, accuracy, argument_parser, farewell, frechet, plt, print_table, save_picture, start
from torch import Tensor

from fashion.data import CLASSES, Data, Split, load, to_greys
from fashion.networks import WEIGHTS, Classifier, Denoise, Denoiser, karras, load_weights, sample

SAMPLES = 2000  # of a model, for its scores
Panels = dict[str, Tensor]  # {title: images in the order of IN_PICTURES}
IN_PICTURES = torch.arange(CLASSES).repeat_interleave(6)  # the classes of a grid, row by row


class Spread(float):
    """The mean over seeds, printed with the standard deviation from seed to seed."""

    deviation: float | None  # of more than one seed

    def __new__(cls, values: list[float]) -> Spread:
        made = super().__new__(cls, sum(values) / len(values))
        made.deviation = float(torch.tensor(values, dtype=torch.float64).std()) if len(values) > 1 else None
        return made

    def __format__(self, spec: str) -> str:
        return f"{float(self):.3g}" + ("" if self.deviation is None else f" ± {self.deviation:.1g}")


def options(description: str) -> argparse.ArgumentParser:
    parser = argument_parser(description)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from --seed on")
    parser.add_argument("--times", type=float, default=1.0, help="multiplies all training steps: 10 suits a GPU")
    return parser


class Study:
    """A script's options, data and base, on the device that there is."""

    def __init__(self, parser: argparse.ArgumentParser, argv: list[str] | None) -> None:
        self.args = start(parser, argv)
        self.smoke: bool = self.args.smoke
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        data = load(self.smoke)
        self.data = Data(data.train.to(self.device), data.validation.to(self.device), data.test.to(self.device))
        self.classifier = load_weights(Classifier(), WEIGHTS / "classifier.safetensors").to(self.device)
        self.base = load_weights(Denoiser(), WEIGHTS / "base.safetensors").to(self.device)
        self.test, self.validation = (Judge(s, self.classifier) for s in (self.data.test, self.data.validation))

    def steps(self, count: int) -> int:
        """Training steps: `count` by default, two in a smoke run, which is the least."""
        return 2 if self.smoke else max(2, round(count * self.args.times))

    def batch(self, rows: int) -> int:
        """Rows of a training step: few in a smoke run."""
        return min(rows, 8) if self.smoke else rows

    def count(self, count: int, smoke: int = 20) -> int:
        """Any other number, with its stand-in for a smoke run."""
        return smoke if self.smoke else count

    def wanted(self, count: int = SAMPLES) -> Tensor:
        """As many of each class: what samples are asked for."""
        return (torch.arange(self.count(count, 50)) % CLASSES).to(self.device)

    def sample(self, model: Denoise, labels: Tensor, gen: int | torch.Generator) -> Tensor:
        """By DPM-Solver++ in 16 steps; a smoke run takes two. An integer seeds a generator of its own."""
        gen = torch.Generator().manual_seed(gen) if isinstance(gen, int) else gen
        return sample(model, labels, gen, sigmas=karras(self.count(16, 2)))

    def floor(self, seed: int, count: int = SAMPLES) -> dict[str, float]:
        """What as many training images score: no model can be expected to be nearer."""
        rows = self.data.train.draw(self.count(count, 50), torch.Generator().manual_seed(seed))
        return self.test.scores(rows.images, rows.labels)

    def real_panel(self) -> Tensor:
        """Test images for a grid."""
        labels = self.data.test.labels
        return torch.cat([self.data.test.images[(labels == c).nonzero()[:6, 0]] for c in range(CLASSES)])

    def over_seeds(self, run: Callable[[int], dict[str, Table]]) -> dict[str, Table]:
        """Run the seeds, each of which gives tables by their titles; keep those, print and return what they have in
        common: means and spreads."""
        seeds = range(self.args.seed, self.args.seed + (1 if self.smoke else self.args.seeds))
        runs = {f"seed {seed}": run(seed) for seed in seeds}
        self.args.out.mkdir(parents=True, exist_ok=True)
        kept = json.dumps(runs, indent=1, ensure_ascii=False)
        (self.args.out / "seeds.json").write_text(kept + "\n", encoding="utf-8")
        tables: dict[str, Table] = {}
        for title, first in runs[f"seed {seeds[0]}"].items():
            tables[title] = {
                row: {column: Spread([tables[title][row][column] for tables in runs.values()]) for column in columns}
                for row, columns in first.items()
            }
            print_table(title, tables[title])
        return tables

    def finish(self, panels: Panels, name: str) -> None:
        """Save the picture of all models' images, and say so."""
        picture = self.args.out / f"{name}.png"
        save_grid(panels, picture)
        farewell(self.args, picture)


class Judge:
    """Scores samples against one split, by the features of the classifier."""

    def __init__(self, split: Split, classifier: Classifier, neighbours: int = SAMPLES) -> None:
        self.classifier = classifier
        self.real = self.features(split.images)
        # Balls around as many real images as there are samples: of those, precision and coverage count the hits.
        self.centres = self.real[:neighbours]
        ranked, last = torch.cdist(self.centres, self.centres).sort(dim=1).values, len(self.centres) - 1
        self.third, self.fifth = (ranked[:, min(k, last)] for k in (3, 5))  # the nearest of all is the image itself

    def features(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.classifier.features(part) for part in x.split(1000)])

    def distance(self, x: Tensor) -> float:
        return frechet(self.features(x), self.real)

    def scores(self, x: Tensor, labels: Tensor) -> dict[str, float]:
        """Frechet distances of the samples as they come and in 256 grey levels; of the latter precision
        (arXiv 1904.06991: in a ball around a real image up to its third neighbour), coverage (arXiv 2002.09797: real
        images with a sample in their ball, up to the fifth) and how often the classifier sees the class asked for."""
        greys = to_greys(x)
        seen = self.features(greys)
        gaps = torch.cdist(self.centres, seen)
        with torch.no_grad():
            logits = self.classifier.head(seen)
        return {
            "distance": self.distance(x),
            "256 greys": frechet(seen, self.real),
            "precision": float((gaps < self.third[:, None]).any(0).double().mean()),
            "coverage": float((gaps < self.fifth[:, None]).any(1).double().mean()),
            "class": accuracy(logits, labels),
        }


def save_grid(panels: Panels, path: Path) -> None:
    """One panel a model, one row a class; the same cell of two models starts from the same noise."""
    fig, axes = plt.subplots(1, len(panels), figsize=(2.6 * len(panels), 4.6), layout="constrained", squeeze=False)
    for ax, (name, x) in zip(axes[0], panels.items(), strict=True):
        tiles = F.pad(x.detach().cpu()[:, 0].unflatten(0, (CLASSES, -1)), (0, 2, 0, 2), value=1.0)
        ax.imshow(tiles.permute(0, 2, 1, 3).flatten(2).flatten(0, 1).numpy(), cmap="gray", vmin=-1, vmax=1)
        ax.set_title(name, fontsize=9)
        ax.axis("off")
    save_picture(fig, path)
