"""What the tests of the sequence family share: inputs, cases, and the backends that serve it."""

import pytest
import torch
from conftest import DEVICE
from oracle import assert_accurate, value_and_grad

import fastgen
from fastgen import _backend, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BACKENDS = [b for b in ("native", "triton", "reference") if _backend.missing("token_logprob", b, DEVICE) is None]
native = pytest.mark.skipif("native" not in BACKENDS or DEVICE != "cpu", reason="about the compiled CPU kernels")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fastgen.use_backend(request.param):
        yield request.param


@pytest.fixture(params=[b for b in BACKENDS if b != "reference"])
def kernel_backend(request):
    with fastgen.use_backend(request.param):
        yield request.param


def streams(shape, dtype=torch.float32, device="cpu", near=1.0):
    """Logits of a student and of a teacher, tokens of which one in four is ignored."""
    student = 3 * torch.randn(shape, device=device)
    teacher = student + near * torch.randn(shape, device=device)
    tokens = torch.randint(shape[-1], shape[:-1], device=device)
    ignored = (torch.arange(tokens.numel(), device=device) % 4 == 1).reshape(tokens.shape)
    return student.to(dtype), teacher.to(dtype), tokens.masked_fill(ignored, -100)


def is_real(tokens):
    return torch.arange(len(tokens), device=tokens.device) % 3 != 1


# name -> function of (module, student or model, teacher or reference model, tokens)
CASES = {
    **{
        f"jsd-{beta}": lambda m, s, t, y, b=beta, tau=tau: m.generalized_jsd_loss(s, t, y, beta=b, temperature=tau)
        for beta, tau in ((0, 0.5), (0.1, 1.0), (0.5, 2.0), (0.9, 4.0), (1, 1.5))
    },
    "jsd-unlabelled": lambda m, s, t, y: m.generalized_jsd_loss(s, t, beta=0.3),
    "jsd-none": lambda m, s, t, y: m.generalized_jsd_loss(s, t, y, beta=0.7, reduction="none"),
    "jsd-forward-none": lambda m, s, t, y: m.generalized_jsd_loss(s, t, y, beta=0.0, reduction="none"),
    "jsd-reverse-sum": lambda m, s, t, y: m.generalized_jsd_loss(s, t, y, beta=1.0, reduction="sum"),
    "jsd-mean": lambda m, s, t, y: m.generalized_jsd_loss(s, t, y, reduction="mean", num_items=11, temperature=0.7),
    "logprob": lambda m, s, t, y: m.token_logprob(s, y),
    "logprob-hot": lambda m, s, t, y: m.token_logprob(s, y, temperature=4.0),
    "logprob-cold": lambda m, s, t, y: m.token_logprob(s, y, temperature=0.5).sum(),
    "ddo": lambda m, s, t, y: m.sequence_ddo_loss(s, t, y, is_real(y), alpha=2.0, beta=0.1),
    "ddo-masked": lambda m, s, t, y: m.sequence_ddo_loss(
        s, t, y, is_real(y), mask=(y % 3 != 0), alpha=3.0, normalize=True, reduction="sum"
    ),
    "ddo-none": lambda m, s, t, y: m.sequence_ddo_loss(s, t, y, is_real(y), beta=0.01, reduction="none"),
}


def check(case, s, t, y, what=""):
    """A case's value and gradient, against float64 and the reference's own error."""
    f = CASES[case]
    value64, _ = value_and_grad(lambda x: f(reference, x, t.double(), y), s.double())
    cotangent = torch.randn_like(value64) if value64.dim() else torch.tensor(0.7, device=s.device, dtype=value64.dtype)
    value64, grad64 = value_and_grad(lambda x: f(reference, x, t.double(), y), s.double(), cotangent)
    eager = value_and_grad(lambda x: f(reference, x, t, y), s, cotangent)
    actual = value_and_grad(lambda x: f(fastgen, x, t, y), s, cotangent)
    if s.dtype == torch.float64:  # the oracle itself, whose log-probabilities cancel
        torch.testing.assert_close(actual, (value64, grad64), rtol=1e-11, atol=1e-14)
        return actual
    # Of one number eager may have every digit by luck: three roundings are always allowed.
    by_luck = value64.dim() == 0 and abs(actual[0] - value64) <= 3 * torch.finfo(actual[0].dtype).eps * abs(value64)
    if not by_luck:
        assert_accurate(actual[0], eager[0], value64, f"{case} {what} value")
    assert_accurate(actual[1], eager[1], grad64, f"{case} {what} gradient")
    return actual


def layouts(t):
    """The same logits [B, T, V] in other places."""
    yield torch.cat([t, t], 1)[:, : t.shape[1]]
    yield t.transpose(0, 1).contiguous().transpose(0, 1)
    yield t.repeat_interleave(2, 0)[::2]
    yield t.repeat_interleave(2, 2)[..., ::2]
    yield torch.cat([t, t], 2)[..., : t.shape[2]]


def assert_same(actual, expected, backend):
    """To the bit on CPUs, whose sums have one tree wherever a row starts; to a few roundings elsewhere, where chunks
    start at 16-byte boundaries."""
    if backend == "native" and actual.device.type == "cpu":
        assert torch.equal(actual, expected)
    else:
        eps = torch.finfo(actual.dtype).eps
        torch.testing.assert_close(actual, expected, rtol=8 * eps, atol=8 * eps * expected.abs().max().item())
