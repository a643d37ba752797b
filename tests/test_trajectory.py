"""The trajectory solver against brute force, a plain numpy sweep and its own reference."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastgen
from fastgen import FactoredCost, optimal_trajectory, reference
from fastgen.core.dispatch import missing, operators
from fastgen.trajectory import reference as sweep

INF = float("inf")


def random_cost(n: int, seed: int, *, batch: tuple[int, ...] = (), dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*batch, n + 1, n + 1, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tied_cost(n: int, seed: int, forbidden: float = 0.2) -> Tensor:
    """Small integers, so that many paths cost the same, and some forbidden edges."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.randint(-2, 3, (n + 1, n + 1), generator=generator).double()
    return cost.masked_fill(torch.rand(cost.shape, generator=generator) < forbidden, INF)


def monge_cost(n: int, seed: int) -> Tensor:
    """Integers with F[s,t] + F[s',t'] <= F[s,t'] + F[s',t]: minus a sum over rectangles, plus any rows and columns."""
    rng = np.random.default_rng(seed)
    density = rng.integers(0, 3, (n + 1, n + 1)) * (rng.random((n + 1, n + 1)) < 0.3)
    rows, columns = rng.integers(-40, 40, (n + 1, 1)), rng.integers(-40, 40, n + 1)
    return torch.from_numpy((rows + columns - density.cumsum(0).cumsum(1)).astype(np.float64))


def factored_cost(n: int, seed: int, plateau: float = 0.3) -> FactoredCost:
    """Increasing v and non-decreasing h with plateaus, as isotonic regression leaves them."""
    rng = np.random.default_rng(seed)
    v = np.cumsum(rng.exponential(size=n + 1)) * 10.0 ** rng.uniform(-3, 3)
    h = 0.01 + np.cumsum(rng.exponential(size=n + 1) * (rng.random(n + 1) > plateau))
    return FactoredCost(torch.from_numpy(v), torch.from_numpy(h))


def path_cost(cost: Tensor, path: list[int]) -> Tensor:
    total = cost.new_zeros(())
    for s, t in itertools.pairwise(path):
        total = total + cost[s, t]
    return total


def brute_force(cost: Tensor, edges: int, first: int) -> tuple[float, list[int] | None]:
    """The least cost, and of the paths that have it the one a backward scan for the lowest predecessor finds."""
    last = len(cost) - 1
    options = []
    for inner in itertools.combinations(range(first + 1, last), edges - 1):
        path = [first, *inner, last]
        options.append((float(path_cost(cost, path)), path[::-1], path))
    best = min(options, default=(INF, [], []))
    return best[0], best[2] if best[0] < INF else None


@contextmanager
def one_thread() -> Iterator[None]:
    """For the reference: thousands of small tensor operations, which on busy cores wait for the slowest thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def numpy_sweep(cost: np.ndarray, edges: int) -> np.ndarray:
    used = np.where(np.triu(np.ones(cost.shape, bool), 1), cost, cost.dtype.type(INF))
    layer = np.full(len(cost), INF, cost.dtype)
    layer[0] = 0
    totals = []
    for _ in range(edges):
        layer = (layer[:, None] + used).min(0)
        totals.append(layer[-1])
    return np.array(totals)


@pytest.mark.parametrize("convention", ["edges", "nodes"])
def test_brute_force(convention: str) -> None:
    first = 0 if convention == "edges" else 1
    for seed in range(200):
        n = 2 + seed % 8
        cost = tied_cost(n, seed)
        result = optimal_trajectory(cost, "all", convention=convention)
        assert list(result.steps) == list(range(1 + first, n + 1))
        for k, total in zip(result.steps, result.total_cost.tolist(), strict=True):
            expected, path = brute_force(cost, k - first, first)
            assert total == expected
            if path is None:
                with pytest.raises(ValueError, match="no path"):
                    result.steps[k]
            else:
                assert result.steps[k].tolist() == path


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_thousand_steps_all_equal_to_the_bit(dtype: torch.dtype) -> None:
    cost = random_cost(1000, 0, dtype=dtype).square()
    result = optimal_trajectory(cost, "all")
    assert result.method == "exact"
    assert np.array_equal(result.total_cost.numpy(), numpy_sweep(cost.numpy(), 1000))
    ordinary = cost.numpy()
    for k in range(1, 1001) if dtype == torch.float64 else range(1, 1001, 100):
        path = result.steps[k].numpy()
        assert path[0] == 0
        assert path[-1] == 1000
        assert (np.diff(path) > 0).all()
        # cumsum adds one by one, as the solver does.
        assert np.cumsum(ordinary[path[:-1], path[1:]])[-1] == result.total_cost[k - 1]


@pytest.mark.parametrize("n", [1, 2, 5, 23, 24, 25, 31, 32, 33, 48, 63, 64, 65, 95, 96, 97, 130, 200])
def test_sizes_around_blocks_and_panels(n: int) -> None:
    for dtype in (torch.float64, torch.float32):
        cost = random_cost(n, n, dtype=dtype)
        with one_thread():
            expected, table = sweep.trajectory_table(cost[None], None, 0, n, False)
        result = optimal_trajectory(cost, "all")
        assert torch.equal(result.total_cost, expected[0, 1:])
        for k in {1, (n + 1) // 2, n}:
            assert torch.equal(result.steps[k], sweep.trajectory_path(cost[None], None, table, 0, k, False)[0])
            assert torch.equal(optimal_trajectory(cost, k).steps, result.steps[k])


def test_batch_equals_single_problems() -> None:
    cost = random_cost(70, 3, batch=(2, 3))
    result = optimal_trajectory(cost, [5, 70, 9])
    assert result.total_cost.shape == (2, 3, 3)
    assert result.steps[5].shape == (2, 3, 6)
    for i, j in itertools.product(range(2), range(3)):
        alone = optimal_trajectory(cost[i, j], [5, 70, 9])
        assert torch.equal(alone.total_cost, result.total_cost[i, j])
        for k in (5, 70, 9):
            assert torch.equal(alone.steps[k], result.steps[k][i, j])
    one = optimal_trajectory(cost, 7, convention="nodes")
    assert one.steps.shape == (2, 3, 7)
    assert one.total_cost.shape == (2, 3)
    assert bool((one.steps[..., 0] == 1).all())
    assert optimal_trajectory(cost[:, :0], 4).steps.shape == (2, 0, 5)


def test_only_the_upper_triangle_is_read() -> None:
    cost = random_cost(40, 1)
    spoilt = cost.masked_fill(torch.ones_like(cost, dtype=torch.bool).tril(), float("nan"))
    spoilt[0] = -INF  # node 0 takes no part where nodes count from 1
    a, b = (optimal_trajectory(c, "all", convention="nodes") for c in (cost, spoilt))
    assert torch.equal(a.total_cost, b.total_cost)
    sliced = torch.stack([cost, cost + 1], -1)[..., 0]
    assert torch.equal(optimal_trajectory(sliced, 9).steps, optimal_trajectory(cost, 9).steps)


def test_nodes_are_edges_of_the_rest() -> None:
    cost = random_cost(50, 2)
    nodes, edges = optimal_trajectory(cost, 12, convention="nodes"), optimal_trajectory(cost[1:, 1:], 11)
    assert torch.equal(nodes.steps, edges.steps + 1)
    assert torch.equal(nodes.total_cost, edges.total_cost)
    assert optimal_trajectory(torch.zeros(2, 2), 1, convention="nodes").steps.tolist() == [1]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 150), seed=st.integers(0, 2**31), nodes=st.booleans())
def test_monge_equals_exact_to_the_bit_on_matrices(n: int, seed: int, nodes: bool) -> None:
    convention = "nodes" if nodes else "edges"
    # Divided by 3 the entries round: sums then tie where exact ones do not.
    for cost in (monge_cost(n, seed), monge_cost(n, seed) / 3):
        try:
            monge = optimal_trajectory(cost, "all", convention=convention, method="monge")
        except ValueError:
            continue  # rounding may break the inequality, which is then not certified
        exact = optimal_trajectory(cost, "all", convention=convention, method="exact")
        assert (monge.method, exact.method) == ("monge", "exact")
        assert torch.equal(monge.total_cost, exact.total_cost)
        for k in list(exact.steps)[:: max(1, n // 5)]:
            assert torch.equal(monge.steps[k], exact.steps[k])


@pytest.mark.parametrize(("n", "shift", "density"), [(100, 28, 0.02), (300, 28, 0.002), (300, 30, 0.2)])
def test_rounded_ties_do_not_mislead_the_bisection(n: int, shift: int, density: float) -> None:
    """Integer edges, first edge 2^shift: in float32 many sums tie that differ exactly (comparing as rounded fails)."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        corners = rng.integers(0, 3, (n + 1, n + 1)) * (rng.random((n + 1, n + 1)) < density)
        rows = rng.integers(-4, 5, (n + 1, 1))
        corners[0], rows[0] = 0, 2**shift
        cost = torch.from_numpy((rows - corners.cumsum(0).cumsum(1)).astype(np.float32))
        monge, exact = (optimal_trajectory(cost, "all", method=m) for m in ("monge", "exact"))
        assert torch.equal(monge.total_cost, exact.total_cost)
        assert all(torch.equal(monge.steps[k], exact.steps[k]) for k in range(1, n + 1, 17))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 200), seed=st.integers(0, 2**31), plateau=st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_factored_monge_equals_exact(n: int, seed: int, plateau: float) -> None:
    cost = factored_cost(n, seed, plateau)
    monge, exact = optimal_trajectory(cost, "all"), optimal_trajectory(cost, "all", method="exact")
    assert (monge.method, exact.method) == ("monge", "exact")
    # Products of K edges round by an ulp or two an edge; the least of them is found up to that.
    torch.testing.assert_close(monge.total_cost, exact.total_cost, rtol=0, atol=n * 2**-51)
    with one_thread():
        reference_totals, _ = sweep.trajectory_table(cost.v[None], cost.h[None], 0, n, False)
    assert torch.equal(exact.total_cost, reference_totals.log()[0, 1:])
    matrix = cost.matrix()
    logs = optimal_trajectory(matrix, "all").total_cost
    torch.testing.assert_close(exact.total_cost, logs, rtol=1e-13, atol=n * 2**-50)
    for result in (monge, exact):
        for k in {1, (n + 1) // 2, n}:
            path = result.steps[k].tolist()
            assert len(path) == k + 1
            product = torch.ones((), dtype=torch.float64)
            for a, b in itertools.pairwise(path):
                product = product * (cost.v[a] + cost.h[b]) / (cost.v[b] + cost.h[b])
            assert product.log() == result.total_cost[k - 1]


@pytest.mark.parametrize("nodes", [2049, 8300, 20000])
def test_factored_monge_over_several_trees(nodes: int) -> None:
    """Bisection above the trees, and layers that threads share."""
    cost = factored_cost(nodes, nodes)
    monge = optimal_trajectory(cost, [2, 3, 6])
    exact = optimal_trajectory(cost, [2, 3, 6], method="exact")
    torch.testing.assert_close(monge.total_cost, exact.total_cost, rtol=0, atol=1e-14)


def test_uncertified_factored_cost_takes_the_exact_method() -> None:
    cost = factored_cost(60, 0)
    noisy = FactoredCost(cost.v, cost.h * (1 + 0.5 * torch.rand(61, generator=torch.Generator().manual_seed(0))))
    result = optimal_trajectory(noisy, "all")
    assert result.method == "exact"
    logs = optimal_trajectory(noisy.matrix(), "all").total_cost
    torch.testing.assert_close(result.total_cost, logs, rtol=1e-13, atol=1e-13)
    with pytest.raises(ValueError, match="h decreases"):
        optimal_trajectory(noisy, 3, method="monge")


def test_factored_batch_and_unused_entries() -> None:
    costs = [factored_cost(90, seed) for seed in range(3)]
    v, h = torch.stack([c.v for c in costs]), torch.stack([c.h for c in costs])
    h[:, 0] = float("nan")
    result = optimal_trajectory(FactoredCost(v, h), 8)
    assert result.total_cost.dtype == torch.float64
    for i, cost in enumerate(costs):
        alone = optimal_trajectory(cost, 8)
        assert torch.equal(result.steps[i], alone.steps)
        assert result.total_cost[i] == alone.total_cost
    # In nodes neither v_0 nor h_0 nor h_1 takes part.
    v[:, 0], h[:, 1] = -100, float("nan")
    assert optimal_trajectory(FactoredCost(v, h), 8, convention="nodes").steps.shape == (3, 8)


def test_constant_h_telescopes() -> None:
    """A Gaussian's cost: log (v_0 + h)/(v_N + h) along every path."""
    v = torch.cat([torch.zeros(1), torch.logspace(-4, 6, 500)]).double()
    result = optimal_trajectory(FactoredCost(v, torch.full_like(v, 0.25)), "all")
    expected = torch.log((v[0] + 0.25) / (v[-1] + 0.25))
    torch.testing.assert_close(result.total_cost, expected.expand(500), rtol=1e-14, atol=1e-13)


@pytest.mark.parametrize("bad", [float("nan"), -INF])
@pytest.mark.parametrize("n", [5, 300])
def test_invalid_entries_are_refused(bad: float, n: int) -> None:
    cost = random_cost(n, 0, batch=(2,))
    cost[1, n - 2, n - 1] = bad
    with pytest.raises(ValueError, match=r"problem 1 of 2: cost has NaN or -inf"):
        optimal_trajectory(cost, 3)


def test_errors() -> None:
    cost = random_cost(6, 0)
    for k in (0, 7, -1):
        with pytest.raises(ValueError, match="num_steps must be from 1 to 6"):
            optimal_trajectory(cost, k)
    with pytest.raises(ValueError, match="num_steps must be from 2 to 6"):
        optimal_trajectory(cost, [1], convention="nodes")
    with pytest.raises(ValueError, match="empty"):
        optimal_trajectory(cost, [])
    with pytest.raises(ValueError, match="'all'"):
        optimal_trajectory(cost, "every")
    for k in (True, [2.0]):
        with pytest.raises(TypeError, match="num_steps must be an int"):
            optimal_trajectory(cost, k)
    with pytest.raises(ValueError, match="'monge' needs a certified cost"):
        optimal_trajectory(cost, 2, method="monge")
    with pytest.raises(ValueError, match="method"):
        optimal_trajectory(cost, 2, method="fast")
    with pytest.raises(ValueError, match="convention"):
        optimal_trajectory(cost, 2, convention="both")
    with pytest.raises(TypeError, match="float32 or float64"):
        optimal_trajectory(cost.half(), 2)
    with pytest.raises(TypeError, match="FactoredCost"):
        optimal_trajectory([[0.0]], 2)
    for wrong in (cost[:5], cost[0], cost[:1, :1]):
        with pytest.raises(ValueError, match="cost must have"):
            optimal_trajectory(wrong, 2)
    blocked = cost.clone()
    blocked[:, 6] = INF
    with pytest.raises(ValueError, match="no path of num_steps = 2"):
        optimal_trajectory(blocked, 2)
    with pytest.raises(ValueError, match=r"problem 1 of 2"):
        optimal_trajectory(torch.stack([cost, blocked]), [2, 3])
    assert optimal_trajectory(blocked, "all").total_cost.tolist() == [INF] * 6


def test_factored_errors() -> None:
    v = torch.linspace(0, 1, 8)
    with pytest.raises(ValueError, match="h must be like v"):
        FactoredCost(v, v[1:])
    with pytest.raises(ValueError, match="N at least 1"):
        FactoredCost(v[:1], v[:1])
    with pytest.raises(TypeError, match="h must be float32"):
        FactoredCost(v, v.half())
    with pytest.raises(ValueError, match="v decreases"):
        optimal_trajectory(FactoredCost(v.flip(0), 1 + v), 2)
    for bad in (torch.zeros(8), v - 0.5, v * float("nan"), v + INF):
        with pytest.raises(ValueError, match="not positive and finite"):
            optimal_trajectory(FactoredCost(v, bad), 2)
    with pytest.raises(ValueError, match="range"):
        optimal_trajectory(FactoredCost(v.double() * 1e300, 1e-300 + v.double()), 2)
    assert "inf" not in str(optimal_trajectory(FactoredCost(1 + v, v - 0.5), 2).total_cost)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_backend_gives_the_same_bits(dtype: torch.dtype, backend: str, device: str) -> None:
    cost = random_cost(70, 8, batch=(2,), dtype=dtype)
    cost[0, :, 30:33], cost[1, 5:9] = INF, INF
    ties = tied_cost(40, 3)
    factored = [factored_cost(75, seed, 0.5) for seed in range(2)]
    vectors = FactoredCost(torch.stack([c.v for c in factored]), torch.stack([c.h for c in factored]))
    for convention in ("edges", "nodes"):
        for problem in (cost, ties, vectors):
            if isinstance(problem, FactoredCost):
                on_device = FactoredCost(problem.v.to(device), problem.h.to(device))
            else:
                on_device = problem.to(device)
            counts = [2, 5] if problem is not ties else [7]
            result = optimal_trajectory(on_device, counts, convention=convention, method="exact")
            with fastgen.use_backend("reference"), one_thread():
                expected = optimal_trajectory(problem, counts, convention=convention, method="exact")
            assert result.total_cost.device.type == torch.device(device).type
            assert torch.equal(result.total_cost.cpu(), expected.total_cost)
            for k in counts:
                assert torch.equal(result.steps[k].cpu(), expected.steps[k])
    with pytest.raises(ValueError, match="NaN"):
        optimal_trajectory(cost.to(device) * float("nan"), 3)
    with pytest.raises(ValueError, match="certified"):
        optimal_trajectory(cost.to(device), 3, method="monge")
    certified = optimal_trajectory(monge_cost(40, 1).to(device, dtype), "all", method="monge")
    assert torch.equal(certified.total_cost, optimal_trajectory(monge_cost(40, 1).to(device, dtype), "all").total_cost)


def test_lookup_of_a_path_that_was_not_asked_for() -> None:
    result = optimal_trajectory(random_cost(9, 0), [2, 4])
    with pytest.raises(KeyError):
        result.steps[3]
    assert dict(result.steps).keys() == {2, 4}


def test_reference_backend_and_reference_function() -> None:
    cost = random_cost(30, 5, batch=(2,))
    native = optimal_trajectory(cost, [3, 30])
    steps, totals = reference.optimal_trajectory(cost, [3, 30])
    factored = factored_cost(30, 1)
    exact = optimal_trajectory(factored, 4, method="exact")
    with fastgen.use_backend("reference"):
        plain, plain_factored = optimal_trajectory(cost, [3, 30]), optimal_trajectory(factored, 4)
        with pytest.raises(ValueError, match="NaN"):
            optimal_trajectory(cost * float("nan"), 3)
        with pytest.raises(ValueError, match="certified"):
            optimal_trajectory(cost, 3, method="monge")
    assert torch.equal(plain_factored.steps, exact.steps)
    assert torch.equal(plain_factored.total_cost, exact.total_cost)
    assert torch.equal(native.total_cost, totals)
    assert torch.equal(native.total_cost, plain.total_cost)
    for k in (3, 30):
        assert torch.equal(native.steps[k], steps[k])
        assert torch.equal(native.steps[k], plain.steps[k])


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 12), seed=st.integers(0, 2**31), first=st.integers(0, 1), kind=st.integers(0, 4))
def test_inspection_agrees_with_the_reference(n: int, seed: int, first: int, kind: int) -> None:
    cost = [monge_cost(n, seed), monge_cost(n, seed) / 3, random_cost(n, seed), tied_cost(n, seed)][kind % 4][None]
    if kind == 4:
        cost = monge_cost(n, seed)[None]
        cost[0, seed % (n + 1), n] = [float("nan"), INF, -INF][seed % 3]
    v, h = cost[:, 0], cost[:, -1]
    for backend in ("native", "triton"):
        if missing("trajectory_inspect", backend, "cpu") is None:
            inspect = operators["trajectory_inspect"].of(backend)
            for costs, other in ((cost, None), (v, h)):
                problem = {"cost": costs, "h": other, "first": first, "certify": True}
                got, expected = (f(**problem) for f in (inspect, sweep.trajectory_inspect))
                assert got.tolist() == expected.tolist()


DIGEST = """
import hashlib, sys, torch
sys.path.insert(0, "tests")
from fastgen import build_info, optimal_trajectory
from test_trajectory import factored_cost, monge_cost, random_cost
digest = hashlib.sha256()
large = factored_cost(9000, 1)
for cost, steps, method in [
    (random_cost(300, 0), "all", "exact"), (random_cost(300, 0).float(), "all", "exact"),
    (random_cost(150, 1, batch=(5,)), "all", "exact"), (monge_cost(200, 2), "all", "monge"),
    (monge_cost(200, 2).float(), "all", "monge"), (factored_cost(300, 3), "all", "monge"),
    (factored_cost(300, 3), "all", "exact"), (large, [2, 5], "monge"),
    (factored_cost(3000, 1), [2, 3], "exact"),
]:
    result = optimal_trajectory(cost, steps, method=method)
    digest.update(result.total_cost.numpy().tobytes())
    for k in list(result.steps)[::20]:
        digest.update(result.steps[k].numpy().tobytes())
print(build_info()["_C"]["isa_used"], digest.hexdigest())
"""


def test_same_bits_at_every_instruction_set_and_thread_count() -> None:
    runs = [("avx512", "4"), ("avx2", "1"), ("baseline", "2")]
    outputs = []
    for level, threads in runs:
        env = {**os.environ, "FASTGEN_CPU_CAPABILITY": level, "OMP_NUM_THREADS": threads}
        done = subprocess.run([sys.executable, "-c", DIGEST], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.split())
    assert len({digest for _, digest in outputs}) == 1
    assert outputs[-1][0] == "baseline"


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("counts", [[2, 5], "all"], ids=str)
def test_several_paths_are_pickled_and_copied(counts, factored, backend, device, tmp_path):
    v = torch.rand(2, 9, dtype=torch.float64, device=device).cumsum(1)
    cost = fastgen.FactoredCost(v, 0.1 + v) if factored else torch.rand(2, 9, 9, device=device)
    result = optimal_trajectory(cost, counts)
    torch.save(result, tmp_path / "result.pt")
    loaded = torch.load(tmp_path / "result.pt", weights_only=False)
    for other in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result), loaded):
        assert list(other.steps) == list(result.steps)
        assert torch.equal(other.total_cost, result.total_cost)
        assert all(torch.equal(other.steps[k], result.steps[k]) for k in result.steps)
    with pytest.raises(KeyError):
        loaded.steps[99]
