"""ELBO differences: DDO (arXiv 2503.01103), Diffusion-DPO (arXiv 2311.12908) and the errors they are made of.

Streams: prediction p, target y, frozen reference prediction q. The formulas are those of ``csrc/elbo.h``.
"""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import scalar
from .elbo_formulas import (
    ELBO_DIFFERENCE,
    ELBO_ERROR,
    ELBO_ERROR_BACKWARD,
    L1_DISTANCE,
    MAPO,
    ErrorArgs,
    PairArgs,
    accumulate_difference,
    map_l2,
    row_scale,
)
from .rowwise import Formula, Functions, Groups, Rows, run
from .scalar import divide, number, sigmoid, softplus

LossOutputs = tuple[Tensor, Tensor, Tensor, Tensor]  # loss, delta, error_slope, grad_pred

# Up to this many images each program counts the real ones among them itself: a few bytes a thread from the cache.
COUNTED_IN_KERNEL = 4096


# -- Losses of a group's m = sum_r share_r * delta_r. A link gives of m the term and its slope.


class LossArgs(NamedTuple):
    weight: Tensor | None
    scale: float | int
    term_scale: float | int  # of a term in the loss
    term: Tensor  # [groups]
    delta: Tensor  # [groups]
    error_slope: Tensor  # [rows]: d term / d error_r, where error_r = w_r * scale * sum_D (p - y)^2
    link: Any


class DdoLink(NamedTuple):
    is_real: Tensor
    counts: Tensor | None  # {n_real, n_fake}
    images: int | None  # without counts: how many to count; None: no division
    alpha: float | int
    beta: float | int
    row_share: float | int
    alphas: Tensor | None = None  # [groups]: instead of alpha


class PreferenceLink(NamedTuple):
    beta: float | int


@triton.jit
def _store_loss(args, group, m, term, slope, T: tl.constexpr):
    tl.store(args.delta + group, m)
    tl.store(args.term + group, number(args.term_scale, T) * term)
    return number(args.term_scale, T) * slope


# The constants of a row: its share of m times its scale, and its share.


@triton.jit
def _single_row(args, row, rank, T: tl.constexpr):
    return row_scale(args, row, T), tl.full((), 1.0, T)


@triton.jit
def _ddo_row(args, row, rank, T: tl.constexpr):
    share = number(args.link.row_share, T)
    return share * row_scale(args, row, T), share


@triton.jit
def _pair_row(args, row, rank, T: tl.constexpr):
    share = tl.where(rank == 0, 1.0, -1.0)
    return share * row_scale(args, row, T), share


@triton.jit
def _loss_coefficient(args, row, rank, constants, slope, T: tl.constexpr):
    tl.store(args.error_slope + row, -slope * constants[1])
    return -slope * constants[0]


@triton.jit
def _count(flags, size, value):
    cols = tl.arange(0, 1024)
    counted = tl.zeros((1024,), tl.int32)
    for start in range(0, size, 1024):
        flag = tl.load(flags + start + cols, mask=cols < size - start, other=0).to(tl.int32)
        counted += tl.where(cols < size - start, (flag == value).to(tl.int32), 0)
    return tl.sum(counted)


@triton.jit
def ddo_term(link, group, m, T: tl.constexpr):
    """Real images: softplus(-beta m) / n_real. Fakes: alpha softplus(beta m) / n_fake. The term and its slope."""
    real = tl.load(link.is_real + group).to(tl.int32)
    alpha = number(link.alpha, T)
    if link.alphas is not None:
        alpha = tl.load(link.alphas + group)
    weight = tl.where(real != 0, 1.0, alpha).to(T)
    if link.counts is not None:
        weight = divide(weight, tl.load(link.counts + 1 - real))
    elif link.images is not None:
        weight = divide(weight, _count(link.is_real, link.images, real).to(T))
    beta = number(link.beta, T)
    signed_beta = tl.where(real != 0, -beta, beta)
    return weight * softplus(signed_beta * m), weight * signed_beta * sigmoid(signed_beta * m)


@triton.jit
def _ddo_epilogue(args, group, sums, T: tl.constexpr):
    term, slope = ddo_term(args.link, group, sums[0], T)
    return _store_loss(args, group, sums[0], term, slope, T)


@triton.jit
def _sigmoid_epilogue(args, group, sums, T: tl.constexpr):
    half = -0.5 * number(args.link.beta, T)
    x = half * sums[0]
    return _store_loss(args, group, sums[0], softplus(x), half * sigmoid(x), T)


@triton.jit
def _ipo_epilogue(args, group, sums, T: tl.constexpr):
    d = sums[0] - divide(0.5, number(args.link.beta, T))
    return _store_loss(args, group, sums[0], d * d, 2.0 * d, T)


@triton.jit
def _hinge_epilogue(args, group, sums, T: tl.constexpr):
    beta = number(args.link.beta, T)
    d = 1.0 - beta * sums[0]
    flat = d <= 0.0  # false for NaN, which must stay NaN
    return _store_loss(args, group, sums[0], tl.where(flat, 0.0, d), tl.where(flat, 0.0, -beta + 0.0 * d), T)


def _loss_formula(row: Any, epilogue: Any) -> Formula:
    return Formula(Functions(row, accumulate_difference, epilogue, _loss_coefficient, map_l2), sums=1, map_streams=2)


DDO = _loss_formula(_ddo_row, _ddo_epilogue)
PREFERENCE = {
    kind: _loss_formula(_pair_row, epilogue)
    for kind, epilogue in (("sigmoid", _sigmoid_epilogue), ("ipo", _ipo_epilogue), ("hinge", _hinge_epilogue))
}


# -- The operators


def _element_scale(rows: Rows, element_mean: bool) -> float | int:
    return scalar.argument(1 / max(rows.size, 1) if element_mean else 1.0, rows.dtype)


def elbo_error(pred: Tensor, target: Tensor, weight: Tensor | None, loss: str, element_mean: bool) -> Tensor:
    rows = Rows(pred, target)
    error = rows.new_vector(rows.count)
    args = ErrorArgs(rows.scalars(weight), _element_scale(rows, element_mean), error=error)
    run(ELBO_ERROR[loss], Groups(rows.count), rows, args)
    return error


def elbo_error_backward(
    grad: Tensor, pred: Tensor, target: Tensor, weight: Tensor | None, loss: str, element_mean: bool
) -> Tensor:
    rows = Rows(pred, target)
    grad_pred = rows.new_output(pred.dtype)
    args = ErrorArgs(rows.scalars(weight), _element_scale(rows, element_mean), grad=rows.scalars(grad))
    run(ELBO_ERROR_BACKWARD[loss], Groups(rows.count), rows, args, grad_pred)
    return grad_pred


def l1_distance(pred: Tensor, target: Tensor, scale: float, with_grad: bool) -> tuple[Tensor, Tensor]:
    rows = Rows(pred, target)
    term = rows.new_vector(rows.count)
    grad_pred = rows.new_output(pred.dtype) if with_grad else None
    args = ErrorArgs(None, scalar.argument(scale, rows.dtype), error=term)
    run(L1_DISTANCE, Groups(rows.count), rows, args, grad_pred)
    return term.sum(), pred.new_empty((0,)) if grad_pred is None else grad_pred


def elbo_difference(
    pred: Tensor, ref_pred: Tensor, target: Tensor, weight: Tensor | None, element_mean: bool
) -> Tensor:
    rows = Rows(pred, target, ref_pred)
    delta = rows.new_vector(rows.count)
    args = ErrorArgs(rows.scalars(weight), _element_scale(rows, element_mean), error=delta)
    run(ELBO_DIFFERENCE, Groups(rows.count), rows, args)
    return delta


def _run_loss(
    formula: Formula,
    groups: Groups,
    rows: Rows,
    weight: Tensor | None,
    element_mean: bool,
    reduction: str,
    scale: float,
    with_grad: bool,
    link: Any,
) -> LossOutputs:
    """One pass: terms, deltas, slopes, and the gradient if asked for."""
    pred = rows.tensors[0]
    term, delta, error_slope = (rows.new_vector(n) for n in (groups.count, groups.count, rows.count))
    grad_pred = rows.new_output(pred.dtype) if with_grad else None
    scales = _element_scale(rows, element_mean), scalar.argument(scale, rows.dtype)
    args = LossArgs(rows.scalars(weight), *scales, term, delta, error_slope, link)
    run(formula, groups, rows, args, grad_pred)
    loss = term if reduction == "none" else term.sum()
    return loss, delta, error_slope, pred.new_empty((0,)) if grad_pred is None else grad_pred


@functools.cache
def _link_of(*names: str) -> Callable[..., Any]:
    return namedtuple("Link", names)


def difference_loss(epilogue: Any) -> Callable[..., LossOutputs]:
    """The launcher of a loss of each row's delta. The operator's own arguments are the fields of ``args.link``."""
    formula = _loss_formula(_single_row, epilogue)

    def launch(
        pred: Tensor,
        ref_pred: Tensor,
        target: Tensor,
        weight: Tensor | None,
        element_mean: bool,
        reduction: str,
        scale: float,
        with_grad: bool,
        **own: Any,
    ) -> LossOutputs:
        rows = Rows(pred, target, ref_pred)
        link = _link_of(*own)(*map(rows.argument, own.values()))
        groups = Groups(rows.count)
        return _run_loss(formula, groups, rows, weight, element_mean, reduction, scale, with_grad, link)

    return launch


def ddo_link(
    rows: Rows, is_real: Tensor, counts: Tensor | None, alpha: float, beta: float, row_share: float, reduction: str
) -> DdoLink:
    images = None
    if reduction == "mean" and counts is None:
        if len(is_real) <= COUNTED_IN_KERNEL:
            images = len(is_real)
        else:
            n_real = is_real.sum()
            counts = torch.stack([n_real, len(is_real) - n_real])
    return DdoLink(
        is_real.contiguous(),
        rows.scalars(counts) if reduction == "mean" else None,
        images,
        *(scalar.argument(value, rows.dtype) for value in (alpha, beta, row_share)),
    )


def ddo_loss(
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    element_mean: bool,
    reduction: str,
    scale: float,
    with_grad: bool,
    is_real: Tensor,
    counts: Tensor | None,
    alphas: Tensor | None,
    alpha: float,
    beta: float,
    mc_samples: int,
) -> LossOutputs:
    rows = Rows(pred, target, ref_pred)
    groups = Groups.consecutive(rows.count, mc_samples)
    link = ddo_link(rows, is_real, counts, alpha, beta, 1 / mc_samples, reduction)
    link = link._replace(alphas=rows.scalars(alphas))
    return _run_loss(DDO, groups, rows, weight, element_mean, reduction, scale, with_grad, link)


def diffusion_dpo_loss(
    pred: Tensor,
    ref_pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    element_mean: bool,
    reduction: str,
    scale: float,
    with_grad: bool,
    beta: float,
    kind: str,
    interleaved: bool,
) -> LossOutputs:
    rows = Rows(pred, target, ref_pred)
    groups = Groups.consecutive(rows.count, 2) if interleaved else Groups.halves(rows.count)
    link = PreferenceLink(scalar.argument(beta, rows.dtype))
    return _run_loss(PREFERENCE[kind], groups, rows, weight, element_mean, reduction, scale, with_grad, link)


@triton.jit
def _kto_epilogue(args, group, sums, T: tl.constexpr):
    desirable = tl.load(args.link.is_desirable + group).to(tl.int32) != 0
    weight = tl.where(desirable, number(args.link.desirable_weight, T), number(args.link.undesirable_weight, T))
    rate = tl.where(desirable, 1.0, -1.0).to(T) * number(args.link.beta, T)
    x = rate * (sums[0] - tl.load(args.link.baseline))
    return _store_loss(args, group, sums[0], weight * sigmoid(-x), -weight * rate * sigmoid(x) * sigmoid(-x), T)


diffusion_kto_loss = difference_loss(_kto_epilogue)


def mapo_loss(
    pred: Tensor,
    target: Tensor,
    weight: Tensor | None,
    element_mean: bool,
    reduction: str,
    scale: float,
    with_grad: bool,
    beta: float,
    error_scale: float,
    timesteps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = Rows(pred, target)
    groups = Groups.halves(rows.count)
    term, error_slope = rows.new_vector(groups.count), rows.new_vector(rows.count)
    grad_pred = rows.new_output(pred.dtype) if with_grad else None
    numbers = (scalar.argument(value, rows.dtype) for value in (scale, beta, error_scale, timesteps))
    args = PairArgs(rows.scalars(weight), _element_scale(rows, element_mean), *numbers, term, error_slope)
    run(MAPO, groups, rows, args, grad_pred)
    loss = term if reduction == "none" else term.sum()
    return loss, error_slope, pred.new_empty((0,)) if grad_pred is None else grad_pred
