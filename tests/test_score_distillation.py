"""Score-distillation losses against the formulas of their papers, written out here or in ``fastgen.reference``."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastgen
from fastgen import ScorePair, decoupled_dmd_loss, dmd_loss, reference, sds_loss, vsd_loss

TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALF)


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
            return torch.randn(shape, generator=g, dtype=torch.float64)

        self.x, self.noise = randn(), randn()
        self.sigma = 0.2 + 0.6 * torch.rand(shape[0], generator=g, dtype=torch.float64)
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


def errors(got: Tensor, exact: Tensor) -> tuple[float, float]:
    d, exact = got.double() - exact.double(), exact.double()
    scale, top = exact.norm().item() or 1.0, exact.abs().max().item() or 1.0
    return d.norm().item() / scale, d.abs().max().item() / top


def check(got: Tensor, eager: Tensor, exact: Tensor) -> None:
    """At most twice the error of the same formula in eager PyTorch at the same dtype.

    The floor is two roundings in the arithmetic's precision, whatever the dtype of the images: a normaliser or a loss
    is one number, whose error in eager PyTorch may happen to be nil.
    """
    assert got.dtype == eager.dtype
    arithmetic = torch.promote_types(got.dtype, torch.float32)
    # In float64 eager is the oracle itself.
    floor = (16 if arithmetic == torch.float64 else 2) * torch.finfo(arithmetic).eps
    for mine, theirs in zip(errors(got, exact), errors(eager, exact), strict=True):
        assert mine <= 2 * theirs + floor, (errors(got, exact), errors(eager, exact))


def compare(loss_fn: Any, written_out: Any, x: Tensor, *args: Any, **kw: Any) -> None:
    """Loss and gradient against eager, both against float64."""

    def widen(value: Any) -> Any:
        if isinstance(value, ScorePair):
            return ScorePair(*map(widen, value))
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    got = value_and_grad(loss_fn, x, *args, **kw)
    eager = value_and_grad(written_out, x, *args, **kw)
    exact = value_and_grad(written_out, x.double(), *map(widen, args), **{k: widen(v) for k, v in kw.items()})
    for mine, theirs, truth in zip(got, eager, exact, strict=True):
        check(mine, theirs, truth)


# ---------------------------------------------------------------- the papers' formulas


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("reduction", "divisor"), [("sum_per_batch", 3), ("mean", 300), ("sum", 1), ("none", 1)])
def test_sds_is_dreamfusions_gradient(dtype: torch.dtype, reduction: Any, divisor: int) -> None:
    p = Problem()
    w = p.sigma**2
    e, u, noise = p.real.to(dtype), p.uncond.to(dtype), p.noise.to(dtype)
    guided = u.double() + 7.5 * (e.double() - u.double())
    G = rows(w, p.x) * (guided - noise.double())
    kw = {"pred_uncond": u, "guidance_scale": 7.5, "weight": w, "reduction": reduction}
    loss, grad = value_and_grad(sds_loss, p.x.to(dtype), e, noise, **kw)
    assert grad.dtype == dtype
    assert errors(grad, G / divisor)[0] < 2 * torch.finfo(dtype).eps
    value = 0.5 * G.square().flatten(1).sum(1)
    expected = value if reduction == "none" else value.sum() / divisor
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    compare(sds_loss, reference.sds_loss, p.x.to(dtype), e, noise, **kw)


def test_sds_is_the_gradient_through_the_noisy_image() -> None:
    """DreamFusion's G is the derivative of the weighted denoising loss without the network's Jacobian."""
    p = Problem()
    x = p.leaf(torch.float64)
    x_t = rows(p.alpha, p.x) * x + rows(p.sigma, p.x) * p.noise
    ((p.real - p.noise) * x_t / rows(p.alpha, p.x)).sum().backward()
    _, grad = value_and_grad(sds_loss, p.x, p.real, p.noise, reduction="sum")
    torch.testing.assert_close(grad, x.grad)


def test_vsd_is_prolificdreamers_gradient() -> None:
    p = Problem()
    _, grad = value_and_grad(
        vsd_loss, p.x, p.real, p.fake, real_uncond=p.uncond, guidance_scale=7.5, weight=p.sigma**2, reduction="sum"
    )
    torch.testing.assert_close(grad, rows(p.sigma**2, p.x) * (p.uncond + 7.5 * (p.real - p.uncond) - p.fake))


def test_vsd_with_the_noise_as_fake_is_sds() -> None:
    p = Problem()
    for one, other in zip(
        value_and_grad(vsd_loss, p.x.float(), p.real.float(), p.noise.float()),
        value_and_grad(sds_loss, p.x.float(), p.real.float(), p.noise.float()),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("clip", [0.1, 1.0])
def test_grad_clip(clip: float) -> None:
    p = Problem()
    args, kw = (p.real.float(), p.noise.float()), {"weight": p.sigma, "reduction": "sum"}
    _, free = value_and_grad(sds_loss, p.x.float(), *args, **kw)
    loss, clipped = value_and_grad(sds_loss, p.x.float(), *args, grad_clip=clip, **kw)
    assert torch.equal(clipped, free.clamp(-clip, clip))
    torch.testing.assert_close(loss, 0.5 * clipped.square().sum())


def dmd_by_hand(p: Problem, eps: float = 0.0, minimum: float = 0.0) -> Tensor:
    r = p.uncond + p.s * (p.real - p.uncond)
    n = (p.x - r).abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=minimum) + eps
    return (p.fake - r) / n


@pytest.mark.parametrize(("eps", "minimum"), [(0.0, 0.0), (1e-6, 0.0), (0.0, 1e-5), (0.5, 0.0), (0.0, 5.0)])
@pytest.mark.parametrize("kind", TYPES)
def test_dmd_of_every_prediction_type(eps: float, minimum: float, kind: str) -> None:
    p = Problem(flow=kind == "flow_prediction")
    G = dmd_by_hand(p, eps, minimum)
    kw = p.dmd(torch.float64, kind, normalizer_eps=eps, normalizer_min=minimum)
    for implementation in (dmd_loss, reference.dmd_loss):
        loss, grad = value_and_grad(implementation, p.x, **kw)
        torch.testing.assert_close(grad, G / G.numel(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(loss, 0.5 * G.square().mean())


@pytest.mark.parametrize("fake_kind", TYPES[:3])
@pytest.mark.parametrize("kind", TYPES[:3])
def test_networks_of_different_prediction_types(kind: str, fake_kind: str) -> None:
    p = Problem()
    _, grad = value_and_grad(dmd_loss, p.x, **p.dmd(torch.float64, kind, fake_kind, normalizer_eps=0.1))
    G = dmd_by_hand(p, 0.1)
    torch.testing.assert_close(grad, G / G.numel(), rtol=1e-9, atol=1e-12)
    kw = p.dmd(torch.float16, kind, fake_kind, reduction="none")  # whose backward recomputes
    compare(dmd_loss, reference.dmd_loss, p.x.half(), **kw)


def test_guidance_in_x0_space_is_guidance_in_epsilon_space() -> None:
    p = Problem()
    eps = p.streams(torch.float64, "epsilon")
    guided = eps["real_uncond"] + p.s * (eps["real_cond"] - eps["real_uncond"])
    kw = {"alpha_t": p.alpha, "sigma_t": p.sigma, "prediction_type": "epsilon"}
    one = value_and_grad(dmd_loss, p.x, **p.dmd(torch.float64, "epsilon"))
    other = value_and_grad(dmd_loss, p.x, p.x_t, guided, eps["fake"], **kw)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_dmd_has_the_pseudo_targets_value_and_gradient(reduction: str) -> None:
    p = Problem()
    x = p.leaf(torch.float64)
    target = (x - dmd_by_hand(p)).detach()
    expected = 0.5 * torch.nn.functional.mse_loss(x, target, reduction=reduction)
    expected = expected.flatten(1).sum(1) if reduction == "none" else expected
    expected.sum().backward()
    loss, grad = value_and_grad(dmd_loss, p.x, **p.dmd(torch.float64, reduction=reduction))
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, x.grad, rtol=1e-9, atol=1e-12)


def pairs(p: Problem, q: Problem, dtype: torch.dtype, kind: str = "epsilon") -> tuple[ScorePair, ScorePair]:
    a, b = p.streams(dtype, kind), q.streams(dtype, kind)
    dm = ScorePair(a["x_t"], p.alpha, p.sigma, a["real_cond"], a["fake"])
    return dm, ScorePair(b["x_t"], q.alpha, q.sigma, b["real_cond"], b["real_uncond"])


def test_decoupled_at_one_level_without_normaliser_is_dmd_with_guidance() -> None:
    p = Problem()
    dm, ca = pairs(p, p, torch.float64)
    one = value_and_grad(decoupled_dmd_loss, p.x, dm, ca, guidance_scale=p.s, normalizer=None)
    torch.testing.assert_close(one, value_and_grad(dmd_loss, p.x, **p.dmd(torch.float64, "epsilon", normalizer=None)))


@pytest.mark.parametrize("kind", TYPES[:3])
def test_decoupled_is_the_papers_formula(kind: str) -> None:
    p, q = Problem(seed=0), Problem(seed=1)
    mean = functools.partial(torch.mean, dim=(1, 2, 3), keepdim=True)
    G = (p.fake - p.real) / mean((p.x - p.real).abs())
    G = G - (p.s - 1) * (q.real - q.uncond) / mean((p.x - q.real).abs())
    kw = {"guidance_scale": p.s, "prediction_type": kind}
    loss, grad = value_and_grad(decoupled_dmd_loss, p.x, *pairs(p, q, torch.float64, kind), **kw)
    torch.testing.assert_close(grad, G / G.numel(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss, 0.5 * G.square().mean())
    for dtype in DTYPES:
        for reduction in ("mean", "none"):
            compare(
                decoupled_dmd_loss, reference.decoupled_dmd_loss, p.x.to(dtype), *pairs(p, q, dtype, kind),
                reduction=reduction, **kw,
            )  # fmt: skip


def test_decoupled_with_a_fake_network_of_another_type() -> None:
    p, q = Problem(seed=0), Problem(seed=1)
    dm, ca = pairs(p, q, torch.float32, "epsilon")
    dm = dm._replace(contrast=p.streams(torch.float32, "v_prediction")["fake"])
    kw = {"guidance_scale": p.s, "fake_prediction_type": "v_prediction"}
    for reduction in ("mean", "none"):
        compare(decoupled_dmd_loss, reference.decoupled_dmd_loss, p.x.float(), dm, ca, reduction=reduction, **kw)


# ---------------------------------------------------------------- precision


def pseudo_target_gradient(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """The usual code: G as precise as can be, then x - G in the images' dtype."""
    x = x.detach().requires_grad_()
    with torch.no_grad():
        G = (fake - real) / (x - real).abs().flatten(1).mean(1)[:, None]
    (0.5 * torch.nn.functional.mse_loss(x, (x - G.to(x.dtype)).detach(), reduction="sum")).backward()
    assert x.grad is not None
    return x.grad


def test_bfloat16_keeps_a_gradient_that_the_pseudo_target_rounds_away() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 4096, generator=g).bfloat16()
    real = (x + torch.randn(4, 4096, generator=g)).bfloat16()
    fake = (real + 0.003 * x.float().abs() * torch.randn(4, 4096, generator=g)).float()
    one = torch.ones(4)
    kw = {"alpha_t": one, "sigma_t": one, "prediction_type": "sample", "reduction": "sum"}
    _, exact = value_and_grad(reference.dmd_loss, x.double(), x.double(), real.double(), fake.double(), **kw)
    _, grad = value_and_grad(dmd_loss, x, x, real, fake, **kw)
    assert errors(grad, exact)[0] < 0.01
    assert errors(pseudo_target_gradient(x, real, fake.double()), exact)[0] > 0.15


def test_float16_with_a_loss_scale_loses_nothing() -> None:
    p = Problem((2, 4, 64, 64), gap=0.001)
    kw = p.dmd(torch.float16, "sample", real_uncond=None, guidance_scale=1.0)
    x = p.leaf(torch.float16)
    (dmd_loss(x, **kw) * 65536.0).backward()
    assert x.grad is not None
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in kw.items()}
    exact = value_and_grad(reference.dmd_loss, x.detach().double(), **wide)
    assert errors(x.grad.double() / 65536, exact[1])[0] < 1e-3
    _, unscaled = value_and_grad(dmd_loss, x, **kw)
    assert errors(unscaled, exact[1])[0] > 0.1  # what the loss scale is for


def test_guidance_at_high_noise_is_not_amplified_by_half_precision() -> None:
    """At Stable Diffusion's t = 980, sigma/alpha = 13: guided in bfloat16 as usual, the error is 13 times larger."""
    p = Problem()
    p.alpha, p.sigma = torch.full((3,), 0.0767).double(), torch.full((3,), 0.9971).double()
    p.x_t = 0.0767 * p.x + 0.9971 * p.noise
    for dtype in DTYPES:
        compare(dmd_loss, reference.dmd_loss, p.x.to(dtype), **p.dmd(dtype, "epsilon"))


@pytest.mark.parametrize("spoil", [torch.zeros_like, torch.neg, lambda g: 1.01 * g, lambda g: g.roll(1)])
def test_the_check_can_fail(spoil: Any) -> None:
    p = Problem()
    eager = value_and_grad(reference.dmd_loss, p.x.float(), **p.dmd(torch.float32))[1]
    exact = value_and_grad(reference.dmd_loss, p.x, **p.dmd(torch.float64))[1]
    with pytest.raises(AssertionError):
        check(spoil(value_and_grad(dmd_loss, p.x.float(), **p.dmd(torch.float32))[1]), eager, exact)


# ---------------------------------------------------------------- rows that are not finite


def sound_and_broken(kind: str) -> tuple[Problem, dict[str, Any], dict[str, Any]]:
    """The arguments of a sound batch, and those where sample 1 is broken."""
    p = Problem()
    sound = p.dmd(torch.float32) | {"x": p.x.float()}
    broken = {k: v.clone() if isinstance(v, Tensor) else v for k, v in sound.items()}
    if kind == "x == r":
        broken["real_uncond"][1] = broken["real_cond"][1] = broken["x"][1]
    else:
        name, value = kind.split()
        broken[name][1].view(-1)[0] = float(value)
    return p, sound, broken


BROKEN = ["x == r", "x inf", "x nan", "fake -inf", "fake nan", "real_cond inf", "real_uncond nan", "alpha_t nan"]


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_sample_is_skipped_alone(kind: str, backend: str) -> None:
    p, sound, broken = sound_and_broken(kind)
    if kind == "alpha_t nan":
        for args in (sound, broken):
            args["prediction_type"] = "epsilon"
    with fastgen.use_backend(backend):
        _, expected = value_and_grad(dmd_loss, **sound)
        for reduction in ("mean", "sum", "none"):
            loss, grad = value_and_grad(dmd_loss, **broken | {"reduction": reduction})
            scale = p.x.numel() if reduction == "mean" else 1
            if reduction == "mean":
                assert torch.equal(grad[[0, 2]], expected[[0, 2]])
            assert torch.count_nonzero(grad[1]) == 0
            torch.testing.assert_close(grad[[0, 2]] * scale, expected[[0, 2]] * p.x.numel())
            assert loss.isfinite().all()
        _, stats = dmd_loss(**broken, return_stats=True)
    assert stats.skipped.item() == 1
    assert stats.grad_abs.isfinite()


def test_the_others_gradients_are_those_of_a_batch_without_the_broken_sample() -> None:
    _, _, broken = sound_and_broken("x == r")
    without = {k: v[[0, 2]] if isinstance(v, Tensor) else v for k, v in broken.items()}
    _, grad = value_and_grad(dmd_loss, **broken | {"reduction": "sum"})
    _, expected = value_and_grad(dmd_loss, **without | {"reduction": "sum"})
    assert torch.equal(grad[[0, 2]], expected)


def test_x_equal_to_r_with_eps_is_not_skipped() -> None:
    _, _, broken = sound_and_broken("x == r")
    _, stats = dmd_loss(**broken, normalizer_eps=1e-6, return_stats=True)
    assert stats.skipped.item() == 0


@pytest.mark.parametrize("place", range(7))
def test_decoupled_skips_a_broken_sample(place: int) -> None:
    p, q = Problem(seed=0), Problem(seed=1)
    dm, ca = pairs(p, q, torch.float32)
    _, expected = value_and_grad(decoupled_dmd_loss, p.x.float(), dm, ca, guidance_scale=3.0)
    x = p.x.float()
    streams = [x, dm.x_t, dm.real, dm.contrast, ca.x_t, ca.real, ca.contrast]
    streams[place] = streams[place].clone()
    streams[place][1, 0, 0, 0] = math.inf
    x = streams[0]
    dm = dm._replace(x_t=streams[1], real=streams[2], contrast=streams[3])
    ca = ca._replace(x_t=streams[4], real=streams[5], contrast=streams[6])
    for reduction in ("mean", "sum", "none"):
        kw = {"guidance_scale": 3.0, "reduction": reduction, "return_stats": True}
        x = x.detach().requires_grad_()
        loss, stats = decoupled_dmd_loss(x, dm, ca, **kw)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        if reduction == "mean":
            assert torch.equal(grad[[0, 2]], expected[[0, 2]])
        assert torch.count_nonzero(grad[1]) == 0
        assert stats.skipped.item() == reference.decoupled_dmd_loss(x, dm, ca, **kw)[1].skipped.item() == 1


@pytest.mark.parametrize("clip", [None, 1.0])
def test_sds_skips_a_broken_sample(clip: float | None) -> None:
    p = Problem()
    pred = p.real.float()
    pred[1, 0, 0, 0] = math.inf
    x = p.leaf(torch.float32)
    loss, stats = sds_loss(x, pred, p.noise.float(), grad_clip=clip, return_stats=True)
    loss.backward()
    _, expected = value_and_grad(sds_loss, p.x.float(), p.real.float(), p.noise.float(), grad_clip=clip)
    assert x.grad is not None
    assert torch.equal(x.grad[[0, 2]], expected[[0, 2]])
    assert torch.count_nonzero(x.grad[1]) == 0
    assert stats.skipped.item() == 1


# ---------------------------------------------------------------- statistics, weights, masks, frames


def compare_stats(loss_fn: Any, written_out: Any, *args: Any, **kw: Any) -> None:
    (loss, got), (_, expected) = loss_fn(*args, return_stats=True, **kw), written_out(*args, return_stats=True, **kw)
    assert torch.equal(got.loss, loss.detach())
    assert not any(t.requires_grad for t in got)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=0)


def test_statistics() -> None:
    p, q = Problem(seed=0), Problem(seed=1)
    x = p.leaf(torch.float32)
    mask = torch.rand(p.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    for extra in ({}, {"mask": mask}, {"reduction": "none"}, {"normalizer": None}):
        compare_stats(dmd_loss, reference.dmd_loss, x, **p.dmd(torch.float32, **extra))
        kw = {"guidance_scale": 3.0, **extra}
        compare_stats(decoupled_dmd_loss, reference.decoupled_dmd_loss, x, *pairs(p, q, torch.float32), **kw)
    compare_stats(sds_loss, reference.sds_loss, x, p.real.float(), p.noise.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_masks(dtype: torch.dtype) -> None:
    p = Problem()
    g = torch.Generator().manual_seed(1)
    mask = torch.rand(p.shape, generator=g) < 0.4
    wide_mask = torch.rand((3, 1, 5, 5), generator=g) < 0.4
    weight_map = torch.rand(p.shape, generator=g).to(dtype)
    for extra in (
        {"weight": p.sigma},
        {"weight": weight_map},
        {"mask": mask},
        {"mask": wide_mask},
        {"mask": mask, "weight": p.sigma},
        {"mask": mask, "weight": weight_map},
        {"mask": torch.zeros_like(mask)},
    ):
        for reduction in ("mean", "sum", "none"):
            kw = p.dmd(dtype, "epsilon", reduction=reduction, **extra)
            compare(dmd_loss, reference.dmd_loss, p.x.to(dtype), **kw)
    compare(sds_loss, reference.sds_loss, p.x.to(dtype), p.real.to(dtype), p.noise.to(dtype), weight=weight_map)
    dm, ca = pairs(p, Problem(seed=1), dtype)
    compare(
        decoupled_dmd_loss, reference.decoupled_dmd_loss, p.x.to(dtype), dm, ca, guidance_scale=3.0, mask=wide_mask,
        weight=p.sigma,
    )  # fmt: skip


def test_the_mean_is_over_the_masks_elements_and_the_normaliser_over_all() -> None:
    p = Problem()
    mask = torch.rand(p.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    loss, grad = value_and_grad(dmd_loss, p.x, **p.dmd(torch.float64, mask=mask))
    G = dmd_by_hand(p)
    torch.testing.assert_close(loss, 0.5 * G[mask].square().mean())
    torch.testing.assert_close(grad, torch.where(mask, G / mask.sum(), 0))


def test_what_the_mask_hides_may_be_infinite() -> None:
    p = Problem()
    mask = torch.ones(p.shape, dtype=torch.bool)
    mask[1, 0, 0, 0] = False
    kw = p.dmd(torch.float32, mask=mask, normalizer=None)
    kw["fake"][1, 0, 0, 0] = math.nan
    x = p.leaf(torch.float32)
    loss, stats = dmd_loss(x, **kw, return_stats=True)
    loss.backward()
    assert x.grad is not None
    assert stats.skipped.item() == 0
    assert loss.isfinite()
    assert x.grad.isfinite().all()


VIDEO = (2, 3, 4, 5, 6)


@pytest.mark.parametrize("dims", ["sample", "frame"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_video(dims: str, dtype: torch.dtype) -> None:
    """Per-frame times, weights and normalisers, and masked frames."""
    p, q = Problem(VIDEO, seed=0), Problem(VIDEO, seed=1)
    g = torch.Generator().manual_seed(3)
    for problem in (p, q):
        problem.sigma = 0.2 + 0.6 * torch.rand(VIDEO[:2], generator=g, dtype=torch.float64)
        problem.alpha = (1 - problem.sigma**2).sqrt()
        problem.x_t = rows(problem.alpha, p.x) * p.x + rows(problem.sigma, p.x) * problem.noise
    mask = torch.tensor([True, False, True])[None, :, None, None, None]
    for reduction in ("mean", "sum", "none"):
        kw = {"normalizer_dims": dims, "reduction": reduction, "mask": mask, "weight": p.sigma}
        compare(dmd_loss, reference.dmd_loss, p.x.to(dtype), **p.dmd(dtype, "epsilon", **kw))
        dm, ca = pairs(p, q, dtype)
        compare(decoupled_dmd_loss, reference.decoupled_dmd_loss, p.x.to(dtype), dm, ca, guidance_scale=3.0, **kw)
    compare_stats(dmd_loss, reference.dmd_loss, p.x.to(dtype), **p.dmd(dtype, "epsilon", normalizer_dims=dims))


def test_one_time_for_all_frames_is_that_time_for_each() -> None:
    p = Problem(VIDEO)
    kw = p.dmd(torch.float32, "epsilon")
    wide = kw | {name: kw[name][:, None].repeat(1, VIDEO[1]) for name in ("alpha_t", "sigma_t")}
    x = p.x.float()
    torch.testing.assert_close(value_and_grad(dmd_loss, x, **kw), value_and_grad(dmd_loss, x, **wide))


def test_a_frame_normaliser_is_a_sample_normaliser_of_frames() -> None:
    p = Problem(VIDEO)
    kw = p.dmd(torch.float32, "epsilon", reduction="sum")
    flat = {k: v.flatten(0, 1) if isinstance(v, Tensor) and v.dim() == 5 else v for k, v in kw.items()}
    flat |= {name: kw[name].repeat_interleave(VIDEO[1]) for name in ("alpha_t", "sigma_t")}
    _, grad = value_and_grad(dmd_loss, p.x.float(), **kw, normalizer_dims="frame")
    _, expected = value_and_grad(dmd_loss, p.x.float().flatten(0, 1), **flat)
    assert torch.equal(grad.flatten(0, 1), expected)


# ---------------------------------------------------------------- shapes, layouts, autograd


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "sliced": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
}


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple) | st.just((1025,)) | st.just((3, 23, 31)),
    batch=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    mixed=st.sampled_from(DTYPES),
    layout=st.sampled_from(list(LAYOUTS)),
    kind=st.sampled_from(TYPES[:3]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    guided=st.booleans(),
    masked=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 1000),
)
def test_any_shape_dtype_and_layout(
    shape: tuple[int, ...], batch: int, dtype: torch.dtype, mixed: torch.dtype, layout: str, kind: str, scale: float,
    guided: bool, masked: bool, reduction: str, seed: int,
) -> None:  # fmt: skip
    p = Problem((batch, *shape), seed)
    for name in ("x", "x_t", "real", "uncond", "fake"):
        setattr(p, name, scale * getattr(p, name))
    kw = p.dmd(dtype, kind, reduction=reduction)
    if not guided:
        kw |= {"real_uncond": None, "guidance_scale": 1.0}
    if masked:
        kw["mask"] = torch.rand(p.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    kw["x_t"] = LAYOUTS[layout](kw["x_t"])
    kw["fake"] = LAYOUTS[layout](kw["fake"].to(mixed if mixed != torch.float64 else dtype))
    if dtype == torch.float16 and reduction == "mean":
        kw["reduction"] = "sum"  # the mean's gradient underflows without a loss scale
    compare(dmd_loss, reference.dmd_loss, LAYOUTS[layout](p.x.to(dtype)), **kw)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("shape", [(2, 40_000), (40, 3_000), (1, 200_001)])
def test_results_do_not_depend_on_the_number_of_threads(shape: tuple[int, int], threads: int) -> None:
    p = Problem(shape)
    dm, ca = pairs(p, Problem(shape, seed=1), torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = value_and_grad(decoupled_dmd_loss, p.x.float(), dm, ca, guidance_scale=3.0)
        torch.set_num_threads(threads)
        other = value_and_grad(decoupled_dmd_loss, p.x.float(), dm, ca, guidance_scale=3.0)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    compare(decoupled_dmd_loss, reference.decoupled_dmd_loss, p.x.float(), dm, ca, guidance_scale=3.0)


def test_an_empty_batch() -> None:
    x = torch.empty(0, 4, requires_grad=True)
    empty, none = torch.empty(0, 4), torch.empty(0)
    dm = ScorePair(empty, none, none, empty, empty)
    losses = [
        sds_loss(x, empty, empty),
        dmd_loss(x, empty, empty, empty, alpha_t=none, sigma_t=none),
        decoupled_dmd_loss(x, dm, dm, guidance_scale=2.0),
    ]
    for loss in losses:
        assert loss.item() == 0
        (grad,) = torch.autograd.grad(loss, x)
        assert grad.shape == (0, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_scales_and_repeats(dtype: torch.dtype) -> None:
    """Any incoming gradient, twice through one graph, and what reduction="none" hands back."""
    p = Problem()
    x = p.leaf(dtype)
    loss = dmd_loss(x, **p.dmd(dtype, "epsilon", reduction="sum"))
    first = torch.autograd.grad(loss, x, torch.tensor(3.0, dtype=loss.dtype), retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss, x, torch.tensor(3.0, dtype=loss.dtype))[0]
    torch.testing.assert_close(first, second, rtol=2 * torch.finfo(dtype).eps, atol=0)
    per_sample = dmd_loss(x, **p.dmd(dtype, "epsilon", reduction="none"))
    (grad,) = torch.autograd.grad(per_sample, x, torch.tensor([3.0, 0.0, 3.0], dtype=loss.dtype))
    torch.testing.assert_close(grad[[0, 2]], second[[0, 2]], rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert torch.count_nonzero(grad[1]) == 0


def test_gradient_flows_to_x_alone() -> None:
    p = Problem()
    kw = p.dmd(torch.float32, "epsilon")
    x = p.leaf(torch.float32)
    for name in ("x_t", "real_cond", "fake", "real_uncond"):
        kw[name].requires_grad_()
    dmd_loss(x, **kw).backward()
    assert x.grad is not None
    assert all(kw[name].grad is None for name in ("x_t", "real_cond", "fake", "real_uncond"))
    assert not dmd_loss(x.detach(), **kw).requires_grad


def test_the_gradient_reaches_a_generator_under_autocast() -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(8, 8)
    p = Problem((3, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = net(p.noise.float())
        loss = dmd_loss(x, **p.dmd(torch.bfloat16, "epsilon"))
    assert loss.dtype == torch.float32
    loss.backward()
    assert net.weight.grad is not None
    assert net.weight.grad.norm() > 0


def test_double_backward_is_refused() -> None:
    p = Problem()
    x = p.leaf(torch.float32)
    (grad,) = torch.autograd.grad(dmd_loss(x, **p.dmd(torch.float32)), x, create_graph=True)
    assert not grad.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


@pytest.mark.parametrize("loss_fn", [sds_loss, vsd_loss])
def test_a_free_image_moves_to_the_mode(loss_fn: Any) -> None:
    """SDS and VSD on an image parameter, where the data are one point c and its score is known: x goes to c."""
    g = torch.Generator().manual_seed(0)
    c = torch.tensor([[0.5, -1.0, 2.0, 0.0]])
    x = torch.randn(1, 4, generator=g).requires_grad_()
    opt = torch.optim.SGD([x], lr=0.2)
    for _ in range(60):
        sigma = 0.2 + 0.6 * torch.rand(1, generator=g)
        alpha, noise = (1 - sigma**2).sqrt(), torch.randn(1, 4, generator=g)
        x_t = fastgen.add_noise(x.detach(), noise, alpha, sigma)
        opt.zero_grad()
        loss_fn(x, (x_t - alpha * c) / sigma, noise, weight=sigma / alpha).backward()  # its fake: x is a point too
        opt.step()
    torch.testing.assert_close(x.detach(), c, atol=1e-3, rtol=0)


# ---------------------------------------------------------------- operators, compilation, errors


def test_opcheck() -> None:
    p = Problem(VIDEO)
    q = Problem(VIDEO, seed=1)
    f, mask = torch.float32, torch.ones(VIDEO, dtype=torch.bool)
    a, b = p.streams(f, "epsilon"), q.streams(f, "epsilon")
    ops = torch.ops.fastgen
    types = ("epsilon", "v_prediction", 3.0, torch.bfloat16)
    after = (torch.tensor(9.0), True, 0.0, 1e-6, 1)
    dmd_args = (
        a["real_cond"], a["fake"], a["real_uncond"], p.sigma, mask, p.alpha, p.sigma, *types,
    )  # fmt: skip
    two_levels = (
        a["real_cond"], a["fake"], b["real_cond"], b["real_uncond"], None, mask, p.alpha, p.sigma, q.alpha, q.sigma,
        *types,
    )  # fmt: skip
    score = (a["real_cond"], a["fake"], None, p.sigma, None, 1.0, math.inf, f)
    x = p.x.float()
    for reduction in ("mean", "none"):
        torch.library.opcheck(ops.score_difference.default, (*score, reduction, True))
        torch.library.opcheck(ops.dmd.default, (x, a["x_t"], *dmd_args, *after, reduction, True))
        torch.library.opcheck(ops.decoupled_dmd.default, (x, b["x_t"], a["x_t"], *two_levels, *after, reduction, False))
    row_grad = torch.rand(2)
    torch.library.opcheck(ops.score_difference_backward.default, (row_grad, *score))
    torch.library.opcheck(ops.dmd_backward.default, (row_grad, a["x_t"], *dmd_args))
    torch.library.opcheck(ops.decoupled_dmd_backward.default, (torch.rand(2, 2), a["x_t"], *two_levels))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic: bool) -> None:
    p, q = Problem(VIDEO, seed=0), Problem(VIDEO, seed=1)
    dm, ca = pairs(p, q, torch.float32)
    mask = torch.tensor([True, False, True])[None, :, None, None, None]

    def step(x: Tensor) -> Tensor:
        x = 2 * x
        dmd = dmd_loss(x, **p.dmd(torch.float32, "epsilon", mask=mask, normalizer_dims="frame"))
        both, stats = decoupled_dmd_loss(x, dm, ca, guidance_scale=3.0, return_stats=True)
        return dmd + both + sds_loss(x, dm.real, dm.contrast) + stats.skipped

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.testing.assert_close(value_and_grad(compiled, p.x.float()), value_and_grad(step, p.x.float()))


STREAMS = ("x_t", "real_cond", "fake", "real_uncond")


def call(**changes: Any) -> Tensor:
    p = Problem()
    return dmd_loss(**p.dmd(torch.float32) | {"x": p.x.float()} | changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"fake": torch.zeros(3, 4, 5, 6)}, ValueError, "fake has shape"),
        ({"x_t": torch.zeros(3, 4, 5, 5, dtype=torch.int64)}, TypeError, "x_t must be float32"),
        ({"real_cond": [1.0]}, TypeError, "real_cond must be a torch.Tensor"),
        ({"real_uncond": None}, ValueError, "guidance_scale = 3 needs real_uncond"),
        ({"alpha_t": torch.ones(4)}, ValueError, "alpha_t must have shape"),
        ({"alpha_t": torch.ones(3, 5)}, ValueError, "alpha_t must have shape"),
        ({"alpha_t": None}, TypeError, "alpha_t must be a torch.Tensor"),
        ({"sigma_t": torch.ones(3).bfloat16()}, TypeError, "sigma_t must be float32 or float64"),
        ({"prediction_type": "eps"}, ValueError, "prediction_type must be one of"),
        ({"fake_prediction_type": "x0"}, ValueError, "fake_prediction_type must be one of"),
        ({"normalizer": "l2"}, ValueError, "normalizer must be one of"),
        ({"normalizer_eps": -1.0}, ValueError, "normalizer_eps must be >= 0"),
        ({"normalizer_min": math.nan}, ValueError, "normalizer_min must be finite"),
        ({"normalizer_dims": "pixel"}, ValueError, "normalizer_dims must be one of"),
        ({"guidance_scale": math.inf}, ValueError, "guidance_scale must be finite"),
        ({"weight": torch.ones(2)}, ValueError, "weight must have shape"),
        ({"weight": torch.ones(3).half()}, TypeError, "weight must be float32 or float64"),
        ({"mask": torch.ones(3, 4, 5, 5)}, TypeError, "mask must be a bool"),
        ({"mask": torch.ones(2, 1, 1, 1, dtype=torch.bool)}, ValueError, "mask of shape"),
        ({"reduction": "sum_per_batch"}, ValueError, "reduction must be one of"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


def test_bad_arguments_of_the_others_are_named() -> None:
    p = Problem()
    x, f = p.x.float(), p.real.float()
    with pytest.raises(TypeError, match=r"dm must be a fastgen\.ScorePair"):
        decoupled_dmd_loss(x, (x, x), None, guidance_scale=2.0)  # type: ignore[arg-type]
    dm, ca = pairs(p, p, torch.float32)
    with pytest.raises(ValueError, match=r"ca\.contrast has shape"):
        decoupled_dmd_loss(x, dm, ca._replace(contrast=torch.zeros(3)), guidance_scale=2.0)
    with pytest.raises(ValueError, match="grad_clip must be > 0"):
        sds_loss(x, f, f, grad_clip=0.0)
    with pytest.raises(ValueError, match="needs pred_uncond"):
        sds_loss(x, f, f, guidance_scale=100.0)
    with pytest.raises(ValueError, match="needs real_uncond"):
        vsd_loss(x, f, f, guidance_scale=7.5)
    with pytest.raises(ValueError, match="normalizer_dims='frame' needs a video"):
        call(**{"x": x[:, 0, 0]} | dict.fromkeys(STREAMS, f[:, 0, 0]), normalizer_dims="frame")
