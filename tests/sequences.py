"""What the tests of the sequence family share: inputs, cases, and the backends that serve it."""

import pytest
import torch
from conftest import DEVICE
from oracle import check_case

import fastgen
from fastgen.cases import FAMILIES
from fastgen.core import dispatch

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BACKENDS = [b for b in ("native", "triton", "reference") if dispatch.missing("token_logprob", b, DEVICE) is None]
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
    return torch.arange(len(tokens) if tokens.dim() else 1, device=tokens.device) % 3 != 1


SHORT = {"generalized_jsd_loss": "jsd", "token_logprob": "logprob", "sequence_ddo_loss": "ddo"}
BY_NAME = {c.name.replace(c.function, SHORT[c.function]): c for c in FAMILIES["sequence"] if c.function in SHORT}


def given(case, s, t, y):
    """The inputs of a case, of these logits of a student or model, of a teacher or reference model, and tokens."""
    names = {"logits": s, "student_logits": s, "ref_logits": t, "teacher_logits": t, "tokens": y, "labels": y}
    roles = BY_NAME[case].roles
    if "is_real" in roles:
        names["is_real"] = is_real(y)
    if "mask" in roles:
        names["mask"] = (y % 3 != 0) & (y >= 0)
    if "weight" in roles:
        names["weight"] = 1 + torch.arange(y.numel(), device=y.device).reshape(y.shape) % 3 / 2
    if "num_items" in roles:
        names["num_items"] = torch.tensor(11.0, device=y.device)
    return {name: names[name] for name in roles}


# name -> function of (module, student or model, teacher or reference model, tokens)
CASES = {
    name: lambda m, s, t, y, name=name, case=case: case(m, **given(name, s, t, y)) for name, case in BY_NAME.items()
}


def check(case, s, t, y, what=""):
    """A case's value and gradient, against float64 and the reference's own error."""
    found = check_case(BY_NAME[case], given(case, s, t, y), what)
    return found["value"], found[f"gradient of {BY_NAME[case].differentiable[0]}"]


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
        eps = torch.finfo(actual.dtype).eps * (2 if actual.is_cuda else 1)  # hardware's exponentials
        torch.testing.assert_close(actual, expected, rtol=8 * eps, atol=8 * eps * expected.abs().max().item())
