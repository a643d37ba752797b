"""A generator's distillation step: forward and backward, with conversion from epsilon and guidance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.cases import CASES

from .harness import compare_case, compiled

SHAPES = [
    ((8, 4, 128, 128), torch.float32),
    ((8, 4, 128, 128), torch.bfloat16),
    ((1, 16, 21, 60, 104), torch.bfloat16),
    ((64, 4, 128, 128), torch.float32),
]


def pseudo_target(
    x: Tensor, x_t: Tensor, real_cond: Tensor, fake: Tensor, alpha_t: Tensor, sigma_t: Tensor, real_uncond: Tensor
) -> Tensor:
    """What DMD codes do, in float32."""
    with torch.no_grad():
        alpha, sigma = (t.view(-1, *[1] * (x.dim() - 1)) for t in (alpha_t, sigma_t))
        x_t, real, uncond, fake = x_t.float(), real_cond.float(), real_uncond.float(), fake.float()
        guided = uncond + 7.5 * (real - uncond)
        r, f = (x_t - sigma * guided) / alpha, (x_t - sigma * fake) / alpha
        n = (x - r).abs().mean(dim=tuple(range(1, x.dim())), keepdim=True)
        grad = torch.nan_to_num((f - r) / (n + 1e-6))
    return 0.5 * F.mse_loss(x.float(), (x.float() - grad).detach())


# By the benchmark's name: the case, and every stream that is read once, and the gradient once.
LOSSES = {"dmd": ("dmd_loss-guided", 6), "decoupled_dmd": ("decoupled_dmd_loss", 8), "sds": ("sds_loss-guided", 4)}


@pytest.mark.parametrize(("shape", "dtype"), SHAPES, ids=lambda v: str(v).removeprefix("torch.").replace(", ", "x"))
@pytest.mark.parametrize("name", LOSSES)
def test_step(name: str, shape: tuple[int, ...], dtype: torch.dtype, benchmark: Any, device: str) -> None:
    case, streams = LOSSES[name]
    torch._dynamo.reset()
    usual = {"eager": pseudo_target, **compiled(pseudo_target)} if name == "dmd" else {}
    others = {f"pseudo-target, {how}": loss for how, loss in usual.items()}
    compare_case(benchmark, CASES[case], shape, dtype, device, streams, others)
