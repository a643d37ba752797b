"""``python -m benchmarks.kernels``: what a GPU spends on a training step of each function, kernel by kernel.

For every workload and backend: the time of a call as a user meets it, the device's share of it, the host's share, the
number of launches, and the floor's part of the device's time, at the rate at which this device copies. The benchmarks
compare with other libraries; this is for finding out where the time goes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastgen
from fastgen import reference
from fastgen.cases import CASES
from fastgen.core.timing import Variant, case_inputs, case_step, input_pool, measure

Shape = tuple[int, ...]
# name of a case -> streams that have to move (every input read once, the gradient or output written once), shapes.
IMAGES: tuple[Shape, ...] = ((8, 3, 32, 32), (64, 4, 64, 64), (1024, 4, 64, 64))
LOGITS: tuple[Shape, ...] = ((8192, 32_000), (8192, 128_256))
WORK: dict[str, tuple[int, tuple[Shape, ...]]] = {
    "ddo_loss": (4, (*IMAGES, (8, 3, 512, 512))),
    "elbo_error": (3, IMAGES[1:]),
    "diffusion_nft_loss-kl": (6, ((8, 16, 128, 128), (128, 16, 128, 128))),
    "sds_loss-guided": (4, IMAGES[1:]),
    "dmd_loss-guided": (6, (IMAGES[1], (64, 4, 128, 128))),
    "decoupled_dmd_loss": (8, (IMAGES[1], (64, 4, 128, 128))),
    "guidance": (3, IMAGES[1:]),
    "reverse_step_-epsilon": (5, IMAGES[1:]),  # in place: with gradients the other one is plain PyTorch
    "flow_sde_step": (3, IMAGES[1:]),
    "add_noise": (3, IMAGES[1:]),
    "ScoreMoments": (1, IMAGES[1:]),
    "feature_distance": (3, ((64, 64, 64, 64),)),
    "token_logprob": (2, LOGITS),
    "generalized_jsd_loss-0.5": (3, LOGITS),
    "generalized_jsd_loss-0": (3, LOGITS),
    "generalized_jsd_loss-1": (3, LOGITS),
    "sequence_ddo_loss": (3, ((32, 680, 4096),)),
    "sparse_divergence_loss-forward-bucket": (2, LOGITS),
}
DTYPES = (torch.bfloat16, torch.float32)
CALLS = 4  # under the profiler


def _on(backend: str, step: Variant, inputs: Sequence[Tensor]) -> None:
    with fastgen.use_backend(backend):
        step(inputs)


def _kernels(f: Variant, pool: list[Sequence[Tensor]]) -> dict[str, float]:
    """Microseconds of a call in each kernel, copy and fill, by its name."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        for i in range(CALLS):
            f(pool[i % len(pool)])
        torch.cuda.synchronize()
    found: dict[str, float] = defaultdict(float)
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            found[event.name] += event.device_time / CALLS
            found["launches"] += 1 / CALLS
    return dict(found)


def _host_seconds(f: Variant, pool: list[Sequence[Tensor]], calls: int = 20) -> float:
    """What the host takes to issue a call: too few are issued for it to be kept waiting."""
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for i in range(calls):
            f(pool[i % len(pool)])
        times.append((time.perf_counter() - start) / calls)
    torch.cuda.synchronize()
    return statistics.median(times)


def examine(name: str, shape: Shape, dtype: torch.dtype, backends: Sequence[str]) -> list[dict[str, Any]]:
    case, (streams, _) = CASES[name], WORK[name]
    pool = input_pool(case_inputs(case, shape, dtype, "cuda"), "cuda")
    variants: dict[str, Variant] = {}
    for backend in backends:
        module = reference if backend == "eager" else fastgen
        step = partial(case_step, case, partial(case, module))
        variants[backend] = step if backend == "eager" else partial(_on, backend, step)
    measured = measure(variants, pool, "cuda", rounds=7)
    rows = []
    for backend, f in variants.items():
        kernels = _kernels(f, pool)
        launches = kernels.pop("launches", 0)
        device = sum(kernels.values())
        floor = streams * torch.Size(shape).numel() * dtype.itemsize
        rows.append(
            {
                "case": name,
                "shape": list(shape),
                "dtype": str(dtype).removeprefix("torch."),
                "backend": backend,
                "call_us": measured[backend].median * 1e6,
                "device_us": device,
                "host_us": _host_seconds(f, pool) * 1e6,
                "launches": launches,
                "gb_per_s": floor / device * 1e-3 if device else 0.0,
                "kernels": dict(sorted(kernels.items(), key=lambda item: -item[1])),
            }
        )
    return rows


def copy_rate() -> float:
    """GB/s of a large copy on the device, read and written."""
    a, b = (torch.empty(1 << 30, dtype=torch.uint8, device="cuda") for _ in range(2))
    a.random_(0, 255)
    pool: list[Sequence[Tensor]] = [(a, b), (b, a)]
    return 2 * a.nbytes / measure({"copy": lambda x: x[1].copy_(x[0])}, pool, "cuda")["copy"].median * 1e-9


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="a file that gets a JSON line for each row")
    parser.add_argument("--seconds", type=float, default=60, help="for all")
    parser.add_argument("--only", default="", help="part of the names of cases")
    parser.add_argument("--backends", nargs="+", default=["native", "triton"], help="of native, triton, eager")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("benchmarks.kernels needs an NVIDIA GPU that torch can use, and there is none here.")
        return 1
    stop, copy = time.monotonic() + options.seconds, copy_rate()
    x = torch.randn(8, 3, 32, 32, device="cuda", requires_grad=True)
    add = _host_seconds(lambda inputs: torch.add(inputs[0], 1.0), [[x]], 200) * 1e6
    print(f"{torch.cuda.get_device_name()}: a copy moves {copy:.0f} GB/s; the host issues an addition in {add:.1f} us")
    work = [(n, s, d) for d in DTYPES for n, (_, shapes) in WORK.items() for s in shapes if options.only in n]
    for name, shape, dtype in work:
        if time.monotonic() > stop:
            print("no time left")
            break
        try:
            rows = examine(name, shape, dtype, options.backends)
        except Exception as error:
            print(f"{name} {shape} {dtype}: {type(error).__name__}: {str(error)[:300]}")
            continue
        for row in rows:
            share = row["gb_per_s"] / copy
            print(
                f"{name:38} {'x'.join(map(str, shape)):15} {row['dtype']:9} {row['backend']:7}"
                f" call {row['call_us']:9.1f}  device {row['device_us']:9.1f}  host {row['host_us']:7.1f}"
                f"  launches {row['launches']:4.1f}  of copy {share:5.2f}",
                flush=True,
            )
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps({**row, "copy_gb_per_s": copy, "add_host_us": add}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
