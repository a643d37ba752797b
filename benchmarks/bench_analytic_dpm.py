"""The moments of Analytic-DPM: one pass over a batch of predictions, against eager PyTorch and torch.compile."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen import ScoreMoments, reference, use_backend
from fastgen.core import dispatch
from fastgen.core.timing import Variant

from .harness import compare, compiled

DEVICE = os.environ.get("FASTGEN_TEST_DEVICE", "cpu")
SHAPES = [(64, 3, 32, 32), (64, 3, 64, 64), (64, 4, 128, 128), (1024, 4, 64, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_score_moments(shape: tuple[int, ...], dtype: torch.dtype, benchmark: Any, device: str) -> None:
    t = torch.randint(1000, (shape[0],), device=device)

    def moments_of(mean_square: Any) -> Variant:
        """What the class does, with another function for its pass over the batch."""
        sums = torch.zeros(1000, 3, dtype=torch.float64, device=device)

        def update(inputs: Sequence[Tensor]) -> None:
            square = mean_square(inputs[0]).double()
            terms = torch.stack([torch.ones_like(square), square, square.square()], 1)
            sums.index_put_((t,), terms, accumulate=True)

        return update

    def ours(backend: str) -> Variant:
        moments = ScoreMoments(1000, device=device)

        def update(inputs: Sequence[Tensor]) -> None:
            with use_backend(backend):
                moments.update(t, inputs[0])

        return update

    torch._dynamo.reset()
    variants: dict[str, Variant] = {
        "eager": moments_of(reference.mean_square),
        **{k: moments_of(f) for k, f in compiled(reference.mean_square).items()},
    }
    for backend in ("native", "triton"):
        if dispatch.missing("mean_square", backend, device) is None:
            variants[backend] = ours(backend)
    variants["fastgen"] = ours("auto")
    size = torch.Size(shape).numel() * dtype.itemsize
    compare(benchmark, variants, lambda: [torch.randn(shape, device=device).to(dtype)], size, "fastgen", device)
