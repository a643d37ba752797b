"""The ELBO family: a training step's forward and backward, against eager PyTorch and torch.compile of the reference."""

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
SHAPES = [(8, 3, 32, 32), (64, 3, 64, 64), (64, 4, 128, 128), (1024, 4, 64, 64)]
DTYPES = [torch.float32, torch.bfloat16]


def loss_of(name: str, module: Any, p: Tensor, q: Tensor, y: Tensor, real: Tensor, weight: Tensor) -> Tensor:
    if name == "ddo_loss":
        return module.ddo_loss(p, q, y, real, weight=weight, alpha=2.0, beta=0.05)
    if name == "diffusion_dpo_loss":
        return module.diffusion_dpo_loss(p, q, y)
    return module.elbo_error(p, y, weight=weight).mean()


def step(loss: Callable[..., Tensor], constants: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    # A fresh leaf stands for the network's output.
    p = inputs[0].detach().requires_grad_()
    loss(p, *inputs[1:], *constants).backward()


def backend_step(backend: str, *args: Any) -> None:
    with fastgen.use_backend(backend):
        step(*args)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("name", ["ddo_loss", "diffusion_dpo_loss", "elbo_error"])
def test_step(name: str, shape: tuple[int, ...], dtype: torch.dtype, benchmark: Any, device: str) -> None:
    rows = shape[0]
    constants = (torch.arange(rows, device=device) % 2 == 0, torch.rand(rows, device=device) + 0.5)
    ours, theirs = partial(loss_of, name, fastgen), partial(loss_of, name, reference)
    torch._dynamo.reset()
    variants: dict[str, Variant] = {
        "eager": partial(step, theirs, constants),
        **{k: partial(step, f, constants) for k, f in compiled(theirs).items()},
    }
    for backend in ("native", "triton"):
        if _backend.missing(name, backend, device) is None:
            variants[backend] = partial(backend_step, backend, ours, constants)
    variants["fastgen"] = partial(step, ours, constants)
    size = torch.Size(shape).numel() * dtype.itemsize
    streams = 3 if name == "elbo_error" else 4  # every input once, the gradient once
    compare(
        benchmark,
        variants,
        lambda: [torch.randn(shape, device=device).to(dtype) for _ in range(3)],
        streams * size,
        "fastgen",
        device,
    )
