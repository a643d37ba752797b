"""Rows of logits wherever they start: odd vocabularies, slices along tokens and columns."""

import pytest
import torch
from conftest import DEVICE
from oracle import assert_accurate, value_and_grad

import fastgen
from fastgen import reference

# What of a [3, 5, V + 3] tensor the logits are: its rows start at any place between two 16-byte boundaries.
SLICES = {
    "one phase": (slice(None), slice(None), slice(0, -3)),
    "another phase": (slice(None), slice(None), slice(3, None)),
    "tokens": (slice(None), slice(1, None), slice(1, -2)),
    "batch": (slice(1, 2), slice(2, 4), slice(2, -1)),
}


def logits(where, vocabulary, dtype, scale):
    return (scale * torch.randn(3, 5, vocabulary + 3, device=DEVICE)).to(dtype)[SLICES[where]]


@pytest.mark.parametrize(
    ("student", "teacher", "dtype"),
    [
        ("one phase", "one phase", torch.bfloat16),
        ("another phase", "another phase", torch.bfloat16),
        ("another phase", "one phase", torch.float32),
        ("tokens", "one phase", torch.bfloat16),
        ("batch", "another phase", torch.float32),
    ],
    ids=str,
)
def test_rows_may_start_anywhere(student, teacher, dtype, kernel_backend):
    vocabulary = 613  # odd: three chunks of the smallest program and edges
    s, t = logits(student, vocabulary, dtype, 3.0), logits(teacher, vocabulary, dtype, 2.0)
    t = t[: s.shape[0], : s.shape[1]]
    y = torch.randint(vocabulary, s.shape[:-1], device=DEVICE)
    y[..., -1] = -100
    losses = {
        "jsd": lambda m, x, o: m.generalized_jsd_loss(x, o, y, beta=0.5, reduction="none"),
        "logprob": lambda m, x, o: m.token_logprob(x, y, temperature=2.0),
    }
    for name, f in losses.items():
        exact = value_and_grad(lambda x: f(reference, x, t.double()), s.double())
        eager = value_and_grad(lambda x: f(reference, x, t), s)
        actual = value_and_grad(lambda x: f(fastgen, x, t), s)
        for what, mine, theirs, truth in zip(("value", "gradient"), actual, eager, exact, strict=True):
            assert_accurate(mine, theirs, truth, f"{name} {what}")
