"""Joint energy models: the loss against float64, guidance and Langevin sampling of known densities, the buffer."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_accurate, double, value_and_grad
from syncs import Syncs

import fastgen
from fastgen import ReplayBuffer, reference
from fastgen.core import dispatch

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
IGNORED = -100


@pytest.fixture
def loss_backend(backend, device):
    if reason := dispatch.missing("token_logprob", backend, device):
        pytest.skip(reason)


def batch(dtype=torch.float32, device="cpu", rows=6, fakes=5, classes=7, scale=3.0):
    real, fake = (scale * torch.randn(n, classes, device=device) for n in (rows, fakes))
    labels = torch.randint(classes, (rows,), device=device)
    labels[:1] = IGNORED
    return real.to(dtype), labels, fake.to(dtype)


CASES = {
    "jem": {},
    "classifier": {"energy_weight": 0.0},
    "weighted": {"energy_weight": 0.3},
    "own ignore_index": {"ignore_index": 2},
}


def gradients(module, real, labels, fake, cotangent, **arguments):
    labels = torch.where(labels == IGNORED, 2, labels) if "ignore_index" in arguments else labels
    value, grad_real = value_and_grad(lambda x: module.joint_energy_loss(x, labels, fake, **arguments), real, cotangent)
    _, grad_fake = value_and_grad(lambda x: module.joint_energy_loss(real, labels, x, **arguments), fake, cotangent)
    return value, grad_real, grad_fake


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(case, dtype, loss_backend, device):
    real, labels, fake = batch(dtype, device)
    cotangent = torch.tensor(0.7, device=device)
    exact = gradients(reference, double(real), labels, double(fake), cotangent, **CASES[case])
    eager = gradients(reference, real, labels, fake, cotangent, **CASES[case])
    actual = gradients(fastgen, real, labels, fake, cotangent, **CASES[case])
    for what, a, e, x in zip(("value", "real", "fake"), actual, eager, exact, strict=True):
        assert_accurate(a, e, x, f"{case} {what}")
    for corrupt in (torch.zeros_like, torch.neg):
        for a, e, x in zip(actual[1:], eager[1:], exact[1:], strict=True):
            if x.abs().sum() > 0:
                with pytest.raises(AssertionError, match="error"):
                    assert_accurate(corrupt(a), e, x)


def test_is_cross_entropy_and_energies(loss_backend, device):
    real, labels, fake = batch(device=device)
    plain = fastgen.joint_energy_loss(real, labels, fake, energy_weight=0.0)
    torch.testing.assert_close(plain, F.cross_entropy(real, labels, ignore_index=IGNORED))
    real.requires_grad_()
    loss, energy_real, energy_fake = fastgen.joint_energy_loss(real, labels, fake, return_energies=True)
    torch.testing.assert_close(energy_real, -real.logsumexp(1))
    torch.testing.assert_close(energy_fake, -fake.logsumexp(1))
    torch.testing.assert_close(loss, plain + energy_real.mean() - energy_fake.mean())
    assert loss.requires_grad
    assert not energy_real.requires_grad
    assert not energy_fake.requires_grad


def test_by_hand(loss_backend, device):
    """At weight 1 the softmax of labelled images cancels: their gradient is minus the onehot vector."""
    real = torch.tensor([[2.0, 0.0], [0.0, 3.0]], device=device)
    fake = torch.tensor([[0.0, math.log(3.0)]], device=device)
    labels = torch.tensor([0, 1], device=device)
    loss, grad_real, grad_fake = gradients(fastgen, real, labels, fake, None)
    assert loss.item() == pytest.approx(-2.5 + math.log(4.0), rel=1e-6)
    torch.testing.assert_close(grad_real.cpu(), -0.5 * torch.eye(2))
    torch.testing.assert_close(grad_fake.cpu(), torch.tensor([[0.25, 0.75]]))


def test_edges(loss_backend, device):
    real, labels, fake = batch(device=device)
    # Groups that are empty contribute nothing.
    loss, grad_real, _ = gradients(fastgen, real, labels, fake[:0], None)
    expected = F.cross_entropy(real, labels, ignore_index=IGNORED) - real.logsumexp(1).mean()
    torch.testing.assert_close(loss, expected)
    assert grad_real.isfinite().all()
    torch.testing.assert_close(fastgen.joint_energy_loss(real[:0], labels[:0], fake), fake.logsumexp(1).mean())
    unlabelled = torch.full_like(labels, IGNORED)
    loss, grad_real, _ = gradients(fastgen, real, unlabelled, fake, None)
    torch.testing.assert_close(loss, fake.logsumexp(1).mean() - real.logsumexp(1).mean())
    torch.testing.assert_close(grad_real, -real.softmax(1) / len(real))
    # Large logits, and forbidden ones.
    loss, grad_real, grad_fake = gradients(fastgen, real * 1e4, labels, fake * 1e4, None)
    assert all(t.isfinite().all() for t in (loss, grad_real, grad_fake))
    masked = fake.clone()
    masked[:, 0] = -math.inf
    loss, _, grad_fake = gradients(fastgen, real, labels, masked, None)
    assert loss.isfinite()
    assert (grad_fake[:, 0] == 0).all()
    # A bad row spoils the value, and no other row's gradient.
    broken = real.clone()
    broken[3, 2] = math.nan
    loss, grad, _ = gradients(fastgen, broken, labels, fake, None)
    others = torch.arange(6, device=device) != 3
    torch.testing.assert_close(grad[others], gradients(fastgen, real, labels, fake, None)[1][others])
    assert loss.isnan()
    assert fastgen.joint_energy_loss(real, torch.full_like(labels, 7), fake).isnan()
    # Other losses' ignore_index is a label outside like any other.
    labels[0] = -100
    loss, energy, _ = fastgen.joint_energy_loss(real, labels, fake, ignore_index=-1, return_energies=True)
    assert loss.isnan()
    torch.testing.assert_close(energy, -real.logsumexp(1))


def test_compiles_and_does_not_sync(loss_backend, device):
    real, labels, fake = batch(device=device)

    def f(x):
        return fastgen.joint_energy_loss(x, labels, fake, energy_weight=0.5)

    torch._dynamo.reset()
    torch.testing.assert_close(
        value_and_grad(torch.compile(f, fullgraph=True, backend="aot_eager"), real), value_and_grad(f, real)
    )
    if dispatch.backend_for("token_logprob", device) != "triton":  # the interpreter reads values
        with Syncs() as syncs:
            value_and_grad(f, real)
        assert syncs.count == 0


def test_torch_func(loss_backend, device):
    real, labels, fake = batch(device=device)

    def f(x):
        return fastgen.joint_energy_loss(x, labels, fake)

    torch.testing.assert_close(torch.func.grad(f)(real), value_and_grad(f, real)[1])
    several = torch.stack([real, -real])
    torch.testing.assert_close(torch.func.vmap(f)(several), torch.stack([f(x) for x in several]))


def test_second_derivatives_are_refused_not_wrong(loss_backend, device):
    if dispatch.backend_for("token_logprob", device) == "reference":
        pytest.skip("the reference has them")
    real, labels, fake = batch(device=device)
    real.requires_grad_()
    (grad,) = torch.autograd.grad(fastgen.joint_energy_loss(real, labels, fake), real, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        grad.square().sum().backward()


def test_gradcheck_of_the_reference():
    real, labels, fake = batch(torch.float64, rows=3, fakes=2, classes=3)
    for arguments in ({}, {"energy_weight": 0.3}):
        assert torch.autograd.gradcheck(
            lambda r, f: reference.joint_energy_loss(r, labels, f, **arguments),
            (real.requires_grad_(), fake.requires_grad_()),
        )


def net(dtype=torch.float32, classes=4):
    torch.manual_seed(1)
    layers = torch.nn.Flatten(), torch.nn.Linear(6, 16), torch.nn.SiLU(), torch.nn.Linear(16, classes)
    return torch.nn.Sequential(*layers).to(dtype)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("with_score", [False, True])
def test_guidance_is_the_gradient_of_the_log_densities(gamma, with_score):
    f, x, labels = net(torch.float64), torch.randn(5, 2, 3, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2])
    score = torch.randn_like(x) if with_score else None
    actual = fastgen.classifier_guidance(f, x, labels, guidance_scale=gamma, score=score)
    leaf = x.clone().requires_grad_()
    logits = f(leaf)
    log_density = gamma * F.log_softmax(logits, 1).gather(1, labels[:, None]).sum()
    if not with_score:
        log_density = log_density + logits.logsumexp(1).sum()
    expected = torch.autograd.grad(log_density, leaf)[0] + (score if with_score else 0)
    torch.testing.assert_close(actual, expected)
    assert not actual.requires_grad
    assert all(p.grad is None for p in f.parameters())
    with torch.no_grad():
        torch.testing.assert_close(fastgen.classifier_guidance(f, x, labels, guidance_scale=gamma, score=score), actual)


def test_guidance_of_a_conditional_model_is_that_of_its_logit():
    f, x, labels = net(), torch.randn(3, 6), torch.tensor([0, 3, 1])
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf).gather(1, labels[:, None]).sum(), leaf)
    torch.testing.assert_close(fastgen.classifier_guidance(f, x, labels), expected)
    narrow = fastgen.classifier_guidance(net(torch.bfloat16), x.bfloat16(), labels)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), expected, rtol=0.05, atol=0.02)


def gaussians(x):
    """log p(x, y) of two unit Gaussians at ±3, up to a constant."""
    return -0.5 * torch.stack([(x - 3).square().sum(1), (x + 3).square().sum(1)], 1)


def test_guidance_wherever_it_is_called():
    x, labels = torch.randn(3, 4), torch.tensor([0, 5, -1])
    net = torch.nn.Linear(4, 5)
    expected = fastgen.classifier_guidance(net, x, labels)
    assert expected.isnan().any(1).tolist() == [False, True, True]  # labels outside are not silently no guidance
    with torch.inference_mode():
        assert torch.equal(fastgen.classifier_guidance(net, x + 0, labels)[0], expected[0])
    constant = fastgen.classifier_guidance(lambda x: net.weight[:3].clone(), x, labels[:1].expand(3))
    assert torch.equal(constant, torch.zeros_like(x))


def test_langevin_samples_a_known_density():
    gen = torch.Generator().manual_seed(0)
    start = torch.randn(4000, 1, generator=gen)
    chain = {"steps": 100, "step_size": 0.1, "noise_scale": 0.2**0.5, "generator": gen}
    both = fastgen.langevin_sample(gaussians, start, **chain)
    assert (both > 0).double().mean().item() == pytest.approx(0.5, abs=0.05)
    assert both.abs().mean().item() == pytest.approx(3.0, abs=0.1)
    one = fastgen.langevin_sample(gaussians, start, torch.ones(4000, dtype=torch.long), **chain)
    assert one.mean().item() == pytest.approx(-3.0, abs=0.1)
    assert one.std().item() == pytest.approx(1.0, abs=0.1)
    assert not one.requires_grad


def test_langevin_is_a_loop_of_steps():
    f, x = net(), torch.randn(5, 2, 3)
    gen = torch.Generator().manual_seed(3)
    actual = fastgen.langevin_sample(f, x, steps=3, step_size=0.5, noise_scale=0.1, generator=gen)
    gen.manual_seed(3)
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(f(leaf).logsumexp(1).sum(), leaf)
        x = x + 0.5 * grad + 0.1 * torch.randn(x.shape, generator=gen)
    torch.testing.assert_close(actual, x)


def test_the_buffer_keeps_reinitialises_and_repeats():
    buffer = ReplayBuffer(50, (2, 3), reinit_rate=0.2, low=-0.5, high=0.5, seed=7)
    assert len(buffer) == 50
    assert buffer.samples.abs().max() <= 0.5
    assert buffer.samples.std().item() == pytest.approx(1 / math.sqrt(12), abs=0.05)
    afresh = 0
    for k in range(100):
        start, index = buffer.sample(20)
        assert len(set(index.tolist())) == 20
        same = (start == buffer.samples[index]).flatten(1).all(1)
        afresh += int((~same).sum())
        buffer.update(index, torch.full_like(start, 1.0 + k))
        assert (buffer.samples[index] == 1.0 + k).all()
    assert afresh / 2000 == pytest.approx(0.2, abs=0.03)

    other = ReplayBuffer(50, (2, 3), reinit_rate=0.2, low=-0.5, high=0.5)
    state = buffer.state_dict()
    buffer.update(torch.arange(50), torch.zeros(50, 2, 3))
    assert state["samples"].abs().sum() > 0
    other.load_state_dict(state)
    buffer.load_state_dict(state)
    for mine, theirs in zip(buffer.sample(20), other.sample(20), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(ReplayBuffer(9, (4,)).samples, ReplayBuffer(9, (4,)).samples)


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("generator", torch.zeros(3, dtype=torch.uint8), ValueError),
        ("generator", torch.zeros(16), ValueError),
        ("generator", None, TypeError),
        ("samples", torch.zeros(50, 4), ValueError),
        ("samples", torch.zeros(50, 3, dtype=torch.long), TypeError),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(key, value, error):
    buffer, twin = (ReplayBuffer(50, (3,)) for _ in range(2))
    state = ReplayBuffer(50, (3,), seed=1).state_dict()
    with pytest.raises(error, match=f"state.*{key}"):
        buffer.load_state_dict({**state, key: value})
    assert torch.equal(buffer.samples, twin.samples)
    for mine, theirs in zip(buffer.sample(20), twin.sample(20), strict=True):
        assert torch.equal(mine, theirs)


def test_no_host_sync():
    f, buffer = net(), ReplayBuffer(50, (6,))
    with Syncs() as syncs:
        start, index = buffer.sample(8)
        buffer.update(index, fastgen.langevin_sample(f, start, torch.zeros(8, dtype=torch.long), steps=2))
    assert syncs.count == 0


X, R, Y = torch.zeros(3, 6), torch.zeros(3, 4), torch.zeros(3, dtype=torch.long)
NET = net()
BAD_CALLS = {
    "logits_real must be float32": (TypeError, lambda: fastgen.joint_energy_loss(R.int(), Y, R)),
    r"logits_real must have shape \[B, C\]": (ValueError, lambda: fastgen.joint_energy_loss(R[None], Y, R)),
    r"logits_fake must have shape \[B, C\]": (ValueError, lambda: fastgen.joint_energy_loss(R, Y, R[:, :2])),
    "logits_fake must be a torch.Tensor": (TypeError, lambda: fastgen.joint_energy_loss(R, Y, [1.0])),
    "logits_fake is on": (ValueError, lambda: fastgen.joint_energy_loss(R, Y, R.to("meta"))),
    "labels must be int64": (TypeError, lambda: fastgen.joint_energy_loss(R, Y.int(), R)),
    r"labels must have shape \[3\]": (ValueError, lambda: fastgen.joint_energy_loss(R, Y[:2], R)),
    "energy_weight must be >= 0": (ValueError, lambda: fastgen.joint_energy_loss(R, Y, R, energy_weight=-1.0)),
    "ignore_index must be an int": (TypeError, lambda: fastgen.joint_energy_loss(R, Y, R, ignore_index=1.0)),
    "x must be float32": (TypeError, lambda: fastgen.classifier_guidance(NET, X.int())),
    "score has shape": (ValueError, lambda: fastgen.classifier_guidance(NET, X, Y, score=X[:2])),
    "labels must be given": (ValueError, lambda: fastgen.classifier_guidance(NET, X, score=X)),
    "labels must be int64 ": (TypeError, lambda: fastgen.classifier_guidance(NET, X, Y.float())),
    "classifier must return logits": (ValueError, lambda: fastgen.classifier_guidance(lambda x: x.sum(1), X)),
    "classifier must be callable": (TypeError, lambda: fastgen.classifier_guidance(None, X)),
    "logits that depend on x": (ValueError, lambda: fastgen.classifier_guidance(lambda x: NET(x).detach(), X)),
    "guidance_scale must be finite": (ValueError, lambda: fastgen.langevin_sample(NET, X, Y, guidance_scale=math.nan)),
    "steps must be at least 1": (ValueError, lambda: fastgen.langevin_sample(NET, X, steps=0)),
    "x must be a torch.Tensor": (TypeError, lambda: fastgen.langevin_sample(NET, [1.0])),
    "capacity must be at least 1": (ValueError, lambda: ReplayBuffer(0, (2,))),
    "low must be below high": (ValueError, lambda: ReplayBuffer(4, (2,), low=1.0)),
    "reinit_rate must be <= 1": (ValueError, lambda: ReplayBuffer(4, (2,), reinit_rate=1.5)),
    "dtype must be float32": (TypeError, lambda: ReplayBuffer(4, (2,), dtype=torch.int64)),
    "seed must be an int": (TypeError, lambda: ReplayBuffer(4, (2,), seed=None)),
    "n must be at most the capacity": (ValueError, lambda: ReplayBuffer(4, (2,)).sample(5)),
    "shape must be a tuple of ints": (TypeError, lambda: ReplayBuffer(4, 2)),
    "shape must be a tuple": (TypeError, lambda: ReplayBuffer(4, 2)),
    r"shape\[0\] must be at least 0": (ValueError, lambda: ReplayBuffer(4, (-1,))),
    "index must hold integers": (TypeError, lambda: ReplayBuffer(4, (2,)).update(Y > 0, X)),
    "state must have the keys": (ValueError, lambda: ReplayBuffer(4, (2,)).load_state_dict({})),
    "samples must have shape": (ValueError, lambda: ReplayBuffer(4, (2,)).update(Y, X)),
    "state's samples have shape": (
        ValueError,
        lambda: ReplayBuffer(4, (2,)).load_state_dict(ReplayBuffer(4, (3,)).state_dict()),
    ),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_names_the_argument(message):
    error, call = BAD_CALLS[message]
    with pytest.raises(error, match=message.strip()):
        call()
