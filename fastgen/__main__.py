"""``python -m fastgen info``, ``python -m fastgen verify`` and ``python -m fastgen bench``."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from typing import Any

import torch

from . import __version__
from .core import bench, dispatch, verify
from .core.operator import PACKAGE, operators

VARIABLES = ("FASTGEN_BACKEND", "FASTGEN_CPU_CAPABILITY", "FASTGEN_CPU_CACHE_MB", "TRITON_INTERPRET")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _backends(device_type: str) -> dict[str, dict[str, Any]]:
    """Which backend serves each operator, and why the ones preferred to it do not."""
    found = {}
    for name in sorted(operators):
        try:
            chosen = dispatch.backend_for(name, device_type)
        except RuntimeError:  # FASTGEN_BACKEND asks for what is not there
            chosen = "none"
        passed_over = {}
        for backend in dispatch.preference(device_type):
            if backend == chosen:
                break
            if reason := dispatch.missing(name, backend, device_type):
                passed_over[backend] = reason
        found[name] = {"backend": chosen, "passed_over": passed_over}
    return found


def _extension(facts: Any) -> dict[str, Any]:
    if isinstance(facts, dispatch.NotBuilt):
        return {"state": "not built", "reason": str(facts)}
    if isinstance(facts, ImportError):
        return {"state": "built, but does not load", "reason": str(facts)}
    return {"state": "loaded", **facts}


def facts() -> dict[str, Any]:
    """Versions, devices, build facts, and which backend serves each operator: what ``info --json`` prints."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return {
        "fastgen": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cpu": {
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "cuda": torch.version.cuda,
        "gpus": [
            {"name": torch.cuda.get_device_name(i), "capability": list(torch.cuda.get_device_capability(i))}
            for i in gpus
        ],
        "extensions": {name: _extension(found) for name, found in dispatch.build_info().items()},
        "environment": {variable: os.environ[variable] for variable in VARIABLES if variable in os.environ},
        "operators": {device_type: _backends(device_type) for device_type in (("cpu", "cuda") if gpus else ("cpu",))},
    }


def _print_backends(served: dict[str, dict[str, Any]]) -> None:
    """Which backend serves each operator; then why the ones preferred to it do not, each reason once."""
    passed_over: dict[str, list[str]] = {}
    for name, entry in served.items():
        print(f"  {name:26} {entry['backend']}")
        for backend, reason in entry["passed_over"].items():
            passed_over.setdefault(f"{backend}: {reason}", []).append(name)
    for reason, names in passed_over.items():
        where = "" if len(names) == len(served) else f" ({', '.join(names)})"
        print(f"not {reason}{where}")


def info(as_json: bool = False) -> int:
    """Prints :func:`facts`, for a person or as JSON."""
    found = facts()
    if as_json:
        print(json.dumps(found, indent=2))
        return 0
    print(f"{PACKAGE} {found['fastgen']}, Python {found['python']}, torch {found['torch']}, triton {found['triton']}")
    print("CPU: {machine}, {threads} threads, {capability}".format(**found["cpu"]))
    for i, gpu in enumerate(found["gpus"]):
        print(f"GPU {i}: {gpu['name']}, compute capability {'.'.join(map(str, gpu['capability']))}")
    if not found["gpus"]:
        print(f"GPU: none that torch can use (built for CUDA {found['cuda']})")
    for name, entry in found["extensions"].items():
        state = entry.pop("state")
        details = ", ".join(f"{k} {v}" for k, v in entry.items())
        print(f"{PACKAGE}.{name}: " + (details if state == "loaded" else f"{state}: {entry['reason']}"))
    for variable, value in found["environment"].items():
        print(f"{variable}={value}")
    for device_type, served in found["operators"].items():
        print(f"\non {device_type}:")
        _print_backends(served)
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {PACKAGE}", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    showing = commands.add_parser(
        "info", help="versions, devices, build facts, which backend serves each operator and why"
    )
    showing.add_argument("--json", action="store_true", help="for a program")
    checking = commands.add_parser("verify", help="check every operator, backend and dtype against float64")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    checking.add_argument("--device", default=default, help=f"a torch device (default here: {default})")
    checking.add_argument("--backend", choices=dispatch.BACKENDS[1:], help="only this one")
    measuring = commands.add_parser("bench", help="what a few losses cost here, beside eager PyTorch and torch.compile")
    measuring.add_argument("--device", default=default, type=bench.usable_device, help="a CPU or a CUDA device")
    measuring.add_argument("--seconds", default=120.0, type=bench.seconds, help="for all of it (default: 120)")
    measuring.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes most of it")
    measuring.add_argument("--json", action="store_true", help="for a program")
    arguments = parser.parse_args(argv)
    if arguments.command == "info":
        return info(arguments.json)
    return verify.main(arguments) if arguments.command == "verify" else bench.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
