"""Batch-sharded DTensors and process groups.

A DTensor's operators need a rule that says which placements go in and come out. Ours work by rows or by groups of
neighbouring rows, so a batch in shards that hold whole groups stays where it is; only the scalar loss is summed over
the mesh. The rules follow from the roles of an operator's arguments and results.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import dispatch
from .operator import Operator, Role, operators


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
    return mean_gradient(full, mesh.size())  # a sum, then divided: gloo has no mean


def mean_gradient(t: Tensor, ranks: int) -> Tensor:
    """`t`, whose gradient is divided by a number of ranks."""
    return _MeanGradient.apply(t, ranks)


def sharded_rows(t: Tensor, mesh: Any, placements: Sequence[Any], shape: Sequence[int], ahead: int = 0) -> Tensor:
    """A DTensor of `shape` whose rows, behind `ahead` dimensions, lie as `placements` say; `t` is this rank's part."""
    from torch.distributed.tensor import DTensor, Shard

    where = [Shard(p.dim + ahead) if p.is_shard() else p for p in placements]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(t, mesh, where, run_check=False, shape=torch.Size(shape), stride=stride)


def sum_of_ranks(t: Tensor, mesh: Any, placements: Sequence[Any]) -> Tensor:
    """The sum over rows that lie as `placements` say, of which `t` is that of this rank's."""
    from torch.distributed.tensor import DTensor, Partial

    return DTensor.from_local(t, mesh, [Partial("sum") if p.is_shard() else p for p in placements], run_check=False)


def group_counts(is_real: Tensor, group: Any = None) -> Tensor:
    """The numbers of real and fake images; over a process group, the mean of a rank's.

    Data parallelism averages gradients over ranks, so a rank divides by the mean count to make that average global.
    """
    n_real = is_real.sum()
    counts = torch.stack([n_real, len(is_real) - n_real]).to(torch.float32)
    if group is not None:
        torch.distributed.all_reduce(counts, group=group)
        counts = counts / torch.distributed.get_world_size(group)
    return counts


def loss_counts(is_real: Tensor, group: Any) -> Tensor | None:
    """The numbers of real and fake images to divide by, where they are not those of the tensor at hand."""
    if is_dtensor(is_real):
        from torch.distributed.tensor import DTensor, Replicate

        mesh = is_real.device_mesh  # type: ignore[attr-defined]
        n_real = is_real.sum().full_tensor()  # type: ignore[attr-defined]
        counts = torch.stack([n_real, is_real.shape[0] - n_real]).to(torch.float32)
        return DTensor.from_local(counts, mesh, [Replicate()] * mesh.ndim)
    return None if group is None else group_counts(is_real, group)


def batch_mean(rows: Tensor, group: Any = None) -> Tensor:
    """The mean of one number a row over the whole batch: all ranks of a process group, all shards of a DTensor."""
    total, count = rows.sum(), rows.shape[0]
    if is_dtensor(rows):
        from torch.distributed.tensor import Replicate

        total = total.redistribute(placements=[Replicate()] * rows.device_mesh.ndim)  # type: ignore[attr-defined]
    elif group is not None:
        sums = torch.stack([total, torch.full_like(total, count)])
        torch.distributed.all_reduce(sums, group=group)
        return sums[0] / sums[1].clamp(min=1)
    return total / max(count, 1)


def row_dim(role: Role | None, dims: int, batch: int | None = None, size: int | None = None) -> int | None:
    """The dimension of a tensor of this role that its rows, or groups of rows, lie in; None if in none."""
    if role in (Role.STACKED, Role.STACKED_GROUP):
        return 1 if dims > 1 else 0
    if role is Role.WHOLE or (role is Role.ROW_OR_ALL and size == 1 and batch != 1):
        return None
    return 0


def whole_groups(rows: int, together: int, mesh: tuple[int, ...]) -> bool:
    """Whether no group of `together` neighbouring rows is parted by shards, as torch.chunk cuts them, over a mesh.

    Over several dimensions the operators may come to shard over any of them, so the rows must divide by all.
    """
    if together == 1:
        return True
    if len(mesh) == 1:
        return -(-rows // mesh[0]) % together == 0
    return rows % (together * math.prod(mesh)) == 0


# What shards of a batch part whose first half are winners and whose second half the losers.
HALVES = "winners from their losers, half a batch away"


def check_groups(streams: Mapping[str, Tensor], together: int, parted: str, instead: str | None = None) -> None:
    """Refuses DTensors in shards that part groups of `together` rows: operators would have to gather them.

    The error says what is `parted`, and what to do `instead` of gathering; by default, to have rows that divide.
    """
    for name, t in streams.items():
        if not is_dtensor(t):
            return
        mesh, rows = t.device_mesh, t.shape[0]  # type: ignore[attr-defined]
        by_rows = any(placement.is_shard(0) for placement in t.placements)  # type: ignore[attr-defined]
        if by_rows and not whole_groups(rows, together, mesh.shape):
            instead = instead or f"let the rows be a multiple of {together * mesh.size()}"
            whole = "[Replicate()]" if mesh.ndim == 1 else f"[Replicate()] * {mesh.ndim}"
            raise ValueError(
                f"{name} is a DTensor of {rows} rows that are sharded over a mesh {list(mesh.shape)}, which parts"
                f" {parted}: {instead}, or gather them by {name}.redistribute(placements={whole})"
            )


def _group_rows(op: Operator, bound: Mapping[str, Any], rows: int) -> int:
    """How many neighbouring rows make one group; all, where a group's are half a batch apart."""
    if op.paired:
        return 2 if bound.get("interleaved", False) else max(rows, 1)
    for name, value in bound.items():
        if op.arguments[name] is Role.GROUP and value is not None:
            return rows // max(value.shape[0], 1) or 1
    return bound.get("group_rows", 1)


def sharding_rule(op: Operator, *values: Any) -> list[Any]:
    """The placements that may go into `op` and come out: the rows sharded, where that parts no group, or nothing."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    bound = op.bind(*values)
    first = next(v for n, v in bound.items() if op.arguments[n] in (Role.STREAM, Role.WRITTEN, Role.LOGITS))
    rows = first.shape[0]

    def argument(name: str, sharded: bool) -> object:
        value, role = bound[name], op.arguments[name]
        if value is None or role is None:
            return None
        dim = row_dim(role, len(value.shape), rows, value.shape[0] if len(value.shape) else None)
        return Shard(dim) if sharded and dim is not None else Replicate()

    def result(name: str, sharded: bool) -> object:
        role, count = op.results[name].role, op.results[name].count
        if not sharded or (role is Role.GRADIENT and not bound.get("with_grad", True)):
            return Replicate()  # the gradient that is not wanted is an empty vector, the same on every rank
        if role is Role.LOSS and bound.get("reduction", "sum") != "none":
            return Partial("sum")
        return Shard(row_dim(role, 1 if count is None else 2) or 0)

    row_wise = Role.STREAM in op.arguments.values() or Role.LOGITS in op.arguments.values()
    stays = row_wise and whole_groups(rows, _group_rows(op, bound, rows), first.device_mesh.shape)
    choices = (True, False) if stays else (False,)
    return [
        ([result(n, sharded) for n in op.results], [argument(n, sharded) for n in op.arguments]) for sharded in choices
    ]


@functools.cache
def register_sharding_rules() -> None:
    """Called when the first DTensor arrives: importing DTensor is slow."""
    from torch.distributed.tensor.experimental import register_sharding

    for op in operators.values():
        if any(role is not Role.WHOLE for role in op.arguments.values() if role is not None) and op.results:
            for overload in (op.native, op.triton):
                register_sharding(overload)(functools.partial(sharding_rule, op))  # type: ignore[arg-type]


def backend_of(name: str, x: Tensor) -> str:
    """The backend that runs the operator `name` now, which takes `x` sharded over its batch too."""
    if is_dtensor(x):
        register_sharding_rules()
    return dispatch.backend_for(name, x.device.type)


def place_in(group: Any) -> tuple[int, int]:
    """This process's place in a process group, and the number of its ranks; of None, 0 and 1."""
    if group is None:
        return 0, 1
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed process group that this rank is in, got {group!r}")
    return torch.distributed.get_rank(group), torch.distributed.get_world_size(group)


def check_alike(group: Any, device: torch.device, **numbers: int | Tensor) -> None:
    """Raises ValueError on every rank of a group where a number, an integer, is not the same on all; one collective."""
    place_in(group)
    own = torch.stack([torch.as_tensor(n, dtype=torch.int64, device=device) for n in numbers.values()])
    ends = torch.stack([own, -own])
    torch.distributed.all_reduce(ends, op=torch.distributed.ReduceOp.MIN, group=group)
    for name, least, most in zip(numbers, *ends.tolist(), strict=True):
        if least != -most:
            raise ValueError(f"{name} must be the same on all ranks of the group, but differs between them")


def fingerprint(t: Tensor) -> Tensor:
    """An integer that tells tensors apart: of their bits and places, so the same wherever it is computed."""
    if t.is_complex():
        t = torch.view_as_real(t)
    bits = t.detach().flatten()
    if bits.is_floating_point():
        bits = bits.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.element_size()])
    # Large odd factors, of one element's bits and its place; a sum that wraps is the same in any order.
    mixed = bits.to(torch.int64) * 0x1E3779B97F4A7C15 + torch.arange(len(bits), device=bits.device) * 0x3F58476D1CE4E5B9
    mixed = (mixed ^ (mixed >> 31)) * 0x14D049BB133111EB
    return (mixed ^ (mixed >> 29)).sum() >> 1  # one bit less, so that it has a negative
