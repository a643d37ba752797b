"""Score-distillation losses against the formulas of their papers, written out here or in ``fastgen.reference``."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from conftest import DEVICE
from distillation import DTYPES, TYPES, Problem, compare, pairs, rows, value_and_grad
from distillation import each_backend as each_backend
from oracle import assert_accurate
from torch import Tensor

import fastgen
from fastgen import decoupled_dmd_loss, dmd_loss, reference, sds_loss, vsd_loss
from fastgen.core.accuracy import errors

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
@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("kind", TYPES)
def test_dmd_of_every_prediction_type(eps: float, minimum: float, kind: str, flow: bool) -> None:
    p = Problem(flow=flow)
    G = dmd_by_hand(p, eps, minimum)
    kw = p.dmd(torch.float64, kind, normalizer_eps=eps, normalizer_min=minimum)
    for implementation in (dmd_loss, reference.dmd_loss):
        loss, grad = value_and_grad(implementation, p.x, **kw)
        torch.testing.assert_close(grad, G / G.numel(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(loss, 0.5 * G.square().mean())


@pytest.mark.parametrize("fake_kind", TYPES)
@pytest.mark.parametrize("kind", TYPES)
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


def test_decoupled_at_one_level_without_normaliser_is_dmd_with_guidance() -> None:
    p = Problem()
    dm, ca = pairs(p, p, torch.float64)
    one = value_and_grad(decoupled_dmd_loss, p.x, dm, ca, guidance_scale=p.s, normalizer=None)
    torch.testing.assert_close(one, value_and_grad(dmd_loss, p.x, **p.dmd(torch.float64, "epsilon", normalizer=None)))


@pytest.mark.parametrize("kind", TYPES)
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
                decoupled_dmd_loss,
                reference.decoupled_dmd_loss,
                p.x.to(dtype),
                *pairs(p, q, dtype, kind),
                reduction=reduction,
                **kw,
            )


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
    x, to_real, to_fake = (torch.randn(4, 4096, generator=g).to(DEVICE) for _ in range(3))
    x = x.bfloat16()
    real = (x + to_real).bfloat16()
    fake = (real + 0.003 * x.float().abs() * to_fake).float()
    one = torch.ones(4, device=DEVICE)
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
    p.alpha, p.sigma = (torch.full((3,), k, device=DEVICE).double() for k in (0.0767, 0.9971))
    p.x_t = 0.0767 * p.x + 0.9971 * p.noise
    for dtype in DTYPES:
        compare(dmd_loss, reference.dmd_loss, p.x.to(dtype), **p.dmd(dtype, "epsilon"))


@pytest.mark.parametrize("spoil", [torch.zeros_like, torch.neg, lambda g: 1.01 * g, lambda g: g.roll(1)])
def test_the_check_can_fail(spoil: Any) -> None:
    p = Problem()
    eager = value_and_grad(reference.dmd_loss, p.x.float(), **p.dmd(torch.float32))[1]
    exact = value_and_grad(reference.dmd_loss, p.x, **p.dmd(torch.float64))[1]
    with pytest.raises(AssertionError):
        assert_accurate(spoil(value_and_grad(dmd_loss, p.x.float(), **p.dmd(torch.float32))[1]), eager, exact)


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


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_sample_is_skipped_alone(kind: str, written_out: bool, each_backend: str) -> None:
    p, sound, broken = sound_and_broken(kind)
    if kind == "alpha_t nan":
        for args in (sound, broken):
            args["prediction_type"] = "epsilon"
    with fastgen.use_backend("reference" if written_out else each_backend):
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
    assert stats.skips.tolist() == [False, True, False]
    assert stats.grad_norm[1] == 0
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
