"""DMD as other libraries call it: x0 without a schedule, their words and shapes, their formulas; f-distill."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE
from distillation import TYPES, Problem, to_prediction, value_and_grad
from distillation import each_backend as each_backend

import fastgen
from fastgen import dmd_loss


def test_predictions_of_x0_need_no_schedule() -> None:
    p = Problem()
    x, real, fake = p.x.float(), p.real.float(), p.fake.float()
    ones = torch.ones(3, device=DEVICE)

    def run(**given):
        return value_and_grad(lambda v: dmd_loss(v, real_cond=real, fake=fake, **given), x)

    wanted = run(x_t=p.x_t.float(), alpha_t=0.6 * ones, sigma_t=0.8 * ones, prediction_type="sample")
    for kind in ("sample", "x0"):
        for mine, theirs in zip(run(x_t=None, prediction_type=kind), wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    for given in ({}, {"fake_prediction_type": "sample"}, {"prediction_type": "x0", "fake_prediction_type": "eps"}):
        with pytest.raises(TypeError, match=r"^x_t must be a torch.Tensor, got NoneType; only 'sample' predictions"):
            run(x_t=None, **given)
    with pytest.raises(TypeError, match=r"^sigma_t must be a torch.Tensor, got NoneType"):
        run(x_t=x, alpha_t=ones)


def test_words_and_shapes_of_others() -> None:
    p = Problem()
    given = p.dmd(torch.float32, "epsilon")
    wanted = dmd_loss(p.x.float(), **given)
    wide = {n: given[n].reshape(3, 1, 1, 1) for n in ("alpha_t", "sigma_t")}
    torch.testing.assert_close(
        dmd_loss(p.x.float(), **given | wide | {"prediction_type": "eps"}), wanted, rtol=0, atol=0
    )
    weight = torch.linspace(0.5, 2, 3, device=DEVICE)
    torch.testing.assert_close(
        dmd_loss(p.x.float(), **given | wide, weight=weight.reshape(3, 1, 1, 1)),
        dmd_loss(p.x.float(), **given, weight=weight),
    )
    with pytest.raises(ValueError, match=r"^alpha_t must have shape \[3\]"):
        dmd_loss(p.x.float(), **given | {"alpha_t": given["alpha_t"].reshape(3, 1, 1)})


def test_frames_may_come_with_trailing_dimensions() -> None:
    p = Problem((2, 3, 4, 5))
    given = p.dmd(torch.float32, "epsilon")
    frames = {n: torch.linspace(0.3, 0.9, 6, device=DEVICE).reshape(2, 3) for n in ("alpha_t", "sigma_t")}
    wide = {n: t.reshape(2, 3, 1, 1) for n, t in frames.items()}
    torch.testing.assert_close(dmd_loss(p.x.float(), **given | wide), dmd_loss(p.x.float(), **given | frames))


def test_nvidias_variational_loss() -> None:
    """``variational_score_distillation_loss``: x0-predictions, mean + 1e-6, half a mean square to a pseudo-target."""
    p = Problem()
    real, fake, scale = p.real.float(), p.fake.float(), torch.tensor([0.5, 1.0, 2.0], device=DEVICE)

    def theirs(x):
        with torch.no_grad():
            weight = scale.reshape(3, 1, 1, 1) / ((x - real).abs().mean(dim=(1, 2, 3), keepdim=True) + 1e-6)
            target = x - (fake - real) * weight
        return 0.5 * torch.nn.functional.mse_loss(x, target)

    def ours(x):
        return dmd_loss(x, None, real, fake, prediction_type="x0", normalizer_eps=1e-6, weight=scale)

    for mine, wanted in zip(value_and_grad(ours, p.x.float()), value_and_grad(theirs, p.x.float()), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-6)


def test_rcms_loss() -> None:
    """Its normaliser is at least 1e-5, its loss the sum of squares, without a half: twice ours."""
    p = Problem()
    real, fake = p.real.float(), p.fake.float()

    def theirs(x):
        with torch.no_grad():
            target = x - (fake - real) / (x - real).abs().mean(dim=(1, 2, 3), keepdim=True).clip(min=1e-5)
        return (x - target).square().sum()

    def ours(x):
        return 2 * dmd_loss(x, None, real, fake, prediction_type="x0", normalizer_min=1e-5, reduction="sum")

    for mine, wanted in zip(value_and_grad(ours, p.x.float()), value_and_grad(theirs, p.x.float()), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


def test_self_forcings_guidance() -> None:
    """``cond + s (cond - uncond)``: our guidance_scale is s + 1."""
    p = Problem()
    x, real, fake, uncond = (t.float() for t in (p.x, p.real, p.fake, p.uncond))
    ours = dmd_loss(x, None, real, fake, prediction_type="x0", real_uncond=uncond, guidance_scale=4.0)
    theirs = dmd_loss(x, None, real + 3 * (real - uncond), fake, prediction_type="x0")
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", TYPES)
def test_a_guided_fake_network(kind) -> None:
    """Self-Forcing can guide the fake network too, with a scale of its own, on x0; any prediction is guided alike."""
    p = Problem()
    fake_uncond = p.fake + 0.2 * p.uncond
    guided = p.fake + 0.5 * (p.fake - fake_uncond)
    wanted = value_and_grad(lambda x: dmd_loss(x, None, p.real, guided, prediction_type="x0"), p.x)
    given = p.dmd(torch.float64, kind, guidance_scale=1.0, real_uncond=None)
    uncond = to_prediction(fake_uncond, p.x_t, p.alpha, p.sigma, kind)
    fake = fastgen.guidance(given.pop("fake"), uncond, 1.5)
    for mine, theirs in zip(value_and_grad(lambda x: dmd_loss(x, fake=fake, **given), p.x), wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_guidance_of_half_precision_predictions_is_not_rounded_if_one_is_float32() -> None:
    cond, uncond = (torch.randn(2, 99, device=DEVICE).bfloat16() for _ in range(2))
    guided = fastgen.guidance(cond.float(), uncond, 1.5)
    torch.testing.assert_close(guided.double(), uncond.double() + 1.5 * (cond.double() - uncond.double()))
    assert (fastgen.guidance(cond, uncond, 1.5).float() != guided).any()


def test_self_forcings_times() -> None:
    """Uniform times, shifted and then clamped; Self-Forcing's own are in thousandths, and shift > 1."""
    u = fastgen.renoise_times(2000, low=0.1, high=1.0, generator=torch.Generator(DEVICE).manual_seed(0))
    thousandths, shift = 1000 * u, 5.0
    theirs = shift * (thousandths / 1000) / (1 + (shift - 1) * (thousandths / 1000)) * 1000
    ours = fastgen.NoiseSchedule.flow(shift=shift).quantile_t(u).clamp(0.02, 0.98)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(1000 * ours, theirs.clamp(20, 980))
    assert (ours == 0.98).any()
    assert ours.min() < 0.4


RATIOS = {
    "reverse_kl": lambda r: 1,
    "forward_kl": lambda r: r,
    "js": lambda r: 1 - 1 / (1 + r),
    "squared_hellinger": math.sqrt,
    "softened_reverse_kl": lambda r: 1 / (1 + r),
    "neyman": lambda r: 1 / r,
    "jeffreys": lambda r: 1 + r,
}


@pytest.mark.parametrize("divergence", RATIOS)
def test_f_distill_weights_by_hand(divergence) -> None:
    logits = torch.tensor([[0.0, 1.0], [-20.0, 3.0], [2.0, 2.4], [90.0, 0.0]], device=DEVICE, requires_grad=True)
    ratios = [math.exp(0.5), 0.1, math.exp(2.2), 20.0]
    h = [RATIOS[divergence](r) for r in ratios]
    weight = fastgen.f_distill_weight(logits, divergence)
    torch.testing.assert_close(weight.cpu(), torch.tensor([v / (sum(h) / 4 + 1e-6) for v in h], dtype=torch.float32))
    assert not weight.requires_grad
    assert fastgen.f_distill_weight(logits.bfloat16(), divergence).dtype == torch.float32
    wide = fastgen.f_distill_weight(logits, divergence, ratio_bounds=(1e-9, 1e9))
    h = [RATIOS[divergence](math.exp(v)) for v in (0.5, -8.5, 2.2, 10.0)]
    torch.testing.assert_close(wide.cpu(), torch.tensor([v / (sum(h) / 4 + 1e-6) for v in h], dtype=torch.float32))


BAD_CALLS = {
    "logits must be a torch.Tensor": (TypeError, lambda x: fastgen.f_distill_weight([1.0], "js")),
    "divergence must be one of": (ValueError, lambda x: fastgen.f_distill_weight(x, "kl")),
    r"ratio_bounds\[0\] must be > 0": (ValueError, lambda x: fastgen.f_distill_weight(x, "js", ratio_bounds=(0, 1))),
    "ratio_bounds must be": (ValueError, lambda x: fastgen.f_distill_weight(x, "js", ratio_bounds=(2, 1))),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_names_the_argument(message) -> None:
    error, call = BAD_CALLS[message]
    with pytest.raises(error, match=f"^{message}"):
        call(torch.zeros(2))
