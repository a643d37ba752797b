"""Noise schedules, the forward process and conversions between predictions."""

import math

import pytest
import torch
from oracle import assert_accurate, double, value_and_grad

import fastgen
from fastgen import NoiseSchedule, reference

TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")


def test_linear_and_cosine_tables_follow_their_papers():
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    linear = NoiseSchedule.linear(1000).alphas_cumprod
    torch.testing.assert_close(linear, torch.cumprod(1 - beta, 0))
    scaled = NoiseSchedule.linear(1000, 0.00085, 0.012, scaled=True).alphas_cumprod
    assert scaled[0].item() == pytest.approx(1 - 0.00085)
    assert 0.0046 < scaled[-1].item() < 0.0048  # Stable Diffusion's last ᾱ
    cosine = NoiseSchedule.cosine(1000).alphas_cumprod
    f = lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    assert cosine[499].item() == pytest.approx(f(0.5) / f(0), rel=1e-9)


@pytest.mark.parametrize("make", [NoiseSchedule.linear, NoiseSchedule.cosine, NoiseSchedule.vp, NoiseSchedule.flow])
def test_coefficients(make, device):
    schedule = make()
    t = schedule.sample_t(64, generator=torch.Generator().manual_seed(0)).to(device)
    alpha, sigma = schedule.alpha_t(t), schedule.sigma_t(t)
    assert alpha.shape == sigma.shape == (64,)
    assert alpha.dtype == sigma.dtype == torch.float32
    assert alpha.device.type == device
    total = alpha + sigma if schedule.kind == "flow" else alpha.square() + sigma.square()
    torch.testing.assert_close(total, torch.ones_like(total))


def test_edm(device):
    schedule = NoiseSchedule.edm(sigma_data=0.5, log_mean=-0.8, log_std=1.2)
    t = schedule.sample_t(20_000, generator=torch.Generator().manual_seed(0)).to(device)
    assert t.log().mean().item() == pytest.approx(-0.8, abs=0.03)
    assert t.log().std().item() == pytest.approx(1.2, abs=0.03)
    assert torch.equal(schedule.sigma_t(t), t)
    assert (schedule.alpha_t(t) == 1).all()
    torch.testing.assert_close(schedule.edm_weight(t), (t**2 + 0.25) / (t * 0.5) ** 2)
    assert schedule.alpha_t(t.double()).dtype == torch.float64


def test_vp_integrates_its_beta():
    schedule = NoiseSchedule.vp(0.1, 20.0)
    t = torch.tensor([0.3, 1.0], dtype=torch.float64)
    integral = 0.1 * t + 0.5 * (20.0 - 0.1) * t**2
    torch.testing.assert_close(schedule.alpha_t(t), torch.exp(-0.5 * integral))


def test_edm_weight_at_the_ends_of_a_flow():
    weight = NoiseSchedule.flow().edm_weight(torch.tensor([0.0, 0.5, 1.0]))
    assert weight.tolist() == [float("inf"), 5.0, 4.0]  # all is noise at t = 1, which training draws


def test_flow_times():
    generator = torch.Generator().manual_seed(0)
    uniform = NoiseSchedule.flow().sample_t(20_000, generator=generator)
    assert uniform.min() > 0
    assert uniform.max() <= 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.02)
    shifted = NoiseSchedule.flow(shift=3.0).sample_t(20_000, generator=generator)
    assert shifted.median().item() == pytest.approx(3 * 0.5 / (1 + 2 * 0.5), abs=0.02)
    normal = NoiseSchedule.flow(logit_std=1.0).sample_t(20_000, generator=generator)
    assert normal.logit().std().item() == pytest.approx(1.0, abs=0.03)


def test_times_are_reproducible():
    for make in (NoiseSchedule.linear, NoiseSchedule.edm, NoiseSchedule.flow, NoiseSchedule.vp):
        first, second = (make().sample_t(5, generator=torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_add_noise_matches_float64(dtype, backend, device):
    x, noise = (torch.randn(5, 3, 4, 6, device=device).to(dtype) for _ in range(2))
    alpha, sigma = torch.rand(5, device=device) + 0.1, torch.rand(5, device=device)
    cotangent = torch.randn(5, 3, 4, 6, device=device).to(dtype)
    a64, s64 = alpha.double(), sigma.double()
    for swap in (False, True):

        def f(module, t, a, s, other, swap=swap):
            return module.add_noise(other, t, a, s) if swap else module.add_noise(t, other, a, s)

        exact = value_and_grad(lambda t, f=f: f(reference, t, a64, s64, noise.double()), x.double(), cotangent)
        eager = value_and_grad(lambda t, f=f: f(reference, t, alpha, sigma, noise), x, cotangent)
        actual = value_and_grad(lambda t, f=f: f(fastgen, t, alpha, sigma, noise), x, cotangent)
        for mine, theirs, truth in zip(actual, eager, exact, strict=True):
            assert_accurate(mine, theirs, truth, "add_noise")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prediction_to_x0_matches_float64(kind, dtype, backend, device):
    pred, x_t = (torch.randn(5, 3, 7, device=device).to(dtype) for _ in range(2))
    alpha, sigma = torch.rand(5, device=device) * 0.9 + 0.07, torch.rand(5, device=device)
    args64 = [double(t) for t in (x_t, alpha, sigma)]
    exact = value_and_grad(lambda p: reference.prediction_to_x0(p, *args64, kind), pred.double())
    eager = value_and_grad(lambda p: reference.prediction_to_x0(p, x_t, alpha, sigma, kind), pred)
    actual = value_and_grad(lambda p: fastgen.prediction_to_x0(p, x_t, alpha, sigma, kind), pred)
    for mine, theirs, truth in zip(actual, eager, exact, strict=True):
        assert_accurate(mine, theirs, truth, kind)


def test_every_prediction_type_recovers_x0(backend, device):
    schedules = (NoiseSchedule.linear(), NoiseSchedule.cosine(), NoiseSchedule.vp(), NoiseSchedule.edm())
    for schedule in (*schedules, NoiseSchedule.flow(), NoiseSchedule.ddgan(4)):
        x0, noise = torch.randn(6, 10, device=device), torch.randn(6, 10, device=device)
        t = schedule.sample_t(6, generator=torch.Generator().manual_seed(1)).to(device)
        t = t.clamp(1, 600) if schedule.num_timesteps else t.clamp(0.05, 0.9)
        t = t.clamp(max=3) if schedule.num_timesteps == 5 else t
        alpha, sigma = schedule.alpha_t(t)[:, None], schedule.sigma_t(t)[:, None]
        x_t = schedule.add_noise(x0, noise, t)
        outputs = {"epsilon": noise, "sample": x0, "v_prediction": alpha * noise - sigma * x0}
        outputs["flow_prediction"] = noise - x0
        for kind, output in outputs.items():
            recovered = schedule.prediction_to_x0(output, x_t, t, kind)
            torch.testing.assert_close(recovered, x0, rtol=1e-3, atol=1e-4)


def test_on_a_flow_a_flow_prediction_is_divided_by_exactly_one():
    schedule, t = NoiseSchedule.flow(), torch.linspace(0, 1, 100_001)
    assert ((schedule.alpha_t(t) + schedule.sigma_t(t)) == 1).all()


def test_add_noise_differentiates_twice(backend, device):
    x = torch.randn(3, 4, device=device, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(3, 4, device=device, dtype=torch.float64, requires_grad=True)
    a, s = (torch.rand(3, device=device, dtype=torch.float64) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, n: fastgen.add_noise(x, n, a, s), (x, noise))
    assert torch.autograd.gradgradcheck(lambda x, n: fastgen.add_noise(x, n, a, s) ** 2, (x, noise))


def test_agrees_with_the_forward_process_of_the_table(device):
    schedule = NoiseSchedule.linear(10)
    x0, noise = torch.ones(10, 2, device=device), torch.zeros(10, 2, device=device)
    t = torch.arange(10, device=device)
    x_t = schedule.add_noise(x0, noise, t)
    torch.testing.assert_close(x_t[:, 0].cpu().double(), schedule.alphas_cumprod.sqrt(), rtol=1e-6, atol=0)


P, V, H = torch.zeros(2, 3), torch.ones(2), torch.ones(2, dtype=torch.bfloat16)
BAD_CALLS = {
    "noise has shape": (ValueError, lambda: fastgen.add_noise(P, P[:, :1], V, V)),
    "alpha_t must be float32": (TypeError, lambda: fastgen.add_noise(P, P, H, V)),
    "sigma_t must be a torch.Tensor": (TypeError, lambda: fastgen.add_noise(P, P, V, 1.0)),
    r"sigma_t must have shape \[2\]": (ValueError, lambda: fastgen.add_noise(P, P, V, V[:1])),
    "prediction_type must be one of": (ValueError, lambda: fastgen.prediction_to_x0(P, P, V, V, "eps")),
    "x_t has shape": (ValueError, lambda: fastgen.prediction_to_x0(P, P[:1], V, V)),
    "alphas_cumprod must be float32": (TypeError, lambda: NoiseSchedule.from_alphas_cumprod(H)),
    "alphas_cumprod must lie in": (ValueError, lambda: NoiseSchedule.from_alphas_cumprod(torch.tensor([0.5, 0.9]))),
    "alphas_cumprod must have shape": (ValueError, lambda: NoiseSchedule.from_alphas_cumprod(torch.ones(2, 2))),
    "num_timesteps must be at least 1": (ValueError, lambda: NoiseSchedule.linear(0)),
    "beta_start must be > 0": (ValueError, lambda: NoiseSchedule.linear(10, 0.0)),
    "must be below 1": (ValueError, lambda: NoiseSchedule.linear(10, 0.1, 1.5)),
    "max_beta must be below 1": (ValueError, lambda: NoiseSchedule.cosine(10, max_beta=1.0)),
    "sigma_data must be > 0": (ValueError, lambda: NoiseSchedule.edm(sigma_data=0.0)),
    "shift must be > 0": (ValueError, lambda: NoiseSchedule.flow(shift=-1.0)),
    "t must hold integers": (TypeError, lambda: NoiseSchedule.linear().alpha_t(V)),
    "t must be floating-point": (TypeError, lambda: NoiseSchedule.edm().alpha_t(torch.tensor([1, 2]))),
    r"t must have shape \[B\]": (ValueError, lambda: NoiseSchedule.edm().alpha_t(torch.tensor(1.0))),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_names_the_argument(message):
    error, call = BAD_CALLS[message]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "schedule",
    [
        NoiseSchedule.edm(),
        NoiseSchedule.vp(),
        NoiseSchedule.flow(shift=3.0),
        NoiseSchedule.flow(shift=2.0, logit_std=1.0, logit_mean=-0.3),
        NoiseSchedule.linear(50),
    ],
    ids=lambda s: s.kind,
)
def test_quantiles_are_those_of_the_training_times(schedule):
    u = torch.tensor([0.1, 0.35, 0.5, 0.9])
    t = schedule.quantile_t(u)
    samples = schedule.sample_t(20_000, generator=torch.Generator().manual_seed(0))
    below = (samples[:, None] < t).double().mean(0)
    up_to = (samples[:, None] <= t).double().mean(0)
    assert ((below - 0.015 < u) & (u < up_to + 0.015)).all()
    assert t.dtype == samples.dtype
    assert (schedule.num_timesteps is not None) or schedule.quantile_t(u.double()).dtype == torch.float64


def test_even_quantiles_are_an_even_grid():
    middles = (torch.arange(50, dtype=torch.float64) + 0.5) / 50
    assert NoiseSchedule.linear(1000).quantile_t(middles).tolist() == list(range(10, 1000, 20))
    with pytest.raises(TypeError, match="u must be floating-point"):
        NoiseSchedule.edm().quantile_t(torch.arange(3))
