"""The operators that the cases run, with the arguments that they are called with."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastgen
from fastgen.cases import CASES, FAMILIES, Case
from fastgen.core import dispatch, verify

Calls = dict[str, list[tuple[Any, ...]]]
DTYPES = ((torch.float32,), (torch.bfloat16, torch.float32, torch.float64))  # alike and mixed


class Recorder(TorchDispatchMode):
    """Keeps calls of our operators that show something new of an argument: a dtype, a layout, a None, an option."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Calls = {}
        self.seen: set[Any] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("fastgen", "fastgen_triton"):
            name = func._schema.name.partition("::")[2]
            aspects = {(name, i, _aspect(value)) for i, value in enumerate(args)}
            if not aspects <= self.seen:
                self.seen |= aspects
                kept = tuple(_copy(a) if isinstance(a, Tensor) else a for a in args)  # some are written to
                self.calls.setdefault(name, []).append(kept)
        return func(*args, **(kwargs or {}))


def _aspect(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.dim(), value.is_contiguous()
    return type(value) if isinstance(value, float) else value


def _copy(t: Tensor) -> Tensor:
    """Laid out alike, where it is dense in some order of dimensions; expanded tensors as they are."""
    return t.detach() if 0 in t.stride() else t.detach().clone()


def turned(t: Tensor) -> Tensor:
    """The same tensor in a layout that is not contiguous."""
    return t.transpose(-2, -1).contiguous().transpose(-2, -1)


def record(cases: Iterable[Case], backend: str, device: str) -> Calls:
    with fastgen.use_backend(backend), Recorder() as recorder:
        for case in cases:
            for dtypes in DTYPES:
                layout = turned if len(dtypes) > 1 else None
                verify.results(case, fastgen, case.inputs((2, 2, 6), *dtypes, device=device, layout=layout))
    return recorder.calls


@functools.cache
def recorded(backend: str, device: str) -> Calls:
    """What the cases call each operator with, with gradients and without."""
    # The arguments are alike on all backends, but for the solver's table; interpreting Triton's kernels is slow.
    native = dispatch.missing("elbo_error", "native", device) is None
    calls = record(CASES.values(), "native" if native else backend, device)
    return calls | record(FAMILIES["trajectory"], backend, device)
