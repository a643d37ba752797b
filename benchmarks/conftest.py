"""FASTGEN_TEST_DEVICE=cuda puts the benchmarks on a GPU; versions go into the results file."""

import importlib.metadata
import os
from typing import Any

import pytest
import torch

DEVICE = os.environ.get("FASTGEN_TEST_DEVICE", "cpu")


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


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
