"""Every example runs, in a smoke version of seconds."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def numbers(value):
    if isinstance(value, dict):
        for v in value.values():
            yield from numbers(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from numbers(v)
    elif isinstance(value, (int, float)):
        yield float(value)


@pytest.mark.parametrize("name", sorted(p.stem for p in EXAMPLES.glob("*_digits.py")))
def test_smoke(name, tmp_path):
    results = load(name).main(["--smoke", "--out", str(tmp_path)])
    found = list(numbers(results))
    assert found
    assert all(math.isfinite(x) for x in found)
    assert list(tmp_path.glob("*.png")), "the example saved no picture"
