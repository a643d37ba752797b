"""Distances of a perceptual network's features, forward and backward, against eager PyTorch and torch.compile."""

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
from fastgen.core import dispatch
from fastgen.core.timing import Variant

from .harness import compare, compiled

DEVICE = os.environ.get("FASTGEN_TEST_DEVICE", "cpu")
LAYERS = {  # VGG's five, of images of 64 and of 256 pixels
    "vgg-64": [(16, 64, 64, 64), (16, 128, 32, 32), (16, 256, 16, 16), (16, 512, 8, 8), (16, 512, 4, 4)],
    "vgg-256": [(4, 64, 256, 256), (4, 128, 128, 128), (4, 256, 64, 64), (4, 512, 32, 32), (4, 512, 16, 16)],
}
DTYPES = [torch.float32, torch.bfloat16]


Loss = Callable[..., Tensor]


def step(feature_distance: Loss, inputs: Sequence[Tensor]) -> None:
    half = len(inputs) // 2
    features = [t.detach().requires_grad_() for t in inputs[:half]]  # fresh leaves stand for the network's
    feature_distance(features, inputs[half:], [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0]).backward()


def backend_step(backend: str, inputs: Sequence[Tensor]) -> None:
    with fastgen.use_backend(backend):
        step(fastgen.feature_distance, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", LAYERS)
def test_feature_distance(name: str, dtype: torch.dtype, benchmark: Any, device: str) -> None:
    shapes = LAYERS[name]
    torch._dynamo.reset()
    variants: dict[str, Variant] = {
        "eager": partial(step, reference.feature_distance),
        **{k: partial(step, f) for k, f in compiled(reference.feature_distance).items()},
    }
    for backend in ("native", "triton"):
        if dispatch.missing("elbo_error", backend, device) is None:
            variants[backend] = partial(backend_step, backend)
    variants["fastgen"] = partial(step, fastgen.feature_distance)
    elements = sum(torch.Size(s).numel() for s in shapes)
    compare(
        benchmark,
        variants,
        lambda: [torch.randn(s, device=device).to(dtype) for _ in range(2) for s in shapes],
        3 * elements * dtype.itemsize,  # both features once, the gradient once
        "fastgen",
        device,
    )
