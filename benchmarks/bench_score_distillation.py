"""A generator's distillation step: forward and backward, with conversion from epsilon and guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastgen
from fastgen import ScorePair, _backend, reference

from .harness import Variant, compare, compiled

CASES = [
    ((8, 4, 128, 128), torch.float32),
    ((8, 4, 128, 128), torch.bfloat16),
    ((1, 16, 21, 60, 104), torch.bfloat16),
    ((64, 4, 128, 128), torch.float32),
]


Times = tuple[Tensor, Tensor]


def times(rows: int, device: str) -> Times:
    sigma = torch.linspace(0.1, 0.9, rows, device=device)
    return (1 - sigma**2).sqrt(), sigma


def dmd(
    module: Any, at: Times, x: Tensor, x_t: Tensor, real: Tensor, uncond: Tensor, fake: Tensor, *_: Tensor
) -> Tensor:
    alpha, sigma = at
    return module.dmd_loss(
        x, x_t, real, fake, alpha_t=alpha, sigma_t=sigma, real_uncond=uncond, guidance_scale=7.5, normalizer_eps=1e-6
    )


def pseudo_target(at: Times, x: Tensor, x_t: Tensor, real: Tensor, uncond: Tensor, fake: Tensor, *_: Tensor) -> Tensor:
    """What DMD codes do, in float32."""
    with torch.no_grad():
        alpha, sigma = (t.view(-1, *[1] * (x.dim() - 1)) for t in at)
        x_t, real, uncond, fake = x_t.float(), real.float(), uncond.float(), fake.float()
        guided = uncond + 7.5 * (real - uncond)
        r, f = (x_t - sigma * guided) / alpha, (x_t - sigma * fake) / alpha
        n = (x - r).abs().mean(dim=tuple(range(1, x.dim())), keepdim=True)
        grad = torch.nan_to_num((f - r) / (n + 1e-6))
    return 0.5 * F.mse_loss(x.float(), (x.float() - grad).detach())


def decoupled(
    module: Any, at: Times, x: Tensor, x_t: Tensor, real: Tensor, uncond: Tensor, fake: Tensor, *ca: Tensor
) -> Tensor:
    alpha, sigma = at
    dm = ScorePair(x_t, alpha, sigma, real, fake)
    return module.decoupled_dmd_loss(x, dm, ScorePair(ca[0], alpha, sigma, ca[1], uncond), guidance_scale=7.5)


def sds(module: Any, at: Times, x: Tensor, noise: Tensor, real: Tensor, uncond: Tensor, *_: Tensor) -> Tensor:
    return module.sds_loss(x, real, noise, pred_uncond=uncond, guidance_scale=100.0, weight=at[1])


LOSSES: dict[str, tuple[Callable[..., Tensor], int]] = {
    "dmd": (dmd, 6),
    "decoupled_dmd": (decoupled, 8),
    "sds": (sds, 4),
}


def step(loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    # A fresh leaf stands for the generator's output.
    x = inputs[0].detach().requires_grad_()
    loss(x, *inputs[1:]).backward()


def backend_step(backend: str, *args: Any) -> None:
    with fastgen.use_backend(backend):
        step(*args)


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=lambda v: str(v).removeprefix("torch.").replace(", ", "x"))
@pytest.mark.parametrize("name", LOSSES)
def test_step(name: str, shape: tuple[int, ...], dtype: torch.dtype, benchmark: Any, device: str) -> None:
    loss, streams = LOSSES[name]  # every stream that is read once, and the gradient once
    at = times(shape[0], device)
    ours, theirs, usual = partial(loss, fastgen, at), partial(loss, reference, at), partial(pseudo_target, at)
    torch._dynamo.reset()
    variants: dict[str, Variant] = {
        "eager": partial(step, theirs),
        **{k: partial(step, f) for k, f in compiled(theirs).items()},
    }
    if name == "dmd":
        variants["pseudo-target, eager"] = partial(step, usual)
        variants["pseudo-target, torch.compile"] = partial(step, torch.compile(usual))
    operator = {"sds": "score_difference"}.get(name, name)
    for backend in ("native", "triton"):
        if _backend.missing(operator, backend, device) is None:
            variants[backend] = partial(backend_step, backend, ours)
    variants["fastgen"] = partial(step, ours)
    compare(
        benchmark,
        variants,
        lambda: [torch.randn(shape, device=device).to(dtype) for _ in range(7)],
        streams * torch.Size(shape).numel() * dtype.itemsize,
        "fastgen",
        device,
    )
