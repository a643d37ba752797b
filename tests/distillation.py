"""What the tests of score distillation share: consistent inputs, and comparisons with the written-out formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICE
from oracle import assert_accurate
from torch import Tensor

from fastgen import ScorePair
from fastgen.core import dispatch

BACKENDS = [b for b in ("native", "triton") if dispatch.missing("dmd", b, DEVICE) is None] or ["reference"]


@pytest.fixture(autouse=True, params=BACKENDS)
def each_backend(request):
    """Every backend of our own kernels; where there is none, the reference."""
    with dispatch.use_backend(request.param):
        yield request.param


TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def rows(scalar: Tensor, like: Tensor) -> Tensor:
    return scalar.to(like.dtype).reshape(*scalar.shape, *[1] * (like.dim() - scalar.dim()))


def to_prediction(x0: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, kind: str) -> Tensor:
    """What a network of this prediction type puts out when it means x0."""
    a, s = rows(alpha, x0), rows(sigma, x0)
    noise = (x_t - a * x0) / s
    return {"epsilon": noise, "sample": x0, "v_prediction": a * noise - s * x0, "flow_prediction": noise - x0}[kind]


class Problem:
    """A distillation step in float64: x, its noisy version, and what the networks mean; `dmd` gives the arguments."""

    def __init__(
        self, shape: tuple[int, ...] = (3, 4, 5, 5), seed: int = 0, gap: float = 0.3, flow: bool = False
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        self.shape = shape

        def randn() -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE)

        self.x, self.noise = randn(), randn()
        self.sigma = 0.2 + 0.6 * torch.rand(shape[0], generator=g, dtype=torch.float64).to(DEVICE)
        self.alpha = 1 - self.sigma if flow else (1 - self.sigma**2).sqrt()
        self.x_t = rows(self.alpha, self.x) * self.x + rows(self.sigma, self.x) * self.noise
        self.real, self.uncond = self.x + 0.5 * randn(), self.x + 0.5 * randn()
        self.fake = self.real + gap * randn()
        self.s = 3.0

    def streams(self, dtype: torch.dtype, kind: str = "sample", fake_kind: str | None = None) -> dict[str, Tensor]:
        def pred(x0: Tensor, kind: str) -> Tensor:
            return to_prediction(x0, self.x_t, self.alpha, self.sigma, kind).to(dtype)

        return {
            "x_t": self.x_t.to(dtype),
            "real_cond": pred(self.real, kind),
            "fake": pred(self.fake, fake_kind or kind),
            "real_uncond": pred(self.uncond, kind),
        }

    def dmd(self, dtype: torch.dtype, kind: str = "sample", fake_kind: str | None = None, **kw: Any) -> dict[str, Any]:
        args: dict[str, Any] = self.streams(dtype, kind, fake_kind)
        args |= {"alpha_t": self.alpha, "sigma_t": self.sigma, "prediction_type": kind, "guidance_scale": self.s}
        return args | {"fake_prediction_type": fake_kind} | kw

    def leaf(self, dtype: torch.dtype) -> Tensor:
        return self.x.to(dtype).requires_grad_()


def value_and_grad(loss_fn: Any, x: Tensor, *args: Any, **kw: Any) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    loss = loss_fn(x, *args, **kw)
    (grad,) = torch.autograd.grad(loss.sum(), x)
    return loss.detach(), grad


def compare(loss_fn: Any, written_out: Any, x: Tensor, *args: Any, **kw: Any) -> None:
    """Loss and gradient against eager, both against float64."""

    def widen(value: Any) -> Any:
        if isinstance(value, ScorePair):
            return ScorePair(*map(widen, value))
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    got = value_and_grad(loss_fn, x, *args, **kw)
    eager = value_and_grad(written_out, x, *args, **kw)
    exact = value_and_grad(written_out, x.double(), *map(widen, args), **{k: widen(v) for k, v in kw.items()})
    assert_accurate(got[1], eager[1], exact[1], "gradient")
    # The loss is one number, whose error in eager PyTorch may happen to be nil: eight roundings are allowed.
    assert got[0].dtype == eager[0].dtype
    torch.testing.assert_close(got[0].double(), exact[0], rtol=8 * torch.finfo(got[0].dtype).eps, atol=0)


def pairs(p: Problem, q: Problem, dtype: torch.dtype, kind: str = "epsilon") -> tuple[ScorePair, ScorePair]:
    a, b = p.streams(dtype, kind), q.streams(dtype, kind)
    dm = ScorePair(a["x_t"], p.alpha, p.sigma, a["real_cond"], a["fake"])
    return dm, ScorePair(b["x_t"], q.alpha, q.sigma, b["real_cond"], b["real_uncond"])
