"""The sequence family: steps of training, forward and backward, against eager PyTorch and torch.compile."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgen
from fastgen import reference
from fastgen.cases import CASES

from . import peers
from .harness import compare, compare_case, compiled

DEVICE = os.environ.get("FASTGEN_TEST_DEVICE", "cpu")
# Language models' vocabularies, and VAR's tokens of an image.
LOGITS = [(512, 32_000), (128, 128_256)] if DEVICE == "cpu" else [(8192, 32_000), (8192, 128_256)]
IMAGES = (4, 680, 4096) if DEVICE == "cpu" else (32, 680, 4096)
HEAD = (256, 512, 32_000) if DEVICE == "cpu" else (8192, 4096, 128_256)  # tokens, width, vocabulary
MASKED = (4096, 1024, 32_000)  # the same, half of whose tokens count
ENTRIES = 64  # of a sparse teacher
DTYPES = [torch.float32, torch.bfloat16]

STEPS: list[tuple[str, str, tuple[int, ...], int]] = [
    # the benchmark's name, its case, shape, streams at the floor: every input once, the gradient once
    *(
        (f"generalized_jsd-{beta}", f"generalized_jsd_loss-{case}", shape, 3)
        for shape in LOGITS
        for beta, case in ((0.5, "0.5"), (0.0, "0"))
    ),
    ("generalized_jsd-hard", "generalized_jsd_loss-hard-0.3", LOGITS[0], 3),
    *(("token_logprob", "token_logprob", shape, 2) for shape in LOGITS),
    ("sequence_ddo_loss", "sequence_ddo_loss", IMAGES, 3),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("step", STEPS, ids=lambda s: f"{s[0]}-{'x'.join(map(str, s[2]))}")
def test_step(step: tuple[str, str, tuple[int, ...], int], dtype: torch.dtype, benchmark: Any, device: str) -> None:
    _, case, shape, streams = step
    compare_case(benchmark, CASES[case], shape, dtype, device, streams, peers.of_logits(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_sparse_divergence_loss(dtype: torch.dtype, benchmark: Any, device: str) -> None:
    rows, vocabulary = LOGITS[0]
    eager: Callable[..., Any] = reference.sparse_divergence_loss

    def step(loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        loss(inputs[0].detach().requires_grad_(), *inputs[1:]).backward()

    def make() -> list[Tensor]:
        logits, teacher = (torch.randn(rows, vocabulary, device=device) for _ in range(2))
        return [logits.to(dtype), *teacher.log_softmax(-1).topk(ENTRIES)]

    torch._dynamo.reset()
    losses: dict[str, Callable[..., Tensor]] = {
        "eager": eager,
        **compiled(eager),
        "fastgen": fastgen.sparse_divergence_loss,
    }
    compare(
        benchmark,
        {name: partial(step, loss) for name, loss in losses.items()},
        make,
        2 * rows * vocabulary * dtype.itemsize,
        "fastgen",
        device,
    )


def linear_step(loss: Callable[..., Tensor], student: Tensor, teacher: Tensor, inputs: Sequence[Tensor]) -> None:
    hidden = inputs[0].detach().requires_grad_()
    weight = student.detach().requires_grad_()
    loss(hidden, weight, inputs[1], teacher).backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_linear_generalized_jsd_loss(dtype: torch.dtype, benchmark: Any, device: str) -> None:
    """Matrix products dominate; what the fused form saves is memory."""
    tokens, width, vocabulary = HEAD
    student, teacher = (0.05 * torch.randn(vocabulary, width, device=device, dtype=dtype) for _ in range(2))
    losses: dict[str, Callable[..., Tensor]] = {
        "eager": reference.linear_generalized_jsd_loss,
        **peers.of_hidden(),
        "fastgen": fastgen.linear_generalized_jsd_loss,
    }
    compare(
        benchmark,
        {name: partial(linear_step, loss, student, teacher) for name, loss in losses.items()},
        lambda: [torch.randn(tokens, width, device=device).to(dtype) for _ in range(2)],
        (3 * vocabulary + 3 * tokens) * width * dtype.itemsize,
        "fastgen",
        device,
    )


def masked_logprob(module: Any) -> Callable[..., Tensor]:
    def loss(hidden: Tensor, head: Tensor, tokens: Tensor, mask: Tensor, **options: Any) -> Tensor:
        return -module.linear_token_logprob(hidden, head, tokens, mask=mask, **options).sum() / (len(mask) // 2)

    return loss


def masked_divergence(module: Any) -> Callable[..., Tensor]:
    def loss(hidden: Tensor, head: Tensor, taught: Tensor, teacher: Tensor, mask: Tensor, **options: Any) -> Tensor:
        return module.linear_generalized_jsd_loss(hidden, head, taught, teacher, mask=mask, **options)

    return loss


@pytest.mark.parametrize("of", ["linear_token_logprob", "linear_generalized_jsd_loss"])
def test_half_of_the_tokens(of: str, benchmark: Any, device: str) -> None:
    """Rows that do not count need no projection. On a CPU in float32, on a GPU in bfloat16."""
    tokens, width, vocabulary = MASKED
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    student, teacher = (width**-0.5 * torch.randn(vocabulary, width, device=device, dtype=dtype) for _ in range(2))
    mask = torch.arange(tokens, device=device) % 2 == 0
    labels = torch.randint(vocabulary, (tokens,), device=device)
    divergence = of == "linear_generalized_jsd_loss"
    ours, others = (
        (masked_divergence, peers.of_masked_hidden) if divergence else (masked_logprob, peers.of_masked_tokens)
    )
    losses: dict[str, Callable[..., Tensor]] = {
        "eager": ours(reference),
        **others(),
        "fastgen": partial(ours(fastgen), num_valid=tokens // 2),
    }

    def step(loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        hidden, head = inputs[0].detach().requires_grad_(), student.detach().requires_grad_()
        loss(hidden, head, *((inputs[1], teacher) if divergence else (labels,)), mask).backward()

    streams = 2 if divergence else 1  # models, whose gradient is the student's
    compare(
        benchmark,
        {name: partial(step, loss) for name, loss in losses.items()},
        lambda: [torch.randn(tokens, width, device=device).to(dtype) for _ in range(streams)],
        (streams + 1) * (vocabulary + tokens // 2) * width * dtype.itemsize,
        "fastgen",
        device,
    )
