"""Sampling: steps in place, guidance, posteriors, Langevin steps, compilation, errors."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from oracle import assert_accurate, value_and_grad
from steps import DTYPES, SCHEDULE, S, T, column, extras, images
from syncs import Syncs
from torch import Tensor

import fastgen
from fastgen import NoiseSchedule, StepCoefficients, reference
from fastgen.core import dispatch

# ---------------------------------------------------------------- in place


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place_is_out_of_place_to_the_bit(dtype: torch.dtype, backend: str, device: str) -> None:
    k = StepCoefficients(*(v.to(device) for v in fastgen.step_coefficients(SCHEDULE, S, T, method="ddim", eta=1.0)))
    for shape in ((4, 3, 5, 5), (4, 2, 8, 8)):
        x, cond, uncond, noise = (t.to(device) for t in images(dtype, 4, shape))
        for kind in ("epsilon", "flow_prediction"):
            for extra in extras(uncond, noise):
                extra = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in extra.items()}
                expected = fastgen.reverse_step(x, cond, k, prediction_type=kind, **extra)
                y = x.clone()
                assert fastgen.reverse_step_(y, cond, k, prediction_type=kind, **extra) is y
                assert torch.equal(y, expected)


def test_in_place_in_any_layout(backend: str, device: str) -> None:
    x, cond = (t.to(device) for t in images(torch.float32, 2, (4, 3, 5, 7)))
    k = fastgen.step_coefficients(SCHEDULE, 300, 500, device=device)
    expected = fastgen.reverse_step(x, cond, k)
    last = torch.channels_last
    padded = torch.stack([x, x], 1)
    for y, c in (
        (x.contiguous(memory_format=last), cond.contiguous(memory_format=last)),
        (x.contiguous(memory_format=last), cond),  # no two layouts in one pass
        (torch.cat([x, x], 3)[..., :7], cond),  # gaps in rows
        (padded[:, 1], cond),  # gaps between rows
    ):
        fastgen.reverse_step_(y, c, k)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(padded[:, 0], x)  # what lies between is not written to
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="use reverse_step"):
        fastgen.reverse_step_(leaf, cond, k)
    with torch.no_grad():
        fastgen.reverse_step_(leaf, cond, k)
    torch.testing.assert_close(leaf.detach(), expected, rtol=1e-6, atol=1e-6)


PEAK = """
import re, sys, torch, fastgen
def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
k = fastgen.step_coefficients(fastgen.NoiseSchedule.linear(1000), 300, 500, method="ddim", eta=1.0)
def step(x, cond, uncond, noise):
    if sys.argv[2] == "langevin_step_":
        return fastgen.langevin_step_(x, cond, 0.5, 0.1, noise=noise)
    options = dict(uncond=uncond, guidance_scale=3.0, noise=noise, clamp=(-1.0, 1.0))
    return getattr(fastgen, sys.argv[2])(x, cond, k, **options)
streams = [torch.randn(16, 3, 512, 512).to(getattr(torch, sys.argv[1])) for _ in range(4)]
step(*[t[:1].clone() for t in streams])
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
step(*streams)
print((status("VmHWM") - before) / streams[0].nbytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif(dispatch.missing("reverse_step", "native", "cpu") is not None, reason="needs the compiled kernels")
@pytest.mark.parametrize(
    ("dtype", "name", "most"),
    [("float32", "reverse_step", 1.1), ("bfloat16", "reverse_step_", 0.1), ("float32", "langevin_step_", 0.1)],
)
def test_peak_memory(dtype: str, name: str, most: float) -> None:
    """Out of place it is the output alone; in place nothing."""
    run = subprocess.run([sys.executable, "-c", PEAK, dtype, name], capture_output=True, text=True, check=False)
    if run.returncode and "clear_refs" in run.stderr:
        pytest.skip("this kernel does not let a process reset its peak memory")
    assert run.returncode == 0, run.stderr
    assert most - 0.2 < float(run.stdout) <= most


# ---------------------------------------------------------------- guidance, posteriors, Langevin steps

DDGAN = NoiseSchedule.ddgan(4)
STEPS = torch.tensor([0, 3, 1, 2])


def ddgan_posterior(x0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """DDGAN's, as its code has it: arrays over t, a log-variance and a mask of the last step, which is noiseless."""
    assert DDGAN.alphas_cumprod is not None
    cumulative = DDGAN.alphas_cumprod
    previous = torch.cat([cumulative.new_ones(1), cumulative[:-1]])
    betas = 1 - cumulative / previous
    first = betas * previous.sqrt() / (1 - cumulative)
    second = (1 - previous) * (1 - betas).sqrt() / (1 - cumulative)
    log_variance = (betas * (1 - previous) / (1 - cumulative)).clamp(min=1e-20).log()
    mask = (t != 0).double()
    mean = column(first[t]) * x0 + column(second[t]) * x_t
    return mean + column(mask) * column(log_variance[t] / 2).exp() * noise


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_posterior_and_its_gradients(dtype: torch.dtype, backend: str, device: str) -> None:
    streams = images(dtype, 3)
    cotangent = torch.randn(4, 3, 5, 5).to(dtype)
    t = STEPS.to(device)
    for i, name in enumerate(("x0", "x_t", "noise")):

        def with_leaf(f: Any, rows: list[Tensor], i: int = i) -> Any:
            return lambda leaf: f(*(leaf if j == i else row for j, row in enumerate(rows)))

        exact = value_and_grad(
            with_leaf(lambda a, b, z: ddgan_posterior(a, b, z, STEPS), [s.double() for s in streams]),
            streams[i].double(),
            cotangent,
        )
        eager = value_and_grad(
            with_leaf(lambda a, b, z: reference.posterior_sample(DDGAN, a, b, STEPS, noise=z), streams),
            streams[i],
            cotangent,
        )
        there = [s.to(device) for s in streams]
        got = value_and_grad(
            with_leaf(lambda a, b, z: fastgen.posterior_sample(DDGAN, a, b, t, noise=z), there),
            there[i],
            cotangent.to(device),
        )
        for what, mine, theirs, truth in zip(("value", "gradient"), got, eager, exact, strict=True):
            assert_accurate(mine.cpu(), theirs, truth, f"{name}: {what}")
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(theirs.double(), truth, rtol=4 * eps, atol=4 * eps)
        for wrong in (torch.zeros_like(got[1]), -got[1]):
            with pytest.raises(AssertionError, match="error"):
                assert_accurate(wrong.cpu(), eager[1], exact[1])
    clean = fastgen.posterior_sample(DDGAN, *there[:2], torch.zeros_like(t), noise=there[2])
    assert torch.equal(clean, there[0])


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["x0", "x_t", "noise", "cond", "uncond"])
def test_a_gradient_is_rounded_to_its_own_inputs_dtype_alone(
    name: str, half: torch.dtype, backend: str, device: str
) -> None:
    streams = [t.to(device) for t in images(half, 3)]
    t, scale = STEPS.to(device), torch.tensor([0.3, 1.0, 2.5, 7.3], device=device)
    names = ("cond", "uncond") if name in ("cond", "uncond") else ("x0", "x_t", "noise")
    i = names.index(name)
    for wide in (torch.float32, torch.float64):
        rows = [s.to(wide if j == i else half).requires_grad_(j == i) for j, s in enumerate(streams[: len(names)])]
        out = (
            fastgen.guidance(*rows, scale)
            if len(names) == 2
            else fastgen.posterior_sample(DDGAN, *rows[:2], t, noise=rows[2])
        )
        cotangent = torch.randn(out.shape, device=device).to(out.dtype)
        (grad,) = torch.autograd.grad(out, rows[i], cotangent)
        k = fastgen.step_coefficients(DDGAN, t - 1, t, dtype=torch.float64)
        wanted = {"x0": k.x0, "x_t": k.x_t, "noise": k.noise, "cond": scale, "uncond": 1 - scale}[name]
        exact = wanted.double().reshape(-1, 1, 1, 1) * cotangent.double()
        assert grad.dtype == wide
        torch.testing.assert_close(grad.double(), exact, rtol=3e-7, atol=1e-12)


def test_derivatives_by_finite_differences(backend: str, device: str) -> None:
    t = STEPS[:2].to(device)
    streams = [torch.randn(2, 3, dtype=torch.float64, device=device, requires_grad=True) for _ in range(3)]
    scale = torch.tensor([0.5, 7.5], dtype=torch.float64, device=device)

    def posterior(x0: Tensor, x_t: Tensor, noise: Tensor) -> Tensor:
        return fastgen.posterior_sample(DDGAN, x0, x_t, t, s=t - 1, noise=noise).square()

    def guided(cond: Tensor, uncond: Tensor) -> Tensor:
        return fastgen.guidance(cond, uncond, scale).square()

    for f, inputs in ((posterior, streams), (guided, streams[:2])):
        assert torch.autograd.gradcheck(f, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)


def test_posterior_draws_its_noise(backend: str, device: str) -> None:
    x0, x_t = (t.to(device) for t in images(torch.float32, 2))
    t = STEPS.to(device)

    def generator() -> torch.Generator:
        return torch.Generator(device).manual_seed(3)

    noise = torch.randn(x_t.shape, generator=generator(), device=device)
    got = fastgen.posterior_sample(DDGAN, x0, x_t, t, generator=generator())
    assert torch.equal(got, fastgen.posterior_sample(DDGAN, x0, x_t, t, noise=noise))
    got = fastgen.langevin_step(x0, x_t, 1.0, 0.1, generator=generator())
    assert torch.equal(got, fastgen.langevin_step(x0, x_t, 1.0, 0.1, noise=noise))
    assert torch.equal(fastgen.langevin_step_(x0, x_t, 1.0, 0.1, generator=generator()), got)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_guidance(dtype: torch.dtype, backend: str, device: str) -> None:
    cond, uncond = images(dtype, 2)
    cotangent = torch.randn(cond.shape)
    for scale in (1.0, 7.5, torch.tensor([0.0, 1.0, 2.5, 7.5])):
        for first in (True, False):
            leaf, other = (cond, uncond) if first else (uncond, cond)

            def run(f: Any, rows: Tensor, others: Tensor, s: Any, first: bool = first) -> tuple[Tensor, Tensor]:
                return value_and_grad(
                    lambda p: f(p, others, s) if first else f(others, p, s), rows, cotangent.to(rows.device)
                )

            exact = run(lambda a, b, s: s * a + (1 - s) * b, leaf.double(), other.double(), column(scale))
            eager = run(reference.guidance, leaf, other, scale)
            there = scale.to(device) if isinstance(scale, Tensor) else scale
            got = run(fastgen.guidance, leaf.to(device), other.to(device), there)
            for what, mine, theirs, truth in zip(("value", "gradient"), got, eager, exact, strict=True):
                assert_accurate(mine.cpu(), theirs, truth, what)
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(eager[0].double(), exact[0], rtol=2 * eps, atol=64 * eps)
    mixed = fastgen.guidance(cond.to(device), uncond.double().to(device), 2.0)
    assert mixed.dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_langevin_step(dtype: torch.dtype, backend: str, device: str) -> None:
    x, grad, noise = images(dtype, 3)
    steps = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float32)
    for step, scale in ((1.0, 0.01), (steps, steps.sqrt()), (steps[2:3], 0.1)):
        exact = x.double() + column(step) * grad.double() + column(scale) * noise.double()
        eager = reference.langevin_step(x, grad, step, scale, noise=noise)
        leaf = x.to(device).requires_grad_()
        numbers = [n.to(device) if isinstance(n, Tensor) else n for n in (step, scale)]
        got = fastgen.langevin_step(leaf, grad.to(device), *numbers, noise=noise.to(device))
        assert_accurate(got.cpu(), eager, exact)
        assert not got.requires_grad
        with pytest.raises(AssertionError, match="error"):
            assert_accurate(
                fastgen.langevin_step(leaf, -grad.to(device), *numbers, noise=noise.to(device)).cpu(), eager, exact
            )
        assert fastgen.langevin_step_(leaf, grad.to(device), *numbers, noise=noise.to(device)) is leaf
        assert torch.equal(leaf.detach(), got)


# ---------------------------------------------------------------- compilation and errors


def test_compiles_without_a_graph_break(kernel_backend: str, device: str) -> None:
    x, cond, uncond, noise = (t.to(device) for t in images(torch.float32, 4))
    s, t = S.to(device), T.to(device)

    def sampler(x: Tensor, cond: Tensor) -> tuple[Tensor, ...]:
        k = fastgen.step_coefficients(SCHEDULE, s, t, method="ddim", eta=0.5)
        options: dict[str, Any] = {"uncond": uncond, "guidance_scale": 2.0, "noise": noise, "clamp": (-1.0, 1.0)}
        a = fastgen.reverse_step(x, cond, k, **options)
        b = fastgen.reverse_step_(a.clone(), cond, k, **options)
        c = fastgen.langevin_step(b, cond, 0.5, 0.1, noise=noise)
        return a, b, fastgen.langevin_step_(c.clone(), cond, 0.5, 0.1, noise=noise)

    torch._dynamo.reset()
    compiled = torch.compile(sampler, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for got, expected in zip(compiled(x, cond), sampler(x, cond), strict=True):
            assert torch.equal(got, expected)


def test_no_sync(kernel_backend: str, device: str) -> None:
    x, cond, noise = (v.to(device) for v in images(torch.float32, 3))
    s, t = S.to(device), T.to(device)
    with Syncs() as syncs:
        k = fastgen.step_coefficients(SCHEDULE, s, t, method="ddim", eta=0.5)
        fastgen.reverse_step(x, cond, k, uncond=noise, guidance_scale=2.0, noise=noise)
        fastgen.reverse_step_(x, cond, k)
        fastgen.posterior_sample(DDGAN, x, cond, STEPS.to(device))
        fastgen.langevin_step_(x, cond, 0.5, 0.1)
        fastgen.guidance(x, cond, 2.0)
    assert syncs.count == 0


@pytest.mark.parametrize("name", ["reverse_step_", "langevin_step_"])
def test_a_backward_does_not_use_what_was_overwritten(name: str, backend: str, device: str) -> None:
    x, weight = torch.randn(2, 3, device=device), torch.randn(2, 3, device=device, requires_grad=True)
    arguments = {"reverse_step_": (x, K.__class__(*(k.to(device) for k in K))), "langevin_step_": (x, 0.5, 0.1)}[name]
    loss = (x * weight).sum()
    with torch.no_grad():
        getattr(fastgen, name)(x, *arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        getattr(fastgen, name)(x.clone(), *arguments)


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_a_schedule_may_start_without_noise(method: Any, clipped: bool, backend: str, device: str) -> None:
    schedule = NoiseSchedule.from_alphas_cumprod(torch.tensor([1.0, 0.5]))
    k = fastgen.step_coefficients(schedule, -1, 0, method=method, use_clipped_model_output=clipped, device=device)
    x = torch.randn(2, 3, device=device)
    for kind, pred in (("sample", x), ("epsilon", torch.randn_like(x))):
        assert torch.equal(fastgen.reverse_step(x, pred, k, prediction_type=kind, noise=pred), x)


X, K = torch.zeros(2, 3), fastgen.step_coefficients(SCHEDULE, 3, 5)
TWO = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("step", {"x_t": [1.0]}, TypeError, "x_t must be a torch.Tensor"),
        ("step", {"cond": torch.zeros(2, 4)}, ValueError, "cond has shape"),
        ("step", {"cond": X.long()}, TypeError, "cond must be float32"),
        ("step", {"uncond": torch.zeros(3, 3)}, ValueError, "uncond has shape"),
        ("step", {"noise": torch.zeros(2)}, ValueError, "noise has shape"),
        ("step", {"coefficients": tuple(K)}, TypeError, "coefficients must be a fastgen.StepCoefficients"),
        ("step", {"coefficients": K._replace(eps=torch.zeros(3))}, ValueError, "coefficients.eps must have shape"),
        ("step", {"coefficients": K._replace(x0=torch.zeros(2).half())}, TypeError, "coefficients.x0 must be float32"),
        ("step", {"prediction_type": "eps"}, ValueError, "prediction_type must be one of"),
        ("step", {"guidance_scale": 2.0}, ValueError, "guidance_scale other than 1 needs uncond"),
        ("step", {"uncond": X, "guidance_scale": "2"}, TypeError, "guidance_scale must be a number"),
        ("step", {"uncond": X, "guidance_scale": torch.ones(3)}, ValueError, "guidance_scale must have shape"),
        ("step", {"clamp": (1.0, -1.0)}, ValueError, "clamp must be"),
        ("step", {"clamp": (float("nan"), 1.0)}, ValueError, "clamp must be"),
        ("step", {"clamp": 1.0}, TypeError, "clamp must be"),
        ("step", {"clamp": (1.0,)}, ValueError, "clamp must be"),
        ("numbers", {"schedule": 1000}, TypeError, "schedule must be a fastgen.NoiseSchedule"),
        ("numbers", {"schedule": NoiseSchedule.edm()}, ValueError, "schedule must be discrete"),
        ("numbers", {"s": 5}, ValueError, "s and t must satisfy"),
        ("numbers", {"t": 1000}, ValueError, "s and t must satisfy"),
        ("numbers", {"s": TWO}, TypeError, "s and t must both be"),
        ("numbers", {"s": TWO, "t": TWO.float()}, TypeError, "t must hold integers"),
        ("numbers", {"s": TWO[:1], "t": TWO}, ValueError, "s must have shape"),
        ("numbers", {"method": "euler"}, ValueError, "method must be one of"),
        ("numbers", {"eta": -0.5}, ValueError, "eta must be >= 0"),
        ("numbers", {"eta": 1.5}, ValueError, "eta must be <= 1"),
        ("numbers", {"variance": "large"}, ValueError, "variance must be one of"),
        ("numbers", {"variance": "beta", "method": "ddim"}, ValueError, "variance 'beta' is DDPM's"),
        ("numbers", {"variance": torch.ones(2)}, ValueError, "variance must have shape"),
        ("numbers", {"dtype": torch.float16}, TypeError, "dtype must be float32 or float64"),
        ("guidance", {"uncond": torch.zeros(2, 4)}, ValueError, "uncond has shape"),
        ("guidance", {"scale": torch.ones(2).half()}, TypeError, "scale must be float32"),
        ("posterior", {"schedule": NoiseSchedule.edm()}, ValueError, "schedule must be discrete"),
        ("posterior", {"x_t": torch.zeros(2, 4)}, ValueError, "x_t has shape"),
        ("posterior", {"t": TWO.float()}, TypeError, "t must hold integers"),
        ("posterior", {"s": TWO[:1]}, ValueError, "s must have shape"),
        ("posterior", {"noise": torch.zeros(3, 3)}, ValueError, "noise has shape"),
        ("langevin", {"grad": None}, TypeError, "grad must be a torch.Tensor"),
        ("langevin", {"step_size": float("inf")}, ValueError, "step_size must be finite"),
        ("langevin", {"noise_scale": torch.ones(3)}, ValueError, "noise_scale must have shape"),
        ("langevin", {"noise": torch.zeros(2)}, ValueError, "noise has shape"),
    ],
)
def test_errors_name_the_argument(name: str, changes: dict[str, Any], error: type, message: str) -> None:
    step = {"x_t": X, "cond": X, "coefficients": K}
    langevin = {"x": X, "grad": X, "step_size": 1.0, "noise_scale": 0.1}
    calls: dict[str, list[tuple[Any, dict[str, Any]]]] = {
        "step": [(fastgen.reverse_step, step), (fastgen.reverse_step_, step)],
        "numbers": [(fastgen.step_coefficients, {"schedule": SCHEDULE, "s": 3, "t": 5})],
        "guidance": [(fastgen.guidance, {"cond": X, "uncond": X, "scale": 2.0})],
        "posterior": [(fastgen.posterior_sample, {"schedule": SCHEDULE, "x0": X, "x_t": X, "t": TWO})],
        "langevin": [(fastgen.langevin_step, langevin), (fastgen.langevin_step_, langevin)],
    }
    for f, arguments in calls[name]:
        with pytest.raises(error, match=message):
            f(**{**arguments, **changes})
