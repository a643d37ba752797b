"""Images by row number, the order in which they come, and files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file aside and renames it: whoever is killed meanwhile leaves the old file, or none, at `path`."""
    aside = path.with_name(f".{path.name}.part")
    with open(aside, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def seed_of(*numbers: int) -> int:
    """A seed of its own for each tuple of numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Images:
    """Images [C, H, W] by row number, as float32: uint8 becomes [-1, 1], floats stay as they are.

    `read` returns the array of some rows; `rows` are those of it that count, such as a split's.
    """

    def __init__(self, read: Callable[[Sequence[int]], Any], rows: Any, labels: Any = None) -> None:
        self._read, self._rows, self._labels = read, np.asarray(rows), labels
        self.shape: tuple[int, ...] = tuple(self[torch.arange(1)].shape[1:]) if len(self._rows) else ()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Tensor) -> Tensor:
        x = torch.from_numpy(np.ascontiguousarray(self._read(self._rows[index.numpy()])))
        return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x.float()

    def labels(self, index: Tensor) -> Tensor | None:
        return None if self._labels is None else torch.as_tensor(self._labels[self._rows[index.numpy()]]).long()

    def check_labels(self, classes: int) -> None:
        if self._labels is None:
            raise ValueError(f"--classes {classes} needs labels: subfolders, or 'labels' in an .npz")
        low, high = int(np.min(self._labels)), int(np.max(self._labels))
        if low < 0 or high >= classes:
            raise ValueError(f"labels go from {low} to {high}, which --classes {classes} does not cover")

    def split(self, share: float, seed: int) -> tuple[Images, Images]:
        """All but a random share of the rows, and that share; both at least two rows, as a covariance needs."""
        held = min(max(2, round(share * len(self))), len(self) - 2)
        if held < 2:
            raise ValueError(f"--data has {len(self)} images: too few to hold some out for validation")
        order = self._rows[np.random.default_rng(seed_of(seed, 0)).permutation(len(self))]
        rest, share_of_them = np.sort(order[held:]), np.sort(order[:held])
        return Images(self._read, rest, self._labels), Images(self._read, share_of_them, self._labels)


def open_images(option: str, spec: str) -> Images:
    """The images that a command-line option names."""
    if spec.partition(":")[0] == "random":
        return _random(option, spec.partition(":")[2] or "256x3x32x32")
    path = Path(spec)
    if path.is_dir():
        return _folder(option, path)
    if path.suffix not in (".npy", ".npz") or not path.exists():
        raise ValueError(f"{option} must be a folder, a .npy or .npz file, or random[:NxCxHxW]; there is no {spec!r}")
    if path.suffix == ".npy":
        return _array(option, np.load(path, mmap_mode="r"), None)
    with np.load(path) as arrays:
        if "images" not in arrays:
            raise ValueError(f"{option}: {spec} has no array 'images', only {', '.join(arrays)}")
        return _array(option, arrays["images"], arrays.get("labels"))


def _array(option: str, x: Any, labels: Any) -> Images:
    if x.ndim != 4 or len(x) == 0:
        raise ValueError(f"{option} must be images [N, C, H, W], got shape {list(x.shape)}")
    if x.dtype != np.uint8 and not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"{option} must be uint8 or floating-point, got {x.dtype}")
    if labels is not None and (labels.shape != (len(x),) or not np.issubdtype(labels.dtype, np.integer)):
        raise ValueError(f"{option}: labels must be {len(x)} integers, got {labels.dtype} {list(labels.shape)}")
    return Images(lambda rows: x[rows], np.arange(len(x)), labels)


def _folder(option: str, path: Path) -> Images:
    from PIL import Image

    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{option}: no images ({', '.join(sorted(SUFFIXES))}) in {path}")
    folders = sorted({p.parent for p in files} - {path})
    flat = any(p.parent == path for p in files)
    labels = None if flat else np.array([folders.index(p.parent) for p in files])
    with Image.open(files[0]) as first:
        size = first.size

    def read(rows: Sequence[int]) -> Any:
        images = []
        for row in rows:
            with Image.open(files[row]) as image:
                if image.size != size:
                    raise ValueError(
                        f"{option}: {files[row]} is {image.size}, and {files[0]} {size}; resize them first"
                    )
                images.append(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
        return np.stack(images)

    return Images(read, np.arange(len(files)), labels)


def _random(option: str, text: str) -> Images:
    """Waves of random direction and phase: smooth, and as unlike each other as images of a kind are."""
    try:
        n, c, h, w = (int(size) for size in text.split("x"))
    except ValueError:
        n = c = h = w = 0
    if min(n, c, h, w) < 1:
        raise ValueError(f"{option} random:NxCxHxW takes four positive numbers, got {text!r}")
    draw = np.random.default_rng(0)
    speed, phase = draw.uniform(-2, 2, (2, n, c, 1, 1)), draw.uniform(0, 2 * np.pi, (n, c, 1, 1))
    y, x = np.arange(h)[:, None] / h, np.arange(w) / w
    waves = np.sin(phase + 2 * np.pi * (speed[0] * y + speed[1] * x))
    return _array(option, (127.5 * (waves + 1)).astype(np.uint8), np.arange(n) % 2)


class Shuffle:
    """The numbers below `rows` in endless shuffled epochs. Place k holds the same number whoever asks, and when."""

    def __init__(self, rows: int, *seed: int) -> None:
        self.rows = rows

        @lru_cache(maxsize=2)
        def order(epoch: int) -> Tensor:
            return torch.randperm(rows, generator=torch.Generator().manual_seed(seed_of(*seed, epoch)))

        self._order = order

    def __call__(self, start: int, count: int) -> Tensor:
        parts = []
        while count > 0:
            epoch, place = divmod(start, self.rows)
            parts.append(self._order(epoch)[place : place + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return torch.cat(parts)
