"""Analytic-DPM: moments against float64; variances, trajectories and bounds against the paper's formulas."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastgen
from fastgen import NoiseSchedule, ScoreMoments
from fastgen.analytic_dpm import operators

SCHEDULES = {
    "linear": NoiseSchedule.linear(1000),
    "cosine": NoiseSchedule.cosine(1000),
    "short": NoiseSchedule.linear(20, 1e-3, 0.4),
}


def alphas(schedule):
    """ᾱ of nodes, as a list: the formulas below use Python's numbers."""
    return [1.0, *schedule.alphas_cumprod.tolist()]


def gaussian_moments(schedule, variances):
    """ms_eps of the exact score of N(0, diag(variances)): the mean over dimensions of β̄/(ᾱ λ + β̄)."""
    a = torch.tensor(alphas(schedule), dtype=torch.float64)[:, None]
    return ((1 - a) / (a * torch.as_tensor(variances, dtype=torch.float64) + 1 - a)).mean(1)


def spectrum(size=64, decay=2.0):
    """Variances of an image's frequencies; their mean is about that of digits in [-1, 1]."""
    return 0.6 * torch.arange(1, size + 1, dtype=torch.float64) ** -decay


# -- Variances


def paper_variance(a, gamma, s, t, lambda2):
    """Theorem 1 as printed: λ² + (√(β̄_t/α_{t|s}) - √(β̄_s - λ²))² (1 - β̄_t Γ_t)."""
    alpha_ts = a[t] / a[s]
    bracket = math.sqrt((1 - a[t]) / alpha_ts) - math.sqrt(max(1 - a[s] - lambda2, 0.0))
    return lambda2 + bracket**2 * (1 - (1 - a[t]) * gamma)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_variances_are_theorem_1(name, eta):
    schedule = SCHEDULES[name]
    a, last = alphas(schedule), schedule.num_timesteps
    ms = gaussian_moments(schedule, spectrum())
    generator = torch.Generator().manual_seed(1)
    t = torch.cat([torch.tensor([1, 2, last]), torch.randint(2, last + 1, (60,), generator=generator)])
    s = torch.cat([torch.tensor([0, 1, last - 1]), (torch.rand(60, generator=generator) * t[3:]).long()])
    expected = []
    for i, j in zip(s.tolist(), t.tolist(), strict=True):
        beta_tilde = (1 - a[j] / a[i]) * (1 - a[i]) / (1 - a[j])
        expected.append(paper_variance(a, ms[j].item() / (1 - a[j]), i, j, eta**2 * beta_tilde))
    actual = fastgen.reverse_variance(schedule, ms, s, t, eta=eta, data_range=None)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-12)
    # A number for numbers, and shapes broadcast.
    assert fastgen.reverse_variance(schedule, ms, 0, 1, eta=eta, data_range=None).item() == actual[0].item()
    assert fastgen.reverse_variance(schedule, ms, torch.tensor([[0], [1]]), torch.tensor([2, 3, 4])).shape == (2, 3)


def test_the_ddpm_form_is_eta_1():
    """FORMULA of DDPM: β̃ + ᾱ_s β_{t|s}²/β̄_t² cov_t."""
    schedule = SCHEDULES["cosine"]
    a = alphas(schedule)
    ms = gaussian_moments(schedule, spectrum())
    for s, t in ((0, 5), (3, 4), (100, 900), (998, 1000)):
        beta = 1 - a[t] / a[s]
        cov = (1 - a[t]) / a[t] * (1 - ms[t].item())
        expected = beta * (1 - a[s]) / (1 - a[t]) + a[s] * (beta / (1 - a[t])) ** 2 * cov
        assert fastgen.reverse_variance(schedule, ms, s, t).item() == pytest.approx(expected, rel=1e-9)


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(SCHEDULES)),
    st.floats(0, 1),
    st.floats(0, 3),
    st.floats(0.01, 10),
    st.randoms(use_true_random=False),
)
def test_variances_keep_theorem_2s_bounds(name, eta, noisy, radius, random):
    """Whatever Monte-Carlo noise made of the moments: also where they exceed 1."""
    schedule = SCHEDULES[name]
    a = alphas(schedule)
    t = random.randint(1, schedule.num_timesteps)
    s = random.randint(0, t - 1)
    ms = torch.full((len(a),), noisy)
    actual = fastgen.reverse_variance(schedule, ms, s, t, eta=eta, data_range=(-radius, radius)).item()
    low = eta**2 * (1 - a[t] / a[s]) * (1 - a[s]) / (1 - a[t])
    high = paper_variance(a, 0.0, s, t, low)
    gain = math.sqrt(a[s]) - math.sqrt((1 - a[s] - low) * a[t] / (1 - a[t]))
    assert low * (1 - 1e-12) <= actual <= min(high, low + gain**2 * radius**2) * (1 + 1e-9) + 1e-15
    if noisy >= 1:
        assert actual == pytest.approx(low, rel=1e-12)


def test_for_gaussian_data_the_variance_is_the_true_posteriors():
    """x0 ~ N(μ, λ) has a Gaussian x_s given x_t, by Bayes' rule on the chain. And Monte-Carlo moments of the exact
    score are right to their standard error."""
    schedule, mean, variance = SCHEDULES["short"], 0.3, 0.25
    a = alphas(schedule)
    ms = gaussian_moments(schedule, [variance])
    for s, t in itertools.combinations(range(21), 2):
        prior, scale, noise = a[s] * variance + 1 - a[s], a[t] / a[s], 1 - a[t] / a[s]
        posterior = 1 / (1 / prior + scale / noise)
        assert fastgen.reverse_variance(schedule, ms, s, t).item() == pytest.approx(posterior, rel=1e-10)
    generator, moments = torch.Generator().manual_seed(0), ScoreMoments(20)
    t = torch.arange(20).repeat_interleave(400)
    x0 = mean + variance**0.5 * torch.randn(len(t), 16, generator=generator)
    noise = torch.randn(x0.shape, generator=generator)
    alpha, sigma = schedule.alpha_t(t)[:, None], schedule.sigma_t(t)[:, None]
    x_t = alpha * x0 + sigma * noise
    moments.update(t, sigma * (x_t - alpha * mean) / (alpha**2 * variance + sigma**2))
    off = (moments.ms_eps - ms)[1:] / moments.standard_error[1:]
    assert off.abs().max() < 4
    assert 0.5 < off.std() < 1.6  # the standard errors are neither too large nor too small
    # The residual's moments are what is left: E(ε - ε̂)² = 1 - E ε̂².
    errors = ScoreMoments(20)
    errors.update(t, noise - sigma * (x_t - alpha * mean) / (alpha**2 * variance + sigma**2))
    assert ((errors.ms_eps - (1 - ms))[1:] / errors.standard_error[1:]).abs().max() < 4


def test_pixel_variances():
    schedule = SCHEDULES["short"]
    ms = gaussian_moments(schedule, spectrum())
    s, t = torch.tensor([0, 3, 11]), torch.tensor([1, 4, 20])
    for eta in (0.0, 1.0):
        whole = fastgen.reverse_variance(schedule, ms, s, t, eta=eta)[:, None, None].expand(3, 2, 4)
        head = (1 - ms[t])[:, None, None].expand(3, 2, 4)
        torch.testing.assert_close(fastgen.pixel_reverse_variance(schedule, head, s, t, eta=eta), whole)
        pred = torch.rand(3, 2, 4, dtype=torch.float64) - 0.5
        sn = fastgen.pixel_reverse_variance(schedule, head + pred**2, s, t, pred=pred, eta=eta)
        torch.testing.assert_close(sn, whole)
    # Pixel by pixel: below nothing and beyond the range of the data.
    head = torch.tensor([[-1.0, 0.0, 0.5, 100.0]])
    by_pixel = fastgen.pixel_reverse_variance(schedule, head, 3, 9)
    low = fastgen.pixel_reverse_variance(schedule, torch.zeros(1, 4), 3, 9)
    assert by_pixel.dtype == torch.float32
    assert torch.equal(by_pixel[:, :2], low[:, :2])
    assert low[0, 0] < by_pixel[0, 2] < by_pixel[0, 3]
    a = alphas(schedule)
    gain = math.sqrt(a[3]) * (1 - a[9] / a[3]) / (1 - a[9])
    assert by_pixel[0, 3].item() == pytest.approx(low[0, 3].item() + gain**2, rel=1e-5)
    assert fastgen.pixel_reverse_variance(schedule, head.bfloat16(), 3, 9).dtype == torch.float32


# -- Regularised moments


def test_isotonic_regression_is_the_best_monotone_fit():
    generator = np.random.default_rng(0)
    y, w = generator.normal(size=200).cumsum() / 5 + generator.normal(size=200), generator.uniform(0.1, 3, 200)
    fit = operators.isotonic(y, w)
    assert (np.diff(fit) >= 0).all()
    # Karush-Kuhn-Tucker: partial sums of the residuals are >= 0, and 0 where the fit steps up.
    partial = np.cumsum(w * (y - fit))
    steps = np.append(np.diff(fit) > 0, True)
    assert partial.min() > -1e-9
    np.testing.assert_allclose(partial[steps], 0, atol=1e-9)
    np.testing.assert_array_equal(operators.isotonic(np.sort(y), w), np.sort(y))
    sklearn = pytest.importorskip("sklearn.isotonic")
    np.testing.assert_allclose(fit, sklearn.isotonic_regression(y, sample_weight=w), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_exact_moments_are_left_alone_and_noisy_ones_become_certified(name):
    schedule = SCHEDULES[name]
    ms = gaussian_moments(schedule, spectrum())
    kept = fastgen.regularize_moments(schedule, ms)
    torch.testing.assert_close(kept, ms, rtol=1e-9, atol=1e-12)
    noisy = ms * (1 + 0.1 * torch.randn(len(ms), generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    for data_range in ((-1.0, 1.0), (0.0, 1.0), None):
        repaired = fastgen.regularize_moments(schedule, noisy, data_range=data_range)
        cost = fastgen.trajectory_cost(schedule, repaired)
        assert repaired[0] == 0
        assert (repaired[1:] <= 1).all()
        h = cost.h[1:]
        assert (h.diff() >= 0).all()
        if data_range is not None:
            assert h.max() <= ((data_range[1] - data_range[0]) / 2) ** 2 * (1 + 1e-6)
    again = fastgen.regularize_moments(schedule, repaired, data_range=None)
    torch.testing.assert_close(again, repaired, rtol=1e-9, atol=1e-12)


# -- Trajectories


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_cost_is_the_papers(name):
    schedule = SCHEDULES[name]
    a, ms = alphas(schedule), gaussian_moments(schedule, spectrum())
    cost = fastgen.trajectory_cost(schedule, ms).matrix()
    for s, t in ((0, 1), (0, 9), (3, 4), (5, 19), (17, 20), (schedule.num_timesteps - 1, schedule.num_timesteps)):
        expected = math.log(1 - (1 - a[t] / a[s]) * ms[t].item() / (1 - a[t]))
        assert cost[s, t].item() == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("convention", ["nodes", "edges"])
def test_trajectories_are_the_best_by_brute_force(convention):
    schedule = NoiseSchedule.linear(10, 0.01, 0.5)
    a, ms = alphas(schedule), gaussian_moments(schedule, spectrum())
    first = 1 if convention == "nodes" else 0

    def edge(s, t):
        return math.log(1 - (1 - a[t] / a[s]) * ms[t].item() / (1 - a[t]))

    result = fastgen.analytic_trajectory(schedule, ms, "all", convention=convention)
    for k, total in zip(result.steps, result.total_cost.tolist(), strict=True):
        edges = k - first
        best = min(
            (sum(edge(s, t) for s, t in itertools.pairwise((first, *inner, 10))), (first, *inner, 10))
            for inner in itertools.combinations(range(first + 1, 10), edges - 1)
        )
        assert total == pytest.approx(best[0], rel=1e-9)
        assert result.steps[k].tolist() == list(best[1])
    single = fastgen.analytic_trajectory(schedule, ms, 4, convention=convention)
    assert torch.equal(single.steps, result.steps[4])


def test_noisy_moments_give_certified_trajectories():
    schedule = SCHEDULES["linear"]
    ms = gaussian_moments(schedule, spectrum())
    ms = ms * (1 + 0.05 * torch.randn(len(ms), generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    result = fastgen.analytic_trajectory(schedule, ms, 25)
    assert result.method == "monge"
    assert len(result.steps) == 25
    assert result.steps[[0, -1]].tolist() == [1, 1000]
    ms[1] = 1.3
    with pytest.raises(ValueError, match="convention='edges': gather more samples"):
        fastgen.analytic_trajectory(schedule, ms, 25, convention="edges")


# -- The bound


def gaussian_kl(m1, v1, m2, v2):
    return 0.5 * (math.log(v2 / v1) + (v1 + (m1 - m2) ** 2) / v2 - 1)


@pytest.mark.parametrize("variance", ["analytic", "beta", "beta_tilde"])
def test_bound_is_the_kl_of_the_chain(variance):
    """Data ±1 and the exact score: every KL of the definition, by quadrature over x_t and both values of x0."""
    schedule, nodes = NoiseSchedule.linear(12, 0.02, 0.4), [2, 3, 7, 12]
    a = alphas(schedule)
    x = torch.linspace(-9, 9, 20_001, dtype=torch.float64)

    def at(t):
        """Weights of x_t's values given x0 = 1 (the other half is its mirror image), and the posterior mean of x0."""
        density = (-((x - math.sqrt(a[t])) ** 2) / (2 * (1 - a[t]))).exp()
        return density / density.sum(), torch.tanh(x * math.sqrt(a[t]) / (1 - a[t]))

    ms, mse = torch.zeros(13, dtype=torch.float64), torch.zeros(13, dtype=torch.float64)
    for t in range(1, 13):
        weight, x0 = at(t)
        eps, truth = (x - math.sqrt(a[t]) * x0), (x - math.sqrt(a[t]))
        ms[t] = (weight * eps.square()).sum() / (1 - a[t])
        mse[t] = (weight * (eps - truth).square()).sum() / (1 - a[t])
    torch.testing.assert_close(1 - ms, torch.cat([torch.ones(1, dtype=torch.float64), mse[1:]]))
    expected = []
    for s, t in itertools.pairwise(nodes):
        beta = 1 - a[t] / a[s]
        tilde = beta * (1 - a[s]) / (1 - a[t])
        of_x0, of_xt = math.sqrt(a[s]) * beta / (1 - a[t]), math.sqrt(a[t] / a[s]) * (1 - a[s]) / (1 - a[t])
        weight, x0 = at(t)
        true, model = of_x0 + of_xt * x, of_x0 * x0 + of_xt * x
        sigma2 = {"beta": beta, "beta_tilde": tilde}.get(variance)
        if sigma2 is None:
            sigma2 = paper_variance(a, ms[t].item() / (1 - a[t]), s, t, tilde)
        kl = 0.5 * (math.log(sigma2 / tilde) + (tilde + (true - model).square()) / sigma2 - 1)
        expected.append((weight * kl).sum().item())
    bound = fastgen.variational_bound(schedule, ms, torch.tensor(nodes), variance=variance)
    torch.testing.assert_close(bound.steps, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=1e-12)
    weight, x0 = at(2)
    error = (weight * (1 - x0).square()).sum().item()
    decoder = min(
        (weight * 0.5 * (math.log(2 * math.pi * c * error) + (1 - x0).square() / (c * error))).sum().item()
        for c in (0.9, 1.0, 1.1)
    )
    assert bound.reconstruction.item() == pytest.approx(decoder, rel=1e-7)
    assert bound.prior.item() == pytest.approx(gaussian_kl(math.sqrt(a[12]), 1 - a[12], 0, 1), rel=1e-9)
    assert bound.total.item() == pytest.approx(sum(expected) + decoder + bound.prior.item(), rel=1e-7)
    # With two levels, -1 and 1, two apart: at most the entropy's ln 2 may be gained, and the bound holds.
    discrete = fastgen.variational_bound(schedule, ms, torch.tensor(nodes), variance=variance, levels=2)
    assert discrete.total.item() >= math.log(2)
    given_mse = fastgen.variational_bound(schedule, ms, torch.tensor(nodes), variance=variance, mse_eps=1.5 * mse)
    assert given_mse.total > bound.total
    assert torch.equal(
        fastgen.variational_bound(schedule, ms, torch.tensor([0, *nodes]), variance=variance).total, bound.total
    )


def test_bound_of_quantised_data_by_integration():
    """The reconstruction term is Jensen's bound on the decoder's probability of a level's cell."""
    schedule, levels = NoiseSchedule.linear(4, 0.001, 0.5), 17
    a = alphas(schedule)
    width, residual = 2 / (levels - 1), (1 - a[1]) / a[1] * 0.9
    ms = torch.full((5,), 0.1, dtype=torch.float64)
    bound = fastgen.variational_bound(schedule, ms, torch.tensor([1, 4]), levels=levels)
    sigma2 = residual + width**2 / 12
    error = torch.tensor([-1.0, 1.0], dtype=torch.float64) * math.sqrt(residual)
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000 * width - width / 2
    log_density = -0.5 * (math.log(2 * math.pi * sigma2) + (error[:, None] + u).square() / sigma2)
    assert bound.reconstruction.item() == pytest.approx((-log_density.mean() - math.log(width)).item(), rel=1e-6)
    normal = torch.distributions.Normal(0.0, math.sqrt(sigma2))
    cell = normal.cdf(error + width / 2) - normal.cdf(error - width / 2)
    assert bound.reconstruction.item() >= -cell.log().mean().item()


def test_optimal_variances_and_trajectories_win_the_bound():
    schedule = SCHEDULES["linear"]
    ms = gaussian_moments(schedule, spectrum())
    optimal = fastgen.analytic_trajectory(schedule, ms, [10, 50])
    for k in (10, 50):
        even = torch.linspace(1, 1000, k).round().long()
        best, analytic, beta, tilde = (
            fastgen.variational_bound(schedule, ms, nodes, variance=variance).total
            for nodes, variance in (
                (optimal.steps[k], "analytic"),
                (even, "analytic"),
                (even, "beta"),
                (even, "beta_tilde"),
            )
        )
        assert best < analytic < beta < tilde
        # The bound's trajectory-dependent part is half the solver's cost.
        v = (1 - schedule.alphas_cumprod) / schedule.alphas_cumprod
        steps = fastgen.variational_bound(schedule, ms, optimal.steps[k]).steps.sum().item()
        constant = 0.5 * (v[-1].log() - v[0].log()).item()
        cost = optimal.total_cost[[10, 50].index(k)].item()
        assert steps == pytest.approx(0.5 * cost + constant, rel=1e-9)


# -- Errors

S = SCHEDULES["short"]
MS = gaussian_moments(S, [0.25])
P = torch.zeros(2, 3)
T = torch.zeros(2, dtype=torch.long)


def without(node):
    ms = MS.clone()
    ms[node] = math.nan
    return ms


BAD_CALLS = {
    "num_timesteps must be an int": (TypeError, lambda: ScoreMoments(2.5)),
    "num_timesteps must be at least 1": (ValueError, lambda: ScoreMoments(0)),
    "pred must be a torch.Tensor": (TypeError, lambda: ScoreMoments(3).update(T, [1.0])),
    "pred must be float32": (TypeError, lambda: ScoreMoments(3).update(T, P.int())),
    "t must hold integers": (TypeError, lambda: ScoreMoments(3).update(T.float(), P)),
    r"t must have shape \[2\]": (ValueError, lambda: ScoreMoments(3).update(T[:1], P)),
    "t is on meta": (ValueError, lambda: ScoreMoments(3).update(T.to("meta"), P)),
    "give ScoreMoments a device": (ValueError, lambda: ScoreMoments(3, device="meta").update(T, P)),
    "schedule must be a NoiseSchedule": (TypeError, lambda: fastgen.trajectory_cost(0.1, MS)),
    "schedule must be discrete": (ValueError, lambda: fastgen.trajectory_cost(NoiseSchedule.edm(), MS)),
    "schedule has no noise": (
        ValueError,
        lambda: fastgen.trajectory_cost(NoiseSchedule.from_alphas_cumprod(torch.tensor([1.0, 0.5])), MS[:3]),
    ),
    "ms_eps must be a torch.Tensor": (TypeError, lambda: fastgen.trajectory_cost(S, 0.5)),
    "ms_eps must be float32": (TypeError, lambda: fastgen.regularize_moments(S, MS.half())),
    r"ms_eps must have shape \[21\]": (ValueError, lambda: fastgen.regularize_moments(S, MS[1:])),
    r"got nan at node 7 \(1 in all\)": (ValueError, lambda: fastgen.analytic_trajectory(S, without(7), 5)),
    "positive and finite, got 0 at node 1": (ValueError, lambda: fastgen.trajectory_cost(S, 0 * MS)),
    "non-negative and finite, got -": (ValueError, lambda: fastgen.variational_bound(S, -MS, torch.tensor([1, 20]))),
    "ms_eps is not finite at t = 7": (
        ValueError,
        lambda: fastgen.reverse_variance(S, without(7), 2, torch.tensor([6, 7])),
    ),
    "s must hold integers": (TypeError, lambda: fastgen.reverse_variance(S, MS, torch.zeros(1), 3)),
    "t must be an int": (TypeError, lambda: fastgen.reverse_variance(S, MS, 0, 3.0)),
    "0 <= s < t <= 20": (ValueError, lambda: fastgen.reverse_variance(S, MS, 3, torch.tensor([4, 3]))),
    r"s and t have shapes \[2\] and \[3\]": (
        ValueError,
        lambda: fastgen.reverse_variance(S, MS, T, torch.tensor([4, 5, 6])),
    ),
    "num_steps must be an int": (TypeError, lambda: fastgen.analytic_trajectory(S, MS, 3.0)),
    "eta must be <= 1": (ValueError, lambda: fastgen.reverse_variance(S, MS, 3, 4, eta=1.5)),
    "eta must be >= 0": (ValueError, lambda: fastgen.reverse_variance(S, MS, 3, 4, eta=-0.5)),
    r"data_range must be \(a, b\) with": (ValueError, lambda: fastgen.reverse_variance(S, MS, 3, 4, data_range=(1, 1))),
    "data_range must be a pair": (TypeError, lambda: fastgen.regularize_moments(S, MS, data_range=2.0)),
    "head must be float32": (TypeError, lambda: fastgen.pixel_reverse_variance(S, P.int(), 1, 2)),
    "pred has shape": (ValueError, lambda: fastgen.pixel_reverse_variance(S, P, 1, 2, pred=P[:1])),
    r"s and t must be ints or have shape \[2\]": (
        ValueError,
        lambda: fastgen.pixel_reverse_variance(S, P, 0, T[:1] + 2),
    ),
    "variance must be one of": (ValueError, lambda: fastgen.variational_bound(S, MS, T[:1] + 1, variance="none")),
    "mse_eps must have shape": (ValueError, lambda: fastgen.variational_bound(S, MS, T[:1] + 1, mse_eps=MS[1:])),
    "steps must hold integers": (TypeError, lambda: fastgen.variational_bound(S, MS, torch.ones(2))),
    r"steps must have shape \[K\]": (ValueError, lambda: fastgen.variational_bound(S, MS, torch.tensor([0]))),
    "steps must increase and lie between 1 and 20": (
        ValueError,
        lambda: fastgen.variational_bound(S, MS, torch.tensor([1, 5, 5])),
    ),
    "data_range must be a pair .*got None": (
        TypeError,
        lambda: fastgen.variational_bound(S, MS, torch.tensor([1, 20]), data_range=None),
    ),
    "levels must be at least 2": (
        ValueError,
        lambda: fastgen.variational_bound(S, MS, torch.tensor([1, 20]), levels=1),
    ),
    "convention must be one of": (ValueError, lambda: fastgen.analytic_trajectory(S, MS, 3, convention="steps")),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_errors_name_the_argument(message):
    error, call = BAD_CALLS[message]
    with pytest.raises(error, match=message):
        call()


def test_a_dtensor_is_refused_with_advice(monkeypatch):
    monkeypatch.setattr(fastgen.core.distributed, "is_dtensor", lambda t: True)
    with pytest.raises(TypeError, match=r"pass pred.full_tensor\(\)"):
        ScoreMoments(3).update(T, P)
