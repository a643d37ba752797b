"""What the losses of ``sequence`` have in common: the checks of their options, and what their sums are divided by."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..core import checks, distributed
from . import reference
from .head import LogitTransform
from .layout import Layout

TOKEN_REDUCTIONS = ("batchmean", "sum", "mean", "none")

Reduction = Literal["batchmean", "sum", "mean", "none"]


def check_rows(
    rows: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    num_items: float | Tensor | None,
    ignore_index: int,
    name: str = "weight",
) -> None:
    """Which rows of `rows` [..., N] count, how much, and what their sum is divided by."""
    check_plain(rows, labels=labels, mask=mask, **{name: weight})
    if labels is not None:
        checks.row_indices("labels", labels, rows)
    if mask is not None:
        if labels is not None:
            raise ValueError("mask and labels both say which tokens count: pass one of them")
        checks.mask("mask", mask, rows, rows.shape[:-1])
    if weight is not None:
        checks.floating(name, weight)
        if weight.shape != rows.shape[:-1]:
            raise ValueError(f"{name} must have shape {list(rows.shape[:-1])}, got {list(weight.shape)}")
        if weight.device != rows.device:
            raise ValueError(f"{name} is on {weight.device}, but the batch is on {rows.device}")
    checks.choice("reduction", reduction, TOKEN_REDUCTIONS)
    checks.integer("ignore_index", ignore_index)
    if isinstance(num_items, Tensor):
        checks.real("num_items", num_items)
        if num_items.dim() != 0:
            raise ValueError(f"num_items must be a number or a 0-dimensional tensor, got shape {list(num_items.shape)}")
    elif num_items is not None:
        checks.number("num_items", num_items, low=0, open_low=True)


def check_plain(rows: Tensor, **others: Tensor | None) -> None:
    """Beside plain rows there is no DTensor; beside a DTensor a layout says what fits."""
    for name, t in others.items():
        if t is not None and not distributed.is_dtensor(rows):
            checks.local(name, t)


def check_divergence(beta: float, scaled: bool, temperature: float) -> None:
    if checks.number("beta", beta, low=0) > 1:
        raise ValueError(f"beta must be in [0, 1], got {beta}")
    if not isinstance(scaled, bool):
        raise TypeError(f"scaled must be a bool, got {type(scaled).__name__}")
    checks.number("temperature", temperature, low=0, open_low=True)


def check_cross_entropy(labels: Tensor | None, cross_entropy_weight: float, return_cross_entropy: bool) -> float:
    """The weight of the labels' cross-entropy in a divergence."""
    weight = checks.number("cross_entropy_weight", cross_entropy_weight, low=0)
    if labels is None and (weight > 0 or return_cross_entropy):
        raise ValueError("labels must be the tokens where cross_entropy_weight or return_cross_entropy asks for them")
    if return_cross_entropy and weight == 0:
        raise ValueError("return_cross_entropy needs a cross_entropy_weight > 0: without one there is none")
    return weight


def check_transform(prefix: str, logit_scale: float, softcap: float | None) -> LogitTransform:
    """What a model does with the output of its head."""
    logit_scale = checks.number(f"{prefix}logit_scale", logit_scale, low=0, open_low=True)
    if softcap is not None:
        softcap = checks.number(f"{prefix}softcap", softcap, low=0, open_low=True)
    return LogitTransform(logit_scale, softcap)


def check_rounding(round_logits: bool, name: str, hidden: Tensor) -> None:
    if not isinstance(round_logits, bool):
        raise TypeError(f"round_logits must be a bool, got {type(round_logits).__name__}")
    if round_logits and reference.autocast_dtype(hidden) == torch.float16:
        raise ValueError(f"round_logits must be False where {name} is float16: the gradient of its logits underflows")


def spread_rows(
    layout: Layout, rows: Tensor, labels: Tensor | None, mask: Tensor | None, weight: Tensor | None
) -> tuple[Tensor | None, ...]:
    """What there is one of per row, as the divided rows [..., N] are."""
    given = {"labels": labels, "mask": expanded(mask, rows.shape[:-1]), "weight": weight}
    return tuple(layout.spread(name, t) for name, t in given.items())


def expanded(mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    return None if mask is None else mask.expand(shape)


def labels_of(rows: Tensor, labels: Tensor | None, mask: Tensor | None, ignore_index: int) -> Tensor | None:
    """Labels of which `ignore_index` alone matters, from them or from a mask."""
    if mask is None:
        return labels
    return torch.where(mask.expand(rows.shape[:-1]), int(ignore_index == 0), ignore_index)


def unscaled(beta: float, scaled: bool) -> float:
    """What `scaled` divides a divergence by, and nothing that is added to one."""
    return beta * (1 - beta) if scaled and 0 < beta < 1 else 1.0


def scale_of(
    rows: Tensor,
    dtype: torch.dtype,
    labels: Tensor | None,
    reduction: str,
    num_items: float | Tensor | None,
    ignore_index: int,
    vocabulary: int,
    beta: float,
    scaled: bool,
) -> Tensor | None:
    """What the sum over rows is multiplied by, 0-dimensional: no value on the device is read."""
    factor = 1 / unscaled(beta, scaled)
    if reduction == "mean":
        factor /= vocabulary
    if num_items is None and reduction in ("sum", "none"):
        return None if factor == 1 else rows.new_full((), factor, dtype=dtype)
    counted = None if labels is None else labels != ignore_index
    items = reference.item_count(rows.shape[:-1].numel(), counted, num_items)
    if isinstance(items, Tensor):
        return factor / items.to(device=rows.device, dtype=dtype)
    return rows.new_full((), factor / items, dtype=dtype)


def reduced(
    rows: Tensor,
    labels: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    reduction: str,
    ignore_index: int,
) -> Tensor:
    """The losses of rows, or their sum, times weights, of which those of ignored rows may be anything, and a scale."""
    if weight is not None:
        weight = weight.detach() if labels is None else torch.where(labels != ignore_index, weight.detach(), 0)
        rows = rows * weight.to(rows.dtype)
    loss = rows if reduction == "none" else rows.sum()
    return loss if scale is None else loss * scale
