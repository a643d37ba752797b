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


def sde_step(function: Any, drawn: bool, inputs: Sequence[Tensor]) -> Tensor:
    """A step that is drawn, or one that was taken and is to be learnt from."""
    velocity, x_t, other = inputs
    t, t_next = 0.6, 0.55
    if drawn:
        with torch.no_grad():
            return function(velocity, x_t, t, t_next, noise=other).sample
    leaf = velocity.detach().requires_grad_()
    function(leaf, x_t, t, t_next, sample=other).log_prob.sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@pytest.mark.parametrize("drawn", [True, False], ids=["drawn", "learnt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flow_sde_step(drawn: bool, dtype: torch.dtype, benchmark: Any, device: str) -> None:
    shape = (32, 16, 64, 64)
    torch._dynamo.reset()
    plain = partial(_reference_step, shape[0], device)
    variants: dict[str, Variant] = {
        "eager": partial(sde_step, plain, drawn),
        **{name: partial(sde_step, f, drawn) for name, f in compiled(plain).items()},
        "fastgen": partial(sde_step, fastgen.flow_sde_step, drawn),
    }
    compare(
        benchmark,
        variants,
        lambda: [torch.randn(shape, device=device).to(dtype) for _ in range(3)],
        (5 if drawn else 4) * torch.Size(shape).numel() * dtype.itemsize,
        "fastgen",
        device,
    )


def _reference_step(
    rows: int,
    device: str,
    velocity: Tensor,
    x_t: Tensor,
    t: float,
    t_next: float,
    noise: Tensor | None = None,
    sample: Tensor | None = None,
) -> Any:
    times = [torch.full((rows,), value, dtype=torch.float64, device=device) for value in (t, t_next)]
    return reference.flow_sde_step(velocity, x_t, *times, noise_level=0.7, noise=noise, sample=sample, t_max=None)
