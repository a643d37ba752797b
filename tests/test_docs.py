"""The examples that users copy: docstrings, the README, and the pages of the documentation."""

import ast
import doctest
import re
import sys
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


def page_blocks():
    for page in sorted((ROOT / "docs").rglob("*.md")):
        text = page.read_text()
        for block in re.finditer(r"^```python\n(.*?)^```", text, re.S | re.M):
            heading = re.findall(r"^#+ (.*?)(?: \{.*)?$", text[: block.start()], re.M)[-1]
            yield pytest.param(block[1], id=f"{page.relative_to(ROOT / 'docs')}: {heading}")


@pytest.mark.parametrize("block", list(page_blocks()))
def test_blocks_of_the_documentation_run(block, tmp_path, monkeypatch):
    """Each stands alone; one that imports a library that is not here is skipped, by the library's name."""
    for node in ast.walk(ast.parse(block)):
        names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in getattr(node, "names", [])]
        for name in names if isinstance(node, (ast.Import, ast.ImportFrom)) else []:
            if name.partition(".")[0] not in (*sys.stdlib_module_names, "fastgen", "torch"):
                pytest.importorskip(name.partition(".")[0])
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(block, "a page", "exec"), {"__name__": "page"})


def test_the_documentation_quotes_the_demo_as_it_is():
    demo = (ROOT / "examples" / "ddo_digits.py").read_text()
    function = re.search(r"^def finetune_with_ddo.*?^    return models\[1:\]$", demo, re.S | re.M)[0]
    assert function in (ROOT / "docs" / "demo.md").read_text()
