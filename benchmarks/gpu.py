"""``make gpu``: on a machine with a GPU, all tests on the device, compute-sanitizer, the benchmarks, a results file.

Every step has its own time limit, and the next one runs whatever became of it, so that one call of under nine minutes
brings back all there is to know.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
ON_DEVICE = {**os.environ, "FASTGEN_TEST_DEVICE": "cuda", "PYTHONUNBUFFERED": "1"}


def step(title: str, command: Sequence[str], seconds: int) -> bool:
    print(f"\n== {title}", flush=True)
    start = time.monotonic()
    try:
        passed = subprocess.run(command, env=ON_DEVICE, timeout=seconds, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"stopped after {seconds} s")
        passed = False
    print(f"== {title}: {'ok' if passed else 'FAILED'}, {time.monotonic() - start:.0f} s", flush=True)
    return passed


def sanitizer_steps() -> list[tuple[str, list[str], int]]:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        print("compute-sanitizer is not on the PATH: its checks are left out")
        return []
    subset = [sys.executable, "-m", "benchmarks.sanitize"]
    return [(f"compute-sanitizer {k}", [tool, "--tool", k, "--error-exitcode", "9", *subset], 60) for k in SANITIZERS]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results file goes")
    out: Path = parser.parse_args(argv).out
    if not torch.cuda.is_available():
        print("make gpu needs an NVIDIA GPU that torch can use, and there is none here.")
        print(f"torch is {torch.__version__}, built for CUDA {torch.version.cuda}.")
        print("Without a GPU: make test runs the Triton kernels under their interpreter and compiles all for GPUs,")
        print("and python -m benchmarks.aot reports what the compilers make of them.")
        return 1
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    results = out / f"{gpu}-{datetime.date.today().isoformat()}.json"
    out.mkdir(parents=True, exist_ok=True)
    python = [sys.executable, "-m"]
    steps = [
        ("info", [*python, "fastgen", "info"], 30),
        ("verify", [*python, "fastgen", "verify", "--device", "cuda"], 60),
        ("tests", [*python, "pytest", "tests", "--maxfail=20"], 150),
        *sanitizer_steps(),
        ("benchmarks", [*python, "pytest", "benchmarks", "--benchmark-enable", f"--benchmark-json={results}"], 200),
    ]
    outcomes = {title: step(title, command, seconds) for title, command, seconds in steps}
    if results.exists():
        outcomes["report"] = step("report", [*python, "benchmarks.report", str(results)], 60)
    print("\n" + "\n".join(f"{'ok    ' if passed else 'FAILED'}  {title}" for title, passed in outcomes.items()))
    return 0 if all(outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
