"""``python -m benchmarks.host``: what the host takes to issue a training step, with launches that do nothing. No GPU.

The launchers of Triton's and of CUDA's kernels run as they would on a GPU, on CPU tensors of a few elements. Triton's
kernels are compiled, for sm_90, and handed to a launcher that returns at once; CUDA's host code is that of the
emulator, which is built first (two minutes; ``--emulator`` takes one that is there), with launches that return at once.
So what is timed is Python, the dispatcher, the allocations and the plans; what CUDA's driver takes for a launch, some
microseconds each, comes on top of it. PyTorch's own operations run: a sum, for Triton, and what autograd fills with 1.

Times are the process's, of steps, forward and backward, over what autograd takes for a ``Function`` that does nothing,
in one run.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .driver import launch_idly
from .emulated import build_emulated

STEPS = (
    "elbo_error",
    "ddo_loss",
    "diffusion_dpo_loss",
    "diffusion_nft_loss-kl",
    "sds_loss-guided",
    "dmd_loss-guided",
    "decoupled_dmd_loss",
    "reverse_step_-epsilon",
    "token_logprob",
    "generalized_jsd_loss-0.5",
)
SHAPE = (4, 2, 32)
CALLS = 50  # of a timed block

Variant = Callable[[Sequence[Tensor]], Any]


def _idle_cuda(emulator: Path) -> Callable[[], int]:
    """Launches of CUDA's kernels do nothing from here on, on CPU tensors. Gives what counts them."""
    os.environ["EMULATED_IDLE"] = "1"
    torch.ops.load_library(str(emulator))
    launches = ctypes.CDLL(str(emulator)).emulated_launches
    launches.restype = ctypes.c_long
    return launches


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.saved_tensors[0], None


def _nothing(inputs: Sequence[Tensor]) -> None:
    _Nothing.apply(inputs[0].detach().requires_grad_(), torch.zeros(())).backward()


def _measure(variants: Mapping[str, Variant], pool: Sequence[Sequence[Tensor]], rounds: int = 25) -> dict[str, float]:
    """Of every variant the median time of a call, in turn, as the process's: others may run beside it."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, f in variants.items():
            start = time.process_time()
            for i in range(CALLS):
                f(pool[i % len(pool)])
            times[name].append((time.process_time() - start) / CALLS)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emulator", type=Path, help="a library that build_emulated has made, instead of a new one")
    parser.add_argument("--only", default="", help="part of the names of cases")
    options = parser.parse_args(argv)
    sys.modules["fastgen._C"] = None  # type: ignore[assignment]  # its kernels would hold the CPU's place
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        emulator = options.emulator or build_emulated(Path(folder), checked=False)
        return _report(emulator, [name for name in STEPS if options.only in name])


def _report(emulator: Path, names: Sequence[str]) -> int:
    import fastgen
    from fastgen import reference
    from fastgen.cases import CASES
    from fastgen.core.timing import case_inputs, case_step

    counters = {"native": _idle_cuda(emulator), "triton": launch_idly(lambda *_: lambda *_: None)}
    warnings.filterwarnings("ignore", module="triton")

    def on(backend: str, step: Callable[..., None], inputs: Sequence[Tensor]) -> None:
        with fastgen.use_backend(backend):
            step(inputs)

    print("| step | eager | CUDA | launches | Triton | launches |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for name in names:
        case = CASES[name]
        make = case_inputs(case, SHAPE, torch.float32, "cpu")
        pool = [make(), make()]
        step = partial(case_step, case, partial(case, fastgen))
        variants: dict[str, Variant] = {backend: partial(on, backend, step) for backend in counters}
        counts = {}
        for backend, count in counters.items():
            variants[backend](pool[0])  # compiles
            before = count()
            variants[backend](pool[0])
            counts[backend] = count() - before
        variants["eager"] = partial(case_step, case, partial(case, reference))
        variants["nothing"] = _nothing
        seconds = _measure(variants, pool)
        times = {variant: seconds[variant] / seconds["nothing"] for variant in variants}
        cells = [f"{times['eager']:.1f}", *(f"{times[b]:.1f} | {n}" for b, n in counts.items())]
        print(f"| `{name}` | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
