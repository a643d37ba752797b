"""What is lost where a half-precision head rounds its logits before they are compared: errors against float64.

    python -m benchmarks.logits_rounding
    python -m benchmarks.logits_rounding --plot docs/assets/rounding.png

A student's hidden states and output weights, and a teacher's: the same plus noise, relative to each. All are rounded to
half precision first; the exact loss and gradients, in float64, are those of the rounded operands. The plot has beside
it what a pseudo-target in bfloat16 loses: the mean square between x and x - G, whose difference has the digits of x.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import fastgen
from fastgen import reference

NOISES = (1.0, 0.1, 0.02, 0.01)
LOGIT_SCALE = 3.0  # standard deviation


class Errors(NamedTuple):
    """Relative errors in the 2-norm; of log-probabilities the largest absolute one, in nats."""

    noise: float
    method: str
    value: float
    hidden: float
    weight: float
    logprob: float


def operands(
    rows: int, width: int, vocabulary: int, noise: float, dtype: torch.dtype, seed: int, device: str
) -> list[Tensor]:
    """The student's hidden states and weight, and the teacher's."""
    generator = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator)
    hidden, weight = normal(rows, width), normal(vocabulary, width) * (LOGIT_SCALE / width**0.5)
    noises = normal(rows, width), normal(vocabulary, width) * (LOGIT_SCALE / width**0.5)
    return [t.to(device, dtype) for t in (hidden, weight, hidden + noise * noises[0], weight + noise * noises[1])]


def rounded(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits as a layer of half precision returns them."""
    return hidden @ weight.t()


def exact(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits in float32 of the same operands."""
    return hidden.float() @ weight.float().t()


def of_logits(logits: Callable[[Tensor, Tensor], Tensor], operands: Sequence[Tensor], beta: float) -> Tensor:
    student, student_weight, teacher, teacher_weight = operands
    return reference.generalized_jsd_loss(
        logits(student, student_weight), logits(teacher, teacher_weight).detach(), beta=beta
    )


def linear(operands: Sequence[Tensor], beta: float, **options: Any) -> Tensor:
    return fastgen.linear_generalized_jsd_loss(*operands, beta=beta, **options)


METHODS: dict[str, tuple[Callable[[Sequence[Tensor], float], Tensor], Callable[..., Tensor]]] = {
    "rounded logits, eager": (
        partial(of_logits, rounded),
        lambda hidden, weight, tokens: reference.token_logprob(rounded(hidden, weight), tokens),
    ),
    "float32 logits, eager": (
        partial(of_logits, exact),
        lambda hidden, weight, tokens: reference.token_logprob(exact(hidden, weight), tokens),
    ),
    "fastgen, round_logits=True": (
        partial(linear, round_logits=True),
        partial(fastgen.linear_token_logprob, round_logits=True),
    ),
    "fastgen": (linear, fastgen.linear_token_logprob),
}


def step(
    loss: Callable[[Sequence[Tensor], float], Tensor], operands: Sequence[Tensor], beta: float, loss_scale: float
) -> list[Tensor]:
    """The value, and the gradients of the student's hidden states and weight."""
    leaves = [t.detach().requires_grad_() for t in operands[:2]]
    value = loss([*leaves, *operands[2:]], beta)
    return [value.detach(), *torch.autograd.grad(loss_scale * value, leaves)]


def relative(actual: Tensor, exact: Tensor) -> float:
    return ((actual.double() - exact).norm() / exact.norm()).item()


def study(
    noises: Sequence[float] = NOISES,
    methods: Sequence[str] = tuple(METHODS),
    *,
    rows: int = 128,
    width: int = 512,
    vocabulary: int = 16_000,
    beta: float = 0.5,
    dtype: torch.dtype = torch.bfloat16,
    loss_scale: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
) -> Iterator[Errors]:
    for noise in noises:
        given = operands(rows, width, vocabulary, noise, dtype, seed, device)
        wide = [t.double() for t in given]
        truth = step(partial(of_logits, rounded), wide, beta, loss_scale)
        tokens = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(seed)).to(device)
        logprob = reference.token_logprob(rounded(*wide[:2]), tokens)
        for method in methods:
            loss, of_tokens = METHODS[method]
            value, hidden, weight = map(relative, step(loss, given, beta, loss_scale), truth)
            nats = (of_tokens(*given[:2], tokens).double() - logprob).abs().max().item()
            yield Errors(noise, method, value, hidden, weight, nats)


def pseudo_target(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """DMD's loss as most code writes it: G in float32, the target in the dtype of x."""
    field = (fake.float() - real.float()) / (x.detach().float() - real.float()).abs().mean((1, 2, 3), keepdim=True)
    return 0.5 * F.mse_loss(x, (x - field).detach().to(x.dtype))


def fused(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    return fastgen.dmd_loss(x, None, real, fake, prediction_type="sample")


def field_errors(distance: float) -> list[float]:
    """Errors of x's gradient by both ways, where the two networks' x0-predictions are `distance` apart."""
    generator = torch.Generator().manual_seed(0)
    x, real, change = torch.randn(3, 8, 3, 32, 32, generator=generator)
    given = [t.to(torch.bfloat16) for t in (x, real, real + distance * change)]
    gradients = []
    for loss, tensors in ((fused, [t.double() for t in given]), (pseudo_target, given), (fused, given)):
        leaf = tensors[0].detach().requires_grad_()
        gradients.extend(torch.autograd.grad(loss(leaf, *tensors[1:]), leaf))
    return [relative(gradient, gradients[0]) for gradient in gradients[1:]]


def plot(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    methods = {"rounded logits, eager": "logits rounded to bfloat16", "fastgen": "linear_generalized_jsd_loss"}
    found = list(study((1.0, 0.3, 0.1, 0.03, 0.01), tuple(methods)))
    for method, style in zip(methods, ("s--", "o-"), strict=True):
        errors = [e for e in found if e.method == method]
        left.plot([e.noise for e in errors], [e.weight for e in errors], style, label=methods[method])
    left.set(xlabel="distance of the student from the teacher", ylabel="error of the gradient, of its norm")
    distances = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
    errors_of = [field_errors(d) for d in distances]
    for way, style, name in ((0, "s--", "pseudo-target in bfloat16"), (1, "o-", "dmd_loss")):
        right.plot(distances, [e[way] for e in errors_of], style, label=name)
    right.set(xlabel="distance of the fake network's prediction from the real one's")
    for ax in (left, right):
        ax.set(xscale="log", yscale="log")
        ax.grid(alpha=0.3)
        ax.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What half precision loses before a loss compares.")
    parser.add_argument("--plot", type=Path, help="draw errors over distances instead of printing a table")
    args = parser.parse_args(argv)
    if args.plot:
        return plot(args.plot)
    print("| noise | logits | value | gradient, hidden | gradient, weight | log-probability, nats |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for e in study():
        print(f"| {e.noise} | {e.method} | {e.value:.2%} | {e.hidden:.2%} | {e.weight:.2%} | {e.logprob:.1e} |")


if __name__ == "__main__":
    main()
