"""``python -m benchmarks.tune``: other block sizes, warps, programs and clusters against the defaults, on a GPU.

Each of the numbers that decide how a call is cut up is moved alone, for a few operators and shapes of each skeleton.
What wins by more than the default's own spread is a candidate for ``MEASURED`` in ``triton_kernels/plan.py``, or for
the constants of ``csrc/runtime/partition.h``. Stops when its time is over; what was measured by then is printed and
kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastgen
from fastgen.core import dispatch
from fastgen.core.timing import input_pool, measure

Inputs = Sequence[Tensor]
Found = dict[str, dict[str, float]]  # workload -> candidate -> microseconds


def _loss(name: str, inputs: Inputs) -> None:
    p, q, y, is_real, tokens = inputs
    p = p.detach().requires_grad_()
    if name == "ddo":
        loss = fastgen.ddo_loss(p, q, y, is_real)
    elif name == "jsd":
        loss = fastgen.generalized_jsd_loss(p, q)
    else:
        loss = fastgen.token_logprob(p, tokens).sum()
    loss.backward()


def _step(inputs: Inputs) -> None:
    fastgen.guidance(inputs[0], inputs[1], 7.5)


# Of the row-wise skeleton: groups in registers, loops, splits, maps; of the sweep: long rows and shorter ones.
WORK: dict[str, tuple[Callable[[Inputs], None], tuple[int, ...]]] = {
    "ddo 64x4x64x64": (partial(_loss, "ddo"), (64, 4, 64, 64)),
    "ddo 1024x4x64x64": (partial(_loss, "ddo"), (1024, 4, 64, 64)),
    "ddo 8x3x512x512": (partial(_loss, "ddo"), (8, 3, 512, 512)),
    "guidance 256x4x64x64": (_step, (256, 4, 64, 64)),
    "jsd 2048x128256": (partial(_loss, "jsd"), (2048, 128_256)),
    "token 8192x32000": (partial(_loss, "token"), (8192, 32_000)),
}


def _microseconds(name: str, dtype: torch.dtype) -> float:
    work, shape = WORK[name]
    number = torch.arange(shape[0], device="cuda")

    def make() -> list[Tensor]:
        return [torch.randn(shape, device="cuda").to(dtype) for _ in range(3)] + [number % 2 == 0, number]

    pool = input_pool(make, "cuda")
    return measure({name: work}, pool, "cuda", rounds=7)[name].median * 1e6


def _candidates() -> dict[str, dict[str, int]]:
    from fastgen.triton_kernels.plan import Tuning

    held = Tuning().held_bytes
    values: dict[str, tuple[int, ...]] = {
        "threads": (128, 512),
        "bytes_per_thread": (16, 64),
        "programs": (2, 8),
        "held_bytes": (held // 2, 2 * held),
        "sweep_threads": (128, 512),
    }
    return {f"{field} {n}": {field: n} for field, several in values.items() for n in several}


def _concerns(candidate: str, work: str) -> bool:
    sweep = candidate.startswith("sweep")
    both = candidate.startswith(("programs", "default"))
    return both or sweep == work.startswith(("jsd", "token"))


def tune_triton(dtype: torch.dtype, deadline: float) -> Found:
    from fastgen.triton_kernels import plan, sweep

    device = torch.cuda.get_device_name()
    found: Found = {name: {} for name in WORK}
    everything: dict[str, dict[str, int]] = {"default": {}, **_candidates(), "default again": {}}
    for candidate, fields in everything.items():
        plan.MEASURED[device] = plan.Tuning(**fields)
        for cached in (plan.tuning, plan.groups_plan, plan.map_plan, plan.flat_plan, sweep.plan_sweep, sweep.plan_map):
            cached.cache_clear()
        for name in WORK:
            if _concerns(candidate, name) and time.monotonic() < deadline:
                with fastgen.use_backend("triton"):
                    found[name][candidate] = _microseconds(name, dtype)
    return found


def tune_cuda(dtype: torch.dtype, deadline: float) -> Found:
    """A process reads the limits of its CUDA kernels once: each candidate has one of its own."""
    found: Found = {name: {} for name in WORK}
    for variable, n in (("", 0), ("THREADS", 256), ("THREADS", 512), ("CLUSTER", 1), ("CLUSTER", 4), ("CLUSTER", 8)):
        candidate = f"{variable.lower()} {n}" if variable else "default"
        environment = {**os.environ, **({f"FASTGEN_CUDA_{variable}": str(n)} if variable else {})}
        command = [sys.executable, "-m", "benchmarks.tune", "--cuda-child", str(dtype).removeprefix("torch.")]
        left = deadline - time.monotonic()
        if left < 5:
            break
        try:
            run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=left, check=True)
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            print(f"CUDA, {candidate}: {error}")
            continue
        for name, microseconds in json.loads(run.stdout.splitlines()[-1]).items():
            found[name][candidate] = microseconds
    return found


def table(found: Found) -> str:
    lines = []
    for name, times in found.items():
        if "default" not in times:
            continue
        default = min(times["default"], times.get("default again", float("inf")))
        best = min(times, key=lambda k: times[k])
        lines.append(f"  {name:24} default {default:9.1f} us   best {times[best]:9.1f} us ({best})")
        lines.append("    " + ", ".join(f"{k} {v:.1f}" for k, v in times.items()))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a JSON file for what was measured")
    parser.add_argument("--seconds", type=float, default=60, help="for all")
    parser.add_argument("--cuda-child", choices=("float32", "bfloat16"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.tune needs an NVIDIA GPU that torch can use, and there is none here.")
        return 1
    if options.cuda_child:
        with fastgen.use_backend("native"):
            print(json.dumps({name: _microseconds(name, getattr(torch, options.cuda_child)) for name in WORK}))
        return 0
    start = time.monotonic()
    found: dict[str, Any] = {"device": torch.cuda.get_device_name()}
    shares = iter((0.35, 0.6, 0.85, 1.0))
    for dtype in (torch.bfloat16, torch.float32):
        for what, tune in (("Triton", tune_triton), ("CUDA", tune_cuda)):
            deadline = start + next(shares) * options.seconds
            if what == "CUDA" and dispatch.missing("ddo_loss", "native", "cuda"):
                continue
            name = f"{what}, {str(dtype).removeprefix('torch.')}"
            found[name] = tune(dtype, deadline)
            print(f"{name}\n{table(found[name])}", flush=True)
            if options.out:
                options.out.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
