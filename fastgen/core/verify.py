"""``python -m fastgen verify``: every public function with a kernel against its float64 reference, on this machine."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import reference
from ..cases import FUNCTIONS, Case
from . import dispatch
from .accuracy import accurate, errors
from .operator import PACKAGE, operators

fastgen = importlib.import_module(PACKAGE)  # the public functions, whatever name the package has

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((6, 4, 16, 16), (6, 3, 5, 7), (4, 40_000))


@dataclass(frozen=True)
class Row:
    """One line of the table: the worst relative L2 errors over a function's cases and shapes."""

    function: str
    backend: str
    dtype: str
    value_error: float
    grad_error: float
    eager_error: float
    passed: bool


def results(case: Case, module: ModuleType, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The value, computed without and with a graph, and the gradients.

    Their cotangent is not 1, so that what scales a gradient is seen to; it is of odd eighths, which all dtypes hold.
    """
    with torch.no_grad():
        found = {"value": case(module, **tensors)}
    if case.differentiable:
        leaves = case.leaves(tensors)
        value = case(module, **leaves)
        eighths = (torch.arange(value.numel(), device=value.device) % 8 - 3.5) / 4
        inputs = [leaves[name] for name in case.differentiable]
        grads = torch.autograd.grad(value, inputs, eighths.reshape(value.shape).to(value.dtype))
        found["value with a graph"] = value.detach()
        found |= {f"gradient of {name}": grad for name, grad in zip(case.differentiable, grads, strict=True)}
    return found


def widened(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


def _check(function: str, backend: str, dtype: torch.dtype, device: str) -> Row:
    worst = {"value": 0.0, "gradient": 0.0, "eager": 0.0}
    passed = True
    for case in FUNCTIONS[function]:
        for shape in SHAPES:
            tensors = case.inputs(shape, dtype, device=device)
            exact, eager = results(case, reference, widened(tensors)), results(case, reference, tensors)
            with dispatch.use_backend(backend):
                actual = results(case, fastgen, tensors)
            for what, mine in actual.items():
                theirs, truth, column = eager[what], exact[what], what.partition(" ")[0]
                passed &= accurate(mine, theirs, truth) and mine.dtype == theirs.dtype
                worst[column] = max(worst[column], errors(mine, truth)[0])
                worst["eager"] = max(worst["eager"], errors(theirs, truth)[0])
    name = str(dtype).removeprefix("torch.")
    return Row(function, backend, name, worst["value"], worst["gradient"], worst["eager"], passed)


def verify(device: str, backend: str | None = None, progress: bool = True) -> list[Row]:
    """Checks what is there on `device`: every backend, or the one named."""
    backends = [backend] if backend else [b for b in ("native", "triton") if _is_there(b, device)]
    # No kernels at all: the reference serves, and is checked against its own float64.
    backends = backends or ["reference"]
    work = [(name, b, dtype) for name in FUNCTIONS for b in backends for dtype in DTYPES]
    return [_check(n, b, dtype, device) for n, b, dtype in tqdm(work, unit="check", disable=not progress, leave=False)]


def _is_there(backend: str, device: str) -> bool:
    """Whether it has any kernel. A backend that lacks some fails, and says what is missing."""
    return any(dispatch.missing(name, backend, torch.device(device).type) is None for name in operators)


def table(rows: list[Row]) -> str:
    """The rows as text."""
    lines = [f"{'function':30}{'backend':11}{'dtype':10}{'value':>10}{'gradient':>10}{'eager':>10}   "]
    for row in rows:
        figures = "".join(f"{x:10.1e}" for x in (row.value_error, row.grad_error, row.eager_error))
        lines.append(f"{row.function:30}{row.backend:11}{row.dtype:10}{figures}   {'pass' if row.passed else 'FAIL'}")
    return "\n".join(lines)


def main(arguments: Any) -> int:
    rows = verify(arguments.device, arguments.backend)
    print(table(rows))
    failed = sum(not row.passed for row in rows)
    print(f"\n{len(rows) - failed} of {len(rows)} pass on {arguments.device}: relative L2 errors against float64,")
    print("at most twice eager PyTorch's at the same dtype plus one rounding (and on a GPU 1.4e-6)")
    return 1 if failed else 0
