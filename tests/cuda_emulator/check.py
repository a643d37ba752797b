"""Compares the emulated CUDA kernels with the float64 reference. Run by tests/test_aot_cuda.py: LIBRARY CASE…

A case is ``rows,elements,dtypes,groups``: dtypes of pred, target and ref_pred (``h``, ``b``, ``f``, ``d``); groups is
the number of Monte-Carlo samples of an image.
"""

from __future__ import annotations

import sys

import torch

sys.modules["fastgen._C"] = None  # type: ignore[assignment]  # its kernels would hold the CPU's place
import fastgen  # noqa: E402
from fastgen import reference  # noqa: E402

DTYPES = {"h": torch.float16, "b": torch.bfloat16, "f": torch.float32, "d": torch.float64}
TOLERANCE = {"h": 1e-3, "b": 8e-3, "f": 1e-5, "d": 1e-13}  # of an output's dtype, relative to its largest element


def compare(what: str, got: torch.Tensor, want: torch.Tensor, dtype: str) -> None:
    assert got.shape == want.shape, f"{what}: {got.shape} is not {want.shape}"
    if want.numel() == 0:
        return
    error = (got.double() - want).abs().max().item()
    limit = TOLERANCE[dtype] * (want.abs().max().item() + 1e-30)
    assert error <= limit, f"{what}: error {error:.3g} exceeds {limit:.3g}"


def check(case: str) -> None:
    rows, size, dtypes, samples = case.split(",")
    shape, m = (int(rows), int(size)), int(samples)
    arithmetic = "d" if "d" in dtypes else "f"
    # Shifted, so that the terms of a difference have one sign: a tight tolerance then holds for their sum.
    shifts = (1.0, -2.0, 2.5)
    p, y, q = (
        (torch.randn(shape, dtype=torch.float64) / 4 + s).to(DTYPES[d]) for s, d in zip(shifts, dtypes, strict=True)
    )
    weight = torch.rand(shape[0], dtype=torch.float64) + 0.5
    is_real = torch.rand(shape[0] // m) < 0.5
    w = weight.to(DTYPES[arithmetic])
    p64, y64, w64 = p.double(), y.double(), w.double()

    def loss(run, grad_scale, *streams, **options):
        streams = [streams[0].detach().requires_grad_(), *streams[1:]]
        out = run(*streams, **options)
        value, delta = out if isinstance(out, tuple) else (out, None)
        grad = torch.autograd.grad(value.sum() * grad_scale, streams[0])[0] if value.requires_grad else None
        return value.detach(), delta, grad

    def both(name, *streams, tensors=(), **options):
        """The public function on the emulated kernels, and the reference, in values and gradients."""
        doubles = [t.double() for t in streams]
        for scale in (1.0, 3.0):
            got = loss(getattr(fastgen, name), scale, *streams, *tensors, weight=w, **options)
            want = loss(getattr(reference, name), scale, *doubles, *tensors, weight=w64, **options)
            own = "d" if any(t.dtype == torch.float64 for t in streams) else "f"
            kinds = {"value": own, "delta": own, "gradient": dtypes[0]}
            for (part, dtype), g, v in zip(kinds.items(), got, want, strict=True):
                if v is not None:
                    compare(f"{case} {name} {options} {part}", g, v, dtype)

    with fastgen.use_backend("native"):
        for penalty in ("l2", "l1", "huber"):
            both("elbo_error", p, y, loss=penalty)
        both("elbo_difference", p, q, y)
        both("elbo_error", torch.cat((p[:, :1], p), 1)[:, 1:], y[:1].expand(shape))  # misaligned rows, one for all
        both("elbo_error", torch.cat((p, p[:, :1].expand(shape[0], 8)), 1)[:, : shape[1]], y[:1].expand(shape))
        for reduction in ("mean", "sum", "none"):
            options = {"reduction": reduction, "return_delta": True, "element_reduction": "mean"}
            both("ddo_loss", p, q, y, tensors=(is_real,), alpha=2.0, beta=0.7, mc_samples=m, **options)
            if shape[0] % 2 == 0:
                both("diffusion_dpo_loss", p, q, y, beta=3.0, **options)
        combine = torch.ops.fastgen.row_combination
        compare(f"{case} a x", combine(p, w, None, None), w64[:, None] * p64, dtypes[0])
        mixed = dtypes[0] if dtypes[0] == dtypes[1] else "d" if "d" in dtypes[:2] else "f"
        want = w64[:, None] * p64 - 2 * w64[:, None] * y64
        compare(f"{case} a x + b y", combine(p, w, y, -2 * w), want, mixed)
        again = [fastgen.ddo_loss(p, q, y, is_real, weight=w, mc_samples=m) for _ in range(2)]
        assert torch.equal(*again), f"{case}: two runs differ"


if __name__ == "__main__":
    torch.ops.load_library(sys.argv[1])
    torch.manual_seed(0)
    for case in sys.argv[2:]:
        check(case)
    print(f"{len(sys.argv) - 2} cases agree")
