"""Which implementation runs an operator, and why.

An operator has one schema in two namespaces: ``torch.ops.fastgen`` holds the compiled kernels (CPU and CUDA) and
``torch.ops.fastgen_triton`` the Triton ones. The third backend, ``"reference"``, is no operator: the public function
calls :mod:`fastgen.reference`, plain PyTorch that autograd differentiates.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

from .operator import NATIVE, PACKAGE, operators

BACKENDS = ("auto", "native", "triton", "reference")

# Why an extension may not have been built, and what to do.
_UNBUILT = {
    "_C": "there was no C++ compiler when fastgen was installed, or FASTGEN_CPU=0, or this is a clone that was not"
    " installed; install g++ and Python's headers, then fastgen (pip install --no-build-isolation --no-deps .)",
    "_C_cuda": "there was no CUDA toolkit or C++ compiler when fastgen was installed, or FASTGEN_CUDA=0, or torch is"
    " built without CUDA; on GPUs the Triton kernels serve",
}


class NotBuilt(ImportError):
    """The extension's file is not there."""


def _load(name: str) -> ModuleType | ImportError:
    module, folder = f"{PACKAGE}.{name}", Path(__file__).parents[1]
    # Beside this file alone: the finder of an editable installation would lend a clone another copy's kernels.
    if PathFinder.find_spec(module, [str(folder)]) is None:
        others = sorted(p.name for p in folder.glob(f"{name}.*") if p.suffix in (".so", ".pyd"))
        return NotBuilt(f"there is only {', '.join(others)}, for another Python" if others else _UNBUILT[name])
    try:
        return importlib.import_module(module)
    except ImportError as error:
        # Python's word for an entry of None in sys.modules.
        return NotBuilt(_UNBUILT[name]) if getattr(error, "name", None) == module else error


_extensions: dict[str, ModuleType | ImportError] = {name: _load(name) for name in _UNBUILT}


class _State(threading.local):
    def __init__(self) -> None:
        self.requested = _from_environment()


def _from_environment() -> str:
    name = os.environ.get("FASTGEN_BACKEND", "auto")
    if name not in BACKENDS:
        raise ValueError(f"FASTGEN_BACKEND must be one of {', '.join(BACKENDS)}; got {name!r}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs fastgen's operators on one backend inside a ``with`` block, in this thread.

    Args:
        name: ``"native"`` (the compiled C++ or CUDA kernels), ``"triton"``, ``"reference"`` (plain PyTorch) or
            ``"auto"``, the default: the best one that is there. The environment variable ``FASTGEN_BACKEND`` sets it
            for a process.

    Raises:
        ValueError: for another name.
        RuntimeError: from the operator's call, where the backend is not available; it says what is missing. There is
            no silent fallback.

    A function under ``torch.compile`` keeps the backend it was compiled with. Under the transforms of ``torch.func``
    the reference always runs.

    Example::

        >>> import torch, fastgen
        >>> with fastgen.use_backend("reference"):
        ...     fastgen.elbo_error(torch.ones(2, 3), torch.zeros(2, 3))
        tensor([1., 1.])
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    before = _state.requested
    _state.requested = name
    try:
        yield
    finally:
        _state.requested = before


_state = _State()


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability runs what was built for `architectures`, such as ``"80;90a;120+PTX"``.

    A binary runs on GPUs of its own major version that are no older; one with a letter only on its own; PTX on all
    that are no older.
    """
    major, minor = capability
    for architecture in architectures.split(";"):
        number, plus, _ = architecture.partition("+PTX")
        version = int(number.rstrip("af"))
        if version == 10 * major + minor:
            return True
        older, own = version < 10 * major + minor, number.isdigit()
        if own and older and (plus or version // 10 == major):
            return True
    return False


def _foreign_gpu() -> str | None:
    """Why the CUDA kernels cannot run on one of the GPUs here; None if they can, or where none is to be seen."""
    module = _extensions["_C_cuda"]
    if isinstance(module, ImportError) or not torch.cuda.is_available():  # emulated, or traced for elsewhere
        return None
    built = module.build_info()["architectures"]
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        if not runs_on(built, capability):
            found = ".".join(map(str, capability))
            return f"{PACKAGE}._C_cuda is built for {built}, and GPU {device} has compute capability {found}"
    return None


@functools.cache
def missing(name: str, backend: str, device_type: str) -> str | None:
    """Why `backend` cannot run operator `name` on this type of device; None if it can."""
    if backend == "reference":
        return None
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed (pip install triton)"
        if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return "Triton has no CPU backend (set TRITON_INTERPRET=1 before Python starts, to test its kernels)"
        kernels = f"{PACKAGE}.triton_kernels.{operators[name].family}"
        return None if importlib.util.find_spec(kernels) is not None else f"there is no {kernels}"
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    if key is None:
        return f"{PACKAGE} has no compiled kernels for device type {device_type!r}"
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NATIVE}::{name}", key):
        return None if key == "CPU" else _foreign_gpu()
    extension = {"CPU": "_C", "CUDA": "_C_cuda"}[key]
    module = _extensions[extension]
    if isinstance(module, NotBuilt):
        return f"{PACKAGE}.{extension} is not built"
    if isinstance(module, ImportError):
        return f"{PACKAGE}.{extension} does not load"
    return f"{PACKAGE}.{extension} has no kernel for {name}"


def preference(device_type: str) -> tuple[str, ...]:
    """The backends that ``"auto"`` tries on this type of device, in order.

    On GPUs CUDA's kernels come before Triton's, which serve where those are not built: on an H200 a small loss's step
    costs the host half as much with them. The device takes about as long in float32; in bfloat16 up to 1.4 times as
    long for large inputs, and of small ones some microseconds more.
    """
    return ("native", "reference") if device_type == "cpu" else ("native", "triton", "reference")


@functools.cache
def _resolve(name: str, requested: str, device_type: str) -> str:
    if requested != "auto":
        reason = missing(name, requested, device_type)
        if reason:
            raise RuntimeError(
                f"backend {requested!r} cannot run {name} on {device_type}: {reason}"
                f" (python -m {PACKAGE} info says more)"
            )
        return requested
    return next(b for b in preference(device_type) if missing(name, b, device_type) is None)


def backend_for(name: str, device_type: str) -> str:
    """The backend that runs operator `name` now: ``"native"``, ``"triton"`` or ``"reference"``."""
    # Transforms of torch.func, nested or vmapped, and forward-mode derivatives are right for plain PyTorch as it is.
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    requested = "reference" if transformed else _state.requested
    return _resolve(name, requested, device_type)


# What torch.compiler.assume_constant_result does; calling it would import the compiler, and Triton, with fastgen.
backend_for._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_automatic(name: str, backend: str, device_type: str) -> bool:
    """Whether nobody asked for a backend, and `backend` can run operator `name` on this type of device."""
    return _state.requested == "auto" and missing(name, backend, device_type) is None


def build_info() -> dict[str, Any]:
    """What the compiled extensions say of themselves, or why they are not there.

    Returns:
        A dict with the keys ``"_C"`` (CPU) and ``"_C_cuda"``: a dict of facts such as the compiler and its flags, or
        an ImportError that says why the extension was not built, or what kept it from loading.
        ``python -m fastgen info`` prints it.

    Example::

        >>> import fastgen
        >>> sorted(fastgen.build_info())
        ['_C', '_C_cuda']
    """
    return {name: m if isinstance(m, ImportError) else m.build_info() for name, m in _extensions.items()}
