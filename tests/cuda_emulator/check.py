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
    is_real = loosely(torch.rand(shape[0] // m) < 0.5)
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
        for t in (y, y[:1].expand(shape)):
            distance, gradient = torch.ops.fastgen.l1_distance(p, t, 0.3, True)
            compare(
                f"{case} distance", distance, 0.3 * (p64 - t.double()).abs().sum(), "d" if "d" in dtypes[:2] else "f"
            )
            compare(f"{case} its gradient", gradient, 0.3 * (p64 - t.double()).sign(), dtypes[0])
        square = torch.ops.fastgen.mean_square(p)
        compare(f"{case} mean_square", square, reference.mean_square(p64), "d" if dtypes[0] == "d" else "f")
        combine = torch.ops.fastgen.row_combination
        compare(f"{case} a x", combine(p, w, None, None), w64[:, None] * p64, dtypes[0])
        mixed = dtypes[0] if dtypes[0] == dtypes[1] else "d" if "d" in dtypes[:2] else "f"
        want = w64[:, None] * p64 - 2 * w64[:, None] * y64
        compare(f"{case} a x + b y", combine(p, w, y, -2 * w), want, mixed)
        again = [fastgen.ddo_loss(p, q, y, is_real, weight=w, mc_samples=m) for _ in range(2)]
        assert torch.equal(*again), f"{case}: two runs differ"


def loosely(flags: torch.Tensor) -> torch.Tensor:
    """The same flags, with other bytes than 1 for true."""
    places = torch.arange(flags.numel()).reshape(flags.shape)
    odd = torch.tensor([255, 2, 128, 1], dtype=torch.uint8)[places % 4]
    return torch.where(flags, odd, 0).to(torch.uint8).view(torch.bool)


def check_distillation(case: str) -> None:
    """The losses of score distillation; dtypes of x (and most streams), of the fake prediction and of a weight map."""
    rows, size, dtypes, _ = case.split(",")
    shape, dtype = (int(rows), int(size)), DTYPES[dtypes[0]]
    arithmetic = DTYPES["d" if "d" in dtypes else "f"]
    x, x_t, real, uncond, y = (torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(5))
    fake = torch.randn(shape, dtype=torch.float64).to(DTYPES[dtypes[1]])
    weight_map = torch.rand(shape, dtype=torch.float64).to(DTYPES[dtypes[2]])
    weight, alpha, sigma = ((torch.rand(shape[0], dtype=torch.float64) + 0.5).to(arithmetic) for _ in range(3))
    dm = fastgen.ScorePair(x_t, alpha, sigma, real, fake)
    ca = fastgen.ScorePair(y, sigma, alpha, real, uncond)
    mask = loosely(torch.rand(shape) < 0.7)
    times = {"alpha_t": alpha, "sigma_t": sigma}

    def widen(value):
        if isinstance(value, fastgen.ScorePair):
            return fastgen.ScorePair(*map(widen, value))
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def value_and_grad(run, x, *args, **options):
        x = x.detach().requires_grad_()
        value, stats = run(x, *args, return_stats=True, **options)
        return value.detach(), torch.autograd.grad(value.sum(), x)[0], stats.normalizer

    def both(name, *args, **options):
        got = value_and_grad(getattr(fastgen, name), x, *args, **options)
        wide = [widen(a) for a in args], {k: widen(v) for k, v in options.items()}
        want = value_and_grad(getattr(reference, name), x.double(), *wide[0], **wide[1])
        own = "d" if "d" in (dtypes if options["weight"] is weight_map else dtypes[:2]) else "f"
        kinds = (("value", own), ("gradient", dtypes[0]), ("normalizer", own))
        for (part, kind), g, v in zip(kinds, got, want, strict=True):
            compare(f"{case} {name} {part}", g, v, kind)

    for reduction in ("sum", "none"):  # the gradient from the loss's own pass, and made again
        options = {"reduction": reduction, "weight": weight}
        both("sds_loss", real, fake, grad_clip=1.0, **options)
        both("vsd_loss", real, fake, real_uncond=uncond, guidance_scale=3.0, **options)
        both("dmd_loss", x_t, real, fake, **times, **options)
        both("dmd_loss", x_t, real, fake, real_uncond=uncond, guidance_scale=3.0, **times, **options)
        both("decoupled_dmd_loss", dm, ca, guidance_scale=3.0, **options)
        both("decoupled_dmd_loss", dm, ca, guidance_scale=3.0, mask=mask, **options)
        mixed = {"prediction_type": "epsilon", "fake_prediction_type": "v_prediction"}
        both("dmd_loss", x_t, real, fake, mask=mask, **times, **mixed, reduction=reduction, weight=weight_map)
    if shape[0] == 0:
        return
    skipped = real.clone()
    skipped[-1, -1] = float("inf")
    grad = value_and_grad(fastgen.decoupled_dmd_loss, x, dm._replace(real=skipped), ca, guidance_scale=3.0)[1]
    assert not grad[-1].any(), f"{case}: a row that is not finite has a gradient"


def check_sampling(case: str) -> None:
    """Reverse steps and guidance; dtypes of x_t, of the predictions and of the noise."""
    rows, size, dtypes, _ = case.split(",")
    shape = (int(rows), int(size))
    arithmetic = "d" if "d" in dtypes else "f"
    x_t, cond, noise = (torch.randn(shape, dtype=torch.float64).to(DTYPES[d]) for d in dtypes)
    uncond = torch.randn(shape, dtype=torch.float64).to(cond.dtype)
    numbers = [torch.rand(shape[0], dtype=torch.float64) + 0.5 for _ in range(6)]
    each = fastgen.StepCoefficients(*(n.to(DTYPES[arithmetic]) for n in numbers))
    scale = (torch.rand(shape[0], dtype=torch.float64) * 3).to(DTYPES[arithmetic])
    sets = [each, each._replace(eps=torch.zeros_like(each.eps))]
    if shape[0] > 0:  # one number for all rows
        sets.append(fastgen.StepCoefficients(*(n[:1] for n in each)))
    for kind in ("epsilon", "sample", "v_prediction", "flow_prediction"):
        for k in sets:
            for guide in ({}, {"uncond": uncond, "guidance_scale": scale}, {"uncond": uncond, "guidance_scale": 2.0}):
                for z, clamp in ((None, None), (noise, (-0.5, 1.0))):
                    doubles = {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in guide.items()}
                    options = {"prediction_type": kind, "clamp": clamp}
                    want = reference.reverse_step(
                        x_t.double(), cond.double(), k, **options, **doubles, noise=None if z is None else z.double()
                    )
                    what = f"{case} reverse_step {kind} {sorted(guide)} noise={z is not None}"
                    got = fastgen.reverse_step(x_t, cond, k, **options, **guide, noise=z)
                    compare(what, got, want, dtypes[0])
                    x = x_t.clone()
                    fastgen.reverse_step_(x, cond, k, **options, **guide, noise=z)
                    assert torch.equal(x, got), f"{what}: in place differs"
    mixed = torch.promote_types(cond.dtype, x_t.dtype)
    want = reference.guidance(x_t.double(), cond.double(), scale.double())
    compare(f"{case} guidance", fastgen.guidance(x_t, cond, scale), want, {v: n for n, v in DTYPES.items()}[mixed])


if __name__ == "__main__":
    torch.ops.load_library(sys.argv[1])
    torch.manual_seed(0)
    for case in sys.argv[2:]:
        check(case)
    for case in sys.argv[2:]:
        check_distillation(case)
    with fastgen.use_backend("native"):
        for case in sys.argv[2:]:
            check_sampling(case)
    print(f"{len(sys.argv) - 2} cases agree")
