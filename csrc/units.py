"""The translation units of the kernels, written at build time: those of one device are those of the other.

A header of a family, ``csrc/<family>.h``, registers its operators for any device, in one function or several::

    template <class Device>
    void register_<part>(torch::stable::detail::StableLibrary& m) { … }

Each such function becomes a unit, but for those in `SHARED`. So what takes long to compile can be split, for compilers
to work on at once.
"""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHARED = ("analytic_dpm", "gradient", "schedule")  # parts too small for units of their own

# suffix of a unit, the header with the device, its type
DEVICES = {"CPU": ("cpp", "runtime/cpu.h", "Cpu"), "CUDA": ("cu", "runtime/cuda.cuh", "Cuda")}


def parts() -> dict[str, str]:
    """The header of each part."""
    found = {}
    for header in sorted(HERE.glob("*.h")):
        for part in re.findall(r"\nvoid register_(\w+)\(", header.read_text()):
            found[part] = header.name
    return found


def units() -> dict[str, list[str]]:
    """The parts of each unit."""
    alone = {part: [part] for part in parts() if part not in SHARED}
    return {**alone, "shared": list(SHARED)}


def text(names: list[str], device: str, key: str | None = None, namespace: str = "fastgen") -> str:
    """A unit that registers these parts; `key`: for the kernels of another device than they are made for."""
    _, header, kind = DEVICES[device]
    headers = parts()
    includes = "".join(f'#include "{name}"\n' for name in sorted({headers[part] for part in names}))
    calls = "".join(f"  fastgen::register_{part}<fastgen::{kind}>(m);\n" for part in names)
    library = f"STABLE_TORCH_LIBRARY_IMPL({namespace}, {key or device}, m)"
    return f'{includes}#include "{header}"\n\n{library} {{\n{calls}}}\n'


def write(folder: Path, device: str, namespace: str = "fastgen") -> list[Path]:
    """Writes the units of a device, for operators of this namespace. Files that are right are left alone: builds are
    incremental."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for unit, names in units().items():
        path = folder / f"{unit}.{DEVICES[device][0]}"
        content = text(names, device, namespace=namespace)
        if not path.exists() or path.read_text() != content:
            path.write_text(content)
        paths.append(path)
    return sorted(paths)
