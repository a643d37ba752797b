"""``python -m fastgen bench``: what a few losses cost on this machine, beside plain PyTorch, in two minutes."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import reference
from ..cases import CASES, Case
from . import dispatch
from .operator import PACKAGE
from .timing import FEWEST_ROUNDS, Variant, case_inputs, case_step, input_pool, measure_beside_copy

fastgen = importlib.import_module(PACKAGE)  # the public functions, whatever name the package has

Shape = tuple[int, ...]
# A case, whether its rows are images or logits, and the tensors that have to move: every input once, the gradient once.
WORK = (
    ("ddo_loss", "image", 4),
    ("dmd_loss-guided", "image", 6),
    ("diffusion_nft_loss", "image", 5),
    ("generalized_jsd_loss-0.5", "vocabulary", 3),
    ("token_logprob", "vocabulary", 2),
)
VARIANTS = ("eager", "torch.compile", "fastgen")
SHAPES: dict[str, dict[str, Shape]] = {
    "cpu": {"image": (64, 4, 64, 64), "vocabulary": (64, 32_000)},
    "cuda": {"image": (1024, 4, 64, 64), "vocabulary": (8192, 128_256)},
}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
EAGER_BYTES = 40  # times the logits' own, which fit a GPU's memory: eager PyTorch's temporaries, and inputs that rotate
SECONDS_A_CALL = 2.0  # are kept for each of the calls that are left, when there is a choice to compile
NO_TIME = "no time was left"


@dataclass(frozen=True)
class Time:
    """Of one variant: median microseconds of a step, over fastgen's, and the share of a copy's bandwidth (0 to 1)."""

    microseconds: float
    times_fastgen: float
    share_of_copy: float


@dataclass(frozen=True)
class Timed:
    """One call: what its variants take, and why one of them was not measured."""

    function: str
    shape: Shape
    dtype: str
    floor_bytes: int
    copy_gb_per_s: float | None = None
    variants: dict[str, Time] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def _shape(kind: str, device_type: str) -> Shape:
    shape = SHAPES[device_type][kind]
    if kind == "vocabulary" and device_type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        rows, row_bytes = shape[0], shape[1] * DTYPES[device_type].itemsize
        while rows > 1 and rows * row_bytes * EAGER_BYTES > free:
            rows //= 2
        shape = (rows, *shape[1:])
    return shape


def _failure(step: Variant, inputs: Sequence[Tensor]) -> str | None:
    """Why a compiled step does not run, in a line: there may be no compiler, or one that fails."""
    try:
        step(inputs)
    except Exception as error:
        told = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {told[0]}" if told else type(error).__name__
    return None


class _Budget:
    """The time of all calls together. Nothing is begun after it; what has begun is finished."""

    def __init__(self, seconds: float) -> None:
        self.stop, self.compiling = time.monotonic() + seconds, 0.0

    def left(self) -> float:
        return self.stop - time.monotonic()

    def allows_to_compile(self, calls: int) -> bool:
        """Whether a compilation like the last one leaves time to measure this call and those after it."""
        return self.left() - self.compiling > SECONDS_A_CALL * calls

    def compile(self, step: Variant, inputs: Sequence[Tensor]) -> str | None:
        start = time.monotonic()
        reason = _failure(step, inputs)
        self.compiling = time.monotonic() - start
        return reason


def _row(case: Case, kind: str, streams: int, device_type: str, budget: _Budget, calls: int, compiled: bool) -> Timed:
    shape, dtype = _shape(kind, device_type), DTYPES[device_type]
    floor = streams * math.prod(shape) * dtype.itemsize
    empty = Timed(case.function, shape, str(dtype).removeprefix("torch."), floor)
    names = [name for name in VARIANTS if compiled or name != "torch.compile"]
    if budget.left() <= 0:
        return Timed(**vars(empty) | {"missing": dict.fromkeys(names, NO_TIME)})
    pool = input_pool(case_inputs(case, shape, dtype, device_type), device_type)
    theirs = partial(case, reference)
    losses: dict[str, Callable[..., Tensor]] = {"eager": theirs, "fastgen": partial(case, fastgen)}
    missing: dict[str, str] = {}
    if compiled:
        torch._dynamo.reset()
        losses["torch.compile"] = torch.compile(theirs)
        reason = NO_TIME
        if budget.allows_to_compile(calls):
            reason = budget.compile(partial(case_step, case, losses["torch.compile"]), pool[0]) or ""
        if reason:
            missing["torch.compile"] = reason
    steps: dict[str, Variant] = {n: partial(case_step, case, losses[n]) for n in names if n not in missing}
    measured, copy_rate = measure_beside_copy(steps, pool, device_type, seconds=max(budget.left(), 0) / calls)
    missing |= {name: "the memory is too small" for name in steps if name not in measured}
    if "fastgen" not in measured:
        missing |= dict.fromkeys(measured, "there is no time of fastgen's to compare with")
        return Timed(**vars(empty) | {"missing": missing})
    ours = measured["fastgen"].median
    times = {
        name: Time(measured[name].median * 1e6, measured[name].median / ours, floor / measured[name].median / copy_rate)
        for name in names
        if name in measured
    }
    return Timed(**vars(empty) | {"copy_gb_per_s": copy_rate * 1e-9, "variants": times, "missing": missing})


def bench(device: str, seconds: float = 120.0, compiled: bool = True, progress: bool = True) -> list[Timed]:
    """Measures each of :data:`WORK` on `device`, forward and backward, for `seconds` altogether."""
    budget, place = _Budget(seconds), torch.device(device)
    # The current device, for what is made and launched there.
    with torch.cuda.device(place) if place.type == "cuda" else contextlib.nullcontext():
        return [
            _row(CASES[name], kind, streams, place.type, budget, len(WORK) - i, compiled)
            for i, (name, kind, streams) in enumerate(tqdm(WORK, unit="call", disable=not progress, leave=False))
        ]


def table(rows: Sequence[Timed]) -> str:
    """The rows as text: a line for each variant, and why one has no figures."""
    lines = [f"{'':26}{'variant':15}{'µs':>12}{'over ours':>12}{'of a copy':>11}"]
    for row in rows:
        heading = [row.function, f"  {'×'.join(map(str, row.shape))} {row.dtype}", ""]
        shown = (name for name in VARIANTS if name in row.variants or name in row.missing)
        for left, name in zip(heading, shown, strict=False):
            line = f"{left:26}{name:15}"
            if name in row.variants:
                time_ = row.variants[name]
                line += f"{time_.microseconds:12.1f}{time_.times_fastgen:10.2f} ×{time_.share_of_copy:10.0%}"
            else:
                line += f"   {row.missing[name]}"
            lines.append(line.rstrip())
    return "\n".join(lines)


def seconds(text: str) -> float:
    """The argument of ``--seconds``."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")
    return value


def usable_device(text: str) -> str:
    """The argument of ``--device``: a CPU, or a GPU that is there."""
    try:
        device = torch.device(text)
        if device.type == "cuda":
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such word, no such GPU, a torch without CUDA
        told = str(error).splitlines()[0] if str(error) else "it cannot be used"
        raise argparse.ArgumentTypeError(f"must be a device that torch can use, got {text!r}: {told}") from None
    if device.type not in SHAPES:
        raise argparse.ArgumentTypeError(f"must be a CPU or a CUDA device, got {text!r}")
    return text


def main(arguments: Any) -> int:
    device, start = arguments.device, time.monotonic()
    rows = bench(device, arguments.seconds, not arguments.no_compile)
    on_gpu = torch.device(device).type == "cuda"
    found = {
        "fastgen": fastgen.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if on_gpu else "cpu",
        "threads": torch.get_num_threads(),
        "backend": dispatch.backend_for("elbo_error", torch.device(device).type),
        "seconds": time.monotonic() - start,
    }
    if arguments.json:
        print(json.dumps(found | {"rows": [asdict(row) for row in rows]}, indent=2))
        return 0
    print("{device}, torch {torch}, {threads} threads, fastgen {fastgen} by its {backend} backend\n".format(**found))
    print(table(rows))
    print(f"\nA step forward and backward: medians of interleaved rounds, at least {FEWEST_ROUNDS} of them; eager and")
    print(
        "torch.compile are of the reference. 100 % of a copy: every input and the gradient moved once, as fast as that."
    )
    return 0
