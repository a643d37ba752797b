"""``python -m fastgen info`` and ``python -m fastgen verify``."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys

import torch

from . import __version__
from .core import dispatch, verify
from .core.operator import PACKAGE, operators

VARIABLES = ("FASTGEN_BACKEND", "FASTGEN_CPU_CAPABILITY", "FASTGEN_CPU_CACHE_MB", "TRITON_INTERPRET")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _print_backends(device_type: str) -> None:
    """Which backend serves each operator; then why the ones preferred to it do not, each reason once."""
    passed_over: dict[str, list[str]] = {}
    for name in sorted(operators):
        try:
            chosen = dispatch.backend_for(name, device_type)
        except RuntimeError:  # FASTGEN_BACKEND asks for what is not there
            chosen = "none"
        print(f"  {name:26} {chosen}")
        for backend in dispatch.preference(name, device_type):
            if backend == chosen:
                break
            if reason := dispatch.missing(name, backend, device_type):
                passed_over.setdefault(f"{backend}: {reason}", []).append(name)
    for reason, names in passed_over.items():
        where = "" if len(names) == len(operators) else f" ({', '.join(names)})"
        print(f"not {reason}{where}")


def info() -> int:
    """Versions, devices, build facts, and which backend serves each operator."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, triton {_version('triton')}"
    print(f"{PACKAGE} {__version__}, {versions}")
    print(f"CPU: {platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            print(f"GPU {i}: {torch.cuda.get_device_name(i)}, compute capability {major}.{minor}")
    else:
        print(f"GPU: none that torch can use (built for CUDA {torch.version.cuda})")
    for extension, facts in dispatch.build_info().items():
        if isinstance(facts, dispatch.NotBuilt):
            print(f"{PACKAGE}.{extension}: not built: {facts}")
        elif isinstance(facts, ImportError):
            print(f"{PACKAGE}.{extension}: built, but does not load: {facts}")
        else:
            print(f"{PACKAGE}.{extension}: " + ", ".join(f"{k} {v}" for k, v in facts.items()))
    for variable in VARIABLES:
        if variable in os.environ:
            print(f"{variable}={os.environ[variable]}")
    for device_type in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        print(f"\non {device_type}:")
        _print_backends(device_type)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {PACKAGE}", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, build facts, which backend serves each operator and why")
    checking = commands.add_parser("verify", help="check every operator, backend and dtype against float64")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    checking.add_argument("--device", default=default, help=f"a torch device (default here: {default})")
    checking.add_argument("--backend", choices=dispatch.BACKENDS[1:], help="only this one")
    arguments = parser.parse_args(argv)
    return info() if arguments.command == "info" else verify.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
