"""Operators of ``policy``, and how its losses are differentiated.

The kernels are in ``csrc/policy.h`` and ``triton_kernels/policy.py``.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from ..core.autograd import differentiable
from ..core.operator import (
    Gradient,
    Loss,
    Output,
    PerRow,
    PredictionType,
    Reduction,
    Role,
    Stream,
    WideOutput,
    operator,
)


class NftOutputs(NamedTuple):
    """Of :func:`diffusion_nft_loss`."""

    loss: Loss
    slopes: Annotated[Tensor, Role.STACKED, 3]
    stats: Annotated[Tensor, Role.STACKED_GROUP, 5]
    grad_pred: Gradient


class FlowOutputs(NamedTuple):
    """Of :func:`flow_sde_step`."""

    mean: WideOutput
    log_prob: PerRow


class DrawOutputs(NamedTuple):
    """Of :func:`flow_sde_draw`."""

    sample: Output
    mean: WideOutput
    log_prob: PerRow


class Branches(NamedTuple):
    """``x0± = a x_t + b (old ± beta (pred - old))``, a and b by `prediction_type`."""

    pred: Stream
    old_pred: Stream
    x_t: Stream
    x0: Stream
    ref_pred: Stream | None
    alpha_t: PerRow
    sigma_t: PerRow
    prediction_type: PredictionType
    beta: float


@operator
def diffusion_nft_loss_backward(row_grad: Annotated[Tensor, Role.STACKED, 3], of: Branches) -> Gradient:
    """Each row of `row_grad` times the gradient of its term's half square: of x0+, of x0- and of pred - ref_pred."""


@differentiable(diffusion_nft_loss_backward, "pred", slope="slopes", returns=("loss", "stats"))
@operator
def diffusion_nft_loss(
    of: Branches,
    r: PerRow,
    loss_scale: float,
    kl_weight: float,
    normalizer_min: float,
    reduction: Reduction,
    scale: float,
    with_grad: bool,
) -> NftOutputs:
    """The terms of both branches, each over its normaliser, and of the reference."""


@operator
def flow_sde_step(pred: Stream, x_t: Stream, sample: Stream, k_x: PerRow, k_v: PerRow, std: PerRow) -> FlowOutputs:
    """``mean = k_x x_t + k_v pred``, and an element's log-probability of `sample`, normal around it."""


@operator
def flow_sde_draw(x_t: Stream, pred: Stream, noise: Stream, k_x: PerRow, k_v: PerRow, std: PerRow) -> DrawOutputs:
    """The same of ``sample = mean + std noise``, in the dtype of x_t."""


@operator
def flow_sde_step_backward(
    grad_log_prob: PerRow,
    sample: Stream,
    mean: Stream,
    grad_mean: Stream | None,
    k_v: PerRow,
    std: PerRow,
    dtype: torch.dtype,
) -> Gradient:
    """``k_v (grad_log_prob (sample - mean) / (std² D) + grad_mean)``: the gradient of pred."""
