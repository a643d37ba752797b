"""Operators of ``elbo``, and how its losses are differentiated.

Every loss here reduces a row to one number and hands the numbers of a group of rows to a scalar function, so all of
them share one shape: the loss, the group's ELBO difference, d loss / d error of each row, and the gradient, from one
pass. Terms count `scale` times each: for a mean, one by their number in the whole batch, whatever a shard holds. The
kernels are in ``csrc/elbo.h`` and ``triton_kernels/elbo.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from ..core.autograd import FusedLoss, differentiable
from ..core.operator import Gradient, Loss, PerGroup, PerRow, Reduction, Stream, Whole, operator

Penalty = Literal["l2", "l1", "huber"]


class DifferenceOutputs(NamedTuple):
    """Of a loss over ELBO differences."""

    loss: Loss
    delta: PerGroup
    error_slope: PerRow
    grad_pred: Gradient


class DistanceOutputs(NamedTuple):
    """Of a distance between two tensors."""

    distance: Loss
    grad_pred: Gradient


class PairOutputs(NamedTuple):
    """Of a loss over pairs of ELBO errors."""

    loss: Loss
    error_slope: PerRow
    grad_pred: Gradient


class Shared(NamedTuple):
    """What all losses over ELBO differences take."""

    pred: Stream
    ref_pred: Stream
    target: Stream
    weight: PerRow | None
    element_mean: bool
    reduction: Reduction
    scale: float
    with_grad: bool


@operator
def elbo_error_backward(
    grad: PerRow, pred: Stream, target: Stream, weight: PerRow | None, loss: Penalty, element_mean: bool
) -> Gradient:
    """``grad_i ∂error_i/∂pred``"""


@differentiable(elbo_error_backward, "pred")
@operator
def elbo_error(pred: Stream, target: Stream, weight: PerRow | None, loss: Penalty, element_mean: bool) -> PerRow:
    """``w_i red_D penalty(pred - target)``"""


@differentiable(
    elbo_error_backward, "pred", slope="scale", returns=("distance",), loss="l1", weight=None, element_mean=False
)
@operator
def l1_distance(pred: Stream, target: Stream, scale: float, with_grad: bool) -> DistanceOutputs:
    """``scale Σ abs(pred - target)`` over all elements, and its gradient from the same pass."""


@differentiable(elbo_error_backward, "pred", slope=-1.0, loss="l2")
@operator
def elbo_difference(
    pred: Stream, ref_pred: Stream, target: Stream, weight: PerRow | None, element_mean: bool
) -> PerRow:
    """``w_i red_D (ref_pred - pred)(ref_pred + pred - 2 target)``"""


def _difference_loss(*, paired: bool = False, **options: Any) -> Callable[[Callable[..., Any]], FusedLoss]:
    """A decorator of declarations: a loss over ELBO differences, and how it is differentiated."""
    results = {"slope": "error_slope", "returns": ("loss", "delta")}
    fused = differentiable(elbo_error_backward, "pred", **results, loss="l2", **options)
    return lambda declaration: fused(operator(declaration, paired=paired))


@_difference_loss(group_rows="mc_samples")
def ddo_loss(
    of: Shared,
    is_real: PerGroup,
    counts: Whole | None,
    alphas: PerGroup | None,
    alpha: float,
    beta: float,
    mc_samples: int,
) -> DifferenceOutputs:
    """DDO over the mean difference of `mc_samples` rows; `counts` = {real, fake} to divide by where not these, and
    `alphas` where not all images have `alpha`."""


@_difference_loss(paired=True)
def diffusion_dpo_loss(
    of: Shared, beta: float, kind: Literal["sigmoid", "ipo", "hinge"], interleaved: bool
) -> DifferenceOutputs:
    """A preference loss of the difference of row i less that of row i + B/2, or of row 2i less that of row 2i + 1."""


@_difference_loss()
def diffusion_kto_loss(
    of: Shared, is_desirable: PerRow, baseline: Whole, beta: float, desirable_weight: float, undesirable_weight: float
) -> DifferenceOutputs:
    """``w (1 - sigmoid(±beta (delta - baseline)))``, the sign and the weight w by `is_desirable`."""


@differentiable(elbo_error_backward, "pred", slope="error_slope", loss="l2")
@operator(paired=True)
def mapo_loss(
    pred: Stream,
    target: Stream,
    weight: PerRow | None,
    element_mean: bool,
    reduction: Reduction,
    scale: float,
    with_grad: bool,
    beta: float,
    error_scale: float,
    timesteps: float,
) -> PairOutputs:
    """``error_w - beta log sigmoid(timesteps (f(error_w) - f(error_l)))`` of rows i and i + B/2, f by `error_scale`."""
