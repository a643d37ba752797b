"""What a loss over a divided vocabulary costs on meshes that are not at hand: bytes, messages, memory, and time.

    python -m benchmarks.scaling            # tables, as Markdown
    python -m benchmarks.scaling --plot docs/assets/scaling.png

No time here is measured. Counted are the passes of the kernels over logits (``fastgen/sequence/parallel.py``) and the
messages between them, which ``tests/test_divided_vocabulary.py`` counts in real runs; from them follows a time by a
model of the device and of the network whose numbers are stated (`Machine`). A step reads the rows for the normalizers,
again for the sums, and again for the gradient that it writes; these bytes move at a copy's rate, and messages at the
network's rate after its latency. Beside it stand the same loss unfused, in PyTorch's operators over the same slices,
whose traffic and memory are counted while the reference runs (:func:`unfused_counts`), and the loss of whole rows after
an all-gather of the logits.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen import reference

TOKENS = 2**20
VOCABULARIES = (128_256, 262_144)
WIDTHS = (1, 2, 4, 8, 16)
GPUS = (8, 64, 512, 4096)
NODE = 8  # GPUs that are joined by the fast network


class Machine(NamedTuple):
    """A device and its networks; rates in bytes a second, latencies in seconds."""

    copy: float = 4.2e12  # what a copy reaches on an H200, reads and writes together: benchmarks/README.md
    inside: float = 3.6e11  # in one direction, in a node (NVLink 4: 450 GB/s at best, of which 80 %)
    inside_latency: float = 1.0e-5
    between: float = 4.0e10  # a rank's, between nodes (400 Gb/s at best, of which 80 %)
    between_latency: float = 2.0e-5

    def gather(self, ranks: int, part: float) -> float:
        """Of an all-gather in a ring, `part` bytes a rank."""
        if ranks == 1:
            return 0.0
        rate, latency = (self.inside, self.inside_latency) if ranks <= NODE else (self.between, self.between_latency)
        return latency * math.ceil(math.log2(ranks)) + (ranks - 1) * part / rate


class Cost(NamedTuple):
    """Of a rank, in a step."""

    moved: float  # bytes between its memory and its multiprocessors
    held: float  # bytes besides the two rows of logits
    messages: int
    sent: float  # bytes that it puts into messages
    seconds: float


class DividedLoss(NamedTuple):
    """Passes over a rank's logits, each of them `streams` of rows, and the numbers a row of each message."""

    name: str
    streams: int
    passes: int
    messages: tuple[int, ...]
    reference: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _token_logprob(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = reference.token_logprob(student, torch.zeros(student.shape[:-1], dtype=torch.int64))
    return found.sum()


LOSSES = (
    DividedLoss(
        "generalized_jsd_loss, β = ½", 2, 3, (4, 2), functools.partial(reference.generalized_jsd_loss, beta=0.5)
    ),
    DividedLoss(
        "generalized_jsd_loss, β = 0", 2, 3, (4, 2), functools.partial(reference.generalized_jsd_loss, beta=0.0)
    ),
    DividedLoss("token_logprob", 1, 2, (3,), _token_logprob),
)


class Moved(TorchDispatchMode):
    """Counts the bytes that operators read and write; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        given = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        made = [t for t in torch.utils._pytree.tree_leaves(results) if isinstance(t, torch.Tensor)]
        if not func.is_view and "detach" not in func.name():
            self.bytes += sum(t.numel() * t.element_size() for t in (*given, *made) if t.stride() != (0,) * t.dim())
        return results


@functools.cache
def unfused_counts(loss: DividedLoss) -> tuple[float, float]:
    """Bytes that the reference moves forward and backward, and that it keeps for the backward pass, an element of the
    student's bfloat16 logits."""
    student, teacher = torch.randn(2, 16, 4096).to(torch.bfloat16)
    student.requires_grad_()
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with Moved() as moved:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            value = loss.reference(student, teacher)
        value.backward()
    return moved.bytes / student.numel(), sum(kept.values()) / student.numel()


def fused(loss: DividedLoss, tokens: int, vocabulary: int, tp: int, machine: Machine, itemsize: int = 2) -> Cost:
    elements = tokens * (vocabulary / tp)
    moved = elements * itemsize * (loss.streams * loss.passes + 1)
    sent = [4.0 * tokens * numbers for numbers in loss.messages] if tp > 1 else []
    held = elements * itemsize + 4 * tokens * sum(loss.messages) * (tp + 1)
    seconds = moved / machine.copy + sum(machine.gather(tp, part) for part in sent)
    return Cost(moved, held, len(sent), sum(sent), seconds)


def unfused(loss: DividedLoss, tokens: int, vocabulary: int, tp: int, machine: Machine, itemsize: int = 2) -> Cost:
    """A maximum and a sum a row of each stream, and the row's sum, have messages of their own."""
    elements = tokens * (vocabulary / tp)
    moves, keeps = unfused_counts(loss)
    count = 2 * loss.streams + 1 if tp > 1 else 0
    seconds = elements * moves / machine.copy + count * machine.gather(tp, 4.0 * tokens)
    return Cost(elements * moves, elements * (keeps + itemsize), count, 4.0 * tokens * count, seconds)


def whole(loss: DividedLoss, tokens: int, vocabulary: int, tp: int, machine: Machine, itemsize: int = 2) -> Cost:
    """Gather the vocabulary and run the fused loss of whole rows: what a loss that knows no slices needs."""
    elements = tokens * vocabulary
    part = elements / tp * itemsize * loss.streams
    moved = elements * itemsize * (2 * loss.streams + 1)
    seconds = moved / machine.copy + machine.gather(tp, part)
    held = elements * itemsize * (1 + (loss.streams if tp > 1 else 0))
    return Cost(moved, held, int(tp > 1), part if tp > 1 else 0.0, seconds)


def tokens_of(gpus: int, tp: int) -> int:
    """Of a tensor-parallel group, where data parallelism divides the rest."""
    return TOKENS * tp // gpus


def table(loss: DividedLoss, vocabulary: int, machine: Machine) -> list[str]:
    head = ["GPUs", "TP", "tokens a group", "sent a rank, MB", "messages", "fused, ms", "unfused, ms", "gathered, ms"]
    rows = [head, ["---:"] * len(head)]
    for gpus in GPUS:
        for tp in WIDTHS:
            if tp > gpus:
                continue
            tokens = tokens_of(gpus, tp)
            costs = [model(loss, tokens, vocabulary, tp, machine) for model in (fused, unfused, whole)]
            first = costs[0]
            cells = [f"{gpus}", f"{tp}", f"{tokens}", f"{first.sent / 1e6:.3g}", f"{first.messages}"]
            rows.append([*cells, *(f"{1e3 * cost.seconds:.3g}" for cost in costs)])
    return [f"| {' | '.join(row)} |" for row in rows]


def memory_table(loss: DividedLoss, machine: Machine, tokens: int = 8192) -> list[str]:
    head = ["vocabulary", "TP", "fused, MB", "unfused, MB", "gathered, MB"]
    rows = [head, ["---:"] * len(head)]
    for vocabulary in VOCABULARIES:
        for tp in WIDTHS:
            costs = [model(loss, tokens, vocabulary, tp, machine) for model in (fused, unfused, whole)]
            rows.append([f"{vocabulary}", f"{tp}", *(f"{cost.held / 1e6:.0f}" for cost in costs)])
    return [f"| {' | '.join(row)} |" for row in rows]


def page(machine: Machine) -> str:
    parts = []
    for loss in LOSSES[:1]:
        for vocabulary in VOCABULARIES:
            parts.append(f"### `{loss.name}`, vocabulary {vocabulary}, {TOKENS} tokens a step, bfloat16\n")
            parts.extend([*table(loss, vocabulary, machine), ""])
        parts.append("### Memory besides the logits, 8192 tokens a group\n")
        parts.extend([*memory_table(loss, machine), ""])
    return "\n".join(parts)


def plot(path: Path, machine: Machine) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(VOCABULARIES), figsize=(11, 4.2), layout="constrained", sharey=True)
    for ax, vocabulary in zip(axes, VOCABULARIES, strict=True):
        for model, style in ((fused, "o-"), (unfused, "s--"), (whole, "^:")):
            times = [1e3 * model(LOSSES[0], tokens_of(64, tp), vocabulary, tp, machine).seconds for tp in WIDTHS]
            ax.plot(WIDTHS, times, style, label={"whole": "gathered"}.get(model.__name__, model.__name__))
        ax.set(xscale="log", yscale="log", xlabel="tensor-parallel ranks", title=f"vocabulary {vocabulary}")
        ax.set_xticks(WIDTHS, [str(w) for w in WIDTHS])
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("ms a step of the loss, by the model")
    axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A model of losses over divided vocabularies on large meshes.")
    parser.add_argument("--plot", type=Path, help="also draw times over tensor-parallel ranks, on 64 GPUs")
    args = parser.parse_args(argv)
    machine = Machine()
    print(page(machine))
    if args.plot:
        plot(args.plot, machine)


if __name__ == "__main__":
    main()
