"""Fashion-MNIST (Xiao, Rasul and Vollgraf, arXiv 1708.07747): where its files are found, and its three splits.

70 000 grey images, 28x28, ten classes of clothes, under the MIT licence. Of the training files the last 5 000 images
are held out for validation: settings and checkpoints are chosen on these, never on the test files.
"""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

SIDE, CLASSES = 28, 10
NAMES = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
VALIDATION = 5000
SIGMA_DATA = 0.706  # the standard deviation of the training split's pixels
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Split:
    """Images [N, 1, 28, 28] in [-1, 1] and their classes [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Tensor | slice) -> Split:
        return Split(self.images[rows], self.labels[rows])

    def draw(self, count: int, gen: torch.Generator) -> Split:
        """`count` of them, with repeats."""
        return self[torch.randint(len(self), (count,), generator=gen)]

    def to(self, device: torch.device) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Data:
    train: Split
    validation: Split
    test: Split


def folder() -> Path:
    """Where the four files lie: the folder that FASHION_MNIST names, the Debian package's, or torchvision's."""
    named = os.environ.get("FASHION_MNIST")
    places = [Path(named)] if named else [DEBIAN, Path("data/FashionMNIST/raw")]
    for place in places:
        if any((place / f"train-images-idx3-ubyte{end}").exists() for end in (".gz", "")):
            return place
    raise FileNotFoundError(
        f"Fashion-MNIST is not in {' or '.join(map(str, places))}: get it by `apt install dataset-fashion-mnist` "
        "(Debian, Ubuntu) or `torchvision.datasets.FashionMNIST('data', download=True)`, or name the folder with its "
        "four files (train-images-idx3-ubyte.gz, ...) by the environment variable FASHION_MNIST"
    )


def read(path: Path) -> Tensor:
    """One file in the IDX format, of bytes, compressed or not."""
    raw = gzip.decompress(path.with_name(f"{path.name}.gz").read_bytes()) if not path.exists() else path.read_bytes()
    dims = raw[3]
    shape = np.frombuffer(raw, ">i4", dims, 4)
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape).copy())


def load(smoke: bool = False) -> Data:
    """The three splits; made-up images for a smoke run, which needs no files."""
    if smoke:
        return made_up()
    place = folder()

    def split(name: str) -> Split:
        pixels, labels = read(place / f"{name}-images-idx3-ubyte"), read(place / f"{name}-labels-idx1-ubyte")
        return Split(pixels[:, None].float() / 127.5 - 1, labels.long())

    train, test = split("train"), split("t10k")
    return Data(train[:-VALIDATION], train[-VALIDATION:], test)


def made_up(count: int = 300) -> Data:
    """Blobs whose place tells their class: enough for every script to run in seconds."""
    gen = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % CLASSES
    at = torch.linspace(-1, 1, SIDE)
    y, x = (2 * torch.rand(count, 1, 1, generator=gen) / 5 + (k - 2) / 5 for k in (labels[:, None, None] % 5, 2))
    blob = torch.exp(-8 * ((at[:, None] - y) ** 2 + (at - x) ** 2)) * (1 + labels[:, None, None] // 5) / 2
    whole = Split(2 * blob[:, None] - 1, labels)
    third = count // 3
    return Data(whole[:third], whole[third : 2 * third], whole[2 * third :])


def to_greys(x: Tensor) -> Tensor:
    """Clamp and round to the data's 256 grey levels."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
