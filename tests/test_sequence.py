"""Token log-probabilities, DDO over tokens, divergences: every backend against float64, by hand and by identity."""

import math

import pytest
import sequences
import torch
import torch.nn.functional as F
from oracle import assert_accurate, value_and_grad
from sequences import CASES, DTYPES, check, is_real, streams

import fastgen
from fastgen import reference

backend, kernel_backend = sequences.backend, sequences.kernel_backend


@pytest.mark.parametrize("case", ["jsd-0", "jsd-0.5", "jsd-1", "jsd-none", "logprob", "ddo"])
@pytest.mark.parametrize("vocabulary", [1, 7, 64, 1271, 32_000])
def test_vocabularies(case, vocabulary, kernel_backend, device):
    check(case, *streams((2, 2, vocabulary), device=device))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("case", [*(c for c in CASES if c[:4] == "jsd-" and c[-1].isdigit()), "logprob"])
def test_the_vocabulary_of_a_language_model(case, dtype, kernel_backend, device):
    if kernel_backend == "triton" and device == "cpu" and (case, dtype) != ("jsd-0.5", torch.bfloat16):
        pytest.skip("Triton's interpreter takes seconds for each")
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
        logits,
        ref,
        torch.zeros(2, 1, dtype=torch.int64, device=device),
        torch.tensor([True, False], device=device),
        alpha=3.0,
        beta=2.0,
        return_delta=True,
    )
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
    assert_accurate(actual[0], eager[0], exact[0], "value")
    # In row 3 numbers of 10 000 cancel: what their rounding in float32, of up to 1e-3, leaves is luck.
    apart = torch.arange(5) != 3
    torch.testing.assert_close(actual[1][3].double(), exact[1][3], rtol=1e-6, atol=2e-3)
    assert_accurate(actual[1][apart], eager[1][apart], exact[1][apart], "gradient")
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_may_be_further_apart_than_numbers_go(dtype, backend, device):
    """Over a temperature of 2 their difference, a log-probability, is a number."""
    s = torch.tensor([[3e38, -3e38, 1.0, -1e37]], dtype=dtype, device=device).expand(4, 4)
    y = torch.arange(4, device=device)
    logprob, grad = value_and_grad(lambda x: fastgen.token_logprob(x, y, temperature=2.0), s)
    exact = value_and_grad(lambda x: reference.token_logprob(x, y, temperature=2.0), s.double())
    torch.testing.assert_close(logprob.double(), exact[0], rtol=1e-6, atol=0.0)
    torch.testing.assert_close(grad.double(), exact[1])


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
    assert mine * (3 if device == "cpu" else 0.5) < theirs  # a GPU's exponentials are the hardware's
    assert abs(actual[0] - exact[0]) < 1e-2 * exact[0]
    assert abs(eager[0] - exact[0]) > abs(actual[0] - exact[0])


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_a_constant_between_student_and_teacher_costs_no_digits(beta, temperature, backend, device):
    """Logits mean the same with any constant added, and two models rarely have the same. Of rows that lie on different
    sides of 0 neither can be moved to the other exactly: then the error is at most that of eager log-softmaxes."""
    near, noise = 3 * torch.randn(6, 500, device=device), 1e-2 * torch.randn(6, 500, device=device)

    def f(m, x, y):
        return m.generalized_jsd_loss(x, y, beta=beta, temperature=temperature, reduction="none")

    def error(student, teacher, m=fastgen):
        seed = torch.linspace(0.5, 1.5, 6, device=device)
        exact = value_and_grad(lambda x: f(reference, x, teacher.double()), student.double(), seed)[1]
        return ((value_and_grad(lambda x: f(m, x, teacher), student, seed)[1] - exact).norm() / exact.norm()).item()

    usual = max(error(near + noise, near), 1e-7)
    for offset in (10.0, -10.0, 1000.0, -1000.0, 1e4, -1e4):
        allowed = 4 * usual if abs(offset) >= 1000 else max(4 * usual, error(near + noise, near, reference))
        assert error(near + noise + offset, near) < allowed, f"student + {offset}"
        assert error(near + noise, near + offset) < allowed, f"teacher + {offset}"
        assert error(near + noise + offset, near + offset / 3) < allowed, f"both, {offset}"


@pytest.mark.parametrize("least", [torch.finfo(torch.float32).min, -1e32, -4e9, -1e9])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_masks_as_large_as_numbers_go_are_no_offsets(beta, least, backend, device):
    """A row that is masked throughout is uniform; one that is masked in part has zeros there."""
    s, t, _ = streams((3, 20), device=device)
    s[0], t[1], s[2, :5], t[2, :5] = least, least, least, least
    for x, y in ((s, t), (t, s)):
        value, grad = value_and_grad(lambda x: fastgen.generalized_jsd_loss(x, y, beta=beta, reduction="none"), x)
        x0, y0 = x.clone(), y.clone()
        x0[x0.amax(1) == least], y0[y0.amax(1) == least] = 0, 0
        expected = value_and_grad(
            lambda x: reference.generalized_jsd_loss(x, y0.double(), beta=beta, reduction="none"),
            x0.double(),
        )
        torch.testing.assert_close(value.double(), expected[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad.double(), expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_rows_of_any_two_magnitudes(beta, dtype, backend, device):
    """The last place of the one row may be more than all the other's logits."""
    small = torch.linspace(-1, 1, 12, device=device).reshape(3, 4).to(dtype)
    for size in (3e4, 2e5, 2e6, 1e7, 1e9, 1e12, 1e20, 1e30):
        for least in (-size, size):
            if size > torch.finfo(dtype).max:
                continue
            large = torch.full_like(small, least)
            large[1, 2] *= 0.5
            for x, y in ((small, large), (large, small)):
                value, grad = value_and_grad(lambda x, y=y: fastgen.generalized_jsd_loss(x, y, beta=beta), x)
                expected = value_and_grad(
                    lambda x, y=y: reference.generalized_jsd_loss(x, y.double(), beta=beta), x.double()
                )
                torch.testing.assert_close(value.double(), expected[0], rtol=1e-5, atol=1e-7)
                torch.testing.assert_close(
                    grad.double(), expected[1], rtol=max(2 * torch.finfo(dtype).eps, 1e-5), atol=1e-6
                )


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_masks_at_low_temperatures(beta, backend, device):
    """A masked logit over the temperature may be beyond all numbers, where the other row has as good as nothing."""
    least = torch.finfo(torch.float32).min
    s = torch.tensor([[0.0, 1.0, -300.0], [0.0, 1.0, least], [0.0, -800.0, 1.0]], device=device)
    t = torch.tensor([[0.0, 0.5, least], [0.0, 0.5, -1e4], [0.5, -torch.inf, 0.0]], device=device)
    for temperature in (0.1, 0.5, 1.0):
        for x, y in ((s, t), (t[:2], s[:2])):

            def f(m, x, y, temperature=temperature):
                return m.generalized_jsd_loss(x, y, beta=beta, temperature=temperature, reduction="none")

            value, grad = value_and_grad(lambda x, y=y: f(fastgen, x, y), x)
            torch.testing.assert_close(value.double(), f(reference, x.double(), y.double()), rtol=1e-5, atol=1e-6)
            assert grad.isfinite().all()


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.7, 1.0])
def test_most_of_a_long_row_may_be_masked_or_enormous(beta, backend, device):
    """Threads that see nothing but masks; rows whose scaled logits no float32 tells apart; one logit above all."""
    s, t, _ = streams((4, 4099), device=device)
    masked = torch.finfo(torch.float32).min
    s[0, :4000], t[0, 50:4070] = masked, masked
    s[1], t[1], t[1, :2000] = 4e9, 4e9, -4e9
    s[2], t[2] = s[2] + 4e9, t[2] - 4e9
    s[3, 1234], t[3, 1234] = 3e38, 2e38
    value, grad = value_and_grad(lambda x: fastgen.generalized_jsd_loss(x, t, beta=beta, reduction="none"), s)
    x, y = s.double(), t.double()
    expected = value_and_grad(lambda x: reference.generalized_jsd_loss(x, y, beta=beta, reduction="none"), x)
    torch.testing.assert_close(value.double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected[1], rtol=1e-5, atol=1e-6)
    tokens = torch.tensor([4050, 7, 4098, 1234], device=device)
    logprob, grad = value_and_grad(lambda x: fastgen.token_logprob(x, tokens), s)
    expected = value_and_grad(lambda x: reference.token_logprob(x, tokens), x)
    torch.testing.assert_close(logprob.double(), expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.05, 0.5, 0.95, 1.0])
def test_a_token_that_has_all_probability_has_no_gradient(beta, kernel_backend, device):
    """Its share of the loss is the center, however far the teacher is away, and cancels it."""
    s, t, _ = streams((16, 40), device=device)
    s[:, 3] += 60 + torch.arange(16, device=device)
    t[:, 5] += 50
    grad = value_and_grad(lambda x: fastgen.generalized_jsd_loss(x, t, beta=beta, reduction="sum"), s)[1]
    exact = value_and_grad(
        lambda x: reference.generalized_jsd_loss(x, t.double(), beta=beta, reduction="sum"), s.double()
    )[1]
    torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=5e-7)


def test_rows_far_from_their_teachers_keep_the_center_of_the_reverse_divergence(kernel_backend, device):
    """There logarithms of probabilities differ by a hundred. What the sum of the student's is off from 1, as the
    hardware's 2^x leaves it, may not be a hundred times as much in the center."""
    s, t = (torch.randn(64, 500, device=device) for _ in range(2))
    s[:, :2] += 30
    t[:, 2] += 100

    def f(m, x, y):
        return m.generalized_jsd_loss(x, y, beta=1.0, reduction="none")

    exact = value_and_grad(lambda x: f(reference, x, t.double()), s.double())
    eager, actual = (value_and_grad(lambda x, m=m: f(m, x, t), s) for m in (reference, fastgen))
    for mine, theirs, truth, what in zip(actual, eager, exact, ("value", "gradient"), strict=True):
        assert_accurate(mine, theirs, truth, what)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_cross_entropy_is_one_of_its_own(beta, temperature, backend, device):
    """The same number and the same gradient as of two losses; also where the teacher's vocabulary is another's."""
    for columns in (50, 41, 64):
        s, t, y = streams((3, 7, 50), torch.float64, device)
        t = t[..., :columns] if columns < 50 else F.pad(t, (0, columns - 50), value=1.0)
        s, options = s.requires_grad_(), {"beta": beta, "temperature": temperature, "ignore_index": -100}
        found, hard = fastgen.generalized_jsd_loss(
            s, t, y, cross_entropy_weight=0.3, return_cross_entropy=True, **options
        )
        expected = fastgen.generalized_jsd_loss(s, t, y, **options)
        rows = F.cross_entropy(s.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
        expected = expected + 0.3 * rows.sum() / (y != -100).sum()
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(hard, rows.detach())
        assert not hard.requires_grad
        torch.testing.assert_close(*(torch.autograd.grad(loss, s)[0] for loss in (found, expected)))


def test_a_label_outside_the_vocabulary_makes_a_cross_entropy_nan(kernel_backend, device):
    """As in `token_logprob`: the loss says so, and the row's gradient is the divergence's."""
    s, t, y = streams((2, 3, 20), device=device)
    y = y.clamp(min=0)
    y[0, 1] = 20
    s = s.requires_grad_()
    rows, hard = fastgen.generalized_jsd_loss(
        s, t, y, reduction="none", cross_entropy_weight=1.0, return_cross_entropy=True
    )
    assert torch.isnan(rows).nonzero().tolist() == torch.isnan(hard).nonzero().tolist() == [[0, 1]]
    plain = fastgen.generalized_jsd_loss(s, t, y, reduction="none")
    row = [torch.autograd.grad(loss, s, torch.ones_like(loss))[0][0, 1] for loss in (rows, plain)]
    torch.testing.assert_close(*row)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
def test_ddo_at_its_reference_is_nll_in_expectation(alpha, kernel_backend, device):
    """Where the model is the reference its samples have no mean gradient: what is left is β / 2 of NLL's. A model that
    cannot do better by NLL starts DDO over tokens with nothing to gain."""
    vocabulary, length, beta = 3, 3, 0.2
    words = torch.cartesian_prod(*[torch.arange(vocabulary)] * length).to(device)  # all sequences
    theta = torch.randn(length, vocabulary + 1, vocabulary, dtype=torch.float64, device=device).requires_grad_()
    before = torch.cat([torch.full_like(words[:, :1], vocabulary), words[:, :-1]], 1)
    logits = theta[torch.arange(length, device=device), before]  # of each position and the token before it
    logprob = fastgen.token_logprob(logits, words).sum(1)
    of_ref, of_data = logprob.detach().exp(), torch.rand(len(words), dtype=torch.float64, device=device)
    of_data /= of_data.sum()
    torch.testing.assert_close(of_ref.sum(), torch.ones_like(of_ref[0]))

    twice, real = torch.cat([logits, logits]), torch.arange(2 * len(words), device=device) < len(words)
    terms = fastgen.sequence_ddo_loss(
        twice, twice.detach(), words.repeat(2, 1), real, alpha=alpha, beta=beta, reduction="none"
    )
    ddo = (terms * torch.cat([of_data, of_ref])).sum()
    grads = [torch.autograd.grad(loss, theta, retain_graph=True)[0] for loss in (ddo, -(of_data * logprob).sum())]
    torch.testing.assert_close(grads[0], beta / 2 * grads[1])


@pytest.mark.parametrize("case", ["jsd-0", "jsd-0.5", "jsd-1", "jsd-none", "jsd-mean", "logprob", "ddo", "ddo-masked"])
def test_gradcheck(case):
    s, t, y = streams((3, 2, 6), torch.float64)
    assert torch.autograd.gradcheck(lambda x: CASES[case](reference, x, t, y), s.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: CASES[case](fastgen, x, t, y), s)
