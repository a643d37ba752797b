"""What every first backward does to a gradient that its forward pass has written."""

from __future__ import annotations

from .operator import Whole, Written, operator


@operator
def scale_gradient_(grad: Written, scale: Whole) -> None:
    """`grad` times the 0-dimensional `scale`, in place; reads and writes nothing where that is 1, without a sync."""
