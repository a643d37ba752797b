"""Launches of Triton's kernels without a GPU: what the first launch of a kernel hands to the driver, which Triton does,
and what later ones do, which take the compiled kernel from ``rowwise``'s own table, has to be the same.

For a process of its own, without TRITON_INTERPRET; prints how many launches there were.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import fastgen
from benchmarks import aot
from fastgen.cases import CASES
from fastgen.core import dispatch, verify

NAMES = ("ddo_loss", "guidance", "generalized_jsd_loss-0.5", "sparse_divergence_loss-forward-bucket")
calls: list[Any] = []


class Utilities:
    def load_binary(self, name: str, *_: Any) -> tuple[Any, ...]:
        return name, 1, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "max_num_regs": 65_536, "warpSize": 32}


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = metadata.name

    def __call__(self, *arguments: Any) -> None:
        calls.append((self.name, readable(arguments)))


class Driver(aot._Target):
    utils, launcher_cls = Utilities(), Launcher

    def get_current_device(self) -> int:
        return 0


def readable(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.stride()
    if isinstance(value, (tuple, list)):
        return type(value).__name__, *map(readable, value)
    return re.sub("0x[0-9a-f]+", "", repr(value))


def main() -> None:
    dispatch.missing = lambda name, backend, device: None  # nothing runs: the CPU's tensors will do
    Driver(90)
    from fastgen.triton_kernels import rowwise

    rowwise.launch = lambda kernel, programs, like, *args, **constants: rowwise.launch_compiled(
        kernel, programs, 0, args, constants
    )
    launches = 0
    for name in NAMES:
        for shape in ((6, 4, 8, 8), (4, 3000)):
            tensors = CASES[name].inputs(shape, torch.float32)
            found = []
            for _ in range(2):
                calls.clear()
                with fastgen.use_backend("triton"):
                    verify.results(CASES[name], fastgen, tensors)
                found.append(list(calls))
            assert found[0] == found[1], (name, shape, found)
            launches += len(calls)
    assert 0 < len(rowwise._compiled) < launches
    print(launches)


if __name__ == "__main__":
    main()
