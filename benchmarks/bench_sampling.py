"""What a sampler does between two calls of its network: guidance, x0, clamp, mean and noise, the coefficients given."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fastgen
from fastgen import NoiseSchedule, StepCoefficients, reference
from fastgen.core import dispatch
from fastgen.core.timing import Variant

from .harness import compare, compiled

CASES = [((32, 4, 64, 64), torch.float32), ((32, 4, 64, 64), torch.bfloat16), ((8, 3, 256, 256), torch.float32)]
SCHEDULE = NoiseSchedule.linear(1000)


def step(function: Any, k: StepCoefficients, inputs: Sequence[Tensor]) -> Tensor:
    x_t, cond, uncond, noise = inputs
    return function(x_t, cond, k, uncond=uncond, guidance_scale=7.5, noise=noise, clamp=(-1.0, 1.0))


def backend_step(backend: str, k: StepCoefficients, inputs: Sequence[Tensor]) -> Tensor:
    with fastgen.use_backend(backend):
        return step(fastgen.reverse_step_, k, inputs)


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=lambda v: str(v).removeprefix("torch.").replace(", ", "x"))
def test_reverse_step(shape: tuple[int, ...], dtype: torch.dtype, benchmark: Any, device: str) -> None:
    k = fastgen.step_coefficients(SCHEDULE, 499, 519, method="ddim", eta=1.0, device=device)
    torch._dynamo.reset()
    variants: dict[str, Variant] = {
        "eager": partial(step, reference.reverse_step, k),
        **{name: partial(step, f, k) for name, f in compiled(reference.reverse_step).items()},
    }
    for backend in ("native", "triton"):
        if dispatch.missing("reverse_step_", backend, device) is None:
            variants[backend] = partial(backend_step, backend, k)
    variants["out of place"] = partial(step, fastgen.reverse_step, k)
    variants["fastgen"] = partial(step, fastgen.reverse_step_, k)
    compare(
        benchmark,
        variants,
        lambda: [torch.randn(shape, device=device).to(dtype) for _ in range(4)],
        5 * torch.Size(shape).numel() * dtype.itemsize,
        "fastgen",
        device,
    )
