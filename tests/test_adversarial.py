"""Adversarial losses, gradient penalties, pix2pix's loss, and the pairs of a Denoising Diffusion GAN."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DEVICE
from oracle import assert_accurate, value_and_grad

import fastgen
from fastgen import NoiseSchedule, reference
from fastgen.adversarial import KINDS

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LN2 = math.log(2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=dtype, device=DEVICE)


# ---------------------------------------------------------------- losses on logits

# The papers' formulas in D = σ(ℓ), in the order of the docstring's table: of real r and fake f.
BCE = lambda r, f: -torch.log(torch.sigmoid(r)).mean() - torch.log(1 - torch.sigmoid(f)).mean()  # noqa: E731
DISCRIMINATOR: dict[str, Any] = {
    "non_saturating": BCE,
    "saturating": BCE,
    "kl": BCE,
    "wgan": lambda r, f: -(r.mean() - f.mean()),
    "hinge": lambda r, f: (1 - r).clamp(min=0).mean() + (1 + f).clamp(min=0).mean(),
    "relativistic": lambda r, f: -torch.log(torch.sigmoid(r - f)).mean(),
}
GENERATOR: dict[str, Any] = {
    "non_saturating": lambda r, f: -torch.log(torch.sigmoid(f)).mean(),
    "saturating": lambda r, f: torch.log(1 - torch.sigmoid(f)).mean(),
    "kl": lambda r, f: torch.log((1 - torch.sigmoid(f)) / torch.sigmoid(f)).mean(),
    "wgan": lambda r, f: -f.mean(),
    "hinge": lambda r, f: -f.mean(),
    "relativistic": lambda r, f: -torch.log(torch.sigmoid(f - r)).mean(),
}


def generator_loss(real: Any, fake: Any, kind: Any) -> torch.Tensor:
    return fastgen.generator_loss(fake, real if kind == "relativistic" else None, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_the_papers(kind: Any) -> None:
    real, fake = normal(6, 1, 3, 3), normal(6, 1, 3, 3, seed=1).requires_grad_()
    for ours, formula in (
        (lambda r, f: fastgen.discriminator_loss(r, f, kind=kind), DISCRIMINATOR[kind]),
        (lambda r, f: generator_loss(r, f, kind), GENERATOR[kind]),
    ):
        leaves = [real.clone().requires_grad_(), fake]
        value, expected = ours(*leaves), formula(*leaves)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        grads, right = (torch.autograd.grad(v, leaves, materialize_grads=True) for v in (value, expected))
        torch.testing.assert_close(grads, right, rtol=1e-10, atol=1e-16)
        assert torch.autograd.gradcheck(ours, leaves)
        scales = [real[:, :, :2], real], [fake[:, :, :2], fake]
        torch.testing.assert_close(ours(*scales), (ours(scales[0][0], scales[1][0]) + value) / 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_logits_are_safe(kind: Any, dtype: torch.dtype) -> None:
    """Against float64; at the logits ±3e4 the formulas in σ are infinite even there."""
    far = torch.tensor([-3e4, -50.0, 0.0, 50.0, 3e4], device=DEVICE, dtype=dtype)
    real = torch.zeros(5, device=DEVICE, dtype=dtype)
    for loss in (lambda r, f: fastgen.discriminator_loss(r, f, kind=kind), lambda r, f: generator_loss(r, f, kind)):
        value, grad = value_and_grad(lambda f: loss(real, f), far)
        exact, right = value_and_grad(lambda f: loss(real.double(), f), far.double())
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert grad.dtype == dtype
        assert exact.isfinite()
        torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=1e-12)
        torch.testing.assert_close(grad, right.to(dtype), rtol=1e-6, atol=1e-12)


def test_known_values() -> None:
    zero = torch.zeros(3, 2)
    for kind in ("non_saturating", "saturating", "kl"):
        assert fastgen.discriminator_loss(zero, zero, kind=kind).item() == pytest.approx(2 * LN2)
    assert fastgen.discriminator_loss(zero, zero, kind="hinge").item() == 2
    assert fastgen.discriminator_loss(zero, zero, kind="relativistic").item() == pytest.approx(LN2)
    # Past its margin the hinge is satisfied.
    assert fastgen.discriminator_loss(zero + 2, zero - 3, kind="hinge").item() == 0
    # A logit of 60 is σ = 1 in float64: log(1 - σ) would be -inf.
    assert fastgen.generator_loss(torch.tensor([60.0], dtype=torch.float64), kind="saturating").item() == -60
    assert fastgen.generator_loss(torch.tensor([-1e4])).item() == 1e4


def densities() -> tuple[torch.Tensor, torch.Tensor]:
    """Two distributions p (data) and q (generator) over 50 points."""
    p, q = (normal(50, seed=k).softmax(0) for k in range(2))
    return p, q


def expectation(loss: Any, p: torch.Tensor, q: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """E_q of a generator's loss of one logit: the losses take samples, here a point at a time."""
    return sum(weight * loss(point) for weight, point in zip(q, points, strict=True))


def test_the_optimal_discriminator_measures_js_and_kl() -> None:
    p, q = densities()
    logit = (p / q).log()
    kl = (q * (q / p).log()).sum()
    m = (p + q) / 2
    js = 0.5 * ((p * (p / m).log()).sum() + (q * (q / m).log()).sum())
    bce = sum(
        p[i] * fastgen.discriminator_loss(logit[i : i + 1], torch.full((1,), -1e9, dtype=p.dtype))
        + q[i] * fastgen.discriminator_loss(torch.full((1,), 1e9, dtype=p.dtype), logit[i : i + 1])
        for i in range(len(p))
    )
    torch.testing.assert_close(bce, 2 * LN2 - 2 * js)
    found = expectation(lambda x: fastgen.generator_loss(x, kind="kl"), p, q, logit)
    torch.testing.assert_close(found, kl)
    parts = [
        expectation(lambda x, k=k: fastgen.generator_loss(x, kind=k), p, q, logit)
        for k in ("saturating", "non_saturating")
    ]
    torch.testing.assert_close(parts[0] + parts[1], found)


@pytest.mark.parametrize("offset", [-1.0, 0.0, 2.0])
def test_mode_seeking_expansion(offset: float) -> None:
    """With D = σ(λ log(p/q) + C) the saturating loss is -log(1 + a) + λ a/(1 + a) KL(q‖p) + O(λ²), a = e^C."""
    p, q = densities()
    ratio, a = (p / q).log(), math.exp(offset)
    kl = (q * (q / p).log()).sum()
    errors = []
    for scale in (1e-2, 1e-3):
        loss = expectation(lambda x: fastgen.generator_loss(x, kind="saturating"), p, q, scale * ratio + offset)
        errors.append(abs(loss - (-math.log(1 + a) + scale * a / (1 + a) * kl)).item())
    second = 0.5 * a / (1 + a) ** 2 * (q * ratio.square()).sum().item()
    assert errors[0] == pytest.approx(1e-4 * second, rel=0.1)
    assert errors[1] == pytest.approx(1e-6 * second, rel=0.01)


def test_js_on_disjoint_supports_has_no_gradient() -> None:
    """Data at 0, fakes at θ: for any θ ≠ 0 the optimal discriminator gives JS = ln 2, flat in θ; ``kl`` does not."""
    for theta in (0.5, 1.0, 3.0):
        fake = torch.tensor([theta], dtype=torch.float64, requires_grad=True)

        def logit(x: torch.Tensor) -> torch.Tensor:  # as sure as an optimal discriminator, and smooth
            return 400 * (0.5 - x / theta)

        js = LN2 - 0.5 * fastgen.discriminator_loss(logit(torch.zeros_like(fake)), logit(fake))
        assert js.item() == pytest.approx(LN2, abs=1e-15)
        (gone,) = torch.autograd.grad(fastgen.generator_loss(logit(fake), kind="saturating"), fake)
        (kept,) = torch.autograd.grad(fastgen.generator_loss(logit(fake), kind="kl"), fake)
        assert abs(gone.item()) < 1e-80
        assert kept.item() == pytest.approx(400 / theta)


# ---------------------------------------------------------------- gradient penalties


class Critic(torch.nn.Module):
    """Patch logits of two scales, as smooth as double backward needs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Conv2d(1, 4, 3, padding=1, dtype=torch.float64, device=DEVICE)
        self.second = torch.nn.Conv2d(4, 1, 2, stride=2, dtype=torch.float64, device=DEVICE)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        h = torch.tanh(self.first(x))
        patches = self.second(h)
        return [patches, patches.mean((2, 3)) ** 2]


def by_hand(critic: Any, images: torch.Tensor) -> torch.Tensor:
    """‖∇ℓ‖ of each image on its own, with the graph."""
    norms = []
    for image in images:
        x = image[None].detach().requires_grad_()
        logit = sum(scale.mean() for scale in critic(x)) / 2
        norms.append(torch.autograd.grad(logit, x, create_graph=True)[0].square().sum().sqrt())
    return torch.stack(norms)


def parameter_grads(critic: torch.nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(critic.parameters()), materialize_grads=True))


def test_r1_is_the_gradient_of_every_image(kernel_backend: str) -> None:
    critic, images = Critic(), normal(5, 1, 4, 4).requires_grad_()
    penalty = fastgen.r1_penalty(critic(images), images, gamma=3.0, every=4)
    expected = 4 * 1.5 * by_hand(critic, images).square().mean()
    torch.testing.assert_close(penalty, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(parameter_grads(critic, penalty), parameter_grads(critic, expected))


def test_r1_double_backward(kernel_backend: str) -> None:
    """Numerically, in the discriminator's weights and in the images; and by hand for a quadratic discriminator."""
    images = normal(3, 4).requires_grad_()

    def penalty(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return fastgen.r1_penalty(torch.sin(x @ weight).sum(1), x, gamma=0.7)

    assert torch.autograd.gradcheck(penalty, (normal(4, 2, seed=1).requires_grad_(), images))
    matrix = normal(4, 4, seed=2).requires_grad_()
    quadratic = fastgen.r1_penalty(((images @ matrix) * images).sum(1), images, gamma=2.0)
    slope = images @ (matrix + matrix.T)  # ∇ xᵀAx
    torch.testing.assert_close(quadratic, slope.square().sum(1).mean())
    (grad,) = torch.autograd.grad(quadratic, matrix)
    outer = images.T @ slope / 3
    torch.testing.assert_close(grad, 2 * (outer + outer.T))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_r1_is_as_accurate_as_eager(dtype: torch.dtype, kernel_backend: str) -> None:
    x, weight = normal(6, 40, dtype=torch.float32), normal(40, 3, seed=1, dtype=torch.float32)

    def formula(logits: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        wide = torch.float64 if images.dtype == torch.float64 else torch.float32
        (slope,) = torch.autograd.grad(logits.to(wide).mean(1).sum(), images, create_graph=True)
        return 0.5 * slope.to(wide).square().sum(1).mean()

    def run(r1_penalty: Callable[..., torch.Tensor], dtype: torch.dtype) -> Any:
        def penalty(w: torch.Tensor) -> torch.Tensor:
            images = x.to(dtype).requires_grad_()
            return r1_penalty(torch.tanh(images @ w), images)

        return value_and_grad(penalty, weight.to(dtype))

    actual, eager, exact = run(fastgen.r1_penalty, dtype), run(formula, dtype), run(formula, torch.float64)
    assert_accurate(actual[0], eager[0], exact[0], "penalty")
    assert_accurate(actual[1], eager[1], exact[1], "gradient")
    for wrong in (torch.zeros_like(actual[1]), -actual[1]):
        with pytest.raises(AssertionError):
            assert_accurate(wrong, eager[1], exact[1])


def test_lazy_r1_is_r1_on_average() -> None:
    critic, images = Critic(), normal(4, 1, 4, 4).requires_grad_()
    total = [torch.zeros_like(p) for p in critic.parameters()]
    for step in range(8):
        if step % 4 == 0:
            lazy = parameter_grads(critic, fastgen.r1_penalty(critic(images), images, every=4))
            total = [t + g for t, g in zip(total, lazy, strict=True)]
    once = parameter_grads(critic, fastgen.r1_penalty(critic(images), images))
    torch.testing.assert_close(total, [8 * g for g in once])


def test_approximate_r1_goes_to_r1() -> None:
    critic = Critic()
    images = normal(1, 1, 4, 4).expand(20_000, 1, 4, 4)
    exact = 0.5 * by_hand(critic, images[:1]).square().mean()
    found = fastgen.approximate_r1_penalty(critic, images, critic(images), sigma=1e-4, generator=seeded(5))
    # (ε·∇ℓ)² has variance 2 |∇ℓ|⁴: its mean over 20 000 draws is off by 1 % in a standard deviation.
    assert found.item() == pytest.approx(exact.item(), rel=0.04)
    grads = parameter_grads(critic, found), parameter_grads(critic, exact)
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() <= 0.1 * b.norm() + 1e-6


def test_approximate_r1_perturbs_what_the_discriminator_saw() -> None:
    """In float64 one call gives ((ℓ(x_t + σ ε) - ℓ(x_t)) / σ)² at the images passed, with the generator's own ε."""
    x_t, seen = normal(3, 2), []

    def critic(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return x.square().sum(1)

    penalty = fastgen.approximate_r1_penalty(
        critic, x_t, critic(x_t), sigma=0.1, gamma=2.0, every=3, generator=seeded(7)
    )
    noise = torch.randn(3, 2, generator=seeded(7), dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(seen[1], x_t + 0.1 * noise)
    slope = 2 * (x_t * noise).sum(1) + 0.1 * noise.square().sum(1)
    torch.testing.assert_close(penalty, 3 * slope.square().mean())


def test_gradient_penalty() -> None:
    critic, real, fake = Critic(), normal(5, 1, 4, 4), normal(5, 1, 4, 4, seed=1)
    penalty = fastgen.gradient_penalty(critic, real, fake, weight=3.0, generator=seeded(2))
    u = torch.rand(5, generator=seeded(2), device=DEVICE).reshape(5, 1, 1, 1)
    expected = 3 * (by_hand(critic, u * real + (1 - u) * fake) - 1).square().mean()
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(parameter_grads(critic, penalty), parameter_grads(critic, expected))
    flat = torch.nn.Linear(3, 1, device=DEVICE)
    torch.nn.init.zeros_(flat.weight)
    loss = fastgen.gradient_penalty(flat, torch.ones(2, 3, device=DEVICE), torch.zeros(2, 3, device=DEVICE))
    assert loss.item() == pytest.approx(10, rel=1e-6)
    (grad,) = torch.autograd.grad(loss, flat.weight)
    assert grad.isfinite().all()


def test_clip_weights() -> None:
    critic = Critic()
    before = [p.detach().clone() for p in critic.parameters()]
    fastgen.clip_weights_(critic.parameters(), 0.1)
    assert any((p.abs() > 0.1).any() for p in before)
    for p, old in zip(critic.parameters(), before, strict=True):
        assert torch.equal(p, old.clamp(-0.1, 0.1))
        assert p.requires_grad


# ---------------------------------------------------------------- pix2pix


def test_pix2pix_is_the_sum_of_its_terms(kernel_backend: str) -> None:
    logits, output, target = [normal(2, 1, 2, 2), normal(2, 1)], normal(2, 3, 8, 8, seed=1), normal(2, 3, 8, 8, seed=2)
    phi = lambda x: [x.tanh(), x.mean((2, 3)).square()]  # noqa: E731
    output.requires_grad_()
    kw: dict[str, Any] = {
        "kind": "hinge",
        "l1_weight": 7.0,
        "features": phi(output),
        "target_features": phi(target),
        "feature_weights": [0.5, 3.0],
    }
    loss = fastgen.pix2pix_loss(logits, output, target, **kw)
    adversarial = -(logits[0].mean() + logits[1].mean()) / 2
    expected = adversarial + 7 * (output - target).abs().mean()
    for w, x, y in zip([0.5, 3.0], phi(output), phi(target), strict=True):
        expected = expected + w * (x - y).abs().mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(reference.pix2pix_loss(logits, output, target, **kw), expected)
    grads = [torch.autograd.grad(x, output, retain_graph=True)[0] for x in (loss, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_a_graph_break(kind: Any) -> None:
    def step(output: torch.Tensor) -> torch.Tensor:
        fake = [output.mean(1), output[:, :2]]
        real = [t.detach() + 1 for t in fake]
        loss = fastgen.discriminator_loss(real, fake, kind=kind) + generator_loss(real, fake, kind)
        return loss + fastgen.pix2pix_loss(fake, output, torch.ones_like(output))

    torch._dynamo.reset()
    x = normal(4, 3, dtype=torch.float32)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_grad(compiled, x), value_and_grad(step, x))


# ---------------------------------------------------------------- Denoising Diffusion GAN


@pytest.mark.parametrize("steps", [2, 4])
def test_ddgan_schedule(steps: int) -> None:
    """Worked out from the paper's β: of the VP process between times 1e-3 + (1 - 1e-3) k / T, and first 1e-8."""

    def variance(t: float) -> float:
        return 1 - math.exp(-0.5 * t * t * 19.9 - 0.1 * t)

    times = [1e-3 + (1 - 1e-3) * k / steps for k in range(steps + 1)]
    bars = [1 - variance(t) for t in times]
    betas = [1e-8] + [1 - after / before for before, after in itertools.pairwise(bars)]
    expected = torch.tensor([1 - b for b in betas], dtype=torch.float64).cumprod(0)
    schedule = NoiseSchedule.ddgan(steps)
    assert schedule.alphas_cumprod is not None
    torch.testing.assert_close(schedule.alphas_cumprod, expected, rtol=1e-12, atol=0)
    sigma = schedule.sigma_t(torch.arange(steps + 1))
    assert sigma[0].item() == pytest.approx(1e-4, rel=1e-6)
    assert sigma[-1].item() > 0.9999


def test_diffuse_pair_takes_two_noises_in_sequence() -> None:
    schedule, x0 = NoiseSchedule.ddgan(4), normal(4, 3, seed=3)
    t = torch.tensor([1, 2, 3, 4], device=DEVICE)
    noise = normal(4, 3), normal(4, 3, seed=1)
    x_s, x_t = fastgen.diffuse_pair(schedule, x0, t, noise=noise)
    assert schedule.alphas_cumprod is not None
    bars = schedule.alphas_cumprod.tolist()
    for i, k in enumerate(t.tolist()):
        beta = 1 - bars[k] / bars[k - 1]
        s = math.sqrt(bars[k - 1]) * x0[i] + math.sqrt(1 - bars[k - 1]) * noise[0][i]
        torch.testing.assert_close(x_s[i], s)
        torch.testing.assert_close(x_t[i], math.sqrt(1 - beta) * s + math.sqrt(beta) * noise[1][i])
    torch.testing.assert_close(reference.diffuse_pair(schedule, x0, t, noise=noise), (x_s, x_t))
    clean, _ = fastgen.diffuse_pair(schedule, x0, t, s=torch.full_like(t, -1), noise=noise)
    assert torch.equal(clean, x0)
    again = [fastgen.diffuse_pair(schedule, x0, t, generator=seeded(4)) for _ in range(2)]
    assert torch.equal(again[0][1], again[1][1])
    half, _ = fastgen.diffuse_pair(schedule, x0.half(), t)
    assert half.dtype == torch.float16


def test_pairs_and_posterior_have_one_distribution() -> None:
    """(x_s, x_t) drawn forward, and x_s drawn from the posterior of (x0, x_t): the same covariance."""
    schedule, rows = NoiseSchedule.ddgan(4), 200_000
    x0 = torch.full((rows, 1), 0.7, dtype=torch.float64, device=DEVICE)
    t = torch.full((rows,), 2, device=DEVICE)
    x_s, x_t = fastgen.diffuse_pair(schedule, x0, t, generator=seeded(1))
    drawn = fastgen.posterior_sample(schedule, x0, x_t, t, generator=seeded(2))
    forward, posterior = (torch.cat([x, x_t], 1) for x in (x_s, drawn))
    torch.testing.assert_close(posterior.mean(0), forward.mean(0), rtol=0, atol=0.01)
    torch.testing.assert_close(torch.cov(posterior.T), torch.cov(forward.T), rtol=0, atol=0.01)
    assert schedule.alphas_cumprod is not None
    bar = schedule.alphas_cumprod
    expected = torch.tensor([bar[1].sqrt(), bar[2].sqrt()]) * 0.7
    torch.testing.assert_close(forward.mean(0).cpu(), expected, rtol=0, atol=0.01, check_dtype=False)
    # Were one noise used for both, they would be fully correlated.
    assert torch.corrcoef(forward.T)[0, 1] < 0.9
