"""Where logits lie: rows and vocabulary divided among ranks, as DTensors or over a process group.

A rank's kernels see plain tensors: its own rows, of these its own columns, and what there is one of per row. This
module takes DTensors apart and puts results together again, and says no where tensors lie differently than the logits
they belong to. How a loss is made of columns of several ranks is in ``parallel.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.distributed import is_dtensor, mean_gradient, sharded_rows, sum_of_ranks, whole_parameters


class Slices(NamedTuple):
    """Consecutive columns of a vocabulary of `total`, a rank's own from `first` on."""

    group: str  # its name: what collectives under torch.compile take
    ranks: int
    rank: int
    first: int
    total: int
    equal: bool  # whether every rank is taken to have as many

    @classmethod
    def alone(cls, size: int) -> Slices:
        """All columns, on the one rank there is: the steps of a divided vocabulary, and no messages."""
        return cls("", 1, 0, 0, size, equal=False)

    @property
    def most(self) -> int:
        """The most columns that a rank has."""
        return -(-self.total // self.ranks)


class Layout(NamedTuple):
    """How logits are divided."""

    slices: Slices | None  # None: every rank has whole rows
    mesh: Any = None  # None: plain tensors
    placements: tuple[Any, ...] = ()  # of what there is one of per row

    def local(self, name: str, t: Tensor | None) -> Tensor | None:
        """A rank's part of what there is one of per row, or a vector of per row."""
        return None if t is None else self.own(name, t)

    def own(self, name: str, t: Tensor) -> Tensor:
        return t if self.mesh is None else self._spread(name, t).to_local()  # type: ignore[attr-defined]

    def spread(self, name: str, t: Tensor | None) -> Tensor | None:
        """The same as a DTensor where the logits are one: a plain tensor is what every rank has alike."""
        return t if t is None or self.mesh is None else self._spread(name, t)

    def _spread(self, name: str, t: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Replicate

        if not is_dtensor(t):
            replicated = [Replicate()] * self.mesh.ndim
            if any(not p.is_replicate() for p in self.placements):
                raise TypeError(
                    f"{name} is a plain tensor, but the logits' rows are sharded: pass"
                    f" distribute_tensor({name}, mesh, {list(self.placements)})"
                )
            return DTensor.from_local(t, self.mesh, replicated, run_check=False)
        if t.device_mesh != self.mesh:  # type: ignore[attr-defined]
            raise ValueError(f"{name} is on another mesh than the logits")
        if tuple(t.placements) != self.placements:  # type: ignore[attr-defined]
            raise ValueError(
                f"{name} has placements {list(t.placements)}, which do not fit the logits': pass"  # type: ignore[attr-defined]
                f" {name}.redistribute(placements={list(self.placements)})"
            )
        return t

    def rows(self, t: Tensor, rows: torch.Size | tuple[int, ...], stacked: bool = False) -> Tensor:
        """What ranks have found of their `rows`, a number each, or several in front."""
        if self.mesh is None:
            return t
        ahead = 1 if stacked else 0
        return sharded_rows(t, self.mesh, self.placements, (*t.shape[:ahead], *rows), ahead)

    def total(self, t: Tensor) -> Tensor:
        """The sum over all rows, of which ranks have found their own rows'."""
        return t if self.mesh is None else sum_of_ranks(t, self.mesh, self.placements)


def slices_of(group: Any, size: int) -> Slices:
    """Of a process group, whose ranks have `size` columns each, in their order."""
    if isinstance(group, Slices):
        return group
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"vocab_group must be a torch.distributed process group, got {type(group).__name__}")
    ranks, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    if rank < 0:
        raise ValueError("vocab_group is a process group that this rank is not part of")
    return Slices(group.group_name, ranks, rank, rank * size, ranks * size, equal=True)


def layout_of(vocab_group: Any, **logits: Tensor) -> Layout | None:
    """How logits [..., V], all alike, are divided; None where they are plain and whole."""
    (name, first), *others = logits.items()
    if not is_dtensor(first):
        if vocab_group is None:
            return None
        for other, t in others:
            _same_columns(name, first, other, t)
        return Layout(slices_of(vocab_group, first.shape[-1]))
    if vocab_group is not None:
        raise TypeError(f"vocab_group says how plain tensors are divided, but {name} is a DTensor: leave it out")
    mesh, placements = first.device_mesh, tuple(first.placements)  # type: ignore[attr-defined]
    dim = vocabulary_dim(name, placements, first.dim() - 1)
    for other, t in others:
        if t.device_mesh != mesh or tuple(t.placements) != placements:  # type: ignore[attr-defined]
            raise ValueError(
                f"{other} has placements {list(t.placements)}, but {name} has {list(placements)}: pass"  # type: ignore[attr-defined]
                f" {other}.redistribute(placements={list(placements)})"
            )
        if dim is not None:
            _same_columns(name, first, other, t)
    return Layout(mesh_slices(mesh, dim, first.shape[-1]), mesh, of_rows(placements, dim))


def _same_columns(name: str, first: Tensor, other: str, t: Tensor) -> None:
    if t.shape[-1] != first.shape[-1]:
        raise ValueError(
            f"{other} has {t.shape[-1]} columns, but {name} has {first.shape[-1]}: over a divided vocabulary they must"
            " be the same ones"
        )


def vocabulary_dim(name: str, placements: tuple[Any, ...], last: int) -> int | None:
    """The dimension of the mesh over which the vocabulary is divided, None if over none."""
    if any(p.is_partial() for p in placements):
        raise ValueError(
            f"{name} is a sum that is still divided among ranks: pass {name}.redistribute(placements=...) with Shard or"
            " Replicate instead of Partial"
        )
    found = [i for i, p in enumerate(placements) if p.is_shard() and p.dim in (last, -1)]
    if len(found) > 1:
        raise ValueError(
            f"{name} has its vocabulary sharded over {len(found)} dimensions of the mesh: shard it over one"
        )
    return found[0] if found else None


def mesh_slices(mesh: Any, dim: int | None, total: int) -> Slices | None:
    """Of `total` columns that a dimension of a mesh shards."""
    if dim is None:
        return None
    group, ranks = mesh.get_group(dim), mesh.size(dim)
    rank = mesh.get_local_rank(dim)
    each = -(-total // ranks)  # as torch.chunk has it
    return Slices(group.group_name, ranks, rank, min(rank * each, total), total, equal=False)


def of_rows(placements: tuple[Any, ...], dim: int | None) -> tuple[Any, ...]:
    """Placements of what there is one of per row."""
    from torch.distributed.tensor import Replicate

    return tuple(Replicate() if i == dim else p for i, p in enumerate(placements))


def local_logits(t: Tensor) -> Tensor:
    """A rank's part, of one column at least."""
    if not is_dtensor(t):
        return t
    part: Tensor = t.to_local()  # type: ignore[attr-defined]
    return part if part.shape[-1] else F.pad(part, (0, 1), value=-torch.inf)


# -- Collectives


def gathered(part: Tensor, slices: Slices) -> Tensor:
    """[ranks, ...]: what every rank has as `part`, the same to the bit on all of them."""
    if slices.ranks == 1:
        return part.unsqueeze(0)
    flat = part.reshape(-1)
    found = torch.ops._c10d_functional.all_gather_into_tensor(flat, slices.ranks, slices.group)
    whole: Tensor = torch.ops._c10d_functional.wait_tensor(found)
    return whole.view(slices.ranks, *part.shape)


def summed_later(t: Tensor, slices: Slices) -> Tensor:
    """The sum over ranks, once `ready` has waited for it: other work may go on meanwhile."""
    if slices.ranks == 1:
        return t.clone()
    total: Tensor = torch.ops._c10d_functional.all_reduce(t, "sum", slices.group)
    return total


def ready(t: Tensor, slices: Slices) -> Tensor:
    if slices.ranks == 1:
        return t
    total: Tensor = torch.ops._c10d_functional.wait_tensor(t)
    return total


# -- The reference, which has no divided vocabularies


class _Gathered(torch.autograd.Function):
    """All slices beside each other. Every rank computes the same of them: the gradient of its own is its part."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, slices: Slices, dim: int) -> Tensor:
        ctx.size, ctx.rank, ctx.dim = t.shape[dim], slices.rank, dim
        return torch.cat(list(gathered(t, slices)), dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.narrow(ctx.dim, ctx.rank * ctx.size, ctx.size), None, None


def whole_call(
    layout: Layout | None, function: Callable[..., Any], sliced: dict[str, Tensor | None], dim: int, **others: Any
) -> Any:
    """`function` of whole tensors, of which `sliced` are those that `dim` of is divided: on every rank the same."""
    if layout is None:
        return function(**sliced, **others)
    slices, mesh = layout.slices, layout.mesh

    def whole(t: Any) -> Any:
        return t.full_tensor() if is_dtensor(t) else t

    if mesh is None and slices is not None and slices.ranks > 1:
        sliced = {n: t if t is None else _Gathered.apply(t, slices, dim) for n, t in sliced.items()}
    found = function(**{n: whole(t) for n, t in (sliced | others).items()})
    if mesh is None:
        return found
    from torch.distributed.tensor import DTensor, Replicate

    results = found if isinstance(found, tuple) else (found,)
    spread = [DTensor.from_local(t, mesh, [Replicate()] * mesh.ndim, run_check=False) for t in results]
    return tuple(spread) if isinstance(found, tuple) else spread[0]


# -- Output layers


class Head(NamedTuple):
    """An output layer and its input."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def layout_of_heads(vocab_group: Any, **heads: Head) -> tuple[Layout | None, list[Head]]:
    """How the logits of output layers are divided, by the prefix of their names, and a rank's parts of them."""
    (first, one), *others = heads.items()
    for prefix, head in others:
        if is_dtensor(head.hidden) != is_dtensor(one.hidden):
            raise TypeError(f"{first}hidden and {prefix}hidden must both be DTensors or both plain tensors")
    for prefix, head in others:
        for name, t, whole in ((prefix, head.weight, one.weight), (first, one.weight, head.weight)):
            if is_dtensor(whole) and not is_dtensor(t) and not is_dtensor(one.hidden):
                _refuse_shard(f"{name}weight", t, whole)
    found = [_divided_head(prefix, head, vocab_group) for prefix, head in heads.items()]
    layout = found[0][0]
    for prefix, (other, parts) in zip(heads, found, strict=True):
        if other == layout and (layout is None or layout.slices is None or same_size(parts, found[0][1])):
            continue
        raise ValueError(
            f"the logits of {prefix}hidden and {prefix}weight are divided as {other}, those of {first}hidden and"
            f" {first}weight as {layout}: redistribute one of the two, whose vocabularies must be the same"
        )
    return layout, [parts for _, parts in found]


def _refuse_shard(name: str, t: Tensor, whole: Tensor) -> None:
    """What ``to_local`` makes of a sharded layer: beside a whole one it would pass for one of a small vocabulary."""
    ranks = whole.device_mesh.size()  # type: ignore[attr-defined]
    if t.shape[0] != whole.shape[0] and t.shape[0] == -(-whole.shape[0] // ranks):
        raise ValueError(
            f"{name} has {t.shape[0]} rows, as a rank's shard of {whole.shape[0]} has: pass the DTensor itself, which"
            " is gathered, instead of its to_local()"
        )


def same_size(a: Head, b: Head) -> bool:
    return a.weight.shape[0] == b.weight.shape[0]


def _divided_head(prefix: str, head: Head, vocab_group: Any) -> tuple[Layout | None, Head]:
    hidden, weight, bias = head
    if is_dtensor(hidden):
        if vocab_group is not None:
            raise TypeError(
                f"vocab_group says how plain tensors are divided, but {prefix}hidden is a DTensor: leave it out"
            )
        return _sharded_head(prefix, head)
    if vocab_group is None:
        return None, Head(hidden, *whole_parameters(weight, bias))
    slices_of(vocab_group, 0)  # says what is wrong with it
    weight, bias = (_columns_of(n, t, vocab_group) for n, t in ((f"{prefix}weight", weight), (f"{prefix}bias", bias)))
    return Layout(slices_of(vocab_group, weight.shape[0])), Head(hidden, weight, bias)


def _columns_of(name: str, t: Tensor | None, group: Any) -> Any:
    """A rank's slice of a parameter beside plain hidden states.

    Over the other dimensions of its mesh it is gathered, and its gradient the mean over them: ``whole_parameters``.
    """
    if t is None or not is_dtensor(t):
        return t
    from torch.distributed.tensor import Partial, Replicate, Shard

    mesh, placements = t.device_mesh, t.placements  # type: ignore[attr-defined]
    members = torch.distributed.get_process_group_ranks(group)
    dims = [i for i in range(mesh.ndim) if torch.distributed.get_process_group_ranks(mesh.get_group(i)) == members]
    if not dims and set(members).isdisjoint(set(mesh.mesh.flatten().tolist()) - {torch.distributed.get_rank()}):
        return whole_parameters(t, None)[0]  # FSDP2's shards of the slice, over ranks that have the same one
    if len(dims) != 1 or not (placements[dims[0]].is_shard() and placements[dims[0]].dim == 0):
        raise ValueError(
            f"{name} is a DTensor with placements {list(placements)}: its first dimension must be sharded over the"
            " dimension of its mesh that vocab_group is, or it must be a DTensor over other ranks, of this rank's slice"
        )
    (dim,) = dims
    wanted = [Shard(0) if i == dim else Replicate() for i in range(mesh.ndim)]
    gradient = [Shard(0) if i == dim else Partial() for i in range(mesh.ndim)]
    whole = t.redistribute(placements=wanted).to_local(grad_placements=gradient)  # type: ignore[attr-defined]
    return mean_gradient(whole, mesh.size() // mesh.size(dim))


def _sharded_head(prefix: str, head: Head) -> tuple[Layout, Head]:
    """Of DTensors, which together are one batch and one layer."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    hidden, weight, bias = head
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and not (is_dtensor(t) and t.device_mesh == hidden.device_mesh):  # type: ignore[attr-defined]
            raise TypeError(
                f"{prefix}hidden is a DTensor, but {prefix}{name} is none on its mesh: pass"
                f" distribute_tensor({prefix}{name}, mesh, placements), or {prefix}hidden.full_tensor() and all else"
                " whole too"
            )
    mesh, rows = hidden.device_mesh, tuple(hidden.placements)  # type: ignore[attr-defined]
    if vocabulary_dim(f"{prefix}hidden", rows, hidden.dim() - 1) is not None:
        raise ValueError(
            f"{prefix}hidden is sharded along its features: pass {prefix}hidden.redistribute(placements=...) with"
            " whole rows"
        )
    for name, t in (("weight", weight), ("bias", bias)):
        if t is None:
            continue
        if any(not (p.is_replicate() or (p.is_shard() and p.dim == 0)) for p in t.placements):  # type: ignore[attr-defined]
            raise ValueError(f"{prefix}{name} must have placements of Shard(0) and Replicate, got {list(t.placements)}")  # type: ignore[attr-defined]
    columns = [i for i, p in enumerate(weight.placements) if p.is_shard() and rows[i].is_replicate()]  # type: ignore[attr-defined]
    if len(columns) > 1:
        raise ValueError(
            f"{prefix}weight has its vocabulary sharded over {len(columns)} dimensions of the mesh: shard it over one"
        )
    dim = columns[0] if columns else None
    slices = mesh_slices(mesh, dim, weight.shape[0])
    if slices is not None and (slices.ranks - 1) * -(-slices.total // slices.ranks) >= slices.total:
        raise ValueError(f"{prefix}weight leaves ranks without any of its {slices.total} rows: shard it over fewer")
    wanted = [Shard(0) if i == dim else Replicate() for i in range(mesh.ndim)]
    gradient = [w if w.is_shard() else Partial() if r.is_shard() else r for w, r in zip(wanted, rows, strict=True)]

    def part(t: Any) -> Any:
        return None if t is None else t.redistribute(placements=wanted).to_local(grad_placements=gradient)

    return Layout(slices, mesh, rows), Head(hidden.to_local(), part(weight), part(bias))  # type: ignore[attr-defined]
