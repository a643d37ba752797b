"""Builds fastgen._C (CPU kernels) and, where an nvcc fits this torch, fastgen._C_cuda.

FASTGEN_CPU=0 skips the first, FASTGEN_CUDA=0|1 skips or demands the second. Without either the package still
installs: the PyTorch reference serves on CPUs, Triton on GPUs. What a source distribution holds is up to MANIFEST.in
alone, and does not depend on what is built. FASTGEN_PACKAGE=name installs the library under another name, to be
imported beside another package that is called fastgen.
"""

import importlib.metadata
import os
import runpy
import shutil
import sys
from glob import glob
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from setuptools import Command, Extension, find_packages, setup

# The oldest torch whose stable ABI the extensions use; one build then serves every later torch.
TORCH_TARGET = "0x020b000000000000"
CUDA_ARCHITECTURES = (os.environ.get("FASTGEN_CUDA_ARCHITECTURES") or "80;90a;100;120;120+PTX").split(";")
HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True))
CSRC = Path(__file__).resolve().parent / "csrc"
write_units = runpy.run_path(str(CSRC / "units.py"))["write"]
backend = SimpleNamespace(**runpy.run_path(str(CSRC / "backend.py")))
PACKAGE = backend.package()
# A wheel takes all that it finds in the build's folder: one name's must not end up in another's.
BUILD = "build" if PACKAGE == "fastgen" else f"build/package-{PACKAGE}"


def find_ninja() -> None:
    """Puts ninja on the PATH, where the environment is not activated and lacks it there: else builds are serial."""
    if shutil.which("ninja"):
        return
    try:
        files = importlib.metadata.files("ninja") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for file in files:
        if file.name in ("ninja", "ninja.exe"):
            os.environ["PATH"] += os.pathsep + str(Path(file.locate()).resolve().parent)


def cpu_extension(flags: list[str]) -> Extension:
    import pybind11
    from torch.utils.cpp_extension import CppExtension

    return CppExtension(
        f"{PACKAGE}._C",
        ["csrc/runtime/cpu_module.cpp", *(f"csrc/runtime/{name}.cpp" for name in ("convert", "isa", "pool"))],
        include_dirs=[str(CSRC), pybind11.get_include()],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET), ("FASTGEN_FLAGS", f'"{" ".join(flags)}"')],
        extra_compile_args=flags,
        depends=HEADERS,
    )


def gencode(architecture: str) -> str:
    """nvcc's option for a binary, ``90a``, or for PTX, ``120+PTX``, which later GPUs compile for themselves."""
    number, plus, _ = architecture.partition("+PTX")
    return f"-gencode=arch=compute_{number},code={'compute' if plus else 'sm'}_{number}"


def cuda_extension(flags: list[str], home: str) -> Extension:
    os.environ["CUDA_HOME"] = home  # before torch.utils.cpp_extension guesses
    import pybind11
    import torch
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = home  # stays None under a torch built without CUDA
    arch = [gencode(a) for a in CUDA_ARCHITECTURES]
    extension = cpp_extension.CUDAExtension(
        f"{PACKAGE}._C_cuda",
        ["csrc/runtime/cuda_module.cpp"],
        include_dirs=[str(CSRC), pybind11.get_include()],
        define_macros=[
            ("TORCH_TARGET_VERSION", TORCH_TARGET),
            ("FASTGEN_CUDA_ARCHITECTURES", f'"{";".join(CUDA_ARCHITECTURES)}"'),
            ("USE_CUDA", None),  # declares the stream functions of torch's C shim
        ],
        extra_compile_args={"cxx": flags, "nvcc": ["-O3", "-std=c++20", "-Xcompiler=-fvisibility=hidden", *arch]},
        depends=HEADERS,
    )
    if torch.version.cuda is None:  # a build to check compiling and linking; it does not load
        extension.libraries = [name for name in extension.libraries if name not in ("c10_cuda", "torch_cuda")]
    return extension


def torch_has_cuda() -> bool:
    import torch

    return torch.version.cuda is not None


def extensions() -> tuple[list[Extension], dict[str, type[Command]]]:
    compiler, home = backend.compiler_works(), backend.cuda_home()
    if not compiler:
        print("fastgen: no C++ compiler: the PyTorch reference will serve on CPUs, Triton on GPUs", file=sys.stderr)
    if os.environ.get("FASTGEN_CUDA") == "1" and home is None:
        raise SystemExit("FASTGEN_CUDA=1, but no CUDA toolkit was found: set CUDA_HOME to its root")
    flags = ["-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-g0"]
    modules = [cpu_extension(flags)] if backend.want("FASTGEN_CPU", compiler) else []
    # What nvcc compiles needs the C++ compiler too.
    if home and backend.want("FASTGEN_CUDA", compiler) and ("FASTGEN_CUDA" in os.environ or torch_has_cuda()):
        modules.append(cuda_extension(flags, home))
    if not modules:
        return [], {}
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """Adds the generated units, which are no part of a source distribution."""

        def build_extensions(self) -> None:
            for extension in self.extensions:
                device = "CUDA" if extension.name.endswith("._C_cuda") else "CPU"
                folder = Path(BUILD, "units", device.lower())
                extension.sources += map(str, write_units(folder, device, PACKAGE))
            super().build_extensions()

    find_ninja()
    return modules, {"build_ext": Build}


def packages() -> dict[str, Any]:
    """The packages to install, and the folders of those that do not stand where their names say."""
    names = [PACKAGE + name.removeprefix("fastgen") for name in find_packages(include=["fastgen", "fastgen.*"])]
    # A clone's fastgen/triton_kernels is a signpost: an installation has the kernels there.
    folders = {PACKAGE: "fastgen", f"{PACKAGE}.triton_kernels": "triton_kernels"}
    return {"packages": names, "package_dir": folders}


if PACKAGE != "fastgen" and {"develop", "editable_wheel"} & set(sys.argv):
    raise SystemExit("FASTGEN_PACKAGE renames a copy: it goes with pip install ., not with pip install -e .")
ext_modules, cmdclass = extensions()
setup(
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    package_data={PACKAGE: ["py.typed"]},
    options={"build": {"build_base": BUILD}},
    **packages(),
)
