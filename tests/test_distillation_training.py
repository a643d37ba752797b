"""Noise levels, the fake network's loss and backward simulation."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import DEVICE
from oracle import assert_accurate, value_and_grad

import fastgen
from fastgen import NoiseSchedule, backward_simulation, fake_score_loss, reference, renoise_times

TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


# ---------------------------------------------------------------- noise levels


def test_uniform_times() -> None:
    tau = renoise_times(20_000, generator=seeded())
    assert tau.dtype == torch.float32
    assert 0.02 <= tau.min() < 0.021
    assert 0.979 < tau.max() <= 0.98
    assert abs(tau.mean() - 0.5) < 0.01
    assert torch.equal(tau, renoise_times(20_000, generator=seeded()))


def test_cleaner_times() -> None:
    t = torch.linspace(0, 1, 20_001, device=DEVICE)
    tau = renoise_times(len(t), "cleaner", generator_times=t, generator=seeded())
    assert (tau <= t).all()
    assert tau.max() <= 0.98
    assert (tau[t >= 0.02] >= 0.02 - 1e-7).all()
    assert torch.equal(tau[t < 0.02], t[t < 0.02])
    assert abs(tau[10_000:].mean() - (0.02 + t[10_000:].clamp(max=0.98)).mean() / 2) < 0.01


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_beta_times(progress: float) -> None:
    tau = renoise_times(40_000, "beta", low=0.0, high=1.0, progress=progress, generator=seeded())
    a, b = 4 - 3 * progress, 1.5 - 0.5 * progress
    assert abs(tau.mean() - a / (a + b)) < 0.005
    assert abs(tau.var() - a * b / ((a + b) ** 2 * (a + b + 1))) < 0.003


@pytest.mark.parametrize(
    ("kw", "error", "message"),
    [
        ({"n": 0}, ValueError, "n must be at least 1"),
        ({"rule": "log"}, ValueError, "rule must be one of"),
        ({"low": 0.5, "high": 0.5}, ValueError, "low and high"),
        ({"high": 1.5}, ValueError, "low and high"),
        ({"progress": 2.0, "rule": "beta"}, ValueError, "progress must be <= 1"),
        ({"rule": "cleaner"}, ValueError, "generator_times"),
        ({"generator_times": torch.ones(4)}, ValueError, "generator_times"),
        ({"rule": "cleaner", "generator_times": torch.ones(3)}, ValueError, "generator_times must have shape"),
    ],
)
def test_bad_times_are_named(kw: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        renoise_times(**{"n": 4} | kw)


# ---------------------------------------------------------------- the fake network's loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", TYPES)
def test_fake_score_loss(kind: str, reduction: Any, dtype: torch.dtype) -> None:
    pred, x0, noise = (torch.randn(3, 4, 5, device=DEVICE).to(dtype) for _ in range(3))
    alpha, sigma, w = (torch.rand(3, device=DEVICE) + 0.1 for _ in range(3))
    kw = {"prediction_type": kind, "weight": w, "reduction": reduction}

    def run(loss: Any, wide: bool) -> Any:
        args = [t.double() if wide else t for t in (pred, x0, noise)]
        return value_and_grad(lambda p: loss(p, *args[1:], alpha, sigma, **kw), args[0])

    got, eager, exact = (
        run(fake_score_loss, False),
        run(reference.fake_score_loss, False),
        run(reference.fake_score_loss, True),
    )
    assert_accurate(got[1], eager[1], exact[1])
    torch.testing.assert_close(got[0].double(), exact[0], rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)


@pytest.mark.parametrize("module", [fastgen, reference], ids=["public", "reference"])
@pytest.mark.parametrize("kind", ["v_prediction", "flow_prediction"])
def test_targets_of_half_precision_images_are_not_rounded(kind: str, module: Any) -> None:
    x0, noise, error = (torch.randn(4, 999, device=DEVICE).bfloat16() for _ in range(3))
    alpha, sigma = (torch.full((4,), value, device=DEVICE) for value in (0.6, 0.8))
    a, s = (0.6, 0.8) if kind == "v_prediction" else (1.0, 1.0)
    target = a * noise.double() - s * x0.double()
    pred = (target + 0.02 * error.double()).bfloat16().requires_grad_()
    module.fake_score_loss(pred, x0, noise, alpha, sigma, prediction_type=kind, reduction="sum").backward()
    assert pred.grad is not None
    expected = 2 * (pred.detach().double() - target) / 999
    assert (pred.grad.double() - expected).norm() < 0.004 * expected.norm()  # what rounding the gradient costs


def test_a_perfect_fake_network_has_no_loss() -> None:
    x0, noise = torch.randn(2, 8, device=DEVICE), torch.randn(2, 8, device=DEVICE)
    sigma = torch.tensor([0.3, 0.7], device=DEVICE)
    alpha = 1 - sigma
    a, s = alpha[:, None], sigma[:, None]
    exact = {"epsilon": noise, "sample": x0, "v_prediction": a * noise - s * x0, "flow_prediction": noise - x0}
    for kind, pred in exact.items():
        assert fake_score_loss(pred, x0, noise, alpha, sigma, prediction_type=kind) < 1e-12
        x_t = fastgen.add_noise(x0, noise, alpha, sigma)
        torch.testing.assert_close(fastgen.prediction_to_x0(pred, x_t, alpha, sigma, kind), x0, atol=1e-5, rtol=0)


def test_only_the_prediction_gets_a_gradient() -> None:
    pred, x0 = torch.randn(2, 8, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    fake_score_loss(pred, x0, torch.randn(2, 8), torch.ones(2), torch.ones(2)).backward()
    assert pred.grad is not None
    assert x0.grad is None
    with pytest.raises(ValueError, match="prediction_type must be one of"):
        fake_score_loss(pred, x0, x0, torch.ones(2), torch.ones(2), prediction_type="x")


# ---------------------------------------------------------------- backward simulation


def test_backward_simulation_is_the_sampler_up_to_the_step() -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 4)
    schedule, times, noise = NoiseSchedule.flow(), torch.tensor([1.0, 0.7, 0.4]), torch.randn(3, 4)
    calls = []

    def generator(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append((t[0].item(), torch.is_grad_enabled()))
        return net(x_t)

    got = backward_simulation(generator, schedule, times, noise, step=2, rng=torch.Generator().manual_seed(1))
    torch.testing.assert_close([c[0] for c in calls], [1.0, 0.7, 0.4])
    assert [c[1] for c in calls] == [False, False, True]
    rng = torch.Generator().manual_seed(1)
    x = noise
    for t in (0.7, 0.4):
        x = (1 - t) * net(x) + t * torch.randn(3, 4, generator=rng)
    torch.testing.assert_close(got.x_t, x)
    torch.testing.assert_close(got.x0, net(x))
    got.x0.sum().backward()
    assert net.weight.grad is not None
    assert not got.x_t.requires_grad


def test_backward_simulation_draws_every_step_and_converts_predictions() -> None:
    schedule, noise = NoiseSchedule.edm(), torch.randn(2, 4)
    times = torch.tensor([5.0, 1.0, 0.2])
    rng = torch.Generator().manual_seed(0)

    def zero(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)

    found = [backward_simulation(zero, schedule, times, noise, rng=rng) for _ in range(60)]
    assert {s.step for s in found} == {0, 1, 2}
    first = next(s for s in found if s.step == 0)
    torch.testing.assert_close(first.x_t, 5 * noise)
    torch.manual_seed(3)
    steps = [backward_simulation(zero, schedule, times, noise).step for _ in range(5)]
    torch.manual_seed(3)
    assert steps == [backward_simulation(zero, schedule, times, noise).step for _ in range(5)]
    epsilon = backward_simulation(zero, schedule, times[:1], noise, prediction_type="epsilon")
    torch.testing.assert_close(epsilon.x0, epsilon.x_t)
    with pytest.raises(ValueError, match="step must be from 0 to 2"):
        backward_simulation(zero, schedule, times, noise, step=3)
    for step in (True, 1.5, "1", torch.tensor(1)):
        with pytest.raises(TypeError, match="step must be an int"):
            backward_simulation(zero, schedule, times, noise, step=step)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="generator must be callable"):
        backward_simulation(None, schedule, times, noise)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="schedule must be a NoiseSchedule"):
        backward_simulation(zero, None, times, noise)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="times must have shape"):
        backward_simulation(zero, schedule, times[:0], noise)


RANKS = """
import sys, torch, fastgen
rank = int(sys.argv[1])
torch.distributed.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(rank)
times = torch.linspace(1, 0.1, 8)
steps = []
for _ in range(12):
    noise = torch.randn(1, 2)
    steps.append(fastgen.backward_simulation(lambda x, t: x, fastgen.NoiseSchedule.flow(), times, noise).step)
print(steps)
torch.distributed.destroy_process_group()
assert not fastgen.score_distillation.training._shared_steps
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_every_rank_draws_the_same_step(tmp_path: Any) -> None:
    command = [sys.executable, "-c", RANKS]
    where = f"file://{tmp_path / 'store'}"
    runs = [subprocess.Popen([*command, str(rank), where], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    outputs = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert outputs[0] == outputs[1] != ""
    assert len(set(outputs[0].strip("[]\n").split(", "))) > 3
