"""The losses of score distillation over batches that are sharded among ranks.

Samples do not see each other: a rank computes the loss of its own, and only the sum, or the mean, is over all ranks.
What the mean divides by is counted over the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.distributed import is_dtensor, sharded_rows, sum_of_ranks
from .reference import DistillationStats


def on_own_samples(
    function: Callable[..., Any],
    x: Tensor,
    given: dict[str, Tensor | None],
    reduction: str,
    mask: Tensor | None,
    return_stats: bool,
) -> Any:
    """The results of ``function(x, given, mask=, reduction=, return_stats=)`` of a rank's samples, as DTensors."""
    mesh, placements = x.device_mesh, tuple(x.placements)  # type: ignore[attr-defined]
    if any(not (p.is_replicate() or (p.is_shard() and p.dim == 0)) for p in placements):
        raise ValueError(f"x must be sharded along its batch alone, got placements {list(placements)}: redistribute it")
    own = {name: None if t is None else _own(name, t, x) for name, t in given.items()}
    own_mask = None if mask is None else _own("mask", mask, x)
    found = function(
        x.to_local(),  # type: ignore[attr-defined]
        own,
        mask=own_mask,
        reduction="none" if reduction == "none" else "sum",
        return_stats=return_stats,
    )
    loss, stats = found if return_stats else (found, None)

    def rows(t: Tensor, ahead: int = 0) -> Tensor:
        """A rank's samples as part of all, behind `ahead` dimensions."""
        shape = (*t.shape[:ahead], x.shape[0], *t.shape[ahead + 1 :])
        return sharded_rows(t, mesh, placements, shape, ahead)

    count: Any = x.numel() if mask is None else mask.expand(x.shape).sum().to(torch.float32).clamp(min=1)
    whole = rows(loss) if reduction == "none" else sum_of_ranks(loss, mesh, placements)
    if reduction in ("mean", "sum_per_batch"):
        whole = whole / (count if reduction == "mean" else max(x.shape[0], 1))
    if stats is None:
        return whole
    ahead = stats.grad_abs.dim()  # of two terms
    norms = rows(stats.grad_norm, ahead)
    return whole, DistillationStats(
        whole.detach(),
        norms.flatten(ahead).sum(-1) / count,
        rows(stats.normalizer, ahead),
        sum_of_ranks(stats.skipped, mesh, placements),
        norms,
        rows(stats.skips),
    )


def _own(name: str, t: Tensor, x: Tensor) -> Tensor:
    """A rank's part of `t`: of its samples, where it has any of their own."""
    from torch.distributed.tensor import Replicate

    mesh, placements = x.device_mesh, tuple(x.placements)  # type: ignore[attr-defined]
    each = t.dim() > 0 and t.shape[0] == x.shape[0] and (name != "mask" or t.dim() == x.dim())
    wanted = list(placements) if each else [Replicate()] * mesh.ndim
    if not is_dtensor(t):
        if any(not p.is_replicate() for p in wanted):
            raise TypeError(
                f"{name} is a plain tensor, but x is sharded: pass distribute_tensor({name}, mesh, {wanted})"
            )
        return t
    if t.device_mesh != mesh or list(t.placements) != wanted:  # type: ignore[attr-defined]
        raise ValueError(
            f"{name} has placements {list(t.placements)}, which do not fit those of x: pass"  # type: ignore[attr-defined]
            f" {name}.redistribute(placements={wanted})"
        )
    part: Tensor = t.to_local()  # type: ignore[attr-defined]
    return part
