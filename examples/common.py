"""What all examples share: options, tables and pictures, two measures, and a trainer that averages the weights.

They need scikit-learn, matplotlib and tqdm besides fastgen. Results repeat exactly for one seed, one thread count and
one machine; other thread counts add up in another order and drift apart, most of all where two networks compete.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path
from typing import Any, Generic, TypeVar

import matplotlib
import torch
from torch import Tensor, nn

matplotlib.use("Agg")  # writes a file, needs no display
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

Table = dict[str, dict[str, float]]  # {row: {column: number}}


def argument_parser(description: str, threads: int = 1) -> argparse.ArgumentParser:
    """The options that every example has. `threads` is small where the networks are: more wait for one another."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=threads, help="pinned, because it decides the order of sums")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output", help="folder for the picture")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, in seconds")
    return parser


def start(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The options given, put to work; `farewell` tells how long it has been since."""
    args = parser.parse_args(argv)
    args.began = time.perf_counter()
    torch.set_num_threads(args.threads)
    return args


def farewell(args: argparse.Namespace, picture: Path) -> None:
    """The last lines of every example."""
    seconds = time.perf_counter() - args.began
    print(f"\nPicture: {picture}. Took {seconds:.0f} s on {torch.get_num_threads()} thread(s).")
    if args.smoke:
        print("Smoke run: the numbers mean nothing.")


def print_table(title: str, table: Table) -> None:
    """As Markdown that reads well in a terminal too: the page of all examples takes it as it is."""
    columns = list(next(iter(table.values())))
    cells = [["", *columns], *([name, *(f"{row[c]:.4g}" for c in columns)] for name, row in table.items())]
    first, *others = (max(len(row[k]) for row in cells) for k in range(len(columns) + 1))
    cells.insert(1, ["-" * first, *("-" * (n - 1) + ":" for n in others)])
    print(f"\n{title}\n")
    for name, *numbers in cells:
        print(" | ".join([f"| {name:<{first}}", *(f"{x:>{n}}" for x, n in zip(numbers, others, strict=True))]) + " |")


def save_picture(fig: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
    plt.close(fig)


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance between Gaussians fitted to the rows of a and of b."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    # tr sqrt(A B) = sum of the square roots of the eigenvalues of sqrt(A) B sqrt(A), which is symmetric.
    val, vec = torch.linalg.eigh(cov_a)
    root = vec * val.clamp(min=0).sqrt() @ vec.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """How often the largest logit is that of the label."""
    return float((logits.argmax(1) == labels).double().mean())


Model = TypeVar("Model", bound=nn.Module)


class Trainer(Generic[Model]):
    """Adam with warm-up and a running average of the weights, on a copy of the model.

    With `decay_steps` the learning rate falls to zero over so many steps, along a cosine.
    """

    def __init__(
        self,
        model: Model,
        lr: float,
        warmup: int,
        ema_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        decay_steps: int | None = None,
    ) -> None:
        self.model, self.decay = copy.deepcopy(model).requires_grad_(True), ema_decay
        self.ema, self.steps = copy.deepcopy(model).requires_grad_(False), 0
        self.opt = torch.optim.Adam(self.model.parameters(), lr=lr, betas=betas)

        def rate(step: int) -> float:
            falls = 1.0 if decay_steps is None else (1 + math.cos(math.pi * min(1.0, step / decay_steps))) / 2
            return min(falls, (step + 1) / warmup)

        self.rate = torch.optim.lr_scheduler.LambdaLR(self.opt, rate)

    def step(self, loss: Tensor) -> None:
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        self.rate.step()
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))  # short at first, so that the start is forgotten
        with torch.no_grad():
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        """All that a stopped run needs to go on."""
        parts = {name: getattr(self, name).state_dict() for name in ("model", "ema", "opt", "rate")}
        return {**parts, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("model", "ema", "opt", "rate"):
            getattr(self, name).load_state_dict(state[name])
        self.steps = state["steps"]
