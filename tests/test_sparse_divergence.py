"""Divergences from a teacher that is known on a few ids: values by hand, bounds, and what a row may hold."""

import math

import pytest
import torch
from conftest import DEVICE

import fastgen
from fastgen.core import dispatch

KINDS, TAILS = ("forward", "reverse", "jsd"), ("bucket", "renormalize", "none")
BACKENDS = [b for b in ("native", "triton", "reference") if dispatch.missing("sparse_divergence", b, DEVICE) is None]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with fastgen.use_backend(request.param):
        yield request.param


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def divergence(p, q, kind, beta):
    m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return {"forward": kl(p, q), "reverse": kl(q, p), "jsd": beta * kl(p, m) + (1 - beta) * kl(q, m)}[kind]


def by_hand(p, q, kind, tail, beta):
    if tail == "bucket":
        p, q = [*p, 1 - sum(p)], [*q, 1 - sum(q)]
    elif tail == "renormalize":
        p, q = [a / sum(p) for a in p], [b / sum(q) for b in q]
    return divergence(p, q, kind, beta)


def logits(*probabilities, **options):
    return torch.tensor([math.log(p) for p in probabilities], device=DEVICE, **options)


def ids(*values):
    return torch.tensor(values, device=DEVICE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", TAILS)
def test_values_by_hand(kind, tail):
    student = 5.0 + logits(0.4, 0.1, 0.2, 0.3)  # a constant does not matter
    teacher = logits(0.5, 0.25)
    given = {"kind": kind, "tail": tail, "beta": 0.3, "return_masses": True}
    loss, masses = fastgen.sparse_divergence_loss(student[None], teacher[None], ids(2, 0)[None], **given)
    assert loss.item() == pytest.approx(by_hand([0.5, 0.25], [0.2, 0.4], kind, tail, 0.3), abs=1e-6)
    assert masses.flatten().tolist() == pytest.approx([0.6, 0.75])


def test_gradients_by_hand():
    student, teacher = logits(0.4, 0.1, 0.2, 0.3), logits(0.5, 0.25)
    expected = {  # of KL(P‖Q) for the ids 2 and 0
        "bucket": [0.4 - 0.25, 0.1 * 0.15 / 0.4, 0.2 - 0.5, 0.3 * 0.15 / 0.4],
        "renormalize": [0.4 / 0.6 - 1 / 3, 0.0, 0.2 / 0.6 - 2 / 3, 0.0],
        "none": [0.75 * 0.4 - 0.25, 0.75 * 0.1, 0.75 * 0.2 - 0.5, 0.75 * 0.3],
    }
    for tail, gradient in expected.items():
        leaf = student[None].clone().requires_grad_()
        fastgen.sparse_divergence_loss(leaf, teacher[None], ids(2, 0)[None], tail=tail).backward()
        assert leaf.grad[0].tolist() == pytest.approx(gradient, abs=1e-6), tail


@pytest.mark.parametrize("kind", KINDS)
def test_all_ids_make_the_divergence_of_the_whole_vocabulary(kind):
    student, teacher = (torch.randn(3, 9, device=DEVICE) for _ in range(2))
    every = torch.arange(9, device=DEVICE).expand(3, 9)
    beta = {"forward": 0.0, "reverse": 1.0, "jsd": 0.3}[kind]
    whole = fastgen.generalized_jsd_loss(student, teacher, beta=beta, temperature=2.0)
    logprobs = (teacher / 2).log_softmax(-1)
    for tail in TAILS:
        loss = fastgen.sparse_divergence_loss(student, logprobs, every, kind=kind, beta=0.3, tail=tail, temperature=2.0)
        torch.testing.assert_close(loss, whole, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bucket_is_a_lower_bound_and_no_divergence_of_the_same_is_above_0(kind):
    student, teacher = (2 * torch.randn(20, 30, device=DEVICE) for _ in range(2))
    logprobs, top = teacher.log_softmax(-1).topk(4)
    beta = {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}[kind]
    bound = fastgen.sparse_divergence_loss(student, logprobs, top, kind=kind, reduction="none")
    whole = fastgen.generalized_jsd_loss(student, teacher, beta=beta, reduction="none")
    assert (bound >= 0).all()
    assert (bound <= whole + 1e-6).all()
    same = fastgen.sparse_divergence_loss(teacher, logprobs, top, kind=kind, reduction="none")
    assert same.abs().max() < 1e-6


def test_padding_and_rows_without_entries():
    student, teacher = torch.randn(3, 6, device=DEVICE), logits(0.5, 0.25)
    padded = torch.cat([teacher, torch.full((1,), math.nan, device=DEVICE)])
    short = fastgen.sparse_divergence_loss(student[:1], teacher[None], ids(3, 5)[None])
    long = fastgen.sparse_divergence_loss(student[:1], padded[None], ids(3, 5, -7)[None])
    torch.testing.assert_close(long, short)
    for tail in TAILS:
        leaf = student.clone().requires_grad_()
        loss = fastgen.sparse_divergence_loss(leaf, padded.expand(3, 3), ids(-1, -1, -1).expand(3, 3), tail=tail)
        loss.backward()
        assert loss.item() == 0
        assert not leaf.grad.any()


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_id_that_occurs_twice_counts_twice(kind, tail):
    student = torch.randn(3, 7, device=DEVICE, dtype=torch.float64)
    student[:, 4] = torch.tensor([-1.0, 3.0, 0.0])  # the student's probabilities of the second row's entries exceed 1
    student.requires_grad_()
    teacher = logits(0.2, 0.1, 0.3, 0.1, dtype=torch.float64).expand(3, 4)
    twice = ids(4, 1, 4, 4).expand(3, 4)
    loss = fastgen.sparse_divergence_loss(student, teacher, twice, kind=kind, tail=tail)
    (grad,) = torch.autograd.grad(loss, student)
    with fastgen.use_backend("reference"):
        wanted = fastgen.sparse_divergence_loss(student, teacher, twice, kind=kind, tail=tail)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(grad, torch.autograd.grad(wanted, student)[0])


def test_ids_beyond_the_vocabulary(backend):
    student, teacher = torch.randn(2, 6, device=DEVICE), logits(0.5, 0.25).expand(2, 2)
    beyond = torch.stack([ids(0, 6), ids(0, 1)])
    if DEVICE == "cpu" and backend != "triton":
        with pytest.raises(RuntimeError, match=r"teacher_ids must be less than 6|out of bounds"):
            fastgen.sparse_divergence_loss(student, teacher, beyond)
    else:
        loss = fastgen.sparse_divergence_loss(student, teacher, beyond, reduction="none")
        assert loss.isnan().tolist() == [True, False]


def test_what_is_no_teacher_makes_its_row_nan_and_what_rounding_does_not():
    student = torch.randn(4, 6, device=DEVICE, requires_grad=True)
    teacher = torch.stack([logits(0.6, 0.41), logits(0.9, 0.3), logits(1.01, 1e-9), logits(1.2, 1e-9)])
    loss = fastgen.sparse_divergence_loss(student, teacher, ids(0, 1).expand(4, 2), reduction="none")
    assert loss.isnan().tolist() == [False, True, False, True]
    (grad,) = torch.autograd.grad(loss.sum(), student)
    assert grad.isfinite().all(-1).tolist() == [True, False, True, False]


def test_a_student_that_is_certain_has_a_finite_gradient():
    student = torch.tensor([[60.0, 0.0, 0.0, 0.0]], device=DEVICE, requires_grad=True)
    for kind in KINDS:
        loss = fastgen.sparse_divergence_loss(student, logits(0.5, 0.2)[None], ids(0, 1)[None], kind=kind)
        (grad,) = torch.autograd.grad(loss, student)
        assert loss > 0
        assert grad.isfinite().all()
        assert grad.abs().max() < 100


@pytest.mark.parametrize("kind", KINDS)
def test_entries_that_have_no_probability_to_speak_of_are_renormalised(kind):
    """A student that is certain of another id still has ratios among them, however small their probabilities."""
    student = torch.tensor([[300.0, 0.0, 1.0, -1.0], [0.0, 0.0, 1.0, -1.0]], device=DEVICE).requires_grad_()
    logprobs, teacher_ids = logits(0.1, 0.05, 0.05).expand(2, 3), ids(1, 2, 3).expand(2, 3)
    given = {"kind": kind, "beta": 0.3, "tail": "renormalize", "reduction": "none", "return_masses": True}
    losses, masses = fastgen.sparse_divergence_loss(student, logprobs, teacher_ids, **given)
    parts = [math.exp(x) for x in (0.0, 1.0, -1.0)]
    expected = by_hand([0.5, 0.25, 0.25], [x / sum(parts) for x in parts], kind, "none", 0.3)
    assert losses.tolist() == pytest.approx([expected] * 2, rel=1e-4)
    assert masses[:, 0].tolist() == pytest.approx([0.0, 0.2])
    losses[0].backward()
    (found,) = torch.autograd.grad(
        fastgen.sparse_divergence_loss(student, logprobs, teacher_ids, **given)[0][1], student
    )
    torch.testing.assert_close(student.grad[0], found[1], rtol=1e-4, atol=5e-5)  # 300 is rounded to 1.5e-5
    assert found[1, 1:].abs().min() > 1e-3


def test_masked_rows_and_weights():
    student = torch.randn(4, 6, device=DEVICE, requires_grad=True)
    teacher, of = logits(0.5, 0.25).expand(4, 2), ids(2, 0).expand(4, 2)
    each = fastgen.sparse_divergence_loss(student, teacher, of, reduction="none")
    mask = torch.tensor([True, False, True, True], device=DEVICE)
    weight = torch.tensor([0.5, math.nan, 2.0, 0.0], device=DEVICE)
    loss = fastgen.sparse_divergence_loss(student, teacher, of, mask=mask, weight=weight)
    torch.testing.assert_close(loss, (0.5 * each[0] + 2 * each[2]) / 3)
    (grad,) = torch.autograd.grad(loss, student, retain_graph=True)
    (again,) = torch.autograd.grad(loss, student)  # made anew from what was saved
    torch.testing.assert_close(grad, again)
    assert not grad[1].any()
    labels = torch.where(mask, 3, -100)
    torch.testing.assert_close(fastgen.sparse_divergence_loss(student, teacher, of, labels=labels, weight=weight), loss)
    by_items = fastgen.sparse_divergence_loss(student, teacher, of, mask=mask, reduction="sum", num_items=1.5)
    torch.testing.assert_close(by_items, each[mask].sum() / 1.5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": "both"}, "kind must be one of"),
        ({"tail": "mean"}, "tail must be one of"),
        ({"kind": "jsd", "beta": 1.0}, r"beta must be in \(0, 1\)"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"teacher_ids": torch.zeros(2, 3, dtype=torch.int32)}, "teacher_ids must be int64"),
        ({"teacher_ids": torch.zeros(2, 4, dtype=torch.int64)}, "teacher_ids has 4 entries"),
        ({"teacher_logprobs": torch.zeros(2, 0)}, "teacher_logprobs must have 1 to 5 entries"),
        ({"teacher_logprobs": torch.zeros(2, 6)}, "teacher_logprobs must have 1 to 5 entries"),
        ({"teacher_logprobs": torch.zeros(3, 3)}, "teacher_logprobs must have shape"),
        ({"mask": torch.ones(2, dtype=torch.bool), "labels": torch.zeros(2, dtype=torch.int64)}, "mask and labels"),
        ({"weight": torch.ones(3)}, "weight must have shape"),
        ({"num_items": -1.0}, "num_items must be > 0"),
        ({"num_items": torch.ones(2)}, "num_items must be a number or a 0-dimensional tensor"),
        ({"scaled": 1}, "scaled must be a bool"),
    ],
)
def test_errors_name_the_argument(changed, message):
    right = {
        "student_logits": torch.randn(2, 5),
        "teacher_logprobs": torch.full((2, 3), -2.0),
        "teacher_ids": torch.zeros(2, 3, dtype=torch.int64),
    }
    right = {name: t.to(DEVICE) for name, t in right.items()}
    changed = {name: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for name, v in changed.items()}
    with pytest.raises((TypeError, ValueError), match=message):
        fastgen.sparse_divergence_loss(**(right | changed))
