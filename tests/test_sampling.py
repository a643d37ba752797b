"""Reverse steps, against the papers' formulas written out here, and against diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import assert_accurate, double, value_and_grad
from steps import DTYPES, SCHEDULE, S, T, column, extras, images
from torch import Tensor

import fastgen
from fastgen import NoiseSchedule, StepCoefficients, reference

VARIANCE = torch.tensor([0.0, 0.1, 0.4, 0.01])
METHODS: list[dict[str, Any]] = [
    {"method": "ddpm"},
    {"method": "ddpm", "variance": "beta"},
    {"method": "ddpm", "variance": VARIANCE},
    {"method": "ddim"},
    {"method": "ddim", "eta": 1.0},
    {"method": "ddim", "eta": 0.3, "use_clipped_model_output": True},
]


def bar(t: Tensor) -> Tensor:
    """ᾱ of images' rows, 1 at t = -1."""
    table = torch.cat([torch.ones(1, dtype=torch.float64), SCHEDULE.alphas_cumprod])
    return table[t + 1].reshape(-1, 1, 1, 1)


def predictions(kind: str, pred: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    if kind == "epsilon":
        return (x - sigma * pred) / alpha, pred
    if kind == "sample":
        return pred, (x - alpha * pred) / sigma
    return alpha * x - sigma * pred, sigma * x + alpha * pred  # v, arXiv 2202.00512, appendix D


def written_out(
    x: Tensor,
    cond: Tensor,
    kind: str,
    *,
    method: str,
    eta: float = 0.0,
    variance: str | Tensor = "beta_tilde",
    use_clipped_model_output: bool = False,
    uncond: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    noise: Tensor | None = None,
    clamp: tuple[float, float] | None = None,
) -> Tensor:
    """DDPM's equations 6 and 7 and DDIM's 12 and 16, between any two times."""
    bar_s, bar_t = bar(S), bar(T)
    if uncond is not None:
        cond = uncond + column(guidance_scale) * (cond - uncond)
    x0, eps = predictions(kind, cond, x, bar_t.sqrt(), (1 - bar_t).sqrt())
    if clamp is not None:
        x0 = x0.clamp(*clamp)
        if use_clipped_model_output:
            eps = (x - bar_t.sqrt() * x0) / (1 - bar_t).sqrt()
    beta = 1 - bar_t / bar_s
    small = (1 - bar_s) / (1 - bar_t) * beta
    if method == "ddpm":
        mean = (bar_s.sqrt() * beta * x0 + (bar_t / bar_s).sqrt() * (1 - bar_s) * x) / (1 - bar_t)
        own = torch.where(bar_s == 1, 0.0, beta) if isinstance(variance, str) and variance == "beta" else small
    else:
        own = eta**2 * small
        mean = bar_s.sqrt() * x0 + (1 - bar_s - own).clamp(min=0).sqrt() * eps
    if isinstance(variance, Tensor):
        own = variance.double().reshape(-1, 1, 1, 1)
    return mean if noise is None else mean + own.sqrt() * noise


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reverse_step(kind: str, dtype: torch.dtype, backend: str, device: str) -> None:
    x, cond, uncond, noise = images(dtype, 4)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for method in METHODS:
        k = fastgen.step_coefficients(SCHEDULE, S, T, dtype=wide, **method)
        for extra in extras(uncond, noise):
            exact = written_out(x.double(), cond.double(), kind, **method, **{n: double(v) for n, v in extra.items()})
            eager = reference.reverse_step(x, cond, k, prediction_type=kind, **extra)
            there = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in extra.items()}
            on_device = StepCoefficients(*(v.to(device) for v in k))
            got = fastgen.reverse_step(x.to(device), cond.to(device), on_device, prediction_type=kind, **there)
            assert_accurate(got.cpu(), eager, exact, f"{method} {sorted(extra)}")
            # Else eager's own mistakes would widen the tolerance.
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(eager.double(), exact, rtol=eps, atol=1000 * torch.finfo(wide).eps)


def test_wrong_steps_fail(backend: str, device: str) -> None:
    x, cond, uncond, noise = images(torch.float32, 4)
    k = fastgen.step_coefficients(SCHEDULE, S, T, method="ddim", eta=1.0)
    right = {"uncond": uncond, "guidance_scale": 2.0, "noise": noise, "clamp": (-1.0, 1.0)}
    exact = written_out(
        x.double(), cond.double(), "epsilon", method="ddim", eta=1.0, **{n: double(v) for n, v in right.items()}
    )
    eager = reference.reverse_step(x, cond, k, **right)
    for wrong in (
        {"noise": -noise},
        {"noise": None},
        {"clamp": None},
        {"guidance_scale": 3.0},
        {"uncond": cond},
        {"prediction_type": "v_prediction"},
        {"coefficients": k._replace(eps=k.eps + 1e-4)},
        {"coefficients": k._replace(x0=k.x0[:1])},
    ):
        options = {"coefficients": k, **right, **wrong}
        options = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in options.items()}
        options["coefficients"] = StepCoefficients(*(v.to(device) for v in options["coefficients"]))
        got = fastgen.reverse_step(x.to(device), cond.to(device), **options)
        with pytest.raises(AssertionError, match="error"):
            assert_accurate(got.cpu(), eager, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_flow_prediction_is_an_euler_step(dtype: torch.dtype, backend: str, device: str) -> None:
    x, v = images(dtype, 2)
    t, s = torch.tensor([1.0, 0.7, 0.25, 0.01]).double(), torch.tensor([0.9, 0.1, 0.0, 0.0]).double()
    k = StepCoefficients(1 - t, t, 1 - s, 0 * t, s, 0 * t)  # x_s = (1 - s) x0 + s ε
    exact = x.double() + column(s - t) * v.double()
    eager = reference.reverse_step(x, v, k, prediction_type="flow_prediction")
    k = StepCoefficients(*(number.to(device) for number in k))
    got = fastgen.reverse_step(x.to(device), v.to(device), k, prediction_type="flow_prediction")
    assert_accurate(got.cpu(), eager, exact)
    torch.testing.assert_close(eager.double(), exact, rtol=0, atol=20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("method", ["ddpm", "ddim"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_flow_prediction_on_any_schedule_is_what_it_means(
    dtype: torch.dtype, method: str, backend: str, device: str
) -> None:
    """u = ε - x0 of a variance-preserving schedule, where alpha_t + sigma_t is up to √2."""
    x0, eps = (v.double() for v in images(dtype, 2))
    t = T.clamp(max=700)  # later x_t says too little of x0 in half precision
    k = fastgen.step_coefficients(SCHEDULE, S.clamp(max=600), t, method=method, dtype=torch.float64)
    x_t = (column(k.alpha_t) * x0 + column(k.sigma_t) * eps).to(dtype)
    pred = (eps - x0).to(dtype)
    total = column(k.alpha_t + k.sigma_t)
    clean = (x_t.double() - column(k.sigma_t) * pred.double()) / total
    noise = (x_t.double() + column(k.alpha_t) * pred.double()) / total
    exact = column(k.x0) * clean + column(k.x_t) * x_t.double() + column(k.eps) * noise
    eager = reference.reverse_step(x_t, pred, k, prediction_type="flow_prediction")
    there = StepCoefficients(*(number.to(device) for number in k))
    got = fastgen.reverse_step(x_t.to(device), pred.to(device), there, prediction_type="flow_prediction")
    assert_accurate(got.cpu(), eager, exact)
    meant = column(k.x0) * x0 + column(k.x_t) * (column(k.alpha_t) * x0 + column(k.sigma_t) * eps) + column(k.eps) * eps
    torch.testing.assert_close(got.cpu().double(), meant, rtol=0, atol=20 * torch.finfo(dtype).eps)


def test_layouts_dtypes_and_numbers_for_all_rows(backend: str, device: str) -> None:
    f, b = torch.float32, torch.bfloat16
    x, cond, uncond = (t.to(device) for t in (*images(f, 1, (4, 3, 5, 7)), *images(b, 2, (4, 3, 5, 7))))
    noise = torch.randn(3, 5, 7, device=device).expand(4, 3, 5, 7)
    one = fastgen.step_coefficients(SCHEDULE, 300, 500, method="ddim", eta=1.0, device=device)
    assert all(v.shape == (1,) for v in one)
    each = fastgen.step_coefficients(
        SCHEDULE, torch.full((4,), 300, device=device), torch.full((4,), 500, device=device), method="ddim", eta=1.0
    )
    options = {"uncond": uncond, "guidance_scale": 2.0, "noise": noise, "clamp": (-1.0, 1.0)}
    first = fastgen.reverse_step(x, cond, each, **options)
    assert first.dtype == f
    assert fastgen.reverse_step(x.to(b), cond.float(), one, **options).dtype == b
    assert torch.equal(fastgen.reverse_step(x, cond, one, **options), first)
    assert torch.equal(fastgen.reverse_step(x, cond, one._replace(eps=each.eps, noise=each.noise), **options), first)
    last = torch.channels_last
    turned = {n: v.contiguous(memory_format=last) if isinstance(v, Tensor) else v for n, v in options.items()}
    got = fastgen.reverse_step(x.contiguous(memory_format=last), cond.contiguous(memory_format=last), one, **turned)
    torch.testing.assert_close(got, first, rtol=1e-6, atol=1e-6)
    got = fastgen.reverse_step(torch.cat([x, x], 3)[..., :7], cond, one, **options)
    torch.testing.assert_close(got, first, rtol=1e-6, atol=1e-6)
    assert fastgen.reverse_step(x[:0], cond[:0], one).shape == (0, 3, 5, 7)


def test_gradients_flow_through_a_step(backend: str, device: str) -> None:
    x, cond, uncond = (t.to(device) for t in images(torch.float32, 3))
    k = fastgen.step_coefficients(SCHEDULE, 300, 500, method="ddim", device=device)
    _, grad = value_and_grad(lambda c: fastgen.reverse_step(x, c, k, uncond=uncond, guidance_scale=3.0), cond)
    expected = 3 * (k.eps - k.x0 * k.sigma_t / k.alpha_t)
    torch.testing.assert_close(grad, expected.reshape(1, 1, 1, 1).expand_as(grad))


# ---------------------------------------------------------------- against diffusers


def doubled(scheduler: Any, dtype: torch.dtype) -> Any:
    """The scheduler's own arithmetic in `dtype`."""
    for name in ("alphas_cumprod", "betas", "alphas", "final_alpha_cumprod", "one"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).to(dtype))
    return scheduler


def close_to(expected: Tensor, got: Tensor) -> None:
    # float32: diffusers takes 1 - ᾱ in float32, where ᾱ is up to 0.9999.
    tolerance = 1e-11 if got.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(got.cpu(), expected, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_diffusers_ddpm(kind: str, clip: bool, dtype: torch.dtype, device: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    for variance in ("fixed_small", "fixed_large"):
        theirs = diffusers.DDPMScheduler(prediction_type=kind, clip_sample=clip, variance_type=variance)
        schedule = NoiseSchedule.from_alphas_cumprod(theirs.alphas_cumprod)
        doubled(theirs, dtype).set_timesteps(3)
        times = theirs.timesteps.tolist()
        x, pred = images(dtype, 2)
        for t, s in zip(times, [*times[1:], -1], strict=True):
            expected = theirs.step(pred, t, x, generator=torch.Generator().manual_seed(t)).prev_sample
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(t), dtype=dtype)
            choice = "beta" if variance == "fixed_large" else "beta_tilde"
            k = fastgen.step_coefficients(schedule, s, t, variance=choice, dtype=dtype, device=device)
            clamp = (-1.0, 1.0) if clip else None
            got = fastgen.reverse_step(
                x.to(device), pred.to(device), k, prediction_type=kind, noise=noise.to(device), clamp=clamp
            )
            close_to(expected, got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_diffusers_ddim(kind: str, clip: bool, dtype: torch.dtype, device: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(prediction_type=kind, clip_sample=clip)
    schedule = NoiseSchedule.from_alphas_cumprod(theirs.alphas_cumprod)
    doubled(theirs, dtype).set_timesteps(3)
    times = theirs.timesteps.tolist()
    x, pred, noise = images(dtype, 3)
    for t, s in zip(times, [*times[1:], -1], strict=True):
        for eta in (0.0, 1.0):
            for clipped in (False, True):
                options = {"eta": eta, "use_clipped_model_output": clipped}
                expected = theirs.step(pred, t, x, variance_noise=noise if eta else None, **options).prev_sample
                k = fastgen.step_coefficients(schedule, s, t, method="ddim", dtype=dtype, device=device, **options)
                clamp = (-1.0, 1.0) if clip else None
                got = fastgen.reverse_step(
                    x.to(device), pred.to(device), k, prediction_type=kind, noise=noise.to(device), clamp=clamp
                )
                close_to(expected, got)
