"""Comparisons with float64, in the words of a failed test."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

import fastgen
from fastgen import reference
from fastgen.cases import Case
from fastgen.core.accuracy import bounds, errors
from fastgen.core.verify import results, widened


def assert_accurate(actual: Tensor, eager: Tensor, exact: Tensor, what: str = "result") -> None:
    """`actual` is at most twice as far from `exact` (float64) as `eager` is, plus one rounding: see ``bounds``."""
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == eager.dtype, f"{what}: {actual.dtype}, expected {eager.dtype}"
    for name, mine, limit in zip(("L2", "max"), errors(actual, exact), bounds(eager, exact), strict=True):
        assert mine <= limit, f"{what}: relative {name} error {mine:.2e}, allowed {limit:.2e}"


def check_case(case: Case, tensors: Mapping[str, Tensor], what: object = "") -> dict[str, Tensor]:
    """Values and gradients of a case, against float64 and the reference's own error; what ``verify.results`` gives."""
    exact, eager = results(case, reference, widened(tensors)), results(case, reference, tensors)
    actual = results(case, fastgen, tensors)
    for part, mine in actual.items():
        assert_accurate(mine, eager[part], exact[part], f"{case.name} {what} {part}")
    return actual


def value_and_grad(f: Callable[[Tensor], Tensor], pred: Tensor, cotangent: Tensor | None = None):
    """f(pred) and the gradient of (cotangent · f)."""
    pred = pred.detach().requires_grad_()
    value = f(pred)
    seed = torch.ones_like(value) if cotangent is None else cotangent.to(value.dtype)
    (grad,) = torch.autograd.grad(value, pred, seed)
    return value.detach(), grad


def double(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
