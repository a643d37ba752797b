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
from benchmarks.driver import launch_idly
from fastgen.cases import CASES
from fastgen.core import verify

NAMES = ("ddo_loss", "guidance", "generalized_jsd_loss-0.5", "sparse_divergence_loss-forward-bucket")
calls: list[Any] = []


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.name = metadata.name

    def __call__(self, *arguments: Any) -> None:
        calls.append((self.name, readable(arguments)))


def readable(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.stride()
    if isinstance(value, (tuple, list)):
        return type(value).__name__, *map(readable, value)
    return re.sub("0x[0-9a-f]+", "", repr(value))


def main() -> None:
    launched = launch_idly(Launcher)
    from fastgen.triton_kernels import rowwise

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
    assert 0 < len(rowwise._compiled) < launched() / 2
    print(launched() // 2)


if __name__ == "__main__":
    main()
