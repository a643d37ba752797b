"""Compares the emulated CUDA kernels over logits with the float64 reference. Run by tests/test_aot_cuda.py.

The arguments are the LIBRARY and CASEs ``rows,columns,dtypes``: dtypes of student and teacher (h, b, f, d).
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from check import DTYPES, compare

import fastgen
from fastgen import reference


def value_and_grad(f: Callable[..., torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    value = f(x)
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).reshape(value.shape)
    return value.detach(), torch.autograd.grad(value, x, weights)[0]


def check(case: str) -> None:
    rows, size, dtypes = case.split(",")
    shape = (2, int(rows), int(size))
    s = torch.randn(shape, dtype=torch.float64)
    t = (s + torch.randn(shape, dtype=torch.float64)).to(DTYPES[dtypes[1]])
    s = s.to(DTYPES[dtypes[0]])
    y = torch.randint(shape[-1], shape[:-1])
    s[..., 3], t[..., 3], t[..., 5] = -torch.inf, -torch.inf, -torch.inf
    y.masked_fill_((y == 3) | (y == 5), 4).view(-1)[1::3] = -100
    real = torch.tensor([255, 0], dtype=torch.uint8).view(torch.bool)

    def both(what: str, f: Callable[..., torch.Tensor], x: torch.Tensor, *others: torch.Tensor) -> None:
        got = value_and_grad(lambda x: f(fastgen, x, *others), x)
        want = value_and_grad(lambda x: f(reference, x, *(o.double() for o in others)), x.double())
        own = "d" if torch.float64 in (x.dtype, *(o.dtype for o in others)) else "f"
        for part, g, w, dtype in zip(("value", "gradient"), got, want, (own, dtypes[0]), strict=True):
            compare(f"{case} {what} {part}", g, w, dtype)

    both("logprob", lambda m, x: m.token_logprob(x, y, temperature=1.7), s)
    both("ddo", lambda m, x, o: m.sequence_ddo_loss(x, o, y, real, alpha=2.0, normalize=True), s, t)
    # Both an element past their allocations: like each other, unlike the gradient.
    beyond = [torch.cat([x.flatten()[:1], x.flatten()])[1:].view(shape) for x in (s, t)]
    both("logprob beyond", lambda m, x: m.token_logprob(x, y), beyond[0])
    both("jsd beyond", lambda m, x, o: m.generalized_jsd_loss(x, o, y, beta=0.0, reduction="none"), *beyond)
    for beta in (0.0, 0.3, 1.0):
        for reduction in ("sum", "none"):  # the gradient with the loss, and made again
            f = lambda m, x, o: m.generalized_jsd_loss(x, o, y, beta=beta, reduction=reduction)  # noqa: E731
            student = s if beta == 0 else s.index_fill(-1, torch.tensor([5]), -torch.inf)
            both(f"jsd {beta} {reduction}", f, student, t)
            both(f"jsd {beta} {reduction} slices", f, torch.cat([student, student], 1)[:, : shape[1]], t)
            both(f"jsd {beta} {reduction} padded", f, torch.cat([student, student[..., :5]], -1), t)
    twice = [value_and_grad(lambda x: fastgen.generalized_jsd_loss(x, t, y), s)[1] for _ in range(2)]
    assert torch.equal(*twice), f"{case}: two runs differ"


def check_offsets(case: str) -> None:
    """A constant between the rows of student and teacher costs no digits."""
    _, size, _ = case.split(",")
    s = 3 * torch.randn(2, max(int(size), 50))
    t = s + 1e-2 * torch.randn_like(s)
    for beta in (0.0, 0.3, 1.0):
        for x, y in ((s, t), (s + 1000, t), (s, t + 1000), (s - 1e4, t), (s, t - 1e4)):
            grad = value_and_grad(lambda x: fastgen.generalized_jsd_loss(x, y, beta=beta), x)[1]
            want = value_and_grad(lambda x: reference.generalized_jsd_loss(x, y.double(), beta=beta), x.double())[1]
            error = ((grad - want).norm() / want.norm()).item()
            assert error < (1e-4 if beta == 0 else 1e-6), f"{case} jsd {beta}: error {error:.3g}"


if __name__ == "__main__":
    torch.ops.load_library(sys.argv[1])
    torch.manual_seed(0)
    with fastgen.use_backend("native"):
        for case in sys.argv[2:]:
            check(case)
            check_offsets(case)
    print(f"{len(sys.argv) - 2} cases agree")
