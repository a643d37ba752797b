"""A small run of every kernel, for compute-sanitizer: few rows, every path of the row-wise skeleton."""

from __future__ import annotations

import argparse

import torch

import fastgen
from fastgen.cases import CASES
from fastgen.core import verify

# A row on one block, a row on a cluster, a row in two passes; odd sizes end in the scalar tails.
SHAPES = ((4, 3, 5, 7), (2, 20_000), (2, 600_001))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backends", nargs="+", default=["native", "triton"])
    done = 0
    for backend in parser.parse_args().backends:
        for shape in SHAPES:
            for case in CASES.values():
                with fastgen.use_backend(backend):
                    verify.results(case, fastgen, case.inputs(shape, device="cuda"))
                torch.cuda.synchronize()
                done += 1
            print(f"{backend} {shape}: {done} calls", flush=True)
    print("done")


if __name__ == "__main__":
    main()
