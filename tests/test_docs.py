"""The examples that users copy: docstrings and the README."""

import doctest
import re
from pathlib import Path

import pytest
import torch

import fastgen

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", fastgen.__all__)
def test_docstring_examples(name):
    tests = doctest.DocTestFinder(recurse=False).find(getattr(fastgen, name), name, globs={})
    assert tests, f"{name} has no docstring"
    assert any(test.examples for test in tests), f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        runner.run(test)
    assert runner.failures == 0


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_python_blocks_run(document, tmp_path, monkeypatch):
    """Blocks marked ```python run in order in one namespace; ```python fragment is for reading."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.S | re.M)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    torch.manual_seed(0)
    for block in blocks:
        exec(compile(block, document, "exec"), namespace)
    if document == "README.md":
        assert blocks, "the README shows no runnable example"


def test_the_readme_quotes_the_demo_as_it_is():
    demo = (ROOT / "examples" / "ddo_digits.py").read_text()
    function = re.search(r"^def finetune_with_ddo.*?^    return models\[1:\]$", demo, re.S | re.M)[0]
    assert function in (ROOT / "README.md").read_text()
