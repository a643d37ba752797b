"""Images and options that the tests of sampling share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastgen import NoiseSchedule

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SCHEDULE = NoiseSchedule.linear(1000)
S, T = torch.tensor([-1, 0, 37, 960]), torch.tensor([0, 3, 400, 999])


def images(dtype: torch.dtype, n: int, shape: tuple[int, ...] = (4, 3, 5, 5)) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for _ in range(n)]


def column(v: float | Tensor) -> float | Tensor:
    return v.double().reshape(-1, 1, 1, 1) if isinstance(v, Tensor) else v


def extras(uncond: Tensor, noise: Tensor) -> list[dict[str, Any]]:
    scales = torch.tensor([0.0, 1.0, 2.5, 7.5])
    return [
        {},
        {"noise": noise, "clamp": (-1.0, 1.0)},
        {"uncond": uncond, "guidance_scale": 3.0, "noise": noise, "clamp": (-0.7, 1.3)},
        {"uncond": uncond, "guidance_scale": scales, "noise": noise},
        {"uncond": uncond, "guidance_scale": scales, "clamp": (-1.0, 1.0)},
    ]
