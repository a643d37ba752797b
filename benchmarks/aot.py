"""What the compilers make of the kernels, without a GPU: registers, spills, shared memory, width of memory accesses.

    python -m benchmarks.aot [--arch 90]

Triton kernels are compiled as their launchers would launch them: the launchers run on meta tensors under a driver that
names a target instead of a device, and every launch is compiled and not run. So a variant cannot be forgotten or
differ from the real one. It takes a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = (80, 90, 100)
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True)
class Report:
    kernel: str
    variant: str
    arch: int
    num_warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    loads: dict[int, int]  # width in bytes -> global load instructions
    stores: dict[int, int]
    instructions: int

    def wide(self, accesses: dict[int, int]) -> int:
        return sum(n for width, n in accesses.items() if width >= 16)


# -- Compiling what a launcher launches


class _Target:
    """A Triton driver with a target and no device."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # kernels are cached by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextmanager
def _compiling(arch: int, compiled: list[Any]) -> Iterator[None]:
    """Launches of the row-wise skeleton append their compiled kernel to `compiled`."""
    from triton.runtime import driver

    from fastgen.triton_kernels import rowwise

    def compile_launch(kernel: Any, programs: int, like: torch.Tensor, *args: Any, **constants: Any) -> None:
        compiled.append(kernel.warmup(*args, grid=(programs,), **constants))

    launch = rowwise.launch
    rowwise.launch = compile_launch
    driver.set_active(_Target(arch))
    try:
        yield
    finally:
        rowwise.launch = launch


# -- The calls whose kernels are compiled: name -> call, for one dtype


def _images(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _vector(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(n, dtype=dtype, device="meta")


# Groups and rows that stay in registers, rows of many programs each, and programs that loop over their rows.
SHAPES = {"small": (64, 3, 32, 32), "held": (64, 4, 64, 64), "split": (8, 3, 256, 256), "looped": (4096, 3, 256, 256)}


def _loss_calls(dtype: torch.dtype, plan: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Callable[[], Any]]]:
    from fastgen.triton_kernels import elbo

    x, weight = _images(dtype, *shape), _vector(shape[0])
    for with_grad, suffix in ((False, ""), (True, " grad")):
        flags = _vector(shape[0], torch.bool)
        yield (
            f"ddo {plan}{suffix}",
            lambda g=with_grad, f=flags: elbo.ddo_loss(x, x, x, weight, False, "mean", g, f, None, 1.0, 0.05, 1),
        )
        for kind in ("sigmoid", "ipo", "hinge"):
            yield (
                f"dpo {kind} {plan}{suffix}",
                lambda g=with_grad, k=kind: elbo.diffusion_dpo_loss(x, x, x, weight, True, "mean", g, 5000.0, k),
            )
    four = _vector(shape[0] // 4, torch.bool)
    yield (
        f"ddo 4 samples {plan} grad",
        lambda: elbo.ddo_loss(x, x, x, weight, False, "mean", True, four, None, 1.0, 0.05, 4),
    )


def _calls(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Any]]]:
    from fastgen.triton_kernels import elbo, gradient, schedule

    for plan, shape in SHAPES.items():
        x, weight = _images(dtype, *shape), _vector(shape[0])
        for loss in ("l2", "l1", "huber"):
            yield f"error {loss} {plan}", lambda x=x, w=weight, k=loss: elbo.elbo_error(x, x, w, k, True)
        yield f"difference {plan}", lambda x=x, w=weight: elbo.elbo_difference(x, x, x, w, False)
        yield from _loss_calls(dtype, plan, shape)
    x, weight = _images(dtype, *SHAPES["held"]), _vector(SHAPES["held"][0])
    for loss in ("l2", "l1", "huber"):
        yield f"error backward {loss}", lambda k=loss: elbo.elbo_error_backward(weight, x, x, weight, k, True)
    yield "combination", lambda: schedule.row_combination(x, weight, x, weight)
    yield "combination of one", lambda: schedule.row_combination(x, weight)
    yield "scale in place", lambda: gradient.scale_gradient_(x, weight[0])


def triton_report(architectures: Iterable[int] = ARCHITECTURES, dtypes: Iterable[str] = tuple(DTYPES)) -> list[Report]:
    """One entry per kernel of every call above; calls that launch one and the same kernel share its first entry."""
    reports: dict[str, Report] = {}
    for arch, dtype in itertools.product(architectures, dtypes):
        for variant, call in _calls(DTYPES[dtype]):
            compiled: list[Any] = []
            with _compiling(arch, compiled):
                call()
            for kernel in compiled:
                if kernel.hash not in reports:
                    reports[kernel.hash] = _report(kernel, f"{variant} {dtype}", arch)
    return list(reports.values())


# -- Reading what was compiled


def _widths(ptx: str, instruction: str) -> dict[int, int]:
    """Bytes that each global access of one thread moves -> how many there are."""
    counts: Counter[int] = Counter()
    for vector, bits in re.findall(rf"\b{instruction}\.global\S*?(?:\.v(\d))?\.[bufs](\d+)\b", ptx):
        counts[int(vector or 1) * int(bits) // 8] += 1
    return dict(sorted(counts.items()))


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _report(kernel: Any, variant: str, arch: int) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        command = [_tool("cuobjdump"), "--dump-resource-usage", "--dump-sass", cubin.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", dump)}
    ptx = kernel.asm["ptx"]
    return Report(
        kernel=kernel.metadata.name,
        variant=variant,
        arch=arch,
        num_warps=kernel.metadata.num_warps,
        registers=usage["REG"],
        spill_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=kernel.metadata.shared,
        loads=_widths(ptx, "ld"),
        stores=_widths(ptx, "st"),
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+\S", dump, re.MULTILINE)),
    )


def _columns(accesses: dict[int, int]) -> str:
    return " ".join(f"{n}x{width}" for width, n in accesses.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", type=int, action="append", help="80, 90 or 100; all if not given")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="all if not given")
    options = parser.parse_args()
    print(f"{'kernel':16} {'variant':32} sm_ warps regs spill shared  instr  loads (count x bytes)   stores")
    for r in triton_report(options.arch or ARCHITECTURES, options.dtype or tuple(DTYPES)):
        print(
            f"{r.kernel:16} {r.variant:32} {r.arch:3} {r.num_warps:5} {r.registers:4} {r.spill_bytes:5} "
            f"{r.shared_bytes:6} {r.instructions:6}  {_columns(r.loads):24} {_columns(r.stores)}"
        )


if __name__ == "__main__":
    main()
