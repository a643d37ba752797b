"""Token log-probabilities, DDO over tokens, divergences: every backend against float64, by hand and by identity."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_accurate, value_and_grad

import fastgen
from fastgen import _backend, _sequence, reference

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
    assert_accurate(actual[0], eager[0], value64, f"{case} {what} value")
    assert_accurate(actual[1], eager[1], grad64, f"{case} {what} gradient")
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(case, dtype, backend, device):
    check(case, *streams((4, 3, 71), dtype, device))


@pytest.mark.parametrize("case", ["jsd-0", "jsd-0.5", "jsd-1", "jsd-none", "logprob", "ddo"])
@pytest.mark.parametrize("vocabulary", [1, 7, 64, 1271, 32_000])
def test_vocabularies(case, vocabulary, kernel_backend, device):
    check(case, *streams((2, 2, vocabulary), device=device))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("case", [*(c for c in CASES if c[:4] == "jsd-" and c[-1].isdigit()), "logprob"])
def test_the_vocabulary_of_a_language_model(case, dtype, kernel_backend, device):
    check(case, *streams((1, 3, 128_256), dtype, device))


@pytest.mark.parametrize("corrupt", [torch.zeros_like, torch.neg, lambda g: g * 1.01], ids=["zero", "sign", "one %"])
@pytest.mark.parametrize("case", ["jsd-0", "jsd-0.5", "jsd-1", "logprob", "ddo"])
def test_the_tolerance_bites(case, corrupt):
    s, t, y = streams((3, 4, 50))
    exact = value_and_grad(lambda x: CASES[case](reference, x, t.double(), y).sum(), s.double())[1]
    eager = value_and_grad(lambda x: CASES[case](reference, x, t, y).sum(), s)[1]
    assert_accurate(eager, eager, exact)
    with pytest.raises(AssertionError, match="error"):
        assert_accurate(corrupt(eager), eager, exact)


def test_by_hand(backend, device):
    s = torch.tensor([[0.0, 0.0]], device=device)
    t = torch.tensor([[math.log(3.0), 0.0]], device=device)  # P = (3/4, 1/4), Q = (1/2, 1/2)
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    m = (0.55, 0.45)  # 0.2 P + 0.8 Q
    mixed = 0.2 * (0.75 * math.log(0.75 / m[0]) + 0.25 * math.log(0.25 / m[1]))
    mixed += 0.8 * (0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1]))
    for beta, expected in ((0, forward), (1, reverse), (0.2, mixed)):
        assert fastgen.generalized_jsd_loss(s, t, beta=beta).item() == pytest.approx(expected, rel=1e-5)
    # Temperature 2 on doubled logits is temperature 1 on the logits, with half the gradient.
    _, grad = value_and_grad(lambda x: fastgen.generalized_jsd_loss(x, 2 * t, beta=0, temperature=2.0), 2 * s)
    torch.testing.assert_close(grad.cpu(), torch.tensor([[-0.125, 0.125]]))
    logprob = fastgen.token_logprob(t, torch.tensor([1], device=device))
    assert logprob.item() == pytest.approx(math.log(0.25), rel=1e-6)
    logits, ref = torch.stack([t, s]), torch.stack([s, t])
    loss, delta = fastgen.sequence_ddo_loss(
        logits, ref, torch.zeros(2, 1, dtype=torch.int64, device=device), torch.tensor([True, False], device=device),
        alpha=3.0, beta=2.0, return_delta=True,
    )  # fmt: skip
    torch.testing.assert_close(delta.cpu(), torch.tensor([math.log(1.5), -math.log(1.5)]))
    assert loss.item() == pytest.approx(4 * math.log1p(1.5**-2), rel=1e-6)
    assert not delta.requires_grad


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_the_convention_is_that_of_trl(beta, backend, device):
    """Written as there: log-softmaxes, F.kl_div (whose first argument is the second of the divergence), a mask."""
    s, t, y = streams((2, 5, 30), device=device)
    log_q, log_p = F.log_softmax(s / 2, -1), F.log_softmax(t / 2, -1)
    log_m = torch.logsumexp(torch.stack([log_q + math.log(max(1 - beta, 1e-9)), log_p + math.log(max(beta, 1e-9))]), 0)

    def kl(second, first):
        return F.kl_div(second, first, reduction="none", log_target=True)

    if beta in (0, 1):
        elements = kl(log_p, log_q) if beta else kl(log_q, log_p)
    else:
        elements = beta * kl(log_m, log_p) + (1 - beta) * kl(log_m, log_q)
    elements = elements[y != -100]
    expected = {"batchmean": elements.sum() / len(elements), "sum": elements.sum(), "mean": elements.mean()}
    for reduction, value in expected.items():
        loss = fastgen.generalized_jsd_loss(s, t, y, beta=beta, temperature=2.0, reduction=reduction)
        torch.testing.assert_close(loss, value, rtol=1e-5, atol=1e-7)


def test_identities(backend, device):
    s, t, y = streams((3, 4, 40), device=device)
    for beta in (0.0, 0.3, 1.0):
        # A student that is its teacher, at any offset: nothing to lose.
        loss, grad = value_and_grad(lambda x, b=beta: fastgen.generalized_jsd_loss(x, s + 5, beta=b), s)
        assert abs(loss.item()) < 1e-6
        assert grad.abs().max() < 1e-6
        # Gradients of a row sum to 0: a constant does not matter.
        grad = value_and_grad(lambda x, b=beta: fastgen.generalized_jsd_loss(x, t, y, beta=b), s)[1]
        assert grad.sum(-1).abs().max() < 1e-6
        assert grad.abs().max() > 1e-3
    # Swapping the two models swaps beta and 1 - beta.
    torch.testing.assert_close(
        fastgen.generalized_jsd_loss(s, t, beta=0.2), fastgen.generalized_jsd_loss(t, s, beta=0.8)
    )
    loss, delta = fastgen.sequence_ddo_loss(s, s, y, is_real(y), alpha=4.0, return_delta=True)
    assert loss.item() == pytest.approx(5 * math.log(2))
    assert delta.tolist() == [0.0] * 3
    log_softmax = F.log_softmax(s.double(), -1)
    logprobs = [fastgen.token_logprob(s, torch.full_like(y, v)) for v in range(40)]
    torch.testing.assert_close(torch.stack(logprobs, -1).double(), log_softmax, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_masked_vocabulary_and_huge_logits(beta, backend, device):
    s, t, _ = streams((5, 90), device=device)
    s[:, 3] = t[:, 3] = -math.inf  # both
    s[1, 10:80], t[1, 10:80] = -1e4, -1e4
    s[2, 5], t[2, 5] = 1e4, 1e4 - 3
    t[3, 7:70] = -1e4
    if beta < 1:
        t[4, 20:30] = -math.inf  # the teacher alone: infinite in reverse
    if beta > 0:
        s[0, 40:50] = -math.inf  # the student alone: infinite forward
    if beta == 0:
        s[0, 40:50] = -1e4

    def f(m, x, y):
        return m.generalized_jsd_loss(x, y, beta=beta, reduction="none")

    seed = torch.rand(5, device=device)
    exact = value_and_grad(lambda x: f(reference, x, t.double()), s.double(), seed)
    eager = value_and_grad(lambda x: f(reference, x, t), s, seed)
    actual = value_and_grad(lambda x: f(fastgen, x, t), s, seed)
    assert exact[0].isfinite().all()
    assert exact[1].isfinite().all()
    for mine, theirs, truth, what in zip(actual, eager, exact, ("value", "gradient"), strict=True):
        assert_accurate(mine, theirs, truth, what)
    assert (actual[1][:, 3] == 0).all()


def test_infinite_divergences_are_infinite(backend, device):
    s, t, _ = streams((2, 20), device=device)
    masked = t.clone()
    masked[0, 4] = -math.inf
    assert fastgen.generalized_jsd_loss(s, masked, beta=1.0, reduction="none").isinf().tolist() == [True, False]
    loss, grad = value_and_grad(lambda x: fastgen.generalized_jsd_loss(x, t, beta=0.0, reduction="none"), masked)
    assert loss.isinf().tolist() == [True, False]
    assert grad.isfinite().all()  # Q - P


def test_extreme_tokens(backend, device):
    s = torch.randn(6, 50, device=device)
    s[1, 3], s[2, 4], s[3] = -math.inf, 1e4, -math.inf
    y = torch.tensor([0, 3, 4, 5, 50, -1], device=device)
    logprob, grad = value_and_grad(lambda x: fastgen.token_logprob(x, y), s)
    assert logprob[0].isfinite()
    assert logprob[1] == -math.inf
    assert logprob[2] == 0
    assert logprob[3:].isnan().all()  # a row of -inf, and tokens outside the vocabulary
    assert grad[:3].isfinite().all()
    assert (grad[4:] == 0).all()
    assert grad[1, 3] == 1  # the derivative of the logit itself


def test_digits_survive_large_logits(kernel_backend, device):
    """What a log-sum-exp in float32 would round away at 10 000 is there."""
    s = 1e4 + torch.randn(4, 100, device=device)
    y = torch.arange(4, device=device)
    exact = reference.token_logprob(s.double(), y)
    assert (fastgen.token_logprob(s, y) - exact).abs().max() < 1e-5
    assert (s.gather(1, y[:, None])[:, 0] - torch.logsumexp(s, 1) - exact).abs().max() > 1e-4


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_student_close_to_its_teacher_gets_an_accurate_gradient(beta, kernel_backend, device):
    s, t, _ = streams((8, 5000), device=device, near=1e-4)
    exact = value_and_grad(lambda x: reference.generalized_jsd_loss(x, t.double(), beta=beta), s.double())
    eager = value_and_grad(lambda x: reference.generalized_jsd_loss(x, t, beta=beta), s)
    actual = value_and_grad(lambda x: fastgen.generalized_jsd_loss(x, t, beta=beta), s)
    mine, theirs = ((g[1] - exact[1]).norm() / exact[1].norm() for g in (actual, eager))
    assert mine < 3e-3
    assert 3 * mine < theirs
    assert abs(actual[0] - exact[0]) < 1e-2 * exact[0]
    assert abs(eager[0] - exact[0]) > abs(actual[0] - exact[0])


@pytest.mark.parametrize("wider", ["student", "teacher"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_unequal_vocabularies(wider, beta, backend, device):
    s, t, y = streams((2, 3, 70), device=device)
    padding = torch.full((2, 3, 30), 7.0, device=device)
    wide = torch.cat([s if wider == "student" else t, padding], -1)
    pair = (wide, t) if wider == "student" else (s, wide)
    expected = value_and_grad(lambda x: fastgen.generalized_jsd_loss(x, t, y, beta=beta), s)
    actual = value_and_grad(lambda x: fastgen.generalized_jsd_loss(x, pair[1], y, beta=beta), pair[0])
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[1][..., :70], expected[1])
    assert (actual[1][..., 70:] == 0).all()
    assert actual[1].shape == pair[0].shape
    per_token = value_and_grad(lambda x: fastgen.generalized_jsd_loss(x, pair[1], beta=beta, reduction="none"), pair[0])
    assert (per_token[1][..., 70:] == 0).all()


def test_ignored_rows_are_not_read(kernel_backend, device):
    s, t, y = streams((3, 4, 33), device=device)
    s[y == -100], t[y == -100] = math.nan, math.nan
    for case in ("jsd-0.5", "jsd-none", "logprob", "ddo", "ddo-masked"):
        value, grad = value_and_grad(lambda x: CASES[case](fastgen, x, t, y), s)
        assert value.isfinite().all()
        assert grad.isfinite().all()
        assert (grad[y == -100] == 0).all()


@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
def test_no_rows_and_none_valid(reduction, backend, device):
    for shape in ((0, 9), (2, 0, 9), (2, 3, 9)):
        s, t, y = streams(shape, device=device)
        labels = torch.full_like(y, -100)
        for beta in (0.0, 0.5, 1.0):
            f = lambda x: fastgen.generalized_jsd_loss(x, t, labels, beta=beta, reduction=reduction)  # noqa: E731
            value, grad = value_and_grad(f, s)
            assert value.sum() == 0
            assert value.shape == (shape[:-1] if reduction == "none" else ())
            assert grad.shape == s.shape
            assert (grad == 0).all()
        if s.numel() == 0:
            assert fastgen.generalized_jsd_loss(s, t, reduction=reduction).sum() == 0
        assert value_and_grad(lambda x: fastgen.token_logprob(x, labels), s)[1].abs().sum() == 0
    empty = torch.zeros(0, 3, 9, device=device, requires_grad=True)
    tokens, real = torch.zeros(0, 3, dtype=torch.int64, device=device), torch.zeros(0, dtype=torch.bool, device=device)
    loss = fastgen.sequence_ddo_loss(empty, empty, tokens, real)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, empty)[0].shape == (0, 3, 9)


@pytest.mark.parametrize("value", [True, False])
def test_ddo_with_one_group_only(value, backend, device):
    s, t, y = streams((3, 4, 9), device=device)
    real = torch.full((3,), value, device=device)
    loss, grad = value_and_grad(lambda x: fastgen.sequence_ddo_loss(x, t, y, real), s)
    assert loss.isfinite()
    assert grad.isfinite().all()
    assert grad.abs().sum() > 0


def test_accumulated_gradients_equal_one_batch(backend, device):
    s, t, y = streams((6, 5, 30), device=device)
    valid = int((y != -100).sum())
    whole = value_and_grad(lambda x: fastgen.generalized_jsd_loss(x, t, y), s)
    for items in (valid, torch.tensor(valid, device=device)):
        parts = []
        for micro in (slice(0, 2), slice(2, 4), slice(4, 6)):
            f = lambda x: fastgen.generalized_jsd_loss(x, t[micro], y[micro], num_items=items)  # noqa: E731
            parts.append(value_and_grad(f, s[micro]))
        torch.testing.assert_close(sum(p[0] for p in parts), whole[0])
        torch.testing.assert_close(torch.cat([p[1] for p in parts]), whole[1])


def layouts(t):
    """The same logits [B, T, V] in other places."""
    yield torch.cat([t, t], 1)[:, : t.shape[1]]
    yield t.transpose(0, 1).contiguous().transpose(0, 1)
    yield t.repeat_interleave(2, 0)[::2]
    yield t.repeat_interleave(2, 2)[..., ::2]
    yield torch.cat([t, t], 2)[..., : t.shape[2]]


@pytest.mark.parametrize("case", ["jsd-0.5", "jsd-none", "logprob", "ddo"])
def test_strides(case, kernel_backend, device):
    s, t, y = streams((3, 4, 70), device=device)
    base = value_and_grad(lambda x: CASES[case](fastgen, x, t, y), s)
    for other_s, other_t, other_y in zip(layouts(s), layouts(t), [y, y.t().contiguous().t(), y, y, y], strict=True):
        value, grad = value_and_grad(lambda x: CASES[case](fastgen, x, other_t, other_y), other_s)
        assert torch.equal(value, base[0])
        assert torch.equal(grad, base[1])
        assert grad.is_contiguous()
    one = t[:1, :1].expand(3, 4, -1)
    expected = value_and_grad(lambda x: CASES[case](fastgen, x, one.contiguous(), y), s)
    assert torch.equal(value_and_grad(lambda x: CASES[case](fastgen, x, one, y), s)[1], expected[1])


def test_leading_dimensions(backend, device):
    for shape in ((17,), (3, 17), (2, 3, 17), (2, 3, 2, 17)):
        s, t, y = streams(shape, device=device)
        for case in ("jsd-none", "logprob"):
            value, grad = value_and_grad(lambda x: CASES[case](fastgen, x, t, y), s)
            expected = value_and_grad(lambda x: CASES[case](reference, x, t, y), s)
            torch.testing.assert_close((value, grad), expected)
    four = torch.randn(2, 3, 4, 17, device=device)
    mixed = four.permute(2, 0, 1, 3)[:, :, ::2]  # three strides: copied
    torch.testing.assert_close(
        fastgen.generalized_jsd_loss(mixed, -mixed), reference.generalized_jsd_loss(mixed, -mixed)
    )


def test_dtypes_may_differ(kernel_backend, device):
    s, t, y = streams((4, 3, 50), device=device)
    for pair in ((torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float32, torch.float64)):
        value, grad = check("jsd-0.5", s.to(pair[0]), t.to(pair[1]), y)
        assert value.dtype == torch.promote_types(torch.float32, torch.promote_types(*pair))
        assert grad.dtype == pair[0]
        check("ddo", s.to(pair[0]), t.to(pair[1]), y)


@pytest.mark.parametrize("case", ["jsd-0", "jsd-0.5", "jsd-1", "jsd-none", "logprob", "ddo"])
def test_backward_is_right_for_any_cotangent_any_number_of_times(case, kernel_backend, device):
    s, t, y = streams((4, 3, 40), device=device)
    s.requires_grad_()
    loss, expected = CASES[case](fastgen, s, t, y), CASES[case](reference, s, t, y)
    grads = []
    for scale in (1.0, -3.0, 0.0, 1.0):
        cotangent = torch.full_like(loss, scale)
        grads.append(torch.autograd.grad(loss, s, cotangent, retain_graph=True)[0])
        torch.testing.assert_close(grads[-1], torch.autograd.grad(expected, s, cotangent, retain_graph=True)[0])
    torch.testing.assert_close(grads[0], grads[3])
    assert grads[1].abs().sum() > 0


def test_float16_gradients_survive_a_loss_scale(kernel_backend, device):
    s, t, _ = streams((64, 50), torch.float16, device, near=1e-2)
    scale = 2.0**16
    _, grad = value_and_grad(lambda x: fastgen.generalized_jsd_loss(x, t, beta=0.1) * scale, s)
    exact = value_and_grad(lambda x: reference.generalized_jsd_loss(x, t.double(), beta=0.1) * scale, s.double())[1]
    rounded_first = (exact / scale).half().double() * scale
    assert (rounded_first - exact).norm() / exact.norm() > 0.01
    assert (grad.double() - exact).norm() / exact.norm() < 1e-3


def test_half_precision_logits_are_not_rounded_again(kernel_backend, device):
    for dtype in (torch.bfloat16, torch.float16):
        s, t, y = streams((4, 3, 60), dtype, device)
        for case in ("jsd-none", "logprob", "ddo"):
            narrow = value_and_grad(lambda x: CASES[case](fastgen, x, t, y), s)
            wide = value_and_grad(lambda x: CASES[case](fastgen, x, t.float(), y), s.float())
            assert torch.equal(narrow[0], wide[0])
            torch.testing.assert_close(narrow[1].float(), wide[1], rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_rows_stay_alone(bad, backend, device):
    s, t, y = streams((2, 3, 50), device=device)
    y = y.clamp(min=0)
    dirty = s.clone()
    dirty[1, 1, 7] = bad
    others = torch.ones(2, 3, dtype=torch.bool, device=device)
    others[1, 1] = False
    for case in ("jsd-none", "jsd-forward-none", "logprob"):
        clean = value_and_grad(lambda x: CASES[case](fastgen, x, t, y), s)
        value, grad = value_and_grad(lambda x: CASES[case](fastgen, x, t, y), dirty)
        assert torch.equal(value[others], clean[0][others])
        assert torch.equal(grad[others], clean[1][others])
        assert value[1, 1].isnan()
        assert not grad[1, 1].isfinite().all()


def test_counts_of_a_process_group_divide(kernel_backend, device):
    logprob, ref = torch.randn(2, 4, 3, device=device)
    real = torch.tensor([True, False, False, True], device=device)
    run = _sequence.sequence_ddo_loss.on(kernel_backend)
    terms, _, slopes = run(logprob, ref, real, None, 2.0, 0.1, 1.0, "none")
    counts = torch.tensor([2.0, 5.0], device=device)
    loss, _, slope = run(logprob, ref, real, counts, 2.0, 0.1, 1.0, "mean")
    share = torch.where(real, 1 / counts[0], 1 / counts[1])
    torch.testing.assert_close(loss, (terms * share).sum())
    torch.testing.assert_close(slope, slopes * share)


@pytest.mark.parametrize("case", ["jsd-0", "jsd-0.5", "jsd-1", "jsd-none", "jsd-mean", "logprob", "ddo", "ddo-masked"])
def test_gradcheck(case):
    s, t, y = streams((3, 2, 6), torch.float64)
    assert torch.autograd.gradcheck(lambda x: CASES[case](reference, x, t, y), s.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: CASES[case](fastgen, x, t, y), s)


def test_no_gradient_reaches_the_teacher(backend, device):
    s, t, y = streams((2, 3, 9), device=device)
    for case in ("jsd-0.5", "ddo"):
        leaves = s.clone().requires_grad_(), t.clone().requires_grad_()
        CASES[case](fastgen, *leaves, y).backward()
        assert leaves[0].grad.abs().sum() > 0
        assert leaves[1].grad is None


@given(
    rows=st.lists(st.integers(0, 4), max_size=3),
    vocabulary=st.integers(1, 150),
    extra=st.integers(-3, 3),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 2),
    layout=st.integers(0, 4),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    beta=st.sampled_from([0.0, 0.001, 0.5, 0.95, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
)
@settings(max_examples=40)
def test_any_shape_dtype_and_layout(
    rows, vocabulary, extra, dtypes, layout, scale, beta, temperature, kernel_backend, device
):
    s = (scale * torch.randn(*rows, vocabulary, device=device)).to(dtypes[0])
    t = (scale * torch.randn(*rows, max(1, vocabulary + extra), device=device)).to(dtypes[1])
    y = torch.randint(-1, vocabulary, tuple(rows), device=device)
    if len(rows) == 2:
        s, t = list(layouts(s))[layout], list(layouts(t))[layout]
    cotangent = torch.randn(tuple(rows), device=device)

    def jsd(m, x, teacher):
        return m.generalized_jsd_loss(
            x, teacher, y, beta=beta, temperature=temperature, reduction="none", ignore_index=-1
        )

    def logprob(m, x, _):
        return m.token_logprob(x, y, temperature=temperature, ignore_index=-1)

    for f in (jsd, logprob):
        exact = value_and_grad(lambda x: f(reference, x, t.double()), s.double(), cotangent)
        eager = value_and_grad(lambda x: f(reference, x, t), s, cotangent)
        actual = value_and_grad(lambda x: f(fastgen, x, t), s, cotangent)
        for mine, theirs, truth in zip(actual, eager, exact, strict=True):
            assert mine.shape == truth.shape
            assert mine.dtype == theirs.dtype
            # One row of few columns may be exact by luck in eager: its size is that of the logits, not of the result.
            floor = torch.finfo(mine.dtype).eps * max(1.0, scale) + 4e-7
            if mine.numel():
                assert (mine - truth).abs().amax() <= 2 * (theirs - truth).abs().amax() + floor


@native
def test_bitwise_equal_for_any_number_of_threads():
    s, t, y = streams((9, 3, 3000))
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 4):
            torch.set_num_threads(n)
            results.append([value_and_grad(lambda x, c=c: CASES[c](fastgen, x, t, y), s) for c in CASES])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for (value, grad), (first_value, first_grad) in zip(result, results[0], strict=True):
            assert torch.equal(value, first_value)
            assert torch.equal(grad, first_grad)


LEVELS = """
import torch, fastgen
torch.manual_seed(0)
print(fastgen.build_info()["_C"]["isa_used"])
# Softmax over the whole range of the exponential, each element against float64.
x = torch.linspace(-80, 0, 20_001).requires_grad_()
fastgen.token_logprob(x, torch.tensor(20_000)).backward()
exact = torch.softmax(x.double(), 0)
print((((-x.grad - exact) / exact)[:-1].abs().max()).item())
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for beta in (0.0, 0.3, 1.0):
        s, t = (2 * torch.randn(3, 333)).to(dtype).requires_grad_(), (2 * torch.randn(3, 333)).to(dtype)
        loss = fastgen.generalized_jsd_loss(s, t, beta=beta)
        loss.backward()
        print(loss.item(), *s.grad.flatten().tolist())
"""


@native
def test_every_instruction_set_agrees():
    results = {}
    for level in ("baseline", "avx2", "avx512"):
        environment = {**os.environ, "FASTGEN_CPU_CAPABILITY": level}
        run = subprocess.run(
            [sys.executable, "-c", LEVELS], env=environment, capture_output=True, text=True, check=True
        )
        name, error, *lines = run.stdout.splitlines()
        assert float(error) < 4e-7, name
        results[name] = [torch.tensor([float(x) for x in line.split()], dtype=torch.float64) for line in lines]
    first, *others = results.values()
    for other in others:
        for i, (a, b) in enumerate(zip(first, other, strict=True)):
            eps = torch.finfo(DTYPES[i // 3]).eps
            torch.testing.assert_close(b[:1], a[:1], rtol=1e-6, atol=0)
            assert (b - a).norm() <= 4 * eps * a.norm()


PEAK = """
import re, torch, fastgen
def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
s, t = torch.randn(512, 32000), torch.randn(512, 32000)
s.requires_grad_()
fastgen.generalized_jsd_loss(s[:8], t[:8]).backward()
s.grad = None
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
fastgen.generalized_jsd_loss(s, t).backward()
print((status("VmHWM") - before) / s.nbytes)
"""


@native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_the_gradient():
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=False)
    if run.returncode and "clear_refs" in run.stderr:
        pytest.skip("this kernel does not let a process reset its peak memory")
    assert run.returncode == 0, run.stderr
    assert 0.9 < float(run.stdout) <= 1.05


S = torch.zeros(2, 3, 5)
Y = torch.zeros(2, 3, dtype=torch.int64)
R = torch.ones(2, dtype=torch.bool)
jsd, ddo, logprob = fastgen.generalized_jsd_loss, fastgen.sequence_ddo_loss, fastgen.token_logprob
BAD_CALLS = {
    "logits must be a torch.Tensor": (TypeError, lambda: logprob([1.0], Y)),
    "logits must be float32": (TypeError, lambda: logprob(S.int(), Y)),
    r"logits must have shape \[..., V\]": (ValueError, lambda: logprob(S[..., :0], Y)),
    "tokens must be int64": (TypeError, lambda: logprob(S, Y.int())),
    "tokens must be a torch.Tensor": (TypeError, lambda: logprob(S, [[0]])),
    r"tokens must have shape \[2, 3\]": (ValueError, lambda: logprob(S, Y[:1])),
    "tokens is on meta": (ValueError, lambda: logprob(S, Y.to("meta"))),
    "temperature must be > 0": (ValueError, lambda: logprob(S, Y, temperature=0.0)),
    "temperature must be a number": (TypeError, lambda: logprob(S, Y, temperature=torch.ones(()))),
    "ignore_index must be an int": (TypeError, lambda: logprob(S, Y, ignore_index=None)),
    "student_logits must be float32": (TypeError, lambda: jsd(S.long(), S)),
    "teacher_logits must be float32": (TypeError, lambda: jsd(S, S.to(torch.complex64))),
    "teacher_logits has rows": (ValueError, lambda: jsd(S, S[:1])),
    "teacher_logits is on meta": (ValueError, lambda: jsd(S, S.to("meta"))),
    r"labels must have shape \[2, 3\]": (ValueError, lambda: jsd(S, S, Y[0])),
    "labels must be int64": (TypeError, lambda: jsd(S, S, Y.float())),
    "beta must be >= 0": (ValueError, lambda: jsd(S, S, beta=-0.1)),
    r"beta must be in \[0, 1\]": (ValueError, lambda: jsd(S, S, beta=1.1)),
    "temperature must be finite": (ValueError, lambda: jsd(S, S, temperature=math.inf)),
    "reduction must be one of": (ValueError, lambda: jsd(S, S, reduction="tokenmean")),
    "num_items must be at least 1": (ValueError, lambda: jsd(S, S, num_items=0)),
    "num_items must be an int or a 0-dim": (ValueError, lambda: jsd(S, S, num_items=torch.ones(2))),
    "num_items must be an int, got": (TypeError, lambda: jsd(S, S, num_items=2.5)),
    "num_items is what": (ValueError, lambda: jsd(S, S, reduction="sum", num_items=3)),
    r"logits must have shape \[B, T, V\]": (ValueError, lambda: ddo(S[0], S[0], Y[0], R)),
    "ref_logits has 4 columns": (ValueError, lambda: ddo(S, S[..., :4], Y, R)),
    "ref_logits has rows": (ValueError, lambda: ddo(S, S[:, :1], Y, R)),
    "is_real must be a bool": (TypeError, lambda: ddo(S, S, Y, R.float())),
    r"is_real must have shape \[2\]": (ValueError, lambda: ddo(S, S, Y, R[:1])),
    "mask must be a bool": (TypeError, lambda: ddo(S, S, Y, R, mask=Y)),
    "mask of shape": (ValueError, lambda: ddo(S, S, Y, R, mask=R)),
    "alpha must be >= 0": (ValueError, lambda: ddo(S, S, Y, R, alpha=-1.0)),
    "beta must be > 0": (ValueError, lambda: ddo(S, S, Y, R, beta=0.0)),
    "reduction must be one of 'mean'": (ValueError, lambda: ddo(S, S, Y, R, reduction="batchmean")),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_names_the_argument(message):
    error, call = BAD_CALLS[message]
    with pytest.raises(error, match=message):
        call()
