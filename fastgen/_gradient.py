"""What every backward does to a gradient that its forward pass has written."""

from __future__ import annotations

from torch import Tensor

from . import _backend


@_backend.operator("scale_gradient_(Tensor(a!) grad, Tensor scale) -> ()")
def _scale_gradient_(grad: Tensor, scale: Tensor) -> None:
    return None


def scale_gradient(grad: Tensor, scale: Tensor, backend: str) -> Tensor:
    """`grad` times the 0-dimensional `scale`, in place; reads and writes nothing where `scale` is 1, without a sync."""
    _scale_gradient_.on(backend)(grad, scale)
    return grad
