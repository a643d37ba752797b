"""What the compilers make of the kernels, without a GPU: registers, spills, shared memory, width of memory accesses,
bytes moved per element against the floor, instructions an element of each loop, and what they bound on an H100
(``sass``).

    python -m benchmarks.aot [--part triton] [--arch 90] [--dtype bf16] [--only PATTERN]

Triton kernels are compiled as their launchers would launch them: the launchers run on meta tensors under a driver that
names a target instead of a device, and every launch is compiled and not run. So a variant cannot be forgotten or
differ from the real one. It takes a process of its own, without TRITON_INTERPRET. The CUDA sources are compiled by
nvcc (``aot_cuda``). All of both takes a quarter of an hour on four cores; the options leave out what is not wanted.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from tqdm import tqdm

import fastgen
from fastgen.cases import FAMILIES, Case
from fastgen.core.operator import operators

from . import aot_cuda, sass
from .driver import Target

ARCHITECTURES = (80, 90, 100)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
Streams = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Report:
    """One kernel of one variant on one architecture; 16-byte accesses are what memory-bound code wants."""

    kernel: str
    variant: str
    arch: int
    num_warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: int
    loads: dict[int, int]  # width in bytes -> global load instructions
    stores: dict[int, int]
    narrow_reads: int  # bytes per element, of all sweeps in the code, that 16-byte loads do not move; 0 is what we want
    narrow_writes: int
    moved_bytes: int  # per element of a row, that the kernel asks of the caches or the memory
    floor_bytes: int  # the same where each input is read and each output written once; 0 where rows are not the matter
    resident_threads: int  # of a multiprocessor
    loops: list[
        tuple[float, float, float, float]
    ]  # instructions an element: all, special, conversions, 64-bit integers
    bound: str  # what an H100 waits for: memory (the floor), issue, special functions or conversions
    share: float  # of a copy's speed, predicted


# The streams that a kernel of the row-wise skeleton reads, of (all, mapped).
SWEEPS: dict[str, Callable[[Streams, Streams], Streams]] = {
    "held_groups": lambda streams, mapped: streams,
    "looped_groups": lambda streams, mapped: streams + mapped,
    "partial_sums": lambda streams, mapped: streams,
    "finish": lambda streams, mapped: mapped,
}


def _steps(constants: dict[str, Any]) -> tuple[str, int, bool]:
    """Of a kernel over logits: its steps, sweeps over the inputs, and whether it writes an output."""
    steps = ("normalizers", "sums", "results", "map")[constants["FIRST"].value : constants["LAST"].value + 1]
    sweeps = [step for step in steps if step != "results" and (step != "sums" or constants["S"].SUMS > 0)]
    at_once = constants["AT_ONCE"] and len(sweeps) == 3  # the last two are one
    return " to ".join(dict.fromkeys((steps[0], steps[-1]))), len(sweeps) - at_once, "map" in steps


def _bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    return sum(t.element_size() for t in tensors if t is not None)


@dataclass(frozen=True)
class Launch:
    """A compiled kernel and what its launch would have swept; see :class:`Report`."""

    kernel: Any
    tile: int = 0  # elements of a row that a program takes at a time; 0: not a sweep over rows
    reads: Streams = ()  # one for each sweep over a tile in the code
    writes: Streams = ()
    moved_bytes: int = 0
    floor_bytes: int = 0
    steps: str = ""  # of a sweep over logits
    element_bytes: int = 0  # the same: of all inputs

    @staticmethod
    def of(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> Launch:
        name = kernel.metadata.name
        if name == "_scale_in_place":
            return Launch(kernel, constants["BLOCK"], args[:1], args[:1], *(2 * [2 * args[0].element_size()]))
        if name == "_sweep":
            return Launch._logits(kernel, args, constants)
        return Launch._rowwise(kernel, name, args, constants) if name in SWEEPS else Launch(kernel)

    @staticmethod
    def _logits(kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> Launch:
        (steps, sweeps, writes), S = _steps(constants), constants["S"]
        inputs, outs = args[1][: S.STREAMS], args[1][S.STREAMS :]
        written = outs[:1] if writes else ()
        if not sweeps:
            return Launch(kernel, steps=steps)
        moved, floor = _bytes(inputs) * sweeps + _bytes(written), _bytes((*inputs, *outs))
        tile = S.LANES * S.TILES * S.WIDTH
        return Launch(kernel, tile, inputs * sweeps, written, moved, floor, steps, _bytes(inputs))

    @staticmethod
    def _rowwise(kernel: Any, name: str, args: tuple[Any, ...], constants: dict[str, Any]) -> Launch:
        streams = tuple(t for t in args[1] if t is not None)
        mapped = tuple(t for t in args[1][: constants["MAP_STREAMS"]] if t is not None)
        outs = tuple(t for t in args[4:6] if t is not None)
        reads = SWEEPS[name](streams, mapped if outs else ())
        written = outs if name != "partial_sums" else ()
        wide = tuple(t for t in reads if t.dtype != torch.bool)  # masks are narrow, and matter little
        tile = constants["BLOCK"] * (constants["RANKS"] if name == "held_groups" else 1)
        return Launch(kernel, tile, wide, written, _bytes((*reads, *written)), _bytes((*streams, *outs)))

    def turns(self, function: sass.Function) -> list[sass.Loop]:
        """The loops over the tiles of a row; code without one, which sees each element once, as a whole. Of a sweep
        over logits those that most elements take: not those of a block that is not full."""
        turns = [turn for turn in function.loops if turn.loads or turn.stores] or [function.whole]
        full = [turn for turn in turns if turn.loads and not turn.guarded]
        return full if self.element_bytes and full else turns

    def elements(self, turn: sass.Loop) -> float:
        """Of a thread, in one turn of a loop: the compiler may have unrolled it."""
        if self.element_bytes and turn.loads:
            return sum(width * n for width, n in turn.loads.items()) / self.element_bytes
        return self.tile / (32 * self.kernel.metadata.num_warps)

    def narrow(self, function: sass.Function, accesses: dict[int, int], what: str) -> int:
        """Of the bytes per element of one sweep over each tensor that it `what`, "loads" or "stores", those that
        16-byte accesses do not move."""
        if not self.tile:
            return 0
        if self.element_bytes:
            narrow = [w * n for turn in self.turns(function) for w, n in getattr(turn, what).items() if w < 16]
            return sum(narrow)
        moved = sum(width * n for width, n in accesses.items() if width >= 16)
        tensors = self.reads if what == "loads" else self.writes
        return _bytes(tensors) - moved * 32 * self.kernel.metadata.num_warps // self.tile


# -- Compiling what a launcher launches


_by_key: dict[tuple[Any, ...], str] = {}


@contextmanager
def _compiling(arch: int, compiled: list[Launch]) -> Iterator[None]:
    """Launches of the row-wise skeleton are appended to `compiled`."""
    from fastgen.triton_kernels import rowwise

    def compile_launch(kernel: Any, programs: int, like: torch.Tensor, *args: Any, **constants: Any) -> None:
        key = rowwise.launch_key(kernel, arch, args, constants)
        kernel = kernel.warmup(*args, grid=(programs,), **constants)
        # A launch on a GPU takes what was compiled for the same key.
        if _by_key.setdefault(key, kernel.hash) != kernel.hash:
            raise AssertionError(f"launches of two kernels {kernel.metadata.name} have one key")
        compiled.append(Launch.of(kernel, args, constants))

    launch = rowwise.launch
    rowwise.launch = compile_launch
    Target(arch)
    try:
        yield
    finally:
        rowwise.launch = launch


# -- The calls whose kernels are compiled: those of fastgen.cases, on tensors that are nowhere


class _OnMeta(TorchDispatchMode):
    """Runs the launchers of Triton's operators, where meta tensors would get the fake implementations."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "fastgen_triton":
            return func(*args, **(kwargs or {}))
        operator = operators[func._schema.name.partition("::")[2]]
        launcher = getattr(importlib.import_module(f"fastgen.triton_kernels.{operator.family}"), operator.name)
        if operator.family != "trajectory":
            return launcher(**operator.bind(*args))
        # The solver reads its results: a cost that is in order, and totals that are finite.
        results = launcher(*(t.to("meta") if isinstance(t, torch.Tensor) else t for t in args))
        stand_in = lambda t: torch.full(t.shape, float(t.is_floating_point()), dtype=t.dtype)  # noqa: E731
        return tree_map(stand_in, results)


# Groups and rows that stay in registers, rows of many programs each, and programs that loop over their rows.
IMAGES = {"small": (64, 3, 32, 32), "held": (64, 4, 64, 64), "split": (8, 3, 256, 256), "looped": (4096, 3, 256, 256)}
# Vocabularies of image tokens and of language models, odd ones, few rows.
LOGITS = {"var": (4096, 4096), "llm": (2048, 128256), "odd": (2048, 50257), "few": (3, 32000)}
NARROW = {"narrow": (4, 6, 999)}  # rows that start at other places than the gradient's


def _apart(t: torch.Tensor) -> torch.Tensor:
    """With something between the rows, so that they cannot be cut into others."""
    return torch.stack([t, t], 1)[:, 0]


def _sliced(t: torch.Tensor) -> torch.Tensor:
    return torch.cat([t, t[:, :1]], 1)[:, :-1]


def _run(case: Case, tensors: dict[str, torch.Tensor], with_grad: bool) -> None:
    with fastgen.use_backend("triton"), _OnMeta():
        if not with_grad:
            with torch.no_grad():
                case(fastgen, **tensors)
        else:
            case(fastgen, **case.leaves(tensors)).sum().backward()


def _calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every case, with gradients and without, at every plan of its family: name -> call, for one dtype."""
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    for family, cases in FAMILIES.items():
        if family == "trajectory" and dtype != torch.float32:
            continue
        for case in cases:
            if case.function.startswith("linear_"):  # asks for autocast's state, which meta tensors have none of
                continue
            if "discount" in case.options:  # is solved in plain PyTorch, which reads values
                continue
            for plan, shape, dtypes, layout in _variants(family, case, dtype, other):
                tensors = case.inputs(shape, *dtypes, device="meta", layout=layout)
                yield f"{case.name} {plan}", partial(_run, case, tensors, False)
                if case.differentiable:
                    yield f"{case.name} {plan} grad", partial(_run, case, tensors, True)


def _variants(family: str, case: Case, dtype: torch.dtype, other: torch.dtype) -> Iterator[tuple[Any, ...]]:
    if family == "sequence":
        plans = {"llm": LOGITS["llm"]} if case.name.endswith("-none") else LOGITS
        yield from ((plan, shape, (dtype,), None) for plan, shape in plans.items())
        yield from ((plan, shape, (dtype,), _sliced) for plan, shape in NARROW.items())
        yield "llm two dtypes", LOGITS["llm"], (dtype, other), None
    elif family == "trajectory":
        yield from (("nodes", IMAGES["held"], (d,), None) for d in (torch.float64, torch.float32))
    else:
        # Without sums over rows there is one plan, as for what a backward pass makes again.
        shared = ["held"] if family in ("sampling", "schedule") or case.name.endswith("-none") else IMAGES
        yield from ((plan, IMAGES[plan], (dtype,), None) for plan in shared)
        if case.function == "feature_distance":
            yield from ((f"{plan} apart", IMAGES[plan], (dtype,), _apart) for plan in shared)


def triton_report(
    architectures: Iterable[int] = ARCHITECTURES, dtypes: Iterable[str] = tuple(DTYPES), only: str = ""
) -> list[Report]:
    """One entry per kernel of every call above; calls that launch one and the same kernel share its first entry.

    `only`: a pattern that a call's name must match.
    """
    reports: dict[str, Report] = {}
    calls = {d: [(name, call) for name, call in _calls(DTYPES[d]) if re.search(only, name)] for d in dtypes}
    work = [(a, d, name, call) for a, d in itertools.product(architectures, calls) for name, call in calls[d]]
    for arch, dtype, variant, call in tqdm(work, "Triton", unit="call", leave=False, disable=None):
        compiled: list[Launch] = []
        with _compiling(arch, compiled):
            call()
        for launched in compiled:
            if launched.kernel.hash not in reports:
                reports[launched.kernel.hash] = _report(launched, f"{variant} {dtype}", arch)
    return list(reports.values())


# -- Reading what was compiled


def _widths(ptx: str, instruction: str) -> dict[int, int]:
    """Bytes that each global access of one thread moves -> how many there are."""
    counts: Counter[int] = Counter()
    for vector, bits in re.findall(rf"\b{instruction}\.global\S*?(?:\.v(\d))?\.[bufs](\d+)\b", ptx):
        counts[int(vector or 1) * int(bits) // 8] += 1
    return dict(sorted(counts.items()))


def _report(launch: Launch, variant: str, arch: int) -> Report:
    kernel = launch.kernel
    dump, functions = sass.dump(kernel.asm["cubin"])
    (function,) = functions.values()
    loops = _loops(function, launch)
    issued, special, conversions, _ = (sum(column) for column in zip(*loops, strict=True)) if loops else (0, 0, 0, 0)
    bound = sass.bound(issued, special, conversions, launch.floor_bytes, launch.floor_bytes)
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", dump)}
    loads, stores = _widths(kernel.asm["ptx"], "ld"), _widths(kernel.asm["ptx"], "st")
    return Report(
        kernel=f"{kernel.metadata.name} {launch.steps}".rstrip(),
        variant=variant,
        arch=arch,
        num_warps=kernel.metadata.num_warps,
        registers=usage["REG"],
        spill_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=kernel.metadata.shared,
        instructions=len(function.code),
        loads=loads,
        stores=stores,
        narrow_reads=launch.narrow(function, loads, "loads"),
        narrow_writes=launch.narrow(function, stores, "stores") if launch.writes else 0,
        moved_bytes=launch.moved_bytes,
        floor_bytes=launch.floor_bytes,
        resident_threads=sass.resident_threads(usage["REG"], 32 * kernel.metadata.num_warps, kernel.metadata.shared),
        loops=loops,
        bound=bound.what if launch.floor_bytes else "-",
        share=round(min(bound.share, 1.0), 3),
    )


def _loops(function: sass.Function, launch: Launch) -> list[tuple[float, float, float, float]]:
    """Instructions an element of each of the launch's turns."""
    if not launch.tile:
        return []
    turns = [(turn, launch.elements(turn)) for turn in launch.turns(function)]
    return [(t.issued / n, t.special / n, t.conversions / n, t.long / n) for t, n in turns]


def _columns(accesses: dict[int, int]) -> str:
    return " ".join(f"{n}x{width}" for width, n in accesses.items())


def _loop_columns(loops: Iterable[tuple[float, ...]]) -> str:
    return "  ".join("/".join(f"{n:.1f}" for n in loop) for loop in loops)


def table(reports: list[Report]) -> str:
    """The reports as text."""
    title = f"{'kernel':26} {'variant':44} sm_ warps regs threads spill shared  instr  bytes/floor"
    lines = [f"{title}  {'loads (count x bytes)':24}  {'stores':18} bound (share of copy)  loops"]
    for r in reports:
        moved = f"{r.moved_bytes}/{r.floor_bytes}" if r.floor_bytes else "-"
        narrow = "  NARROW" if r.narrow_reads or r.narrow_writes else ""
        lines.append(
            f"{r.kernel:26} {r.variant:44} {r.arch:3} {r.num_warps:5} {r.registers:4} "
            f"{r.resident_threads:7} {r.spill_bytes:5} {r.shared_bytes:6} {r.instructions:6} {moved:>12}  "
            f"{_columns(r.loads):24}  {_columns(r.stores) + narrow:18} {r.bound:10} {r.share:4.0%}  "
            f"{_loop_columns(r.loops)}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--part", choices=("triton", "cuda"), help="the Triton kernels or the CUDA sources; both if not given"
    )
    parser.add_argument("--arch", type=int, action="append", help="80, 90 or 100 (Triton alone); all if not given")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="of Triton kernels; all if not given")
    parser.add_argument("--only", default="", help="a pattern that a Triton call's name, or a CUDA file's, must match")
    parser.add_argument("--json", action="store_true", help="the Triton reports and the CUDA rows, as one list each")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    if options.part != "cuda":
        reports = triton_report(options.arch or ARCHITECTURES, options.dtype or tuple(DTYPES), options.only)
        found["triton"] = [asdict(r) for r in reports]
        if not options.json:
            print(table(reports))
            print("\nbytes/floor: asked for each element of a row, and the least, each input and output once")
            print(
                "loops: instructions an element of each, all/special/conversions/64-bit; bound: predicted for an H100\n"
            )
    if options.part != "triton":
        try:
            rows = aot_cuda.cuda_report(aot_cuda.architectures(options.arch), options.only)
            found["cuda"] = rows
        except FileNotFoundError as error:
            print(f"CUDA sources not compiled: {error}", file=sys.stderr)
        else:
            if not options.json:
                print(aot_cuda.table(rows))
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
