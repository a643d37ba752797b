"""What every operator promises: the dispatcher's contract, compilation, transforms, determinism, memory, threads."""

import subprocess
import sys
import threading

import pytest
import torch
from conftest import DEVICE
from oracle import check_case, value_and_grad
from recorder import recorded
from torch import library as torch_library

import fastgen
from fastgen import reference
from fastgen.cases import CASES, FAMILIES, FUNCTIONS
from fastgen.core import dispatch

SHAPES = {"sequence": (2, 3, 71), "trajectory": (6, 4, 5)}  # of others (6, 3, 5, 7)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Of calls alike but for an option, one stands for all where an operator's own numbers are not the matter.
ONE_OF_EACH = [cases[0].name for cases in FUNCTIONS.values() if cases[0].differentiable]
ONE_OF_EACH += [name for name, case in CASES.items() if name.endswith("-none") and case.function + "-none" == name]


def check_at(name, dtypes, device):
    case = CASES[name]
    family = next(family for family, cases in FAMILIES.items() if case in cases)
    check_case(case, case.inputs(SHAPES.get(family, (6, 3, 5, 7)), *dtypes, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_matches_float64(name, dtype, backend, device):
    check_at(name, (dtype,), device)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_matches_float64_where_dtypes_differ(name, kernel_backend, device):
    check_at(name, (torch.float16, torch.bfloat16, torch.float32), device)


def test_every_operator_has_a_case(kernel_backend, device):
    assert set(recorded(kernel_backend, device)) == set(dispatch.operators)


def test_every_public_function_with_a_kernel_has_a_case():
    twins = {f for f in fastgen.__all__ if f.islower() and hasattr(reference, f.removesuffix("_"))}
    no_kernel = {"step_coefficients", "clip_weights_", "discriminator_loss", "generator_loss"}
    of_a_network = {"r1_penalty", "approximate_r1_penalty", "gradient_penalty"}  # not of tensors alone
    assert twins - no_kernel - of_a_network <= set(FUNCTIONS)
    assert set(FUNCTIONS) <= set(fastgen.__all__)


@pytest.mark.parametrize("name", dispatch.operators)
def test_opcheck(name, kernel_backend, device):
    # The autograd registration test is for operators with a derivative formula; ours are wrapped in Functions.
    utilities = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
    if name == "trajectory_table":  # a Monge table has parts that nothing writes or reads; the last compares all
        del utilities[-1]
    if reason := dispatch.missing(name, kernel_backend, torch.device(device).type):
        pytest.skip(reason)
    for args in recorded(kernel_backend, device)[name]:
        torch_library.opcheck(getattr(dispatch.operators[name], kernel_backend), args, test_utils=utilities)


def of_leaves(case, device):
    """A scalar function, not linear, of the inputs that get gradients, and these."""
    tensors = case.inputs((2, 2, 6), device=device)

    def f(*leaves):
        given = dict(zip(case.differentiable, leaves, strict=True))
        return case(fastgen, **{**tensors, **given}).square().sum()

    return f, tuple(tensors[n] for n in case.differentiable)


def value_and_grads(f, leaves):
    leaves = [t.detach().requires_grad_() for t in leaves]
    value = f(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_compiles_without_a_graph_break(name, kernel_backend, device):
    f, leaves = of_leaves(CASES[name], device)
    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_grads(compiled, leaves), value_and_grads(f, leaves))


def test_compiles_with_inductor_and_dynamic_shapes(device):
    def step(p, q, y, real):
        return fastgen.ddo_loss(p * 2, q, y, real, alpha=2.0) + 1

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for rows in (4, 6):
        p, q, y = (torch.randn(rows, 6, device=device) for _ in range(3))
        real = torch.arange(rows, device=device) % 2 == 0
        expected = value_and_grad(lambda x, a=(q, y, real): step(x, *a), p)
        torch.testing.assert_close(value_and_grad(lambda x, a=(q, y, real): compiled(x, *a), p), expected)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_torch_func(name, kernel_backend, device):
    """Transforms are right, nested ones and vmap too: the reference runs under them."""
    f, leaves = of_leaves(CASES[name], device)
    places = tuple(range(len(leaves)))

    def of_grads(*leaves):
        return sum(g.square().sum() for g in torch.func.grad(f, places)(*leaves))

    batch = [torch.stack([t, 2 * t, t + 0.5]) for t in leaves]
    grads, seconds = (torch.func.grad(g, places)(*leaves) for g in (f, of_grads))
    values = torch.func.vmap(f)(*batch)
    with fastgen.use_backend("reference"):
        needed = [t.clone().requires_grad_() for t in leaves]
        expected = torch.autograd.grad(f(*needed), needed, create_graph=True)
        torch.testing.assert_close(grads, tuple(t.detach() for t in expected))
        torch.testing.assert_close(seconds, torch.autograd.grad(sum(t.square().sum() for t in expected), needed))
        torch.testing.assert_close(values, torch.stack([f(*(t[i] for t in batch)) for i in range(3)]))


def test_second_derivatives_are_refused_not_wrong(kernel_backend, device):
    f, leaves = of_leaves(CASES["ddo_loss"], device)
    (pred,) = (t.requires_grad_() for t in leaves)
    (grad,) = torch.autograd.grad(f(pred), pred, create_graph=True)
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
        seen["other"] = dispatch.backend_for("ddo_loss", "cpu")
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    before = dispatch.backend_for("ddo_loss", "cpu")
    with fastgen.use_backend("reference"):
        inside.set()
        done.wait()
        seen["this"] = dispatch.backend_for("ddo_loss", "cpu")
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
@pytest.mark.skipif(dispatch.missing("ddo_loss", "native", "cpu") is not None, reason="needs the compiled kernels")
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
@pytest.mark.skipif(dispatch.missing("ddo_loss", "native", "cpu") is not None, reason="needs the compiled kernels")
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
