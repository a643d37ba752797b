"""What the benchmarks compare, and what they say of it beside times, which ``fastgen.core.timing`` takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastgen
from fastgen import reference
from fastgen.cases import Case
from fastgen.core import dispatch
from fastgen.core.timing import Variant, case_inputs, case_step, input_pool, measure_beside_copy, nbytes, synchronize

# For a GPU: compile everything once and measure nothing; measure torch.compile's max-autotune too.
COMPILE_ONLY = os.environ.get("FASTGEN_BENCH_COMPILE") == "1"
AUTOTUNE = os.environ.get("FASTGEN_BENCH_AUTOTUNE") == "1"
COMPILE_BYTES = 5 << 30  # of inputs at most where everything is compiled at once


def compiled(f: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """`f` as torch.compile makes it, by the names of variants."""
    found = {"torch.compile": torch.compile(f)}
    if AUTOTUNE:
        found["torch.compile max-autotune"] = torch.compile(f, mode="max-autotune-no-cudagraphs")
    return found


def peak_extra_bytes(f: Variant, inputs: Sequence[Tensor]) -> int:
    """What one call adds to a GPU's memory at its worst. (On CPUs the tests check it, in a process of their own.)"""
    f(inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    f(inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def launches(f: Variant, inputs: Sequence[Tensor]) -> int:
    """CUDA kernels, copies and fills that one call issues."""
    from torch.profiler import ProfilerActivity, profile

    f(inputs)
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        f(inputs)
        torch.cuda.synchronize()
    on_device = (e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return sum(not getattr(event, "is_user_annotation", False) for event in on_device)


def compare(
    benchmark: Any,
    variants: dict[str, Variant],
    make: Callable[[], Sequence[Tensor]],
    floor_bytes: int,
    subject: str,
    device: str,
) -> None:
    """Runs the comparison and leaves it in the benchmark's extra information, from where the report takes it."""
    if COMPILE_ONLY:
        inputs = make()
        if sum(map(nbytes, inputs)) <= COMPILE_BYTES:
            for name, f in variants.items():
                if name != "eager":  # which has nothing to compile, and takes the most memory
                    f(inputs)
        synchronize(device)
        return
    pool = input_pool(make, device)
    measured, copy_rate = measure_beside_copy(variants, pool, device)
    table = {}
    for name in (n for n in variants if n in measured):
        entry: dict[str, Any] = {
            "median_us": measured[name].median * 1e6,
            "fastest_us": measured[name].fastest * 1e6,
            "share_of_copy": floor_bytes / measured[name].median / copy_rate,
            "times_fastgen": measured[name].median / measured[subject].median,
        }
        if device == "cuda":
            entry["launches"] = launches(variants[name], pool[0])
            entry["peak_extra_bytes"] = peak_extra_bytes(variants[name], pool[0])
        table[name] = entry
    benchmark.extra_info.update(
        comparison=table,
        left_out=[n for n in variants if n not in measured],
        floor_bytes=floor_bytes,
        copy_gb_per_s=copy_rate / 1e9,
        subject=subject,
        device=device,
    )
    turn = iter(range(1 << 62))
    benchmark.pedantic(lambda: variants[subject](pool[next(turn) % len(pool)]), rounds=5, iterations=1)


def compare_case(
    benchmark: Any,
    case: Case,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    streams: int,
    others: Mapping[str, Callable[..., Tensor]] | None = None,
) -> None:
    """A training step, forward and backward, by eager PyTorch, torch.compile, every backend and `others`.

    `streams` is how many tensors of `shape` have to move: every input that is read once, the gradient once.
    """
    step = partial(case_step, case)

    def step_on(backend: str, inputs: Sequence[Tensor]) -> None:
        with fastgen.use_backend(backend):
            step(ours, inputs)

    torch._dynamo.reset()
    ours, theirs = partial(case, fastgen), partial(case, reference)
    losses: dict[str, Callable[..., Tensor]] = {"eager": theirs, **compiled(theirs), **(others or {})}
    variants: dict[str, Variant] = {name: partial(step, loss) for name, loss in losses.items()}
    for backend in ("native", "triton"):
        if dispatch.missing("elbo_error", backend, device) is None:
            variants[backend] = partial(step_on, backend)
    variants["fastgen"] = partial(step, ours)
    compare(
        benchmark,
        variants,
        case_inputs(case, shape, dtype, device),
        streams * torch.Size(shape).numel() * dtype.itemsize,
        "fastgen",
        device,
    )
