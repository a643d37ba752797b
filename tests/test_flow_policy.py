"""Flow-GRPO's step and loss: against the published code, by hand, and where they have to stay silent."""

import math

import pytest
import torch
from oracle import value_and_grad
from torch import Tensor

import fastgen


def tensors(rows: int = 4, size: int = 30, device: str = "cpu", dtype=torch.float32) -> dict[str, Tensor]:
    pred, x_t, sample = (torch.randn(rows, size, device=device).to(dtype) for _ in range(3))
    t = torch.linspace(1.0, 0.3, rows, device=device)
    return {"pred": pred, "x_t": x_t, "sample": sample, "t": t, "t_next": 0.8 * t}


def published(pred, x_t, sample, sigma, sigma_next, noise_level=0.7, sigma_max=None):
    """Its step, in float64, and the derivative by autograd."""
    pred, x_t, sample = (v.double() for v in (pred, x_t, sample))
    sigma, sigma_next = (v.double()[:, None] for v in (sigma, sigma_next))
    dt = sigma_next - sigma
    top = torch.where(sigma == 1, sigma_next if sigma_max is None else sigma_max, sigma)
    std = torch.sqrt(sigma / (1 - top)) * noise_level
    mean = x_t * (1 + std**2 / (2 * sigma) * dt) + pred * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
    scale = std * torch.sqrt(-dt)
    log_prob = -((sample - mean) ** 2) / (2 * scale**2) - torch.log(scale) - math.log(math.sqrt(2 * math.pi))
    return log_prob.mean(1), mean, scale[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("t_max", [None, 0.95])
def test_the_step_is_the_published_one(dtype, t_max, backend, device):
    given = tensors(dtype=dtype, device=device)
    weights = torch.linspace(0.5, 2, 4, dtype=torch.float64, device=device)

    def ours(pred):
        step = fastgen.flow_sde_step(**given | {"pred": pred}, noise_level=0.9, t_max=t_max)
        return step, (weights * step.log_prob).sum() + step.mean.square().sum()

    def theirs(pred):
        others = [given[name] for name in ("x_t", "sample", "t", "t_next")]
        log_prob, mean, std = published(pred, *others, 0.9, t_max)
        return (log_prob, mean, std), (weights * log_prob).sum() + mean.square().sum()

    step, exact = ours(given["pred"])[0], theirs(given["pred"])[0]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = 1e-12 if wide == torch.float64 else 3e-6
    for mine, wanted in zip((step.log_prob, step.mean, step.std), exact, strict=True):
        assert mine.dtype == wide
        torch.testing.assert_close(mine.double(), wanted, rtol=tolerance, atol=tolerance)
    _, grad = value_and_grad(lambda x: ours(x)[1], given["pred"])
    _, wanted = value_and_grad(lambda x: theirs(x)[1], given["pred"].double())
    assert grad.dtype == dtype
    bound = max(torch.finfo(dtype).eps, 3e-6) if wide == torch.float32 else 1e-12
    torch.testing.assert_close(grad.double(), wanted, rtol=bound, atol=bound)


@pytest.mark.parametrize("part", ["log_prob", "mean"])
def test_each_result_alone_has_its_gradient(part, backend, device):
    given = tensors(device=device)
    index = {"log_prob": 0, "mean": 1}[part]
    _, grad = value_and_grad(lambda x: getattr(fastgen.flow_sde_step(**given | {"pred": x}), part).sum(), given["pred"])
    others = [given[name] for name in ("x_t", "sample", "t", "t_next")]
    _, wanted = value_and_grad(lambda x: published(x, *others)[index].sum(), given["pred"].double())
    torch.testing.assert_close(grad.double(), wanted, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_was_drawn_has_the_same_probability_when_given(dtype, backend, device):
    """Of the sample as it is stored, whatever its dtype rounds away: else no ratio would be 1."""
    given = tensors(dtype=dtype, device=device)
    noise = torch.randn_like(given["x_t"])
    del given["sample"]
    drawn = fastgen.flow_sde_step(**given, noise=noise)
    again = fastgen.flow_sde_step(**given, sample=drawn.sample)
    assert drawn.sample.dtype == dtype
    assert torch.equal(drawn.log_prob, again.log_prob)
    torch.testing.assert_close(
        drawn.sample.float(), (drawn.mean + drawn.std[:, None] * noise).to(dtype).float(), rtol=1e-2, atol=1e-5
    )
    expected = -0.5 * noise.double().square().mean(1) - drawn.std.double().log() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(drawn.log_prob.double(), expected, rtol=0, atol=2e-5 if dtype == torch.float32 else 0.05)
    leaf = given["pred"].clone().requires_grad_()
    learnt = fastgen.flow_sde_step(**given | {"pred": leaf}, noise=noise)
    for mine, wanted in zip(learnt, drawn, strict=True):
        assert torch.equal(mine, wanted)
    assert learnt.log_prob.requires_grad
    fresh = fastgen.flow_sde_step(**given)
    assert not torch.equal(fresh.sample, drawn.sample)
    assert not fresh.sample.requires_grad


@pytest.mark.parametrize("t_max", [None, 0.95])
@pytest.mark.parametrize(
    ("t", "t_next"),
    [(0.5, 0.25), (1.0, 0.75), (1, 0), (0.5, 0.5), (0.5, 0.6), (1.2, 0.5), (0.0, -0.1), (0.5, -0.1), (1.0, 1.0)],
)
def test_numbers_are_times_of_all_rows(t, t_next, t_max, backend, device):
    given = tensors(device=device) | {"t_max": t_max}
    numbers = fastgen.flow_sde_step(**given | {"t": t, "t_next": t_next})
    for mixed in ({"t": t, "t_next": given["t_next"].double().fill_(t_next)}, {"t_next": t_next}):
        vectors = fastgen.flow_sde_step(**given | {"t": given["t"].double().fill_(t)} | mixed)
        for mine, wanted in zip(numbers, vectors, strict=True):
            torch.testing.assert_close(mine, wanted, equal_nan=True)
    assert numbers.std.isfinite().all() == (0 <= t_next < t <= 1)


@pytest.mark.parametrize(
    ("t", "t_next"), [(0.5, 0.5), (0.5, 0.6), (1.2, 0.5), (0.0, -0.1), (0.5, -0.1), (math.nan, 0.1)]
)
def test_a_row_out_of_range_is_nan_alone(t, t_next, backend, device):
    given = tensors(device=device)
    changed = given | {"t": given["t"].clone(), "t_next": given["t_next"].clone()}
    changed["t"][1], changed["t_next"][1] = t, t_next

    def run(values):
        step = fastgen.flow_sde_step(**values)
        return step, torch.autograd.grad(step.log_prob.sum() + step.mean.sum(), values["pred"])[0]

    (step, grad), (exact, exact_grad) = (run(v | {"pred": v["pred"].requires_grad_()}) for v in (changed, given))
    assert step.log_prob[1].isnan()
    assert step.mean[1].isnan().all()
    sound = [0, 2, 3]
    for mine, wanted in ((step.log_prob, exact.log_prob), (step.mean, exact.mean), (grad, exact_grad)):
        torch.testing.assert_close(mine[sound], wanted[sound], rtol=0, atol=0)


def test_second_derivatives_are_refused(kernel_backend, device):
    given = tensors(device=device)
    given["pred"].requires_grad_()
    (grad,) = torch.autograd.grad(fastgen.flow_sde_step(**given).log_prob.sum(), given["pred"], create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        grad.sum().backward()


def test_grpo_by_hand(device):
    old = torch.zeros(4, device=device)
    ratios = torch.tensor([1.0, 1.5, 1.5, 0.5], device=device)
    advantages = torch.tensor([2.0, 1.0, -1.0, -9.0], device=device)
    log_prob = ratios.log().requires_grad_()
    options = {"clip": 0.2, "advantage_clip": 3.0}
    term = fastgen.grpo_loss(log_prob, old, advantages, reduction="none", **options)
    torch.testing.assert_close(term.detach().cpu(), torch.tensor([-2.0, -1.2, 1.5, 2.4]))
    loss, stats = fastgen.grpo_loss(log_prob, old, advantages, return_stats=True, **options)
    assert loss.item() == pytest.approx(0.7 / 4)
    loss.backward()
    torch.testing.assert_close(log_prob.grad.cpu(), torch.tensor([-2.0, 0.0, 1.5, 0.0]) / 4)
    assert stats.ratio.item() == pytest.approx(4.5 / 4)
    assert stats.clipped.item() == 0.5
    assert stats.kl.item() == pytest.approx(0.5 * (2 * math.log(1.5) ** 2 + math.log(2) ** 2) / 4)
    assert not stats.kl.requires_grad
    assert fastgen.grpo_loss(log_prob[:0], old[:0], advantages[:0]).item() == 0


def test_a_step_of_policy_gradient_at_the_sampling_policy(backend, device):
    """There the ratio is 1 and the gradient is that of -A log p."""
    given = tensors(device=device)
    advantages = torch.tensor([1.0, -2.0, 0.5, 9.0], device=device)
    with torch.no_grad():
        old = fastgen.flow_sde_step(**given).log_prob

    def loss(pred):
        return fastgen.grpo_loss(fastgen.flow_sde_step(**given | {"pred": pred}).log_prob, old, advantages)

    value, grad = value_and_grad(loss, given["pred"])
    held = advantages.clamp(-5, 5)
    assert value.item() == pytest.approx(-held.mean().item(), rel=1e-6)
    plain = value_and_grad(
        lambda x: -(held * fastgen.flow_sde_step(**given | {"pred": x}).log_prob).mean(), given["pred"]
    )[1]
    torch.testing.assert_close(grad, plain)


X, ROW = torch.randn(2, 3), torch.full((2,), 0.5)


def step(**changed):
    return fastgen.flow_sde_step(**{"pred": X, "x_t": X, "t": ROW, "t_next": 0.5 * ROW, "sample": X} | changed)


def grpo(**changed):
    return fastgen.grpo_loss(**{"log_prob": ROW, "old_log_prob": ROW, "advantages": ROW} | changed)


BAD_CALLS = {
    "x_t has shape": (ValueError, lambda: step(x_t=X[:1])),
    "sample must be float32": (TypeError, lambda: step(sample=X.long())),
    "noise and sample exclude each other": (ValueError, lambda: step(noise=X)),
    r"t must have shape \[2\]": (ValueError, lambda: step(t=ROW[:1])),
    "t_next must be float32 or float64": (TypeError, lambda: step(t_next=ROW.half())),
    "t must be a number": (TypeError, lambda: step(t="1")),
    "noise_level must be > 0": (ValueError, lambda: step(noise_level=0.0)),
    "t_max must be below 1": (ValueError, lambda: step(t_max=1.0)),
    "t_max must be <= 1": (ValueError, lambda: step(t_max=1.5)),
    "log_prob must be float32 or float64": (TypeError, lambda: grpo(log_prob=ROW.bfloat16())),
    "old_log_prob has shape": (ValueError, lambda: grpo(old_log_prob=ROW[:1])),
    "advantages must be a torch.Tensor": (TypeError, lambda: grpo(advantages=1.0)),
    "clip must be >= 0": (ValueError, lambda: grpo(clip=-0.1)),
    "advantage_clip must be > 0": (ValueError, lambda: grpo(advantage_clip=0)),
    "reduction must be one of": (ValueError, lambda: grpo(reduction="batch")),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_names_the_argument(message):
    error, call = BAD_CALLS[message]
    with pytest.raises(error, match=f"^{message}"):
        call()
