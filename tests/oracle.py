"""A tolerance that can fail: errors against float64 are held to what eager PyTorch gets at the same dtype."""

from collections.abc import Callable

import torch
from torch import Tensor


def errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """Relative L2 and relative maximum error against a float64 result."""
    difference = actual.double() - exact
    scale = exact.abs().max().item() or 1.0
    return (
        (difference.norm() / (exact.norm() or 1.0)).item(),
        (difference.abs().max() / scale).item(),
    )


def assert_accurate(actual: Tensor, eager: Tensor, exact: Tensor, what: str = "result") -> None:
    """`actual` is at most twice as far from `exact` (float64) as `eager` is, plus one rounding of its dtype."""
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == eager.dtype, f"{what}: {actual.dtype}, expected {eager.dtype}"
    if exact.numel() == 0:
        return
    # Eager float64 is the oracle itself: its error reads 0, so there the floor stands for both.
    floor = torch.finfo(actual.dtype).eps * (32 if actual.dtype == torch.float64 else 1)
    for name, mine, theirs in zip(("L2", "max"), errors(actual, exact), errors(eager, exact), strict=True):
        assert mine <= 2 * theirs + floor, f"{what}: relative {name} error {mine:.2e}, eager {theirs:.2e}"


def value_and_grad(f: Callable[[Tensor], Tensor], pred: Tensor, cotangent: Tensor | None = None):
    """f(pred) and the gradient of (cotangent · f)."""
    pred = pred.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = f(pred)
    seed = torch.ones_like(value) if cotangent is None else cotangent.to(value.dtype)
    (grad,) = torch.autograd.grad(value, pred, seed)
    return value.detach(), grad


def double(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
