"""What is lost where a half-precision head rounds its logits before they are compared: errors against float64.

    python -m benchmarks.logits_rounding

A student's hidden states and output weights, and a teacher's: the same plus noise, relative to each. All are rounded to
half precision first; the exact loss and gradients, in float64, are those of the rounded operands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
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


def main() -> None:
    print("| noise | logits | value | gradient, hidden | gradient, weight | log-probability, nats |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for e in study():
        print(f"| {e.noise} | {e.method} | {e.value:.2%} | {e.hidden:.2%} | {e.weight:.2%} | {e.logprob:.1e} |")


if __name__ == "__main__":
    main()
