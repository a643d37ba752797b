"""ELBO losses and DiffusionNFT: a training step, against eager PyTorch and torch.compile of the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastgen.cases import CASES

from .harness import compare_case

SHAPES = [(8, 3, 32, 32), (64, 3, 64, 64), (64, 4, 128, 128), (1024, 4, 64, 64)]
DTYPES = [torch.float32, torch.bfloat16]
STREAMS = {"ddo_loss": 4, "diffusion_dpo_loss": 4, "elbo_error": 3}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("name", STREAMS)
def test_step(name: str, shape: tuple[int, ...], dtype: torch.dtype, benchmark: Any, device: str) -> None:
    compare_case(benchmark, CASES[name], shape, dtype, device, STREAMS[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("name", "streams"), [("diffusion_nft_loss", 5), ("diffusion_nft_loss-kl", 6)])
def test_nft_step(name: str, streams: int, dtype: torch.dtype, benchmark: Any, device: str) -> None:
    compare_case(benchmark, CASES[name], (8, 16, 128, 128), dtype, device, streams)
