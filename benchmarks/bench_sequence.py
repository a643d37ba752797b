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
from .harness import compare, compare_case

DEVICE = os.environ.get("FASTGEN_TEST_DEVICE", "cpu")
# Language models' vocabularies, and VAR's tokens of an image.
LOGITS = [(512, 32_000), (128, 128_256)] if DEVICE == "cpu" else [(8192, 32_000), (8192, 128_256)]
IMAGES = (4, 680, 4096) if DEVICE == "cpu" else (32, 680, 4096)
HEAD = (256, 512, 32_000) if DEVICE == "cpu" else (8192, 4096, 128_256)  # tokens, width, vocabulary
DTYPES = [torch.float32, torch.bfloat16]

STEPS: list[tuple[str, str, tuple[int, ...], int]] = [
    # the benchmark's name, its case, shape, streams at the floor: every input once, the gradient once
    *(
        (f"generalized_jsd-{beta}", f"generalized_jsd_loss-{case}", shape, 3)
        for shape in LOGITS
        for beta, case in ((0.5, "0.5"), (0.0, "0"))
    ),
    *(("token_logprob", "token_logprob", shape, 2) for shape in LOGITS),
    ("sequence_ddo_loss", "sequence_ddo_loss", IMAGES, 3),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("step", STEPS, ids=lambda s: f"{s[0]}-{'x'.join(map(str, s[2]))}")
def test_step(step: tuple[str, str, tuple[int, ...], int], dtype: torch.dtype, benchmark: Any, device: str) -> None:
    _, case, shape, streams = step
    compare_case(benchmark, CASES[case], shape, dtype, device, streams, peers.of_logits(case))


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
