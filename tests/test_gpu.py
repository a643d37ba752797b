"""What only a GPU can show: streams, graphs, sizes beyond 2^31, peak memory, mixed-precision training.

The other tests run there too (``FASTGEN_TEST_DEVICE=cuda``); ``make gpu`` runs all.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import DEVICE, backends
from oracle import check_case
from torch import Tensor

import fastgen
from fastgen import NoiseSchedule, ScorePair
from fastgen.analytic_dpm import moments
from fastgen.cases import FUNCTIONS
from fastgen.core import verify

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU, and FASTGEN_TEST_DEVICE=cuda")

KERNELS = [b for b in backends() if b != "reference"]
Step = Callable[[Tensor, Tensor, Tensor], Tensor]
SHAPE = (4, 6, 64)


def steps(device: str) -> dict[str, Step]:
    """Functions of every family on three tensors of SHAPE, with all constants on the device, as graphs need them."""
    w = torch.linspace(0.3, 0.9, 4, device=device)
    real = torch.tensor([True, False, True, False], device=device)
    tokens = torch.arange(24, device=device).reshape(4, 6)
    tokens = tokens.masked_fill(tokens % 5 == 1, -100)
    head, labels = torch.randn(32, 64, device=device), tokens.clamp(max=31)
    as_head = lambda x: head.to(x.dtype)  # noqa: E731
    schedule, t = NoiseSchedule.linear(1000), torch.tensor([0, 30, 600, 999], device=device)
    k = fastgen.step_coefficients(schedule, t - 1, t, eta=1.0, method="ddim")
    dmd = {"alpha_t": w, "sigma_t": 1 - w, "guidance_scale": 2.0}
    return {
        "elbo_error": lambda p, q, y: fastgen.elbo_error(p, y, weight=w, loss="huber"),
        "elbo_difference": lambda p, q, y: fastgen.elbo_difference(p, q, y),
        "ddo_loss": lambda p, q, y: fastgen.ddo_loss(p, q, y, real, weight=w, alpha=2.0),
        "diffusion_dpo_loss": lambda p, q, y: fastgen.diffusion_dpo_loss(p, q, y, beta=3.0),
        "add_noise": lambda p, q, y: fastgen.add_noise(p, y, w, 1 - w),
        "mean_square": lambda p, q, y: moments.row_mean_square(p.detach()),
        "sds_loss": lambda p, q, y: fastgen.sds_loss(p, q, y, weight=w),
        "vsd_loss": lambda p, q, y: fastgen.vsd_loss(p, q, y, reduction="none"),
        "dmd_loss": lambda p, q, y: fastgen.dmd_loss(p, y, q, y - q, real_uncond=y, **dmd),
        "decoupled_dmd_loss": lambda p, q, y: fastgen.decoupled_dmd_loss(
            p, ScorePair(y, w, w, q, y), ScorePair(q, w, w, y, q), guidance_scale=2.0
        ),
        "token_logprob": lambda p, q, y: fastgen.token_logprob(p, tokens),
        "generalized_jsd_loss": lambda p, q, y: fastgen.generalized_jsd_loss(p, q, tokens, beta=0.3),
        "sequence_ddo_loss": lambda p, q, y: fastgen.sequence_ddo_loss(p, q, tokens, real),
        "linear_token_logprob": lambda p, q, y: fastgen.linear_token_logprob(p, as_head(p), labels),
        "linear_generalized_jsd_loss": lambda p, q, y: fastgen.linear_generalized_jsd_loss(
            p, as_head(p), q, as_head(p)
        ),
        "joint_energy_loss": lambda p, q, y: fastgen.joint_energy_loss(p[:, 0], tokens[:, 0], q[:, 0]),
        "guidance": lambda p, q, y: fastgen.guidance(p, q, w),
        "reverse_step": lambda p, q, y: fastgen.reverse_step(p.detach(), q, k, noise=y, clamp=(-1.0, 1.0)),
        "posterior_sample": lambda p, q, y: fastgen.posterior_sample(schedule, p, q, t, noise=y),
        "langevin_step": lambda p, q, y: fastgen.langevin_step(p.detach(), q, 0.1, 0.1, noise=y),
        "discriminator_loss": lambda p, q, y: fastgen.discriminator_loss(p, q),
        "generator_loss": lambda p, q, y: fastgen.generator_loss(p),
        "feature_distance": lambda p, q, y: fastgen.feature_distance([p, q], [y, y], [0.5, 1.0]),
    }


def fresh(seed: int, device: str = DEVICE, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator).to(device, dtype) for _ in range(3)]


def forward_backward(f: Step, p: Tensor, q: Tensor, y: Tensor) -> list[Tensor]:
    p = p.detach().requires_grad_()
    value = f(p, q, y)
    if not value.requires_grad:
        return [value]
    return [value.detach(), torch.autograd.grad(value.float().square().sum(), p)[0]]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a.cpu(), e.cpu())
        assert a.isfinite().all()


@pytest.mark.parametrize("dtype", verify.DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("backend", KERNELS)
def test_functions_against_float64(backend, function, dtype):
    with fastgen.use_backend(backend):
        for case in FUNCTIONS[function]:
            for shape in verify.SHAPES:
                check_case(case, case.inputs(shape, dtype, device=DEVICE), shape)


@pytest.mark.parametrize("name", steps("cpu"))
def test_runs_on_the_current_stream(name, kernel_backend):
    """Inputs come late, on another stream: what ran on the default one would read what was there before."""
    f, inputs = steps(DEVICE)[name], fresh(1)
    expected = forward_backward(f, *inputs)
    torch.cuda.synchronize()
    late = [torch.full_like(x, float("nan")) for x in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for x, value in zip(late, inputs, strict=True):
            x.copy_(value)
        actual = forward_backward(f, *late)
    torch.cuda.synchronize()
    assert_same_bits(actual, expected)


def test_losses_on_many_streams_at_once(kernel_backend):
    """Blocks that are the last of a launch add up its terms: launches that overlap must not count each other's."""
    inputs = [x.repeat(500, 1, 1) for x in fresh(1)]
    real = torch.arange(len(inputs[0]), device=DEVICE) % 2 == 0
    expected = fastgen.ddo_loss(*inputs, real)
    torch.cuda.synchronize()
    streams, losses = [torch.cuda.Stream() for _ in range(16)], []
    for stream in streams * 20:
        with torch.cuda.stream(stream):
            losses.append(fastgen.ddo_loss(*inputs, real))
    torch.cuda.synchronize()
    assert_same_bits(losses, [expected] * len(losses))


@pytest.mark.parametrize("name", steps("cpu"))
def test_graph_replays_are_calls_to_the_bit(name, kernel_backend):
    f = steps(DEVICE)[name]
    static = fresh(2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # what is compiled, and looked up, once
            forward_backward(f, *static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = forward_backward(f, *static)
    for seed in (3, 4):
        inputs = fresh(seed)
        for x, value in zip(static, inputs, strict=True):
            x.copy_(value)
        graph.replay()
        assert_same_bits(results, forward_backward(f, *inputs))


@pytest.mark.parametrize("name", steps("cpu"))
def test_no_syncs_and_reruns_agree_to_the_bit(name, kernel_backend):
    f, inputs = steps(DEVICE)[name], fresh(5, dtype=torch.bfloat16)
    expected = forward_backward(f, *inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual = [forward_backward(f, *inputs) for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for results in actual:
        assert_same_bits(results, expected)


@pytest.mark.skipif(DEVICE == "cpu" or torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("name", steps("cpu"))
def test_runs_on_the_tensors_device(name, kernel_backend):
    expected = forward_backward(steps(DEVICE)[name], *fresh(6))
    assert torch.cuda.current_device() == 0
    results = forward_backward(steps("cuda:1")[name], *fresh(6, "cuda:1"))
    assert all(x.device.index == 1 for x in results)
    assert_same_bits(results, expected)


@pytest.mark.parametrize("name", ["ddo_loss", "dmd_loss", "generalized_jsd_loss", "reverse_step"])
def test_compiles_with_reduced_overhead(name, kernel_backend):
    f = steps(DEVICE)[name]
    torch._dynamo.reset()
    compiled = torch.compile(lambda p, q, y: 2 * f(p * 1.5, q, y), mode="reduce-overhead", fullgraph=True)
    for seed in range(4):  # warm up, record, replay
        inputs = fresh(seed)
        expected = forward_backward(lambda p, q, y: 2 * f(p * 1.5, q, y), *inputs)
        torch.compiler.cudagraph_mark_step_begin()
        actual = [x.clone() for x in forward_backward(compiled, *inputs)]
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["ddo_loss", "dmd_loss", "generalized_jsd_loss", "feature_distance"])
def test_autocast_and_gradient_scaling(name, kernel_backend):
    f, (x, q, y) = steps(DEVICE)[name], fresh(7)
    layer = torch.nn.Linear(64, 64, device=DEVICE)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**10)

    def loss() -> Tensor:
        with torch.autocast(DEVICE, dtype=torch.float16):
            return f(layer(x), q, y)

    loss().backward()
    unscaled = layer.weight.grad.clone()
    optimizer.zero_grad()
    before = layer.weight.detach().clone()
    scaler.scale(loss()).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(layer.weight.grad, unscaled, rtol=1e-2, atol=1e-3 * unscaled.abs().max().item())
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(layer.weight, before)
    x.fill_(float("inf"))  # what overflows is noticed, and leaves the weights alone
    before = layer.weight.detach().clone()
    optimizer.zero_grad()
    scaler.scale(loss()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(layer.weight, before)
    assert scaler.get_scale() < 2.0**10


@pytest.mark.parametrize("name", ["ddo_loss", "diffusion_dpo_loss", "sds_loss", "generalized_jsd_loss"])
def test_peak_memory_is_the_gradient(name, kernel_backend):
    f = steps(DEVICE)[name]
    p, q, y = (torch.randn(4, 6, 1 << 18, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    p.requires_grad_()
    f(p, q, y).backward()
    p.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    f(p, q, y).backward()
    assert torch.cuda.max_memory_allocated() - before <= 1.1 * p.nbytes


# -- Beyond 2^31 elements: one operator of each skeleton, alone on the device (-m slow)


def needs_memory(gigabytes: float) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GB of free memory")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 2**30 + 8), (2, 2**31 + 8)], ids=str)
def test_large_rows(shape, kernel_backend):
    needs_memory(40)
    p, y = (torch.empty(shape, device=DEVICE, dtype=torch.bfloat16).normal_() for _ in range(2))
    size, chunk = shape[1], 1 << 26
    exact = torch.zeros(shape[0], device=DEVICE, dtype=torch.float64)
    for begin in range(0, size, chunk):
        exact += (p[:, begin : begin + chunk].float() - y[:, begin : begin + chunk].float()).square().double().sum(1)
    p.requires_grad_()
    error = fastgen.elbo_error(p, y, element_reduction="sum")
    torch.testing.assert_close(error.double(), exact, rtol=1e-5, atol=0)
    error.sum().backward()
    for begin in range(0, size, chunk):
        part = slice(begin, begin + chunk)
        expected = 2 * (p[:, part].detach().float() - y[:, part].float())
        torch.testing.assert_close(p.grad[:, part].float(), expected, rtol=2.0**-7, atol=0)


@pytest.mark.slow
def test_large_logits(kernel_backend):
    needs_memory(30)
    rows, vocabulary = 33_000, 65_536 + 8
    logits = torch.empty(rows, vocabulary, device=DEVICE, dtype=torch.bfloat16).normal_().requires_grad_()
    tokens = torch.arange(rows, device=DEVICE) * 1009 % vocabulary
    value = fastgen.token_logprob(logits, tokens)
    value.sum().backward()
    for begin in range(0, rows, 1000):
        part = slice(begin, begin + 1000)
        leaf = logits[part].detach().float().requires_grad_()
        expected = leaf.log_softmax(-1).gather(1, tokens[part, None])[:, 0]
        torch.testing.assert_close(value[part], expected, rtol=1e-5, atol=1e-5)
        expected.sum().backward()
        torch.testing.assert_close(logits.grad[part].float(), leaf.grad, rtol=2.0**-6, atol=1e-7)


@pytest.mark.slow
def test_large_trajectory(kernel_backend):
    needs_memory(30)
    points = 46_400  # squared, beyond 2^31
    cost = torch.rand(points, points, device=DEVICE)
    least = torch.full((points,), float("inf"), device=DEVICE)  # of two edges
    s = torch.arange(points, device=DEVICE)
    for begin in range(1, points, 1024):
        part = slice(begin, begin + 1024)
        paths = cost[0, part, None] + cost[part]
        least = torch.minimum(least, paths.masked_fill_(s[part, None] >= s, float("inf")).amin(0))
    exact = (least + cost[:, -1])[:-1].amin()
    result = fastgen.optimal_trajectory(cost, 3)
    assert torch.equal(result.total_cost, exact)
    a, b, c, d = result.steps.tolist()
    assert torch.equal((cost[a, b] + cost[b, c]) + cost[c, d], exact)
