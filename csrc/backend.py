"""What is to be built, and the build backend (PEP 517): setuptools', but torch and a toolchain's helpers are asked for
only where there is something to compile. A pure installation fetches setuptools, and no more."""

from __future__ import annotations

import keyword
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

COMPILING = ["torch>=2.11", "pybind11>=2.13", "ninja"]


def compiler_works() -> bool:
    cxx = os.environ.get("CXX", "c++")
    try:
        return subprocess.run([cxx, "--version"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def cuda_home() -> str | None:
    """The toolkit's own root. An nvcc on the PATH may be a wrapper script in a folder with no libraries beside it."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates += sorted(glob("/usr/local/cuda-*"), reverse=True)
    nvcc = shutil.which("nvcc")
    if nvcc:
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    for root in filter(None, candidates):
        if Path(root, "bin", "nvcc").exists() and Path(root, "include", "cuda_runtime.h").exists():
            return root
    return None


def want(variable: str, default: bool) -> bool:
    value = os.environ.get(variable)
    return default if value is None else value != "0"


def package() -> str:
    """The name to import the library by; that of its operators' namespace too."""
    name = os.environ.get("FASTGEN_PACKAGE") or "fastgen"
    if not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name):
        raise SystemExit(f"FASTGEN_PACKAGE must be a name that Python can import, got {name!r}")
    return name


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    # Which torch there is decides over the CUDA kernels, where nobody else has.
    compiler = compiler_works()
    compiling = want("FASTGEN_CPU", compiler) or (cuda_home() is not None and want("FASTGEN_CUDA", compiler))
    return list(COMPILING) if compiling else []


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings: Any = None) -> list[str]:
    return []


@contextmanager
def _variables(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def build_sdist(sdist_directory: str, config_settings: Any = None) -> str:
    # It is the same whatever would be built of it, and under whatever name.
    with _variables(FASTGEN_CPU="0", FASTGEN_CUDA="0", FASTGEN_PACKAGE="fastgen"):
        return build_meta.build_sdist(sdist_directory, config_settings)
