"""``make gpu``: on a machine with a GPU, all tests on the device, compute-sanitizer, the benchmarks, a results file.

Written for a machine that is lent by the minute: the most telling step comes first, every step has its own limit and
the next one runs whatever became of it, and what a step that is stopped has found by then is kept. A step that no time
is left for says so; ``--only`` runs it in another call.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .conftest import pytest_benchmark_update_machine_info

BENCHMARKS = Path(__file__).parent
RESULTS = BENCHMARKS / "results"
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
ON_DEVICE = {**os.environ, "FASTGEN_TEST_DEVICE": "cuda", "PYTHONUNBUFFERED": "1"}
PYTHON = [sys.executable, "-m"]
# They are about compilers, examples and CPUs.
NOT_ON_DEVICE = (
    *("aot", "aot_cuda", "contributing", "distributed", "docs", "docs_site", "examples", "installation"),
    *("linear_distributed", "train_ddo", "trajectory_regret", "types"),
)
# In order of what is to be learnt from them.
FAMILIES = (
    "elbo",
    "sequence",
    "trajectory",
    "score_distillation",
    "sampling",
    "analytic_dpm",
    "adversarial",
    "diffusion_classifier",
)
# One large shape a family, for torch.compile's max-autotune, which compiles for long.
LARGEST = "1024x4x64x64 or 8192x128256 or 64x4x128x128 or 8x3x256x256 or vgg-256"
GRACE = 10  # seconds for what is stopped to end by itself


@dataclass
class Job:
    """A command that was started, to be ended by :meth:`wait`."""

    title: str
    command: Sequence[str]
    seconds: float
    log: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)

    def start(self) -> Job:
        self.began = time.monotonic()
        output = None if self.log is None else self.log.open("w")
        environment = {**ON_DEVICE, **self.environment}
        self.process = subprocess.Popen(self.command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        return self

    def wait(self) -> bool:
        try:
            passed = self.process.wait(max(1.0, self.seconds - (time.monotonic() - self.began))) == 0
            ending = "ok" if passed else "FAILED"
        except subprocess.TimeoutExpired:
            passed, ending = False, f"STOPPED at its {self.seconds:.0f} s"
            self.process.send_signal(signal.SIGINT)  # pytest then says what failed
            try:
                self.process.wait(GRACE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.log is not None and not passed:
            print("\n".join(self.log.read_text().splitlines()[-25:]))
        print(f"== {self.title}: {ending}, {time.monotonic() - self.began:.0f} s", flush=True)
        return passed


def sanitizer_jobs(out: Path, seconds: float) -> list[Job]:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        print("compute-sanitizer is not on the PATH: its checks are left out")
        return []
    # With the caching allocator all lies inside one allocation, and nothing is out of bounds.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Job(
            f"compute-sanitizer {k}, {backend}",
            [tool, "--tool", k, "--error-exitcode", "9", *PYTHON, "benchmarks.sanitize", "--backends", backend],
            seconds,
            out / f"{k}-{backend}.log",
            alone,
        )
        for k in SANITIZERS
        for backend in ("native", "triton")
    ]


class Run:
    """The steps, against one clock."""

    def __init__(self, out: Path, results: Path, deadline: float, alone: bool = False) -> None:
        self.out, self.results, self.deadline, self.alone = out, results, deadline, alone
        self.outcomes: dict[str, bool] = {}

    def left(self) -> float:
        return self.deadline - time.time()

    def together(self, jobs: Sequence[Job]) -> None:
        """Jobs that may share the machine: nothing is timed."""
        running = []
        for job in jobs:
            left = self.left() - GRACE
            job.seconds = left if self.alone else min(job.seconds, left)
            if job.seconds < 5:
                print(f"== {job.title}: no time left")
                self.outcomes[job.title] = False
                continue
            print(f"\n== {job.title}, {job.seconds:.0f} s at most: {' '.join(job.command[1:])}", flush=True)
            running.append(job.start())
        for job in running:
            self.outcomes[job.title] = job.wait()

    def info(self) -> None:
        self.together([Job("info", [*PYTHON, "fastgen", "info"], 40)])

    def smoke(self) -> None:
        """Every operator once, against float64: what fails here fails everywhere."""
        self.together([Job("verify", [*PYTHON, "fastgen", "verify"], 90)])

    def headline(self) -> None:
        """The largest sizes in bfloat16, before anything that may take all the time."""
        self._benchmark("headline", ["--benchmark-enable", "benchmarks", "-k", f"({LARGEST}) and bfloat16"], 90, {})

    def kernels(self) -> None:
        command = [*PYTHON, "benchmarks.kernels", "--out", str(self.results.with_suffix(".kernels.jsonl"))]
        self.together([Job("kernels", command, 70)])

    def tests(self) -> None:
        """Compiling is most of it; each worker's Inductor compiles in its own process, for memory to suffice."""
        workers = max(2, (os.cpu_count() or 4) // 2)
        ignored = [f"--ignore=tests/test_{name}.py" for name in NOT_ON_DEVICE]
        tests = [*PYTHON, "pytest", "tests/test_gpu.py", "tests", *ignored, "-n", str(workers), "--maxfail=80"]
        serial = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
        self.together([Job("tests", [*tests, "--tb=short", "-rfE"], 170, environment=serial)])

    def sanitizers(self) -> None:
        self.together(sanitizer_jobs(self.out, 120))

    def large(self) -> None:
        self.together([Job("beyond 2^31 elements", [*PYTHON, "pytest", "-m", "slow", "tests/test_gpu.py"], 60)])

    def compiling(self) -> None:
        """Every kernel and torch.compile's of every benchmark, at once, into the compilers' caches."""
        workers = str(os.cpu_count() or 4)
        command = [*PYTHON, "pytest", "benchmarks", "-n", workers, "--maxfail=80", "--tb=line"]
        self.together([Job("compiling", command, 80, self.out / "compiling.log", {"FASTGEN_BENCH_COMPILE": "1"})])

    def benchmarks(self) -> None:
        for family in FAMILIES:
            self._benchmark(family, ["--benchmark-enable", str(BENCHMARKS / f"bench_{family}.py")], 70, {})

    def autotune(self) -> None:
        arguments = ["--benchmark-enable", "benchmarks", "-k", f"({LARGEST}) and bfloat16"]
        self._benchmark("autotune", arguments, 120, {"FASTGEN_BENCH_AUTOTUNE": "1"})

    def _benchmark(self, name: str, arguments: list[str], seconds: float, environment: dict[str, str]) -> None:
        lines = self.out / f"{name}.jsonl"
        lines.unlink(missing_ok=True)
        environment = {**environment, "FASTGEN_BENCH_LINES": str(lines)}
        command = [*PYTHON, "pytest", *arguments, "--benchmark-quiet", "--tb=short"]
        self.together([Job(f"benchmarks of {name}", command, seconds, environment=environment)])
        if lines.exists():
            merge(lines, self.results)
            lines.unlink()

    def tune(self) -> None:
        command = [*PYTHON, "benchmarks.tune", "--out", str(self.results.with_suffix(".tune.json"))]
        self.together([Job("tune", command, 70)])

    def report(self) -> None:
        if self.results.exists():
            self.together([Job("report", [*PYTHON, "benchmarks.report", str(self.results)], 40)])


STEPS: dict[str, Callable[[Run], None]] = {
    "info": Run.info,
    "smoke": Run.smoke,
    "kernels": Run.kernels,
    "headline": Run.headline,
    "tests": Run.tests,
    "sanitizers": Run.sanitizers,
    "large": Run.large,
    "compiling": Run.compiling,
    "benchmarks": Run.benchmarks,
    "tune": Run.tune,
    "autotune": Run.autotune,
    "report": Run.report,
}


def merge(lines: Path, results: Path) -> None:
    """Adds a run's benchmarks to the results, in place of those of the same name."""
    new = [json.loads(line) for line in lines.read_text().splitlines()]
    names = {b["fullname"] for b in new}
    old = json.loads(results.read_text())["benchmarks"] if results.exists() else []
    machine: dict[str, Any] = {"machine": platform.machine(), "cpu": {"count": os.cpu_count()}}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    pytest_benchmark_update_machine_info(None, machine)
    found = {
        "machine_info": machine,
        "datetime": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "benchmarks": [b for b in old if b["fullname"] not in names] + new,
    }
    results.write_text(json.dumps(found, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results file goes")
    parser.add_argument(
        "--only", nargs="+", choices=STEPS, default=list(STEPS), help="these steps; one has all the time"
    )
    parser.add_argument("--seconds", type=float, default=560, help="for all, counted from --since")
    parser.add_argument(
        "--since", type=float, default=time.time(), help="Unix time; make passes when it began to build"
    )
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("make gpu needs an NVIDIA GPU that torch can use, and there is none here.")
        print(f"torch is {torch.__version__}, built for CUDA {torch.version.cuda}.")
        print("Without a GPU: make test runs the Triton kernels under their interpreter and compiles all for GPUs,")
        print("and python -m benchmarks.aot reports what the compilers make of them.")
        return 1
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    options.out.mkdir(parents=True, exist_ok=True)
    results = options.out / f"{gpu}-{datetime.date.today().isoformat()}.json"
    run = Run(options.out, results, options.since + options.seconds, alone=len(options.only) == 1)
    for name in options.only:
        STEPS[name](run)
    print("\n" + "\n".join(f"{'ok    ' if passed else 'FAILED'}  {title}" for title, passed in run.outcomes.items()))
    return 0 if all(run.outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
