"""From a public function to its kernels by name: its operators, then what bears their names in C++ and in Triton."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from recorder import Recorder

import fastgen
from fastgen.cases import FUNCTIONS
from fastgen.core.operator import operators

ROOT = Path(__file__).parents[1]


def names(path: Path, pattern: str) -> bool:
    return re.search(pattern, path.read_text(), re.M) is not None


@pytest.mark.parametrize("function", FUNCTIONS)
def test_from_a_public_function_to_its_kernels(function, kernel_backend, device):
    """The operators are those that its cases run."""
    with torch.no_grad(), Recorder() as recorder:
        for case in FUNCTIONS[function]:
            case(fastgen, **case.inputs((2, 2, 6), device=device))
    called, module = list(recorder.calls), Path(inspect.getsourcefile(getattr(fastgen, function)))
    family = [p for p in module.parent.glob("*.py") if p.stem not in ("operators", "reference", "cases")]
    # Some call other public functions besides.
    assert any(names(p, rf"\b{name}\b") for name in called for p in family), f"{family} call none of {called}"
    for name in called:
        folder = ROOT / "fastgen" / operators[name].family
        declarations = folder / "operators.py"
        if not declarations.exists():  # a family of few functions is one file
            declarations = folder / "__init__.py"
        assert names(declarations, rf"^def {name}\("), f"{declarations} declares no {name}"
        # A family's header, or one of an operator's own beside it.
        cpp = [p for p in (ROOT / "csrc").glob("*.h") if names(p, rf'"{name}"')]
        assert [p.stem for p in cpp] in ([folder.name], [name]), f"{cpp} in csrc register {name}"
        assert names(ROOT / "triton_kernels" / f"{folder.name}.py", rf"\b{name}\b"), f"no launcher of {name}"
