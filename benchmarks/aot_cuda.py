"""What nvcc makes of the CUDA kernels, without a GPU: registers, spills, shared memory, width of memory accesses.

``python -m benchmarks.aot_cuda [architecture …]`` prints a table; ``cuda_report`` returns it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("80", "90a")

_RESOURCES = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def cuda_home() -> Path | None:
    """The toolkit's own root, as setup.py finds it: an nvcc on the PATH may be a wrapper with no headers beside it."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates += sorted(map(str, Path("/usr/local").glob("cuda-*")), reverse=True)
    nvcc = shutil.which("nvcc")
    if nvcc:
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    for root in map(Path, filter(None, candidates)):
        if (root / "bin" / "nvcc").exists() and (root / "include" / "cuda_runtime.h").exists():
            return root
    return None


def compiler_flags() -> list[str]:
    """What setup.py passes to compile against torch's stable ABI."""
    from torch.utils.cpp_extension import include_paths

    setup = (ROOT / "setup.py").read_text()
    target = re.search(r'TORCH_TARGET = "(\w+)"', setup)
    assert target is not None
    return ["-std=c++20", f"-DTORCH_TARGET_VERSION={target[1]}", "-DUSE_CUDA", *(f"-I{p}" for p in include_paths())]


def _readable(symbols: Sequence[str]) -> dict[str, str]:
    text = "\n".join(symbols)
    try:
        output = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return dict(zip(symbols, symbols, strict=True))
    names = {}
    for symbol, name in zip(symbols, output.splitlines(), strict=True):
        name = re.sub(r"\((?:fastgen::cuda::)?Access\)", "access=", name.removeprefix("void "))
        name = name.replace("access=0", "wide").replace("access=1", "single")
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
                "atomics": bool(re.search(r"\b(atom|red)\.", body)),
            }
        )
    return rows


def cuda_report(architectures: Sequence[str] = ARCHITECTURES, jobs: int = 2) -> list[dict[str, Any]]:
    """One row per kernel and architecture, in the order of the files.

    Raises:
        FileNotFoundError: where there is no CUDA toolkit.
        RuntimeError: where nvcc fails; its message is in it.
    """
    home = cuda_home()
    if home is None:
        raise FileNotFoundError("no CUDA toolkit: set CUDA_HOME to its root")
    flags = compiler_flags()
    sources = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    nvcc = home / "bin" / "nvcc"
    with ThreadPoolExecutor(jobs) as pool:
        tasks = [pool.submit(_compile, nvcc, source, arch, flags) for source in sources for arch in architectures]
        return [row for task in tasks for row in task.result()]


def main() -> None:
    try:
        rows = cuda_report(sys.argv[1:] or ARCHITECTURES)
    except FileNotFoundError as error:
        print(f"skipped: {error}")
        return
    columns = ["registers", "spill_bytes", "stack_bytes", "static_shared_bytes", "wide_loads", "wide_stores"]
    print("| kernel | arch |", " | ".join(c.replace("_", " ") for c in columns), "|")
    print("|---|---|" + "---:|" * len(columns))
    for row in rows:
        cells = ["yes" if row[c] is True else "no" if row[c] is False else str(row[c]) for c in columns]
        print(f"| {row['kernel']} | {row['arch']} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
