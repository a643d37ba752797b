"""Builds fastgen._C (CPU kernels) and, where an nvcc fits this torch, fastgen._C_cuda.

FASTGEN_CPU=0 skips the first, FASTGEN_CUDA=0|1 skips or demands the second. Without either the package still
installs: the PyTorch reference serves on CPUs, Triton on GPUs. What a source distribution holds is up to MANIFEST.in
alone, and does not depend on what is built.
"""

import importlib.metadata
import os
import runpy
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import Command, Extension, setup

# The oldest torch whose stable ABI the extensions use; one build then serves every later torch.
TORCH_TARGET = "0x020b000000000000"
CUDA_ARCHITECTURES = (os.environ.get("FASTGEN_CUDA_ARCHITECTURES") or "80;90a;100;120;120+PTX").split(";")
HEADERS = sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True))
CSRC = Path(__file__).resolve().parent / "csrc"
write_units = runpy.run_path(str(CSRC / "units.py"))["write"]


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
        "fastgen._C",
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
        "fastgen._C_cuda",
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
    compiler, home = compiler_works(), cuda_home()
    if not compiler:
        print("fastgen: no C++ compiler: the PyTorch reference will serve on CPUs, Triton on GPUs", file=sys.stderr)
    if os.environ.get("FASTGEN_CUDA") == "1" and home is None:
        raise SystemExit("FASTGEN_CUDA=1, but no CUDA toolkit was found: set CUDA_HOME to its root")
    flags = ["-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-g0"]
    modules = [cpu_extension(flags)] if want("FASTGEN_CPU", compiler) else []
    # What nvcc compiles needs the C++ compiler too.
    if home and want("FASTGEN_CUDA", compiler and torch_has_cuda()):
        modules.append(cuda_extension(flags, home))
    if not modules:
        return [], {}
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """Adds the generated units, which are no part of a source distribution."""

        def build_extensions(self) -> None:
            for extension in self.extensions:
                device = "CUDA" if extension.name == "fastgen._C_cuda" else "CPU"
                extension.sources += map(str, write_units(Path("build", "units", device.lower()), device))
            super().build_extensions()

    find_ninja()
    return modules, {"build_ext": Build}


ext_modules, cmdclass = extensions()
setup(ext_modules=ext_modules, cmdclass=cmdclass)
