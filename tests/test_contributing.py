"""The walk of CONTRIBUTING.md, walked: its blocks, applied to a copy of the repository, pass what the suite asks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX", "c++")
BLOCK = re.compile(r"^```(?:python|cpp) (?P<file>\S+?)(?: after (?P<line>.+?))?\n(?P<text>.*?)^```$", re.S | re.M)
BLOCKS = list(BLOCK.finditer((ROOT / "CONTRIBUTING.md").read_text()))
(NAME,) = {n for b in BLOCKS for n in re.findall(r"__all__ \+= \[\"(\w+)\"\]", b["text"])}

# The registration alone, with the walk's own kernel: the family's others are in fastgen._C already.
UNIT = """
#include "elbo.h"
#include "runtime/cpu.h"
using namespace fastgen;
using Device = Cpu;
STABLE_TORCH_LIBRARY_IMPL(fastgen, CPU, m) {{ {registration} }}
"""
RUNTIME = ("pool.cpp", "isa.cpp", "convert.cpp")


def apply(block: re.Match[str], root: Path) -> None:
    path = root / block["file"]
    lines = path.read_text().splitlines(keepends=True)
    place = len(lines)
    if block["line"]:
        (place,) = (i + 1 for i, line in enumerate(lines) if block["line"] in line)
    lines.insert(place, f"\n\n{block['text']}" if block["line"] is None else block["text"])
    path.write_text("".join(lines))


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    root = tmp_path_factory.mktemp("walked")
    for folder in ("fastgen", "csrc", "triton_kernels", "tests", "benchmarks"):
        shutil.copytree(ROOT / folder, root / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    for block in BLOCKS:
        apply(block, root)
    return root


def build(root: Path) -> Path:
    (registration,) = (b["text"] for b in BLOCKS if "m.impl" in b["text"])
    (root / "walk.cpp").write_text(UNIT.format(registration=registration))
    sources = [root / "walk.cpp", *(next((root / "csrc").rglob(name)) for name in RUNTIME)]
    library = root / "walk.so"
    command = [COMPILER, "-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", f"-I{root / 'csrc'}"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", *(f"-I{p}" for p in include_paths())]
    command += [*map(str, sources), *(f"-L{p}" for p in library_paths()), "-ltorch_cpu", "-lc10", "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def run(root: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(root), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


SUITE = ("operators", "no_gradient", "declarations", "two_hops", "docs")


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler")
def test_the_walk_passes_what_the_suite_asks(walked):
    pytest.importorskip("triton")
    library = build(walked)
    # Before the tests' own configuration, as fastgen._C is.
    (walked / "tests" / "walk.py").write_text(f"import fastgen, torch\ntorch.ops.load_library({str(library)!r})\n")
    files = [f"tests/test_{name}.py" for name in SUITE]
    wanted = f"{NAME} or every_operator_has or every_public_function or public_functions_list"
    out = run(walked, "-m", "pytest", "-p", "tests.walk", "-vv", "-k", wanted, *files)
    for backend in ("native", "triton"):
        assert re.search(rf"test_matches_float64\[{backend}-{NAME}-.* PASSED", out), out[-3000:]


def test_the_walk_is_six_files_and_no_more_than_eighty_lines():
    lines = [line for b in BLOCKS for line in b["text"].splitlines() if line.strip()]
    assert len({b["file"] for b in BLOCKS}) == 6
    assert len(lines) <= 80
