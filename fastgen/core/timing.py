"""Measures variants of one computation side by side: interleaved, on inputs that rotate past the caches."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .case import Case

POOL_BYTES = {"cpu": 1 << 30, "cuda": 1 << 30}  # beyond the last-level caches of servers, beyond any GPU's L2
BLOCK_SECONDS = 2e-3  # a timed block lasts at least this long, so that clocks and wake-ups do not show
ROUNDS = {"cpu": 15, "cuda": 9}  # a GPU's scatter little
SECONDS = 10.0  # after which a comparison of slow variants ends, with at least FEWEST_ROUNDS
FEWEST_ROUNDS = 3

Variant = Callable[[Sequence[Tensor]], Any]


@dataclass(frozen=True)
class Measured:
    """Median and fastest time of one call, in seconds."""

    median: float
    fastest: float


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def input_pool(make: Callable[[], Sequence[Tensor]], device: str) -> list[Sequence[Tensor]]:
    """Enough sets of inputs that a set has left the caches when its turn comes again; at most 64."""
    first = make()
    count = min(64, max(2, -(-POOL_BYTES[device] // sum(map(nbytes, first)))))
    return [first, *(make() for _ in range(count - 1))]


def measure(
    variants: dict[str, Variant],
    pool: list[Sequence[Tensor]],
    device: str,
    rounds: int | None = None,
    seconds: float = SECONDS,
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
    for done in range(rounds or ROUNDS[device]):
        if done >= FEWEST_ROUNDS and time.monotonic() - start > seconds:
            break
        for name, count in calls.items():
            times[name].append(_block(variants[name], pool, position, count, device))
            position += count
    return {name: Measured(statistics.median(t), min(t)) for name, t in times.items()}


def measure_beside_copy(
    variants: dict[str, Variant], pool: list[Sequence[Tensor]], device: str, seconds: float = SECONDS
) -> tuple[dict[str, Measured], float]:
    """What :func:`measure` finds, and the bytes a second that a copy of the largest input moves in the same rounds.

    A share of the copy bandwidth is the bytes that an operator has to move at least (each input read once, each output
    written once) over its time, divided by that rate.
    """
    place, largest = max(enumerate(pool[0]), key=lambda item: nbytes(item[1]))
    destination = torch.empty_like(largest)

    def copy(inputs: Sequence[Tensor]) -> None:
        destination.copy_(inputs[place].detach())

    measured = measure({"copy": copy, **variants}, pool, device, seconds=seconds)
    return measured, 2 * nbytes(largest) / measured.pop("copy").median


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
