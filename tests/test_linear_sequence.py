"""Losses from hidden states and output weights: against the reference in float64, chunk by chunk, and in memory."""

import os
import subprocess
import sys

import pytest
import sequences
import torch
from oracle import assert_accurate, double
from sequences import native

import fastgen
from fastgen import reference
from fastgen.sequence import linear as machinery
from fastgen.sequence.head import chunks

backend, kernel_backend = sequences.backend, sequences.kernel_backend

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def heads(rows, dtype=torch.float32, device="cpu", vocabulary=37, teacher_vocabulary=37):
    """Hidden states [rows, H], weight and bias of a student and of a teacher, and labels."""
    tensors = [torch.randn(*rows, 12), torch.randn(vocabulary, 12) / 2, torch.randn(vocabulary)]
    tensors += [torch.randn(*rows, 20), torch.randn(teacher_vocabulary, 20) / 2, torch.randn(teacher_vocabulary)]
    labels = torch.randint(min(vocabulary, teacher_vocabulary), rows)
    labels[..., 1::4] = -100
    return [t.to(device, dtype) for t in tensors], labels.to(device)


def jsd(m, tensors, labels, **options):
    s, sw, sb, t, tw, tb = tensors
    options = {"beta": 0.3, "temperature": 1.5, **options}
    return m.linear_generalized_jsd_loss(s, sw, t, tw, labels, student_bias=sb, teacher_bias=tb, **options)


def logprob(m, tensors, tokens, **options):
    value = m.linear_token_logprob(*tensors[:2], tokens, bias=tensors[2], temperature=0.8, **options)
    return (value * torch.linspace(-1, 2, value.numel(), device=value.device, dtype=value.dtype).view_as(value)).sum()


def gradients(f, m, tensors, labels, **options):
    """The value, and its gradients for the student's hidden states, weight and bias."""
    tensors = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    value = f(m, tensors, labels, **options)
    leaves = [t for t in tensors[:3] if t is not None]
    grads = torch.autograd.grad(value, leaves, torch.tensor(0.7, device=value.device, dtype=value.dtype))
    return [value.detach(), *grads]


def few_launches(kernel_backend, device, max_chunk_bytes):
    """Chunks of one row are launches by the dozen, of which the interpreter takes a second each."""
    if kernel_backend == "triton" and device == "cpu" and max_chunk_bytes == 1:
        pytest.skip("the interpreter takes a minute for it")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("f", [jsd, logprob], ids=["jsd", "logprob"])
@pytest.mark.parametrize("max_chunk_bytes", [1, 4000, 1 << 20])
def test_matches_float64(f, dtype, max_chunk_bytes, backend, device):
    tensors, labels = heads((3, 7), dtype, device)
    exact = gradients(f, reference, [double(t) for t in tensors], labels)
    eager = gradients(f, reference, tensors, labels)
    actual = gradients(f, fastgen, tensors, labels, max_chunk_bytes=max_chunk_bytes)
    for mine, theirs, truth, what in zip(actual, eager, exact, ("value", "hidden", "weight", "bias"), strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(mine, truth, rtol=1e-11, atol=1e-13)
        else:
            assert_accurate(mine, theirs, truth, what)


@pytest.mark.parametrize(
    "options", [{"beta": 0.0}, {"beta": 1.0}, {"reduction": "sum"}, {"reduction": "mean"}], ids=str
)
@pytest.mark.parametrize("vocabularies", [(37, 37), (40, 37), (37, 40)], ids=str)
def test_options(options, vocabularies, backend, device):
    tensors, labels = heads((9,), torch.float32, device, *vocabularies)
    expected = gradients(jsd, reference, tensors, labels, **options)
    for given in (tensors, [*tensors[:2], None, *tensors[3:5], None]):
        expected = gradients(jsd, reference, given, labels, **options)
        actual = gradients(jsd, fastgen, given, labels, max_chunk_bytes=3000, **options)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    expected = gradients(jsd, reference, tensors, None, **options)
    torch.testing.assert_close(gradients(jsd, fastgen, tensors, None, **options), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [0, 1, 7, 64, 1000])
@pytest.mark.parametrize("budget", [1, 100, 350, 6400, 1 << 30])
def test_chunks_cover_the_rows_within_the_budget(rows, budget):
    covered = []
    for chunk in chunks(rows, 100, budget):
        size = len(range(*chunk.indices(rows)))
        assert size * 100 <= max(budget, 100)
        covered += range(*chunk.indices(rows))
    assert covered == list(range(rows))


@pytest.mark.parametrize("f", [jsd, logprob], ids=["jsd", "logprob"])
def test_chunks_do_not_matter(f, kernel_backend, device):
    tensors, labels = heads((50,), device=device)
    whole = gradients(f, fastgen, tensors, labels)
    for max_chunk_bytes in (1, 2000, 10_000):
        chunked = gradients(f, fastgen, tensors, labels, max_chunk_bytes=max_chunk_bytes)
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-6)


def test_accumulated_gradients_equal_one_batch(backend, device):
    tensors, labels = heads((12,), device=device)
    whole = gradients(jsd, fastgen, tensors, labels)
    parts = []
    for micro in (slice(0, 5), slice(5, 12)):
        mine = [t[micro] if i % 3 == 0 else t for i, t in enumerate(tensors)]
        parts.append(gradients(jsd, fastgen, mine, labels[micro], num_items=int((labels != -100).sum())))
    hidden = torch.cat([parts[0][1], parts[1][1]])
    total = [parts[0][0] + parts[1][0], hidden, parts[0][2] + parts[1][2], parts[0][3] + parts[1][3]]
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("f", [jsd, logprob], ids=["jsd", "logprob"])
def test_weight_gradients_accumulate_in_float32(f, kernel_backend, device):
    """Over 256 chunks: added up in bfloat16, they would be off by many roundings."""
    few_launches(kernel_backend, device, 1)
    tensors, labels = heads((256,), torch.bfloat16, device)
    exact = gradients(f, reference, [double(t) for t in tensors], labels)[2]
    actual = gradients(f, fastgen, tensors, labels, max_chunk_bytes=1)[2]
    one_by_one = torch.zeros_like(tensors[1])
    for i in range(256):
        row = [t[i : i + 1] if k % 3 == 0 else t for k, t in enumerate(tensors)]
        if f is jsd:
            one_by_one += gradients(f, reference, row, labels[i : i + 1], num_items=int((labels != -100).sum()))[2]
    error = (actual.double() - exact).norm() / exact.norm()
    assert error < 6e-3
    if f is jsd:
        assert (one_by_one.double() - exact).norm() / exact.norm() > 3 * error


def test_backward_any_number_of_times(kernel_backend, device):
    tensors, labels = heads((6,), device=device)
    for f in (jsd, logprob):
        leaves = [t.clone().requires_grad_() for t in tensors]
        value, expected = f(fastgen, leaves, labels), f(reference, leaves, labels)
        for scale in (2.0, -1.0, 0.0, 2.0):
            seed = torch.tensor(scale, device=device)
            grads = torch.autograd.grad(value, leaves[:3], seed, retain_graph=True)
            torch.testing.assert_close(
                grads, torch.autograd.grad(expected, leaves[:3], seed, retain_graph=True), rtol=1e-4, atol=1e-5
            )


def test_only_what_needs_a_gradient_gets_one(kernel_backend, device):
    tensors, labels = heads((6,), device=device)
    for f in (jsd, logprob):
        for needed in ((True, False, False), (False, True, False), (False, False, True)):
            leaves = [t.clone() for t in tensors]
            for t, need in zip(leaves, needed, strict=False):
                t.requires_grad_(need)
            f(fastgen, leaves, labels).backward()
            assert [t.grad is not None for t in leaves[:3]] == list(needed)
        leaves = [t.clone().requires_grad_() for t in tensors]
        f(fastgen, leaves, labels).backward()
        assert all(t.grad is None for t in leaves[3:])
        with torch.no_grad():
            assert not f(fastgen, leaves, labels).requires_grad


def test_one_row(backend, device):
    tensors, _ = heads((1,), device=device)
    tensors[0], tensors[3] = tensors[0][0], tensors[3][0]
    for f in (jsd, logprob):
        for label in (3, -100):
            y = torch.tensor(label, device=device)
            torch.testing.assert_close(
                gradients(f, fastgen, tensors, y), gradients(f, reference, tensors, y), rtol=1e-4, atol=1e-6
            )


def test_no_rows(backend, device):
    tensors, labels = heads((0, 3), device=device)
    for f in (jsd, logprob):
        value, hidden, weight, bias = gradients(f, fastgen, tensors, labels)
        assert value == 0
        assert hidden.shape == tensors[0].shape
        assert (weight == 0).all()
        assert (bias == 0).all()


def test_compiles_without_a_graph_break(kernel_backend, device):
    tensors, labels = heads((6,), device=device)
    for f in (jsd, logprob):
        torch._dynamo.reset()

        def run(m, tensors, labels, f=f):
            return torch.compile(lambda *t: f(fastgen, t, labels), fullgraph=True, backend="aot_eager")(*tensors)

        torch.testing.assert_close(gradients(run, fastgen, tensors, labels), gradients(f, fastgen, tensors, labels))


SHARED = {  # which of (h, w, b, t, v, c) stand for the two heads
    "one head": (0, 1, 2, 3, 1, 2),
    "one head and one input": (0, 1, 2, 0, 1, 2),
    "inputs that are weights": (0, 0, 2, 3, 3, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shared", SHARED)
def test_compiles_where_tensors_are_shared(shared, dtype, kernel_backend, device):
    """Of a tensor that both models have, only the student's use gets a gradient."""
    given = [torch.randn(6, 6).to(device, dtype) for _ in range(2)]
    bias = torch.randn(6).to(device, dtype)
    tensors, labels = [given[0], given[1], bias, given[0].flip(0).contiguous(), given[1].t().contiguous(), bias], None
    tokens = torch.arange(6, device=device)
    losses = (
        lambda *t: fastgen.linear_generalized_jsd_loss(
            t[0], t[1], t[3], t[4], labels, student_bias=t[2], teacher_bias=t[5]
        ),
        lambda *t: fastgen.linear_token_logprob(t[0], t[1], tokens, bias=t[2]).mean(),
    )
    for loss in losses:
        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        results = []
        for f in (loss, compiled):
            leaves = [t.clone().requires_grad_() for t in tensors]
            used = [leaves[i] for i in SHARED[shared]]
            value = f(*used)
            results.append((value.detach(), *torch.autograd.grad(value, {id(t): t for t in used[:3]}.values())))
        torch.testing.assert_close(results[1], results[0])
        assert all(g.norm() > 0 for g in results[0][1:]) or shared == "one head and one input"


def test_autocast(kernel_backend, device):
    tensors, labels = heads((6,), device=device)
    for f in (jsd, logprob):
        with torch.autocast(device, dtype=torch.bfloat16):
            actual = gradients(f, fastgen, tensors, labels)
        narrow = gradients(f, fastgen, [t.bfloat16() for t in tensors], labels)
        assert [t.dtype for t in actual] == [torch.float32] * 4
        torch.testing.assert_close(actual, [t.float() for t in narrow])


PEAK = """
import re, sys, torch, fastgen
def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
tokens, size, vocabulary = (int(x) for x in sys.argv[1:4])
dtype = getattr(torch, sys.argv[4])
s, t, w, v = (torch.randn(n, size).to(dtype) for n in (tokens, tokens, vocabulary, vocabulary))
w.mul_(0.05).requires_grad_(), s.requires_grad_()
fastgen.linear_generalized_jsd_loss(s[:8], w[:99], t[:8], v[:99]).backward()
s.grad = w.grad = None
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
fastgen.linear_generalized_jsd_loss(s, w, t, v).backward()
print(status("VmHWM") - before - 4 * w.numel() - (w.nbytes if dtype != torch.float32 else 0))
"""


@native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "sizes", [(1024, 32, 32_000), pytest.param((4096, 1024, 32_000), marks=pytest.mark.slow)], ids=str
)
def test_memory_beyond_the_weight_gradient(sizes, dtype):
    """The logits alone would be 131 and 524 MB, of each model; the weight gradient is summed in float32."""
    command = [sys.executable, "-c", PEAK, *map(str, sizes), dtype]
    # Large tensors straight from the system and back to it: what glibc keeps in its heap varies from run to run.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if run.returncode and "clear_refs" in run.stderr:
        pytest.skip("this kernel does not let a process reset its peak memory")
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 200e6


H, W, B, Y = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(5), torch.zeros(2, 3, dtype=torch.int64)
linear, tokens = fastgen.linear_generalized_jsd_loss, fastgen.linear_token_logprob


def under_autocast(hidden, weight):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return tokens(hidden, weight, Y)


BAD_CALLS = {
    "hidden must be a torch.Tensor": (TypeError, lambda: tokens([1.0], W, Y)),
    "hidden must be float32": (TypeError, lambda: tokens(H.int(), W, Y)),
    r"hidden must have shape \[..., H\]": (ValueError, lambda: tokens(H[..., :0], W, Y)),
    r"weight must have shape \[V, 4\]": (ValueError, lambda: tokens(H, W[:, :3], Y)),
    "weight is torch.bfloat16": (TypeError, lambda: tokens(H, W.bfloat16(), Y)),
    "weight is torch.float32, but hidden is torch.float64": (TypeError, lambda: under_autocast(H.double(), W)),
    "weight is torch.float64, but hidden is torch.float32": (TypeError, lambda: under_autocast(H, W.double())),
    "weight is on meta": (ValueError, lambda: tokens(H, W.to("meta"), Y)),
    r"bias must have shape \[5\]": (ValueError, lambda: tokens(H, W, Y, bias=B[:4])),
    r"tokens must have shape \[2, 3\]": (ValueError, lambda: tokens(H, W, Y[:1])),
    "max_chunk_bytes must be at least 1": (ValueError, lambda: tokens(H, W, Y, max_chunk_bytes=0)),
    "temperature must be > 0": (ValueError, lambda: tokens(H, W, Y, temperature=-1.0)),
    "student_hidden must be float32": (TypeError, lambda: linear(H.int(), W, H, W)),
    "student_weight is torch.float64": (TypeError, lambda: linear(H, W.double(), H, W)),
    "student_bias must be": (TypeError, lambda: linear(H, W, H, W, student_bias=B.int())),
    r"teacher_weight must have shape \[V, 4\]": (ValueError, lambda: linear(H, W, H, W.t())),
    r"teacher_bias must have shape \[5\]": (ValueError, lambda: linear(H, W, H, W, teacher_bias=W)),
    "teacher_hidden has rows": (ValueError, lambda: linear(H, W, H[:1], W)),
    r"labels must have shape \[2, 3\]": (ValueError, lambda: linear(H, W, H, W, Y[0])),
    r"beta must be in \[0, 1\]": (ValueError, lambda: linear(H, W, H, W, beta=2.0)),
    "reduction must be one of": (ValueError, lambda: linear(H, W, H, W, reduction="tokens")),
    "^logit_scale must be > 0": (ValueError, lambda: linear(H, W, H, W, logit_scale=0)),
    "^teacher_logit_scale must be > 0": (ValueError, lambda: linear(H, W, H, W, teacher_logit_scale=-1.0)),
    "^softcap must be > 0": (ValueError, lambda: tokens(H, W, Y, softcap=0.0)),
    "^teacher_softcap must be a number": (TypeError, lambda: linear(H, W, H, W, teacher_softcap="30")),
    "num_valid must be at least 0": (ValueError, lambda: tokens(H, W, Y, num_valid=-1)),
    r"token_weight must have shape \[2, 3\]": (ValueError, lambda: linear(H, W, H, W, token_weight=B)),
    "cross_entropy_weight must be >= 0": (ValueError, lambda: linear(H, W, H, W, Y, cross_entropy_weight=-1.0)),
    "labels must be the tokens": (ValueError, lambda: linear(H, W, H, W, cross_entropy_weight=1.0)),
    "return_cross_entropy needs": (ValueError, lambda: linear(H, W, H, W, Y, return_cross_entropy=True)),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_names_the_argument(message):
    error, call = BAD_CALLS[message]
    with pytest.raises(error, match=message):
        call()


def test_rows_that_do_not_count_are_not_projected(monkeypatch, kernel_backend, device):
    """Where it is known without a sync which ones count: on a CPU always, elsewhere by the number or a mask there."""
    projected = []
    linear_logits = machinery.linear_logits
    monkeypatch.setattr(
        machinery,
        "linear_logits",
        lambda head, rows, *rest: projected.append(head.hidden[rows].shape[0]) or linear_logits(head, rows, *rest),
    )
    hidden, weight = torch.randn(3, 5, 8, device=device, requires_grad=True), torch.randn(20, 8, device=device)
    tokens = torch.randint(20, (3, 5), device=device)
    mask = torch.arange(15).reshape(3, 5) % 4 == 1  # of a CPU
    whole = fastgen.token_logprob(hidden @ weight.T, tokens, mask=mask.to(device))
    for counts in ({"mask": mask}, {"mask": mask.to(device), "num_valid": 4}, {"mask": mask, "num_valid": 7}):
        projected.clear()
        logprob = fastgen.linear_token_logprob(hidden, weight, tokens, **counts)
        assert sum(projected) == counts.get("num_valid", 4)
        torch.testing.assert_close(logprob, whole)
        (grad,) = torch.autograd.grad(logprob.sum(), hidden)
        (wanted,) = torch.autograd.grad(whole.sum(), hidden, retain_graph=True)
        torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize("max_chunk_bytes", [1, 1 << 20])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_scaled_and_capped_logits_are_those_of_a_model_that_does_it(reduction, max_chunk_bytes, kernel_backend, device):
    few_launches(kernel_backend, device, max_chunk_bytes)
    scale, cap = 1.5, 2.0  # of logits that reach the cap
    hidden, teacher = (torch.randn(3, 5, 8, device=device).requires_grad_() for _ in range(2))
    head, tokens = torch.randn(20, 8, device=device), torch.randint(20, (3, 5), device=device)
    logits, other = cap * torch.tanh(scale * (hidden @ head.T) / cap), scale * (teacher @ head.T).detach()
    entries, how = other.log_softmax(-1).topk(4), {"reduction": reduction}
    options = {"logit_scale": scale, "softcap": cap, "max_chunk_bytes": max_chunk_bytes}
    of_teacher = {"teacher_logit_scale": scale, **options, **how}
    for mine, theirs in (
        (fastgen.linear_token_logprob(hidden, head, tokens, **options), fastgen.token_logprob(logits, tokens)),
        (
            fastgen.linear_generalized_jsd_loss(hidden, head, teacher, head, **of_teacher),
            fastgen.generalized_jsd_loss(logits, other, **how),
        ),
        (
            fastgen.linear_sparse_divergence_loss(hidden, head, *entries, **options, **how),
            fastgen.sparse_divergence_loss(logits, *entries, **how),
        ),
    ):
        torch.testing.assert_close(mine, theirs)
        factors = torch.linspace(-1, 2, mine.numel(), device=device).view(mine.shape)
        grads = [torch.autograd.grad((v * factors).sum(), hidden, retain_graph=True)[0] for v in (mine, theirs)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_cross_entropy_of_the_same_logits_is_one_of_its_own(
    temperature, reduction, weighted, kernel_backend, device, monkeypatch
):
    """The sum of two losses, with the gradient of both, from logits that are projected once."""
    tensors, labels = heads((3, 5), device=device)
    leaves = [t.clone().requires_grad_() for t in tensors]
    s, sw, sb, *_ = leaves
    weight = torch.rand(3, 5, device=device) if weighted else None
    factors = torch.linspace(-1, 1, 15, device=device).view(3, 5) if reduction == "none" else 1.0
    options = {"beta": 0.3, "scaled": True, "reduction": reduction, "token_weight": weight}
    options["temperature"] = temperature
    soft = jsd(fastgen, leaves, labels, **options)
    rows = -fastgen.linear_token_logprob(s, sw, labels, bias=sb)
    hard = rows if weight is None else rows * weight
    hard = hard if reduction == "none" else hard.sum() / (labels != -100).sum()
    expected = soft + 0.7 * hard
    gradients = torch.autograd.grad((expected * factors).sum(), leaves[:3])

    calls, projected = [], machinery.linear_logits
    monkeypatch.setattr(machinery, "linear_logits", lambda *a: calls.append(a) or projected(*a))
    both, found = jsd(
        fastgen, leaves, labels, cross_entropy_weight=0.7, return_cross_entropy=True, max_chunk_bytes=1 << 20, **options
    )
    (both * factors).sum().backward()
    assert len(calls) == (2 if reduction == "batchmean" else 4)  # a student and a teacher, once more for the backward
    torch.testing.assert_close(both, expected)
    torch.testing.assert_close(found, rows.detach())
    for leaf, gradient in zip(leaves[:3], gradients, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)
