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
from fastgen import _backend, reference

from .harness import Variant, compare, compiled

DEVICE = os.environ.get("FASTGEN_TEST_DEVICE", "cpu")
# Language models' vocabularies, and VAR's tokens of an image.
LOGITS = [(512, 32_000), (128, 128_256)] if DEVICE == "cpu" else [(8192, 32_000), (8192, 128_256)]
IMAGES = (4, 680, 4096) if DEVICE == "cpu" else (32, 680, 4096)
HEAD = (256, 512, 32_000) if DEVICE == "cpu" else (8192, 4096, 128_256)  # tokens, width, vocabulary
DTYPES = [torch.float32, torch.bfloat16]

Loss = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def divergence(beta: float, module: Any, student: Tensor, teacher: Tensor, tokens: Tensor) -> Tensor:
    return module.generalized_jsd_loss(student, teacher, beta=beta)


def negative_logprob(module: Any, logits: Tensor, _: Tensor, tokens: Tensor) -> Tensor:
    return -module.token_logprob(logits, tokens).mean()


def ddo(module: Any, logits: Tensor, ref_logits: Tensor, tokens: Tensor) -> Tensor:
    is_real = torch.arange(len(logits), device=logits.device) % 2 == 0
    return module.sequence_ddo_loss(logits, ref_logits, tokens, is_real)


CASES: list[tuple[str, Loss, str, tuple[int, ...], int]] = [
    # name, loss, operator, shape, streams at the floor: every input once, the gradient once
    *((f"generalized_jsd-{beta}", partial(divergence, beta), "generalized_jsd", shape, 3)
      for shape in LOGITS for beta in (0.5, 0.0)),
    *(("token_logprob", negative_logprob, "token_logprob", shape, 2) for shape in LOGITS),
    ("sequence_ddo_loss", ddo, "sequence_ddo_loss", IMAGES, 3),
]  # fmt: skip


def step(loss: Callable[..., Tensor], tokens: Tensor, inputs: Sequence[Tensor]) -> None:
    # A fresh leaf stands for the model's output.
    loss(inputs[0].detach().requires_grad_(), inputs[1], tokens).backward()


def backend_step(backend: str, *args: Any) -> None:
    with fastgen.use_backend(backend):
        step(*args)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    ("name", "loss", "operator", "shape", "streams"), CASES, ids=[f"{c[0]}-{'x'.join(map(str, c[3]))}" for c in CASES]
)
def test_step(
    name: str, loss: Loss, operator: str, shape: tuple[int, ...], streams: int, dtype: torch.dtype, benchmark: Any,
    device: str,
) -> None:  # fmt: skip
    tokens = torch.randint(shape[-1], shape[:-1], device=device)
    ours, theirs = partial(loss, fastgen), partial(loss, reference)
    torch._dynamo.reset()
    variants: dict[str, Variant] = {
        "eager": partial(step, theirs, tokens),
        **{k: partial(step, f, tokens) for k, f in compiled(theirs).items()},
    }
    for backend in ("native", "triton"):
        if _backend.missing(operator, backend, device) is None:
            variants[backend] = partial(backend_step, backend, ours, tokens)
    variants["fastgen"] = partial(step, ours, tokens)
    compare(
        benchmark,
        variants,
        lambda: [torch.randn(shape, device=device).to(dtype) for _ in range(2)],
        streams * torch.Size(shape).numel() * dtype.itemsize,
        "fastgen",
        device,
    )


def linear_step(module: Any, student: Tensor, teacher: Tensor, inputs: Sequence[Tensor]) -> None:
    hidden = inputs[0].detach().requires_grad_()
    weight = student.detach().requires_grad_()
    module.linear_generalized_jsd_loss(hidden, weight, inputs[1], teacher).backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_linear_generalized_jsd_loss(dtype: torch.dtype, benchmark: Any, device: str) -> None:
    """Matrix products dominate; what the fused form saves is memory."""
    tokens, width, vocabulary = HEAD
    student, teacher = (0.05 * torch.randn(vocabulary, width, device=device, dtype=dtype) for _ in range(2))
    compare(
        benchmark,
        {
            "eager": partial(linear_step, reference, student, teacher),
            "fastgen": partial(linear_step, fastgen, student, teacher),
        },
        lambda: [torch.randn(tokens, width, device=device).to(dtype) for _ in range(2)],
        (3 * vocabulary + 3 * tokens) * width * dtype.itemsize,
        "fastgen",
        device,
    )
