"""Batch-sharded DTensors and process groups.

A DTensor's operators need a rule that says which placements go in and come out. Ours work row by row, so a batch that
is sharded over dimension 0 stays where it is; only the scalar loss is summed over the mesh.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import _backend
from .reference.elbo import group_counts


def is_dtensor(t: object) -> bool:
    return type(t) is not Tensor and type(t).__name__ == "DTensor"


class _MeanGradient(torch.autograd.Function):
    """The identity; its gradient is divided by a number of ranks."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return t.view_as(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad / ctx.ranks, None


def whole_parameters(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The parameters of a layer, gathered where they are DTensors.

    Their gradients are the means over the ranks of what these compute. The mean is what FSDP2, HSDP and DDP make of the
    gradients of all other parameters, and between ranks that compute the same, as in tensor parallelism, it changes
    nothing. Ranks have rows of their own, so each has only a part of a gradient: ``full_tensor()`` as it is would take
    one rank's part for the whole.
    """
    return _whole(weight), None if bias is None else _whole(bias)


def _whole(t: Tensor) -> Tensor:
    if not is_dtensor(t):
        return t
    from torch.distributed.tensor import Partial

    mesh = t.device_mesh  # type: ignore[attr-defined]
    full = t.full_tensor(grad_placements=[Partial()] * mesh.ndim)  # type: ignore[attr-defined]
    return _MeanGradient.apply(full, mesh.size())  # a sum, then divided: gloo has no mean


def loss_counts(is_real: Tensor, group: Any) -> Tensor | None:
    """The numbers of real and fake images to divide by, where they are not those of the tensor at hand."""
    if is_dtensor(is_real):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = is_real.device_mesh  # type: ignore[attr-defined]
        n_real = is_real.sum().full_tensor()  # type: ignore[attr-defined]
        counts = torch.stack([n_real, is_real.shape[0] - n_real]).to(torch.float32)
        return DTensor.from_local(counts, mesh, [Replicate()] * mesh.ndim)
    return None if group is None else group_counts(is_real, group)


@functools.cache
def register_sharding_rules() -> None:
    """Called when the first DTensor arrives: importing DTensor is slow."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    rows, whole, share = Shard(0), Replicate(), Partial("sum")

    def placements(value: object, sharded: bool) -> object:
        return (rows if sharded else whole) if value is not None else None

    def row_rule(tensors: int, *values: Any) -> list[Any]:
        """`tensors` leading arguments with one entry a row; the rest are plain values; one output like them."""
        rules = []
        for sharded in (True, False):
            inputs = [placements(v, sharded) for v in values[:tensors]] + [None] * (len(values) - tensors)
            rules.append(([rows if sharded else whole], inputs))
        return rules

    def ddo_rule(*values: Any) -> list[Any]:
        streams, flags, counts = values[:4], values[7], values[8]
        per_term = values[5] == "none"
        rules: list[Any] = []
        for sharded in (True, False):
            inputs = [placements(v, sharded) for v in streams] + [None] * 3
            inputs += [placements(flags, sharded), None if counts is None else whole] + [None] * 3
            out = rows if sharded else whole
            loss = out if per_term or not sharded else share
            # Without a gradient that output is an empty vector, the same on every rank.
            rules.append(([loss, out, out, out if values[6] else whole], inputs))
        return rules

    def pair_rule(*values: Any) -> list[Any]:
        # Winners and losers lie half a batch apart: a shard of the batch does not hold its pairs.
        return [([whole] * 4, [placements(v, False) for v in values[:4]] + [None] * (len(values) - 4))]

    def distance_rule(*values: Any) -> list[Any]:
        rules: list[Any] = []
        for sharded in (True, False):
            streams = rows if sharded else whole
            rules.append(
                ([share if sharded else whole, streams if values[3] else whole], [streams, streams, None, None])
            )
        return rules

    rules = {
        "elbo_error": functools.partial(row_rule, 3),
        "elbo_error_backward": functools.partial(row_rule, 4),
        "l1_distance": distance_rule,
        "elbo_difference": functools.partial(row_rule, 4),
        "row_combination": functools.partial(row_rule, 4),
        "ddo_loss": ddo_rule,
        "diffusion_dpo_loss": pair_rule,
    }
    for name, rule in rules.items():
        for overload in (_backend.operators[name].native, _backend.operators[name].triton):
            register_sharding(overload)(rule)  # type: ignore[arg-type]
