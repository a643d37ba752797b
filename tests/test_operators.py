"""What every operator promises: the dispatcher's contract, compilation, transforms, determinism, memory, threads."""

import subprocess
import sys
import threading

import pytest
import torch
from conftest import DEVICE
from oracle import value_and_grad
from torch import library as torch_library

import fastgen
from fastgen import _backend


def samples(device):
    """Arguments of every operator, two sets of each at most."""
    p, q, y = (torch.randn(4, 3, 5, device=device) for _ in range(3))
    w = torch.rand(4, device=device)
    real = torch.tensor([True, False, True, False], device=device)
    counts = torch.tensor([2.0, 5.0], device=device)
    cost, v = torch.randn(2, 7, 7, device=device), torch.rand(2, 7, device=device, dtype=torch.float64).cumsum(1)
    backend = _backend.backend_for("trajectory_table", device)
    table = _backend.operators["trajectory_table"].on(backend)(cost, None, 0, 3, False)[1]
    return {
        "elbo_error": [(p, q, w, "l2", True), (p.bfloat16(), q, None, "huber", False)],
        "elbo_error_backward": [(w, p, q, w, "l1", True), (w, p.half(), q, None, "l2", False)],
        "l1_distance": [(p, q, 0.3, True), (p.bfloat16().transpose(1, 2), q, 2.0, False)],
        "elbo_difference": [(p, q, y, w, False), (p.double(), q, y, None, True)],
        "ddo_loss": [
            (p, q, y, w, False, "mean", True, real, None, 2.0, 0.1, 1),
            (p, q, y, None, True, "none", False, real[:2], counts, 1.0, 0.1, 2),
        ],
        "diffusion_dpo_loss": [
            (p, q, y, w, True, "mean", True, 5.0, "sigmoid"),
            (p, q, y, None, False, "none", False, 5.0, "ipo"),
        ],
        "guidance": [(p, q, w), (p.half(), q.transpose(1, 2).contiguous().transpose(1, 2), w[:1])],
        "mean_square": [(p,), (p.half().transpose(1, 2),)],
        **distillation_samples(p, q, y, w),
        "row_combination": [(p, w, q, w), (p.transpose(1, 2), w, None, None)],
        "scale_gradient_": [(p, torch.tensor(0.5, device=device)), (p, torch.tensor(1.0, device=device))],
        **sequence_samples(device),
        **step_samples(p, q, y, w),
        "trajectory_inspect": [(cost, None, 0, True), (v, v, 1, True)],
        "trajectory_table": [(cost, None, 0, 3, False), (v, v, 1, 2, False)],
        "trajectory_path": [(cost, None, table, 0, 3, False)],
    }


def distillation_samples(p, q, y, w):
    mask, bf16 = p > 0, torch.bfloat16
    types, one_pass = ("epsilon", "v_prediction", 3.0, bf16), (w.sum(), True, 0.0, 1e-6, 2)
    score = (p, q, y, w, None, 2.0, float("inf"), p.dtype)
    dmd = (p, q, y, None, mask, w, w, *types)
    decoupled = (p, q, y, p + q, w, mask, w, w, w, w, *types)
    return {
        "score_difference": [(*score, "sum_per_batch", True), (p, q, None, None, y, 1.0, 0.5, bf16, "none", False)],
        "score_difference_backward": [(w, *score)],
        "dmd": [(q, y, *dmd, *one_pass, "mean", True), (q, y, *dmd, None, *one_pass[1:], "none", False)],
        "dmd_backward": [(w, y, *dmd)],
        "decoupled_dmd": [
            (q, y, p, *decoupled, *one_pass, "mean", True),
            (q, y, p, *decoupled, *one_pass, "none", False),
        ],
        "decoupled_dmd_backward": [(torch.stack([w, w]), p, *decoupled)],
    }


def step_samples(p, q, y, w):
    full = (q, y, q, w, w + 1, w, w, w[:1], w, w, "v_prediction", -1.0, 1.0)
    least = (None, None, w, w, w[:1], w, None, None, None, "sample", -float("inf"), float("inf"))
    turned = p.half().transpose(1, 2)
    return {
        "reverse_step": [(p, *full), (turned, q.transpose(1, 2), *least)],
        "reverse_step_": [(p.clone(), *full), (turned.clone(), turned, *least)],
    }


def sequence_samples(device):
    s, t = torch.randn(2, 3, 7, device=device), torch.randn(2, 3, 9, device=device)
    tokens = torch.tensor([[3, -100, 6], [0, 1, 2]], device=device)
    grad, lse = torch.randn(2, 3, device=device), torch.stack([s.amax(-1), s.exp().sum(-1)])
    stats = torch.cat([lse, lse, torch.zeros_like(lse[:1])])
    real, counts = torch.tensor([True, False], device=device), torch.tensor([2.0, 5.0], device=device)
    scale = torch.tensor(0.5, device=device)
    sliced = s.bfloat16().repeat_interleave(2, 1)[:, ::2]
    return {
        "token_logprob": [(s, tokens, 1.0, -100), (sliced, tokens.abs() % 7, 0.5, 2)],
        "token_logprob_backward": [
            (grad, s, tokens, lse, 1.0, -100),
            (scale.expand(2, 3), sliced, tokens, lse, 2.0, -100),
        ],
        "sequence_ddo_loss": [
            (grad, -grad, real, None, 2.0, 0.1, 1.0, "mean"),
            (grad, grad.double(), real, counts, 1.0, 0.1, 0.5, "none"),
        ],
        "generalized_jsd": [
            (s, t, tokens, scale, 0.0, 2.0, -100, True, True),
            (sliced, t, None, None, 0.3, 1.0, -100, False, False),
        ],
        "generalized_jsd_backward": [
            (grad, s, t, tokens, stats, 0.3, 2.0, -100),
            (scale.expand(2, 3), sliced, t, None, stats, 1.0, 1.0, -100),
        ],
    }


def test_every_operator_has_samples():
    assert set(samples("cpu")) == set(_backend.operators)


@pytest.mark.parametrize("name", samples("cpu"))
def test_opcheck(name, kernel_backend, device):
    # The autograd registration test is for operators with a derivative formula; ours are wrapped in Functions.
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    if reason := _backend.missing(name, kernel_backend, torch.device(device).type):
        pytest.skip(reason)
    for args in samples(device)[name]:
        torch_library.opcheck(_backend.operators[name].on(kernel_backend), args, test_utils=utilities)


def losses(device):
    q, y = torch.randn(4, 6, device=device), torch.randn(4, 6, device=device)
    w = torch.rand(4, device=device)
    real = torch.tensor([True, False, True, False], device=device)
    tokens = torch.tensor([1, 5, -100, 0], device=device)
    schedule, times = fastgen.NoiseSchedule.linear(10), torch.tensor([0, 3, 9, 1], device=device)
    return {
        "elbo_error": lambda p: fastgen.elbo_error(p, y, weight=w).sum(),
        "l1_distance": lambda p: fastgen.feature_distance([p, p[:2]], [y, q[:2]], [0.3, 2.0]),
        "elbo_difference": lambda p: fastgen.elbo_difference(p, q, y).sum(),
        "ddo_loss": lambda p: fastgen.ddo_loss(p, q, y, real, weight=w, alpha=2.0),
        "ddo_loss-none": lambda p: fastgen.ddo_loss(p, q, y, real, reduction="none").sum(),
        "diffusion_dpo_loss": lambda p: fastgen.diffusion_dpo_loss(p, q, y, beta=3.0),
        "add_noise": lambda p: fastgen.add_noise(p, y, w, w + 1).square().sum(),
        "prediction_to_x0": lambda p: fastgen.prediction_to_x0(p, y, w + 1, w, "v_prediction").square().sum(),
        "guidance": lambda p: fastgen.guidance(p, y, w + 1).square().sum(),
        "posterior_sample": lambda p: fastgen.posterior_sample(schedule, p, y, times, noise=q).square().sum(),
        "token_logprob": lambda p: fastgen.token_logprob(p, tokens, temperature=2.0).sum(),
        "generalized_jsd": lambda p: fastgen.generalized_jsd_loss(p, q, tokens, beta=0.3),
        "generalized_jsd-none": lambda p: fastgen.generalized_jsd_loss(p, q, beta=1.0, reduction="none").sum(),
        "sequence_ddo_loss": lambda p: fastgen.sequence_ddo_loss(
            p.view(2, 2, 6), y.view(2, 2, 6), tokens.view(2, 2), real[:2], mask=real.view(2, 2)
        ),
        "schedule": lambda p: fastgen.NoiseSchedule.edm().add_noise(p, y, w).square().sum(),
    }


def skip_what_is_missing(name, backend, device):
    operator = name.partition("-")[0]
    if operator in _backend.operators and (reason := _backend.missing(operator, backend, torch.device(device).type)):
        pytest.skip(reason)


@pytest.mark.parametrize("name", losses("cpu"))
def test_compiles_without_a_graph_break(name, kernel_backend, device):
    skip_what_is_missing(name, kernel_backend, device)
    f = losses(device)[name]
    p = torch.randn(4, 6, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    expected, actual = value_and_grad(f, p), value_and_grad(compiled, p)
    torch.testing.assert_close(actual, expected)


def test_compiles_with_inductor_and_dynamic_shapes(device):
    def step(p, q, y, real):
        return fastgen.ddo_loss(p * 2, q, y, real, alpha=2.0) + 1

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows in (4, 6):
        p, q, y = (torch.randn(rows, 6, device=device) for _ in range(3))
        real = torch.arange(rows, device=device) % 2 == 0
        expected = value_and_grad(lambda x, a=(q, y, real): step(x, *a), p)
        torch.testing.assert_close(value_and_grad(lambda x, a=(q, y, real): compiled(x, *a), p), expected)


@pytest.mark.parametrize("name", losses("cpu"))
def test_torch_func(name, kernel_backend, device):
    """Transforms are right, nested ones and vmap too: the reference runs under them."""
    skip_what_is_missing(name, kernel_backend, device)
    f = losses(device)[name]
    p = torch.randn(4, 6, device=device)
    torch.testing.assert_close(torch.func.grad(f)(p), value_and_grad(f, p)[1])
    with fastgen.use_backend("reference"):
        leaf = p.clone().requires_grad_()
        (grad,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum())(p), second)
    batch = torch.randn(3, 4, 6, device=device)
    torch.testing.assert_close(torch.func.vmap(f)(batch), torch.stack([f(x) for x in batch]))


def test_second_derivatives_are_refused_not_wrong(kernel_backend, device):
    p = torch.randn(4, 6, device=device, requires_grad=True)
    (grad,) = torch.autograd.grad(losses(device)["ddo_loss"](p), p, create_graph=True)
    with pytest.raises(RuntimeError, match="once differentiable"):
        grad.sum().backward()


def test_autocast(kernel_backend, device):
    layer = torch.nn.Linear(6, 6, device=device)
    x, q, y = (torch.randn(4, 6, device=device) for _ in range(3))
    real = torch.tensor([True, False, True, False], device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        pred = layer(x)
        loss = fastgen.ddo_loss(pred, q, y, real)
    loss.backward()
    assert pred.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert layer.weight.grad is not None
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(64, 100), (3, 50_000)], ids=str)
def test_bitwise_equal_for_any_number_of_threads(shape, device):
    p, q, y = (torch.randn(shape, device=device) for _ in range(3))
    real = torch.arange(shape[0], device=device) % 2 == 0
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 4):
            torch.set_num_threads(n)
            results.append(value_and_grad(lambda x: fastgen.ddo_loss(x, q, y, real), p))
    finally:
        torch.set_num_threads(threads)
    for value, grad in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_each_thread_has_its_own_backend():
    seen = {}
    inside, done = threading.Event(), threading.Event()

    def other():
        inside.wait()
        seen["other"] = _backend.backend_for("ddo_loss", "cpu")
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    before = _backend.backend_for("ddo_loss", "cpu")
    with fastgen.use_backend("reference"):
        inside.set()
        done.wait()
        seen["this"] = _backend.backend_for("ddo_loss", "cpu")
    thread.join()
    assert seen == {"this": "reference", "other": before}


PEAK = """
import re, torch, fastgen
def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
p, q, y = (torch.randn(256, 4, 64, 64) for _ in range(3))
real = torch.arange(256) % 2 == 0
p.requires_grad_()
fastgen.ddo_loss(p[:2], q[:2], y[:2], real[:2]).backward()
p.grad = None
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
fastgen.ddo_loss(p, q, y, real).backward()
print((status("VmHWM") - before) / p.nbytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif(_backend.missing("ddo_loss", "native", "cpu") is not None, reason="needs the compiled kernels")
def test_peak_memory_is_the_gradient():
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=False)
    if run.returncode and "clear_refs" in run.stderr:
        pytest.skip("this kernel does not let a process reset its peak memory")
    assert run.returncode == 0, run.stderr
    assert 0.9 < float(run.stdout) <= 1.1


LEVELS = """
import torch, fastgen, sys
torch.manual_seed(0)
p, q, y = (torch.randn(6, 3, 50).to(getattr(torch, sys.argv[1])) for _ in range(3))
p.requires_grad_()
loss = fastgen.ddo_loss(p, q, y, torch.arange(6) % 2 == 0, beta=0.1)
loss.backward()
print(fastgen.build_info()["_C"]["isa_used"], loss.item(), *p.grad.flatten().tolist())
"""


@pytest.mark.skipif(DEVICE != "cpu", reason="about CPU instruction sets")
@pytest.mark.skipif(_backend.missing("ddo_loss", "native", "cpu") is not None, reason="needs the compiled kernels")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_every_instruction_set_agrees(dtype):
    import os

    results = {}
    for level in ("baseline", "avx2", "avx512"):
        environment = {**os.environ, "FASTGEN_CPU_CAPABILITY": level}
        run = subprocess.run(
            [sys.executable, "-c", LEVELS, dtype], env=environment, capture_output=True, text=True, check=True
        )
        name, *numbers = run.stdout.split()
        results[name] = torch.tensor([float(n) for n in numbers], dtype=torch.float64)
    first, *others = results.values()
    eps = torch.finfo(getattr(torch, dtype)).eps
    for other in others:  # which fuse multiplications and additions
        torch.testing.assert_close(other, first, rtol=4 * eps, atol=1e-9)
