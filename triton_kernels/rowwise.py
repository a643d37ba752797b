"""The row-wise skeleton in Triton: reduce a row to a few sums, run the epilogue, map the row while it is on chip.

The counterpart of ``csrc/skeleton/formula.h`` and ``csrc/skeleton/rowwise.h``. A family brings ``@triton.jit``
functions:

    row(args, row, rank, T) -> (scale, ...)      constants of a row; its sums enter the group's times the first one
    accumulate(constants, v) -> (share, ...)     what one element of the streams v adds to each sum
    epilogue(args, group, sums, T) -> slope      runs for each group; stores its results
    coefficient(args, row, rank, constants, slope, T) -> number           for each row; may store
    map(constants, coefficient, v) -> value      one output element
    second(constants, v) -> value                one of a second output, where a formula has two

`args` is a NamedTuple of the family's own: tensors (or None), integers, and floats by :func:`scalar.argument`. T is the
arithmetic type; `row` and `rank` may be scalars or tiles, so functions must be elementwise. Epilogues and coefficients
may run more than once for the same group or row, then with the same numbers, so all they do is store.

A stream may be a mask (bool, read as 0 and 1) or None: then its place in `v` holds None, which functions may test. What
an epilogue and a coefficient return may be tuples.

Sums have one fixed tree for a given shape, dtype and device; there are no atomics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import layout, scalar
from .plan import Plan, groups_plan, map_plan, offsets_type, unit_of
from .rowwise_kernels import finish, held_groups, looped_groups, partial_sums


class Functions(NamedTuple):
    """What of a formula the kernels call."""

    row: Any
    accumulate: Any = None
    epilogue: Any = None
    coefficient: Any = None
    map: Any = None
    second: Any = None


@dataclass(frozen=True)
class Formula:
    """`sums` numbers that a row reduces to (0: map only); the first `map_streams` streams feed the map (0: no map)."""

    functions: Functions
    sums: int = 0
    map_streams: int = 0


@dataclass(frozen=True)
class Groups:
    """Which rows belong together: row ``group * stride + rank * row_stride`` is the rank-th of its group."""

    count: int
    rows: int = 1
    stride: int = 1
    row_stride: int = 1

    @staticmethod
    def consecutive(rows: int, each: int) -> Groups:
        return Groups(rows // each, each, each, 1)

    @staticmethod
    def halves(rows: int) -> Groups:
        return Groups(rows // 2, 2, 1, rows // 2)


class Rows:
    """Tensors of one shape as rows: read in place where all share one dense row layout, else copied once.

    The first is there; others may be None. The arithmetic is float64 as soon as a tensor or `dtype` is.
    """

    def __init__(self, first: Tensor, *others: Tensor | None, dtype: torch.dtype | None = None) -> None:
        self.tensors = layout.as_rows(*(t for t in (first, *others) if t is not None))
        self.first = self.tensors[0]
        self.count = first.shape[0]
        self.size = layout.row_size(first)
        self.dtype = torch.float64 if dtype == torch.float64 else layout.arithmetic_dtype(*self.tensors)
        present = iter(self.tensors)
        self.streams = tuple(None if t is None else next(present) for t in (first, *others))

    @property
    def strides(self) -> list[int]:
        return [t.stride(0) if t is not None and self.count > 1 else 0 for t in self.streams]

    def itemsize(self, out: Tensor | None) -> int:
        """Of the narrowest, masks aside: what they need is little beside the rest, and would make tiles large."""
        of = (self.first if out is None else out, *self.tensors)
        return min((t.element_size() for t in of if t.dtype != torch.bool), default=1)

    def new_output(self, dtype: torch.dtype) -> Tensor:
        return layout.new_output(*self.tensors, dtype=dtype)

    def new_vector(self, size: int) -> Tensor:
        return self.first.new_empty((size,), dtype=self.dtype)

    def scalars(self, t: Tensor | None) -> Tensor | None:
        """Per-row numbers in the arithmetic dtype."""
        return None if t is None else t.to(self.dtype).contiguous()

    def argument(self, value: Any) -> Any:
        """An operator's argument as a kernel takes it: flags, numbers in the arithmetic dtype, an integer."""
        if isinstance(value, Tensor):
            return value.contiguous() if value.dtype == torch.bool else self.scalars(value)
        return scalar.argument(value, self.dtype) if isinstance(value, float) else value


def launch(kernel: Any, programs: int, like: Tensor, *args: Any, **constants: Any) -> None:
    """On the current stream of the device that `like` is on, which need not be the current device."""
    if not like.is_cuda:
        kernel[(programs,)](*args, **constants)
    elif like.get_device() == torch.cuda.current_device():
        launch_compiled(kernel, programs, like.get_device(), args, constants)
    else:
        with torch.cuda.device_of(like):
            launch_compiled(kernel, programs, like.get_device(), args, constants)


_compiled: dict[tuple[Any, ...], Any] = {}


def launch_compiled(
    kernel: Any, programs: int, device: int, args: tuple[Any, ...], constants: Mapping[str, Any]
) -> None:
    """On the current device, which is number `device`. Triton looks a compiled kernel up anew at every launch, which
    takes longer than the rest of a small one; here it is looked up by all that Triton may compile one for."""
    key = launch_key(kernel, device, args, constants)
    compiled = _compiled.get(key)
    if compiled is None:
        _compiled[key] = kernel[(programs,)](*args, **constants)
    else:
        compiled[programs, 1, 1](*args, *[constants[name] for name in kernel.arg_names[len(args) :]])


def launch_key(kernel: Any, device: int, args: tuple[Any, ...], constants: Mapping[str, Any]) -> tuple[Any, ...]:
    """All that Triton may compile a kernel anew for. Functions are known by where they are, for they live as long as
    their modules; Triton hashes their sources."""
    key: list[Any] = [id(kernel), device, *constants]
    _add_aspects(key, args)
    for value in constants.values():
        kind = type(value)
        key.append(id(value) if kind is triton.JITFunction or kind is tl.dtype else value)
    return tuple(key)


def _add_aspects(key: list[Any], args: Iterable[Any]) -> None:
    """Of every argument what Triton specializes a kernel for: a tensor's dtype and whether it starts at 16 bytes, an
    integer's type and whether it is 1 or a multiple of 16, a float's type, and anything else itself."""
    add = key.append
    for value in args:
        kind = type(value)
        if kind is Tensor or isinstance(value, Tensor):
            add(value.dtype)
            add(value.data_ptr() % 16 == 0)
        elif value is None or kind is float:
            add(kind)
        elif kind is int:
            add((value == 1, value % 16 == 0, -(2**31) <= value < 2**31, value >= 2**63))
        elif kind is triton.JITFunction:
            add(id(value))
        elif isinstance(value, tuple):
            add((kind, len(value)))
            _add_aspects(key, value)
        else:
            add(value)


def run(
    formula: Formula,
    groups: Groups,
    rows: Rows,
    args: Any,
    out: Tensor | None = None,
    second: Tensor | None = None,
) -> None:
    """Runs `formula` over `rows`; `out` and `second` have the layout of :meth:`Rows.new_output`."""
    if groups.count == 0:
        return
    first, strides, itemsize = rows.first, rows.strides, rows.itemsize(out)
    unit = unit_of((rows.size, *strides), itemsize)
    streams = (
        formula.functions,
        rows.streams,
        tuple(s // unit for s in strides),
        args,
        out,
        second,
        rows.size // unit,
        groups.rows,
        groups.stride,
        groups.row_stride,
    )
    constants = {
        "UNIT": unit,
        "INDEX": offsets_type(rows.size),
        "T": tl.float64 if rows.dtype == torch.float64 else tl.float32,
        "SUMS": formula.sums,
        "STREAMS": len(rows.streams),
        "MAP_STREAMS": formula.map_streams,
    }
    if formula.sums == 0:
        _launch_finish(
            map_plan(rows.size, itemsize, len(rows.tensors), first.device), first, groups, streams, None, constants
        )
        return
    width = 8 if rows.dtype == torch.float64 else 4
    plan = groups_plan(
        rows.size, groups.count, groups.rows, itemsize, width, len(rows.tensors), formula.sums, first.device
    )
    constants |= {"BLOCK": plan.block, "num_warps": plan.num_warps}
    if plan.kind == "held":
        launch(held_groups, groups.count, first, *streams, RANKS=triton.next_power_of_2(groups.rows), **constants)
    elif plan.kind == "looped":
        launch(looped_groups, groups.count, first, *streams, **constants)
    else:
        segments = triton.cdiv(rows.size, plan.segment)
        programs = groups.count * groups.rows * segments
        partials = first.new_empty((programs * formula.sums,), dtype=rows.dtype)
        launch(partial_sums, programs, first, *streams, partials, segments, plan.segment // plan.block, **constants)
        _launch_finish(plan, first, groups, streams, partials, constants)


def _launch_finish(
    plan: Plan, like: Tensor, groups: Groups, streams: Sequence[Any], partials: Tensor | None, constants: dict[str, Any]
) -> None:
    _, _, _, _, out, _, units = streams[:7]
    segments = triton.cdiv(units * constants["UNIT"], plan.segment)
    constants = constants | {
        "BLOCK": plan.block,
        "num_warps": plan.num_warps,
        "RANKS": triton.next_power_of_2(groups.rows) if partials is not None else 1,
        "SEGMENTS": triton.next_power_of_2(segments) if partials is not None else 1,
    }
    shares = segments if out is not None else 1  # without an output only the epilogues are left to do
    programs = groups.count * groups.rows * shares
    blocks = plan.segment // plan.block
    launch(finish, programs, like, *streams, partials, segments, blocks, shares, **constants)
