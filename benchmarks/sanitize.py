"""A small run of every kernel, for compute-sanitizer: few rows, every path of the row-wise skeleton."""

from __future__ import annotations

import torch

import fastgen
from fastgen import _backend, _verify

# A row on one block, a row on a cluster, a row in two passes; odd sizes end in the scalar tails.
SHAPES = ((4, 3, 5, 7), (2, 20_000), (2, 600_001))


def main() -> None:
    for name, calls in _verify.CASES.items():
        for backend in ("native", "triton"):
            if _backend.missing(name, backend, "cuda") is not None:
                continue
            for shape in SHAPES:
                p, q, y = (torch.randn(shape, device="cuda") for _ in range(3))
                with fastgen.use_backend(backend):
                    for call in calls:
                        value = call(fastgen, p.requires_grad_(), q, y)
                        if value.requires_grad:
                            value.sum().backward()
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
