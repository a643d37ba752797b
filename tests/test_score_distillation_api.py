"""Score-distillation losses: options, statistics, video, shapes, autograd, compilation, errors."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import DEVICE
from distillation import DTYPES, TYPES, Problem, compare, pairs, rows, value_and_grad
from distillation import each_backend as each_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastgen
from fastgen import ScorePair, decoupled_dmd_loss, dmd_loss, reference, sds_loss, vsd_loss
from fastgen.core import dispatch


def dmd_by_hand(p: Problem, eps: float = 0.0, minimum: float = 0.0) -> Tensor:
    r = p.uncond + p.s * (p.real - p.uncond)
    n = (p.x - r).abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=minimum) + eps
    return (p.fake - r) / n


# ---------------------------------------------------------------- statistics, weights, masks, frames


def compare_stats(loss_fn: Any, written_out: Any, *args: Any, **kw: Any) -> None:
    (loss, got), (_, expected) = loss_fn(*args, return_stats=True, **kw), written_out(*args, return_stats=True, **kw)
    assert torch.equal(got.loss, loss.detach())
    assert not any(t.requires_grad for t in got)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=0)


def test_statistics() -> None:
    p, q = Problem(seed=0), Problem(seed=1)
    x = p.leaf(torch.float32)
    mask = torch.rand(p.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.5
    for extra in ({}, {"mask": mask}, {"reduction": "none"}, {"normalizer": None}):
        compare_stats(dmd_loss, reference.dmd_loss, x, **p.dmd(torch.float32, **extra))
        kw = {"guidance_scale": 3.0, **extra}
        compare_stats(decoupled_dmd_loss, reference.decoupled_dmd_loss, x, *pairs(p, q, torch.float32), **kw)
    compare_stats(sds_loss, reference.sds_loss, x, p.real.float(), p.noise.float())


@pytest.mark.parametrize("frames", [False, True])
def test_statistics_tell_what_a_spike_came_from(frames: bool) -> None:
    """A small normaliser, networks that disagree, and a skipped sample look different; sound samples look alike."""
    p = Problem((5, 4, 5, 5))
    given = p.dmd(torch.float32, guidance_scale=1.0, real_uncond=None)
    x, real, fake = p.x.float(), given["real_cond"], given["fake"]
    real[1] = x[1] + 1e-3 * (real[1] - x[1])
    fake[2] += 100
    fake[3, 0, 0, 0] = math.inf
    _, stats = dmd_loss(x, **given, normalizer_dims="frame" if frames else "sample", return_stats=True)
    assert stats.skips.nonzero().tolist() == ([[3, 0]] if frames else [[3]])
    norm, normalizer = (t.unflatten(0, (5, -1)) for t in (stats.grad_norm, stats.normalizer))
    usual = norm[[0, 4]].max(), normalizer[[0, 4]].min()
    for row, small in ((1, True), (2, False)):
        assert (norm[row] > 10 * usual[0]).all()
        assert ((normalizer[row] < usual[1] / 10) == small).all()
    by_hand = (fake - real).abs().flatten(2 if frames else 1).sum(-1) / stats.normalizer
    torch.testing.assert_close(stats.grad_norm, torch.where(stats.skips, 0, by_hand))
    torch.testing.assert_close(stats.grad_norm.sum() / x.numel(), stats.grad_abs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_masks(dtype: torch.dtype) -> None:
    p = Problem()
    g = torch.Generator().manual_seed(1)
    mask = torch.rand(p.shape, generator=g).to(DEVICE) < 0.4
    wide_mask = torch.rand((3, 1, 5, 5), generator=g).to(DEVICE) < 0.4
    weight_map = torch.rand(p.shape, generator=g).to(DEVICE, dtype)
    for extra in (
        {"weight": p.sigma},
        {"weight": weight_map},
        {"mask": mask},
        {"mask": wide_mask},
        {"mask": mask, "weight": p.sigma},
        {"mask": mask, "weight": weight_map},
        {"mask": torch.zeros_like(mask)},
    ):
        for reduction in ("mean", "sum", "none"):
            kw = p.dmd(dtype, "epsilon", reduction=reduction, **extra)
            compare(dmd_loss, reference.dmd_loss, p.x.to(dtype), **kw)
    compare(sds_loss, reference.sds_loss, p.x.to(dtype), p.real.to(dtype), p.noise.to(dtype), weight=weight_map)
    dm, ca = pairs(p, Problem(seed=1), dtype)
    compare(
        decoupled_dmd_loss,
        reference.decoupled_dmd_loss,
        p.x.to(dtype),
        dm,
        ca,
        guidance_scale=3.0,
        mask=wide_mask,
        weight=p.sigma,
    )


def test_the_mean_is_over_the_masks_elements_and_the_normaliser_over_all() -> None:
    p = Problem()
    mask = torch.rand(p.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE) < 0.3
    loss, grad = value_and_grad(dmd_loss, p.x, **p.dmd(torch.float64, mask=mask))
    G = dmd_by_hand(p)
    torch.testing.assert_close(loss, 0.5 * G[mask].square().mean())
    torch.testing.assert_close(grad, torch.where(mask, G / mask.sum(), 0))


def test_what_the_mask_hides_may_be_infinite() -> None:
    p = Problem()
    mask = torch.ones(p.shape, dtype=torch.bool, device=DEVICE)
    mask[1, 0, 0, 0] = False
    kw = p.dmd(torch.float32, mask=mask, normalizer=None)
    kw["fake"][1, 0, 0, 0] = math.nan
    x = p.leaf(torch.float32)
    loss, stats = dmd_loss(x, **kw, return_stats=True)
    loss.backward()
    assert x.grad is not None
    assert stats.skipped.item() == 0
    assert loss.isfinite()
    assert x.grad.isfinite().all()


VIDEO = (2, 3, 4, 5, 6)


@pytest.mark.parametrize("dims", ["sample", "frame"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_video(dims: str, dtype: torch.dtype) -> None:
    """Per-frame times, weights and normalisers, and masked frames."""
    p, q = Problem(VIDEO, seed=0), Problem(VIDEO, seed=1)
    g = torch.Generator().manual_seed(3)
    for problem in (p, q):
        problem.sigma = 0.2 + 0.6 * torch.rand(VIDEO[:2], generator=g, dtype=torch.float64).to(DEVICE)
        problem.alpha = (1 - problem.sigma**2).sqrt()
        problem.x_t = rows(problem.alpha, p.x) * p.x + rows(problem.sigma, p.x) * problem.noise
    mask = torch.tensor([True, False, True], device=DEVICE)[None, :, None, None, None]
    for reduction in ("mean", "sum", "none"):
        kw = {"normalizer_dims": dims, "reduction": reduction, "mask": mask, "weight": p.sigma}
        compare(dmd_loss, reference.dmd_loss, p.x.to(dtype), **p.dmd(dtype, "epsilon", **kw))
        dm, ca = pairs(p, q, dtype)
        compare(decoupled_dmd_loss, reference.decoupled_dmd_loss, p.x.to(dtype), dm, ca, guidance_scale=3.0, **kw)
    compare_stats(dmd_loss, reference.dmd_loss, p.x.to(dtype), **p.dmd(dtype, "epsilon", normalizer_dims=dims))


def test_one_time_for_all_frames_is_that_time_for_each() -> None:
    p = Problem(VIDEO)
    kw = p.dmd(torch.float32, "epsilon")
    wide = kw | {name: kw[name][:, None].repeat(1, VIDEO[1]) for name in ("alpha_t", "sigma_t")}
    x = p.x.float()
    torch.testing.assert_close(value_and_grad(dmd_loss, x, **kw), value_and_grad(dmd_loss, x, **wide))


def test_a_frame_normaliser_is_a_sample_normaliser_of_frames() -> None:
    p = Problem(VIDEO)
    kw = p.dmd(torch.float32, "epsilon", reduction="sum")
    flat = {k: v.flatten(0, 1) if isinstance(v, Tensor) and v.dim() == 5 else v for k, v in kw.items()}
    flat |= {name: kw[name].repeat_interleave(VIDEO[1]) for name in ("alpha_t", "sigma_t")}
    _, grad = value_and_grad(dmd_loss, p.x.float(), **kw, normalizer_dims="frame")
    _, expected = value_and_grad(dmd_loss, p.x.float().flatten(0, 1), **flat)
    assert torch.equal(grad.flatten(0, 1), expected)


# ---------------------------------------------------------------- shapes, layouts, autograd


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t,
    "sliced": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
}


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple) | st.just((1025,)) | st.just((3, 23, 31)),
    batch=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    mixed=st.sampled_from(DTYPES),
    layout=st.sampled_from(list(LAYOUTS)),
    kind=st.sampled_from(TYPES[:3]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    guided=st.booleans(),
    masked=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 1000),
)
def test_any_shape_dtype_and_layout(
    shape: tuple[int, ...],
    batch: int,
    dtype: torch.dtype,
    mixed: torch.dtype,
    layout: str,
    kind: str,
    scale: float,
    guided: bool,
    masked: bool,
    reduction: str,
    seed: int,
) -> None:
    p = Problem((batch, *shape), seed)
    for name in ("x", "x_t", "real", "uncond", "fake"):
        setattr(p, name, scale * getattr(p, name))
    kw = p.dmd(dtype, kind, reduction=reduction)
    if not guided:
        kw |= {"real_uncond": None, "guidance_scale": 1.0}
    if masked:
        kw["mask"] = torch.rand(p.shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE) < 0.5
    kw["x_t"] = LAYOUTS[layout](kw["x_t"])
    kw["fake"] = LAYOUTS[layout](kw["fake"].to(mixed if mixed != torch.float64 else dtype))
    if dtype == torch.float16 and reduction == "mean":
        kw["reduction"] = "sum"  # the mean's gradient underflows without a loss scale
    compare(dmd_loss, reference.dmd_loss, LAYOUTS[layout](p.x.to(dtype)), **kw)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("shape", [(2, 40_000), (40, 3_000), (1, 200_001)])
def test_results_do_not_depend_on_the_number_of_threads(shape: tuple[int, int], threads: int) -> None:
    if threads > 1 and dispatch.backend_for("dmd", DEVICE) == "triton":
        pytest.skip("Triton's kernels use none of the CPU's threads")
    p = Problem(shape)
    dm, ca = pairs(p, Problem(shape, seed=1), torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = value_and_grad(decoupled_dmd_loss, p.x.float(), dm, ca, guidance_scale=3.0)
        torch.set_num_threads(threads)
        other = value_and_grad(decoupled_dmd_loss, p.x.float(), dm, ca, guidance_scale=3.0)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    compare(decoupled_dmd_loss, reference.decoupled_dmd_loss, p.x.float(), dm, ca, guidance_scale=3.0)


def test_an_empty_batch() -> None:
    x = torch.empty(0, 4, device=DEVICE, requires_grad=True)
    empty, none = torch.empty(0, 4, device=DEVICE), torch.empty(0, device=DEVICE)
    dm = ScorePair(empty, none, none, empty, empty)
    losses = [
        sds_loss(x, empty, empty),
        dmd_loss(x, empty, empty, empty, alpha_t=none, sigma_t=none),
        decoupled_dmd_loss(x, dm, dm, guidance_scale=2.0),
    ]
    for loss in losses:
        assert loss.item() == 0
        (grad,) = torch.autograd.grad(loss, x)
        assert grad.shape == (0, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_scales_and_repeats(dtype: torch.dtype) -> None:
    """Any incoming gradient, twice through one graph, and what reduction="none" hands back."""
    p = Problem()
    x = p.leaf(dtype)
    loss = dmd_loss(x, **p.dmd(dtype, "epsilon", reduction="sum"))
    three = torch.tensor(3.0, device=DEVICE, dtype=loss.dtype)
    first = torch.autograd.grad(loss, x, three, retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss, x, three)[0]
    torch.testing.assert_close(first, second, rtol=2 * torch.finfo(dtype).eps, atol=0)
    per_sample = dmd_loss(x, **p.dmd(dtype, "epsilon", reduction="none"))
    (grad,) = torch.autograd.grad(per_sample, x, torch.tensor([3.0, 0.0, 3.0], device=DEVICE, dtype=loss.dtype))
    torch.testing.assert_close(grad[[0, 2]], second[[0, 2]], rtol=2 * torch.finfo(dtype).eps, atol=0)
    assert torch.count_nonzero(grad[1]) == 0


def test_the_gradient_reaches_a_generator_under_autocast() -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(8, 8).to(DEVICE)
    p = Problem((3, 8))
    with torch.autocast(torch.device(DEVICE).type, dtype=torch.bfloat16):
        x = net(p.noise.float())
        loss = dmd_loss(x, **p.dmd(torch.bfloat16, "epsilon"))
    assert loss.dtype == torch.float32
    loss.backward()
    assert net.weight.grad is not None
    assert net.weight.grad.norm() > 0


def test_double_backward_is_refused() -> None:
    p = Problem()
    x = p.leaf(torch.float32)
    (grad,) = torch.autograd.grad(dmd_loss(x, **p.dmd(torch.float32)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("loss_fn", [sds_loss, vsd_loss])
def test_a_free_image_moves_to_the_mode(loss_fn: Any) -> None:
    """SDS and VSD on an image parameter, where the data are one point c and its score is known: x goes to c."""
    g = torch.Generator().manual_seed(0)
    c = torch.tensor([[0.5, -1.0, 2.0, 0.0]], device=DEVICE)
    x = torch.randn(1, 4, generator=g).to(DEVICE).requires_grad_()
    opt = torch.optim.SGD([x], lr=0.2)
    for _ in range(60):
        sigma = 0.2 + 0.6 * torch.rand(1, generator=g).to(DEVICE)
        alpha, noise = (1 - sigma**2).sqrt(), torch.randn(1, 4, generator=g).to(DEVICE)
        x_t = fastgen.add_noise(x.detach(), noise, alpha, sigma)
        opt.zero_grad()
        loss_fn(x, (x_t - alpha * c) / sigma, noise, weight=sigma / alpha).backward()  # its fake: x is a point too
        opt.step()
    torch.testing.assert_close(x.detach(), c, atol=1e-3, rtol=0)


# ---------------------------------------------------------------- operators, compilation, errors


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic: bool) -> None:
    p, q = Problem(VIDEO, seed=0), Problem(VIDEO, seed=1)
    dm, ca = pairs(p, q, torch.float32)
    mask = torch.tensor([True, False, True], device=DEVICE)[None, :, None, None, None]

    def step(x: Tensor) -> Tensor:
        x = 2 * x
        dmd = dmd_loss(x, **p.dmd(torch.float32, "epsilon", mask=mask, normalizer_dims="frame"))
        both, stats = decoupled_dmd_loss(x, dm, ca, guidance_scale=3.0, return_stats=True)
        return dmd + both + sds_loss(x, dm.real, dm.contrast) + stats.skipped

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    torch.testing.assert_close(value_and_grad(compiled, p.x.float()), value_and_grad(step, p.x.float()))


PEAK = """
import re, sys, torch, fastgen
def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
def step(x, x_t, real, uncond, fake):
    c = torch.full((len(x),), 0.7)
    kw = dict(alpha_t=c, sigma_t=c, real_uncond=uncond, guidance_scale=7.5)
    fastgen.dmd_loss(x.requires_grad_(), x_t, real, fake, **kw).backward()
streams = [torch.randn(8, 16, 21, 60, 104).to(getattr(torch, sys.argv[1])) for _ in range(5)]
step(*[t[:1, :, :1].contiguous() for t in streams])
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
step(*streams)
print((status("VmHWM") - before) / streams[0].nbytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif(dispatch.missing("dmd", "native", "cpu") is not None, reason="needs the compiled kernels")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory_is_the_gradient(dtype: str) -> None:
    run = subprocess.run([sys.executable, "-c", PEAK, dtype], capture_output=True, text=True, check=False)
    if run.returncode and "clear_refs" in run.stderr:
        pytest.skip("this kernel does not let a process reset its peak memory")
    assert run.returncode == 0, run.stderr
    assert 0.9 < float(run.stdout) <= 1.1


def call(**changes: Any) -> Tensor:
    p = Problem()
    return dmd_loss(**p.dmd(torch.float32) | {"x": p.x.float()} | changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"fake": torch.zeros(3, 4, 5, 6)}, ValueError, "fake has shape"),
        ({"x_t": torch.zeros(3, 4, 5, 5, dtype=torch.int64)}, TypeError, "x_t must be float32"),
        ({"real_cond": [1.0]}, TypeError, "real_cond must be a torch.Tensor"),
        ({"real_uncond": None}, ValueError, "guidance_scale = 3 needs real_uncond"),
        ({"alpha_t": torch.ones(4)}, ValueError, "alpha_t must have shape"),
        ({"alpha_t": torch.ones(3, 5)}, ValueError, "alpha_t must have shape"),
        ({"alpha_t": None, "prediction_type": "epsilon"}, TypeError, "alpha_t must be a torch.Tensor"),
        ({"sigma_t": torch.ones(3).bfloat16()}, TypeError, "sigma_t must be float32 or float64"),
        ({"prediction_type": "v"}, ValueError, "prediction_type must be one of"),
        ({"fake_prediction_type": "x"}, ValueError, "fake_prediction_type must be one of"),
        ({"normalizer": "l2"}, ValueError, "normalizer must be one of"),
        ({"normalizer_eps": -1.0}, ValueError, "normalizer_eps must be >= 0"),
        ({"normalizer_min": math.nan}, ValueError, "normalizer_min must be finite"),
        ({"normalizer_dims": "pixel"}, ValueError, "normalizer_dims must be one of"),
        ({"guidance_scale": math.inf}, ValueError, "guidance_scale must be finite"),
        ({"weight": torch.ones(2)}, ValueError, "weight must have shape"),
        ({"weight": torch.ones(3).half()}, TypeError, "weight must be float32 or float64"),
        ({"mask": torch.ones(3, 4, 5, 5)}, TypeError, "mask must be a bool"),
        ({"mask": torch.ones(2, 1, 1, 1, dtype=torch.bool)}, ValueError, "mask of shape"),
        ({"reduction": "sum_per_batch"}, ValueError, "reduction must be one of"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


def test_bad_arguments_of_the_others_are_named() -> None:
    p = Problem()
    x, f = p.x.float(), p.real.float()
    with pytest.raises(TypeError, match=r"dm must be a fastgen\.ScorePair"):
        decoupled_dmd_loss(x, (x, x), None, guidance_scale=2.0)  # type: ignore[arg-type]
    dm, ca = pairs(p, p, torch.float32)
    with pytest.raises(ValueError, match=r"ca\.contrast has shape"):
        decoupled_dmd_loss(x, dm, ca._replace(contrast=torch.zeros(3)), guidance_scale=2.0)
    with pytest.raises(ValueError, match="grad_clip must be > 0"):
        sds_loss(x, f, f, grad_clip=0.0)
    with pytest.raises(ValueError, match="needs pred_uncond"):
        sds_loss(x, f, f, guidance_scale=100.0)
    with pytest.raises(ValueError, match="needs real_uncond"):
        vsd_loss(x, f, f, guidance_scale=7.5)
    with pytest.raises(ValueError, match="normalizer_dims='frame' needs a video"):
        call(
            **{"x": x[:, 0, 0]} | dict.fromkeys(("x_t", "real_cond", "fake", "real_uncond"), f[:, 0, 0]),
            normalizer_dims="frame",
        )
