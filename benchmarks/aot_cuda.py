"""What nvcc makes of the CUDA kernels, without a GPU: registers, spills, shared memory, width of memory accesses.

``python -m benchmarks.aot --part cuda`` prints the table.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from . import sass

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("80", "90a")

_RESOURCES = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def cuda_home() -> Path | None:
    """The toolkit's root, as the build finds it."""
    root = _of_the_build("backend").cuda_home()
    return None if root is None else Path(root)


def units() -> ModuleType:
    return _of_the_build("units")


def _of_the_build(name: str) -> ModuleType:
    """A module of csrc, which is no part of the package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "csrc" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiler_flags() -> list[str]:
    """What setup.py passes to compile against torch's stable ABI."""
    from torch.utils.cpp_extension import include_paths

    setup = (ROOT / "setup.py").read_text()
    target = re.search(r'TORCH_TARGET = "(\w+)"', setup)
    assert target is not None
    includes = [f"-I{p}" for p in (ROOT / "csrc", *include_paths())]
    return ["-std=c++20", f"-DTORCH_TARGET_VERSION={target[1]}", "-DUSE_CUDA", *includes]


def _readable(symbols: Sequence[str]) -> dict[str, str]:
    text = "\n".join(symbols)
    try:
        output = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return dict(zip(symbols, symbols, strict=True))
    names = {}
    for symbol, name in zip(symbols, output.splitlines(), strict=True):
        name = re.sub(r"\((?:fastgen::cuda::)?Access\)", "access=", name.removeprefix("void "))
        name = name.replace("access=0", "wide").replace("access=1", "single").replace("access=2", "peeled")
        name = re.sub(r"\([\w:]*ScalarType\)(\d+)", lambda m: {"15": "bf16"}.get(m[1], "any"), name)
        name = re.sub(r"\((?:fastgen::)?Divergence\)(\d)", lambda m: ("forward", "mixed", "reverse")[int(m[1])], name)
        names[symbol] = re.sub(r"fastgen::(?:cuda::)?", "", name.partition("(")[0]).replace(" >", ">")
    return names


def _entries(ptx: str) -> dict[str, str]:
    """The PTX of each kernel."""
    parts = re.split(r"\.entry (\w+)", ptx)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _compile(nvcc: Path, source: Path, architecture: str, flags: Sequence[str]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        command = [str(nvcc), "-cubin", "-O3", "-Xptxas=-v", target, *flags]
        command += ["--keep", f"--keep-dir={folder}", str(source), "-o", f"{folder}/out.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"nvcc failed on {source.name} for sm_{architecture}:\n{done.stderr}")
        ptx = _entries(next(Path(folder).glob("*.ptx")).read_text())
        functions = sass.dump(Path(folder) / "out.cubin")[1] if find_spec("triton") else {}  # whose cuobjdump it takes
    found = list(_RESOURCES.finditer(done.stderr + done.stdout))
    names = _readable([m["symbol"] for m in found])
    rows = []
    for m in found:
        shared = re.search(r"(\d+) bytes smem", m["rest"])
        body = ptx[m["symbol"]]
        rows.append(
            {
                "kernel": names[m["symbol"]],
                "file": source.name,
                "arch": f"sm_{architecture}",
                "registers": int(m["registers"]),
                "spill_bytes": int(m["stores"]) + int(m["loads"]),
                "stack_bytes": int(m["stack"]),
                "static_shared_bytes": int(shared[1]) if shared else 0,
                "wide_loads": bool(re.search(r"ld\.global(\.\w+)*\.v4\.\w32", body)),
                "wide_stores": bool(re.search(r"st\.global(\.\w+)*\.v4\.\w32", body)),
                "loops": [asdict(t) for t in functions[m["symbol"]].loops] if functions else [],
                # Besides those that only count up to a number.
                "atomics": bool(re.search(r"\b(atom|red)\.(?!\S*inc\.u32)", body)),
            }
        )
    return rows


def architectures(wanted: Sequence[int] | None) -> Sequence[str]:
    """Those of :data:`ARCHITECTURES` whose numbers are `wanted`; all if None."""
    return [a for a in ARCHITECTURES if not wanted or int(a.rstrip("a")) in wanted]


def cuda_report(architectures: Sequence[str] = ARCHITECTURES, only: str = "", jobs: int = 2) -> list[dict[str, Any]]:
    """One row per kernel and architecture, in the order of the units, of those whose names match the pattern `only`.

    Raises:
        FileNotFoundError: where there is no CUDA toolkit.
        RuntimeError: where nvcc fails; its message is in it.
    """
    home = cuda_home()
    if home is None:
        raise FileNotFoundError("no nvcc: install a CUDA toolkit and set CUDA_HOME to its root")
    flags = compiler_flags()
    nvcc = home / "bin" / "nvcc"
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        sources = [path for path in units().write(Path(folder), "CUDA") if re.search(only, path.stem)]
        tasks = [pool.submit(_compile, nvcc, source, arch, flags) for source in sources for arch in architectures]
        return [row for task in tqdm(tasks, "CUDA", unit="file", leave=False, disable=None) for row in task.result()]


def sweep_cost(row: dict[str, Any]) -> list[float]:
    """Instructions an element, or pair, of each pass of a sweep over bfloat16 rows that are kept on chip."""
    streams = int(row["kernel"].rstrip(">").rpartition(", ")[2])
    turns = [t for t in row["loops"] if t["special"] or t["stores"].get(16)]
    # The first pass takes two vectors of 8 at a time, then what is left. A kept row's last pass reads no global memory.
    first = [t["issued"] / (8 * t["loads"][16] / streams) for t in turns if t["loads"].get(16) and not t["shared"]][:1]
    inner = [t["issued"] / 8 for t in turns if t["shared"] and t["special"] >= 8][:1]
    last = [t["issued"] / 8 for t in turns if t["shared"] and not t["special"] and not t["loads"]]
    return first + inner + last


# What a kernel of a row skeleton asks for each element.
TRAFFIC = {
    "on_chip": "floor",
    "part_sums": "all streams",
    "map": "mapped streams, output",
    "sweep_rows": "floor where a row fits",
}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text."""
    title = f"{'arch':7} regs spill stack shared wide ld/st  {'per element':24} kernel"
    lines = [f"{title}: instructions/special ones of a turn of each loop"]
    for row in rows:
        wide = "/".join("yes" if row[c] else "no" for c in ("wide_loads", "wide_stores"))
        traffic = TRAFFIC.get(row["kernel"].partition("<")[0], "-")
        lines.append(
            f"{row['arch']:7} {row['registers']:4} {row['spill_bytes']:5} {row['stack_bytes']:5} "
            f"{row['static_shared_bytes']:6} {wide:>10}  {traffic:24} {row['kernel']}: "
            + " ".join(
                f"{t['issued']}/{t['special']}" for t in row["loops"] if t["loads"] or t["stores"] or t["special"]
            )
        )
    return "\n".join([*lines, "\nfloor: each stream read once, the output written once"])
