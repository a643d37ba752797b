"""FASTGEN_TEST_DEVICE=cuda puts the benchmarks on a GPU; versions go into the results file.

FASTGEN_BENCH_LINES names a file that gets each benchmark's results as soon as they are there, one JSON line each: a run
that is stopped has lost nothing but the benchmark it was at.
"""

import importlib.metadata
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

DEVICE = os.environ.get("FASTGEN_TEST_DEVICE", "cpu")


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture(autouse=True)
def _keep_lines(benchmark: Any, request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    lines = os.environ.get("FASTGEN_BENCH_LINES")
    if lines and benchmark.stats is not None:
        stats = {name: getattr(benchmark.stats.stats, name) for name in ("min", "median", "rounds")}
        entry = {"name": request.node.name, "fullname": request.node.nodeid, "stats": stats}
        with Path(lines).open("a") as file:
            file.write(json.dumps(entry | {"extra_info": benchmark.extra_info}) + "\n")


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    if DEVICE == "cuda":
        machine_info["gpu"] = torch.cuda.get_device_name()
    for package in ("torch", "triton", "fastgen-kernels"):
        try:
            machine_info[package.removesuffix("-kernels")] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Keeps the file small and free of where it was made: no raw timings, no host name, no paths, no commit state."""
    output_json["machine_info"].pop("node", None)
    output_json.pop("commit_info", None)
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
