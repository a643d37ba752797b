"""Builds the CUDA kernels for CPU tensors, on the emulator of ``tests/cuda_emulator``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

from .aot_cuda import ROOT, compiler_flags, units

EMULATOR = ROOT / "tests" / "cuda_emulator"
COMPILER = os.environ.get("CXX", "c++")


def build_emulated(folder: Path, *, checked: bool = True) -> Path:
    """The kernels as a library, built in `folder`, which takes two minutes. Loaded where ``fastgen._C`` is not, it
    serves the native backend on CPUs.

    Shared memory has no C++ spelling that means one per block: its two declarations are rewritten, in a copy; all else
    compiles as it stands.

    Args:
        checked: with the compiler's checks of alignment and bounds.
    """
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for header in (folder / "csrc").rglob("*.cuh"):
        text = header.read_text()
        text = re.sub(r"extern __shared__ (.+) (\w+)\[\];", r"\1* \2 = emulator::dynamic_shared<\1>();", text)
        header.write_text(re.sub(r"__shared__ (.+) (\w+);", r"\1& \2 = emulator::shared<\1>();", text))
    registering = units()
    (folder / "units.inc").write_text(registering.text(list(registering.parts()), "CUDA", key="CPU"))
    library = folder / "emulated.so"
    command = [COMPILER, "-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
    if checked:
        command += ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]
    command += [flag for flag in compiler_flags() if flag.startswith("-D")]
    command += [f"-I{p}" for p in (EMULATOR, folder, folder / "csrc", *include_paths())]
    command.append(str(EMULATOR / "emulated.cpp"))
    for path in library_paths():
        command += [f"-L{path}", f"-Wl,-rpath,{path}"]
    subprocess.run([*command, "-ltorch_cpu", "-lc10", "-o", str(library)], check=True)
    return library
