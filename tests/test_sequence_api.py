"""The sequence family beyond its values: shapes, strides, dtypes, reductions, threads, memory, errors."""

import functools
import math
import os
import subprocess
import sys

import pytest
import sequences
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import value_and_grad
from sequences import CASES, DTYPES, assert_same, check, layouts, native, streams

import fastgen
from fastgen import reference
from fastgen.sequence import operators

backend, kernel_backend = sequences.backend, sequences.kernel_backend


def test_entropies(backend, device):
    """Of the distribution at the temperature, in all losses that return one; nothing flows back through it."""
    head, hidden = (torch.randn(n, 8, device=device) for n in (50, 6))
    tokens = torch.tensor([3, -100, 7, 0, 49, -100], device=device)
    logits = (hidden @ head.T).requires_grad_()
    logits = torch.where(torch.arange(50, device=device) == 11, -math.inf, logits)  # an entry that is masked
    logprobs = (logits.detach() / 1.5).log_softmax(-1)
    wanted = -(logprobs.exp() * logprobs.clamp(min=-1e30)).sum(-1).masked_fill(tokens == -100, 0)
    options = {"temperature": 1.5, "return_entropy": True}
    for value, entropy in (
        fastgen.token_logprob(logits, tokens, **options),
        fastgen.generalized_jsd_loss(logits, logits.detach() * 0.9, tokens, **options),
    ):
        torch.testing.assert_close(entropy, wanted)
        assert not entropy.requires_grad
        assert value.requires_grad
    bias = torch.where(torch.arange(50, device=device) == 11, -math.inf, 0.0)
    _, entropy = fastgen.linear_token_logprob(hidden, head, tokens, bias=bias, max_chunk_bytes=500, **options)
    torch.testing.assert_close(entropy, wanted)


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
    for shape in ((0, 9), (2, 0, 9), (0, 0, 0, 9), (2, 3, 9)):
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
            loss = fastgen.generalized_jsd_loss(s, t.double(), reduction=reduction)
            assert loss.sum() == 0
            assert loss.dtype == torch.float64
        assert value_and_grad(lambda x: fastgen.token_logprob(x, labels), s)[1].abs().sum() == 0
    empty = torch.zeros(0, 3, 9, device=device, requires_grad=True)
    tokens, real = torch.zeros(0, 3, dtype=torch.int64, device=device), torch.zeros(0, dtype=torch.bool, device=device)
    loss = fastgen.sequence_ddo_loss(empty, empty, tokens, real)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, empty)[0].shape == (0, 3, 9)


@pytest.mark.parametrize("items", [torch.tensor(0), torch.tensor(0.0)], ids=str)
def test_no_items_divide_nothing(items, backend, device):
    """What Transformers passes as num_items_in_batch where every label of a step is masked."""
    s, t, y = streams((2, 3, 9), device=device)
    labels = torch.full_like(y, -100)
    f = lambda x: fastgen.generalized_jsd_loss(x, t, labels, num_items=items.to(device))  # noqa: E731
    value, grad = value_and_grad(f, s)
    assert value == 0
    assert (grad == 0).all()


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


@pytest.mark.parametrize("case", ["jsd-0.5", "jsd-none", "logprob", "ddo"])
def test_strides(case, kernel_backend, device):
    s, t, y = streams((3, 4, 70), device=device)
    base = value_and_grad(lambda x: CASES[case](fastgen, x, t, y), s)
    for other_s, other_t, other_y in zip(layouts(s), layouts(t), [y, y.t().contiguous().t(), y, y, y], strict=True):
        value, grad = value_and_grad(lambda x: CASES[case](fastgen, x, other_t, other_y), other_s)
        assert_same(value, base[0], kernel_backend)
        assert_same(grad, base[1], kernel_backend)
        assert grad.is_contiguous()
    one = t[:1, :1].expand(3, 4, -1)
    expected = value_and_grad(lambda x: CASES[case](fastgen, x, one.contiguous(), y), s)
    assert_same(value_and_grad(lambda x: CASES[case](fastgen, x, one, y), s)[1], expected[1], kernel_backend)


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
            assert_same(narrow[0], wide[0], kernel_backend)
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
    arguments = {"logprob": logprob, "ref_logprob": ref, "is_real": real, "alpha": 2.0, "beta": 0.1, "scale": 1.0}
    run = functools.partial(operators.sequence_ddo_loss.operator, kernel_backend, **arguments)
    terms, _, slopes = run(counts=None, reduction="none")
    counts = torch.tensor([2.0, 5.0], device=device)
    loss, _, slope = run(counts=counts, reduction="mean")
    share = torch.where(real, 1 / counts[0], 1 / counts[1])
    torch.testing.assert_close(loss, (terms * share).sum())
    torch.testing.assert_close(slope, slopes * share)


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
            if mine.numel():
                # One row may be exact by luck in eager: allow for roundings of the logits and of the result.
                floor = torch.finfo(mine.dtype).eps * (max(1.0, scale) + 2 * truth.abs().amax()) + 4e-7
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


class DTensor(torch.Tensor):
    """Goes by its name."""


jsd, ddo, logprob = fastgen.generalized_jsd_loss, fastgen.sequence_ddo_loss, fastgen.token_logprob
BAD_CALLS = {
    "logits must be a torch.Tensor": (TypeError, lambda: logprob([1.0], Y)),
    r"tokens is a DTensor: pass tokens.full_tensor\(\)": (
        TypeError,
        lambda: logprob(S, Y.as_subclass(DTensor)),
    ),
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
    "num_items must be > 0": (ValueError, lambda: jsd(S, S, num_items=0)),
    "cross_entropy_weight must be >= 0": (ValueError, lambda: jsd(S, S, Y, cross_entropy_weight=-1.0)),
    "labels must be the tokens": (ValueError, lambda: jsd(S, S, cross_entropy_weight=1.0)),
    "return_cross_entropy needs": (ValueError, lambda: jsd(S, S, Y, return_cross_entropy=True)),
    "num_items must be a number or a 0-dim": (ValueError, lambda: jsd(S, S, num_items=torch.ones(2))),
    "num_items must be a number, got": (TypeError, lambda: jsd(S, S, num_items="2")),
    "mask and labels": (ValueError, lambda: jsd(S, S, Y, mask=Y > 0)),
    "mask must be a bool tensor, got torch.int64": (TypeError, lambda: jsd(S, S, mask=Y)),
    "weight must have shape": (ValueError, lambda: jsd(S, S, weight=torch.ones(7))),
    "scaled must be a bool": (TypeError, lambda: jsd(S, S, scaled=None)),
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
