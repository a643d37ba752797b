"""Measures variants of one computation side by side: interleaved, on inputs that rotate past the caches.

A share of the copy bandwidth means: the bytes that the operator has to move at least (each input read once, each output
written once) over its time, divided by what copying one tensor onto another of that size reaches in the same rounds.
"""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastgen
from fastgen import reference
from fastgen.cases import Case
from fastgen.core import dispatch

POOL_BYTES = {"cpu": 1 << 30, "cuda": 1 << 30}  # beyond the last-level caches of servers, beyond any GPU's L2
BLOCK_SECONDS = 2e-3  # a timed block lasts at least this long, so that clocks and wake-ups do not show
ROUNDS = 15 if os.environ.get("FASTGEN_TEST_DEVICE", "cpu") == "cpu" else 9  # a GPU's scatter little
SECONDS = 10.0  # after which a comparison of slow variants ends, with at least FEWEST_ROUNDS
FEWEST_ROUNDS = 3
# For a GPU: compile everything once and measure nothing; measure torch.compile's max-autotune too.
COMPILE_ONLY = os.environ.get("FASTGEN_BENCH_COMPILE") == "1"
AUTOTUNE = os.environ.get("FASTGEN_BENCH_AUTOTUNE") == "1"
COMPILE_BYTES = 5 << 30  # of inputs at most where everything is compiled at once

Variant = Callable[[Sequence[Tensor]], Any]


@dataclass(frozen=True)
class Measured:
    """Median and fastest time of one call, in seconds."""

    median: float
    fastest: float


def compiled(f: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    """`f` as torch.compile makes it, by the names of variants."""
    found = {"torch.compile": torch.compile(f)}
    if AUTOTUNE:
        found["torch.compile max-autotune"] = torch.compile(f, mode="max-autotune-no-cudagraphs")
    return found


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def input_pool(make: Callable[[], Sequence[Tensor]], device: str) -> list[Sequence[Tensor]]:
    """Enough sets of inputs that a set has left the caches when its turn comes again; at most 64."""
    first = make()
    size = sum(t.numel() * t.element_size() for t in first)
    count = min(64, max(2, -(-POOL_BYTES[device] // size)))
    return [first, *(make() for _ in range(count - 1))]


def measure(
    variants: dict[str, Variant], pool: list[Sequence[Tensor]], device: str, rounds: int = ROUNDS
) -> dict[str, Measured]:
    """Times every variant once a round, in turn, each round starting elsewhere in the pool. A variant that the GPU's
    memory is too small for is left out."""
    calls: dict[str, int] = {}
    for name, f in variants.items():
        try:
            calls[name] = _calls_for_a_block(f, pool, device)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    times: dict[str, list[float]] = {name: [] for name in calls}
    position, start = 0, time.monotonic()
    for done in range(rounds):
        if done >= FEWEST_ROUNDS and time.monotonic() - start > SECONDS:
            break
        for name, count in calls.items():
            times[name].append(_block(variants[name], pool, position, count, device))
            position += count
    return {name: Measured(statistics.median(t), min(t)) for name, t in times.items()}


def _calls_for_a_block(f: Variant, pool: list[Sequence[Tensor]], device: str) -> int:
    for i in range(3):  # compile, allocate
        f(pool[i % len(pool)])
    once = _block(f, pool, 0, 3, device)
    return max(1, min(200, int(BLOCK_SECONDS / once)))


def _block(f: Variant, pool: list[Sequence[Tensor]], position: int, calls: int, device: str) -> float:
    synchronize(device)
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for i in range(calls):
            f(pool[(position + i) % len(pool)])
        end.record()
        synchronize(device)
        return begin.elapsed_time(end) * 1e-3 / calls
    start = time.perf_counter()
    for i in range(calls):
        f(pool[(position + i) % len(pool)])
    return (time.perf_counter() - start) / calls


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
        if sum(t.numel() * t.element_size() for t in inputs) <= COMPILE_BYTES:
            for name, f in variants.items():
                if name != "eager":  # which has nothing to compile, and takes the most memory
                    f(inputs)
        synchronize(device)
        return
    pool = input_pool(make, device)
    largest = max(pool[0], key=lambda t: t.numel() * t.element_size())
    destination = torch.empty_like(largest)
    copied = 2 * largest.numel() * largest.element_size()
    everything: dict[str, Variant] = {"copy": lambda inputs: destination.copy_(inputs[0].detach()), **variants}
    measured = measure(everything, pool, device)
    copy_rate = copied / measured["copy"].median
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


def case_inputs(case: Case, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Callable[[], list[Tensor]]:
    """What makes a case's inputs, others at every call, none of whose rows is ignored."""
    seeds = itertools.count()

    def make() -> list[Tensor]:
        tensors = case.inputs(shape, dtype, device=device, seed=next(seeds)).values()
        return [t.clamp(min=0) if t.dtype == torch.int64 else t for t in tensors]

    return make


def case_step(case: Case, loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """A training step, forward and backward, of a case that has gradients; of another, its call.

    A small loss takes as long as a few lines of Python, so around it are only fresh leaves, the network's output.
    """
    named = dict(zip(case.roles, inputs, strict=True))
    for name in case.differentiable:
        named[name] = named[name].detach().requires_grad_()
    result = loss(**named)
    if case.differentiable:
        (result.sum() if result.dim() else result).backward()


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
