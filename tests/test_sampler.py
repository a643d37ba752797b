"""The sampling loop: against loops written out, against what is known of Gaussian data, and its errors."""

import itertools
import math
from functools import partial

import pytest
import torch
from syncs import Syncs

from fastgen import NoiseSchedule, analytic_trajectory, optimal_trajectory, reverse_variance, sample

N = 50
SCHEDULE = NoiseSchedule.linear(N, 0.002, 0.3)
MEAN, STD = 0.3, 0.4


def exact_noise(x, t, schedule=SCHEDULE, mean=MEAN):
    """The best noise prediction for data of N(MEAN, STD²) in every pixel."""
    alpha, sigma = (k(t).to(x.dtype).view(-1, *[1] * (x.dim() - 1)) for k in (schedule.alpha_t, schedule.sigma_t))
    return sigma * (x - alpha * mean) / (alpha**2 * STD**2 + sigma**2)


def exact_moments():
    bar = SCHEDULE.alphas_cumprod
    return torch.cat([torch.zeros(1), (1 - bar) / (bar * STD**2 + 1 - bar)])


def start(rows=4, seed=0, dtype=torch.float64):
    return torch.randn(rows, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=dtype)


run = partial(sample, exact_noise, SCHEDULE, progress=False)


@pytest.mark.parametrize("method", ["ddpm", "ddim", "analytic-ddpm", "analytic-ddim"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_is_the_loop_written_out(method, eta):
    ms, nodes = exact_moments(), [1, 13, 26, 38, 50]
    options = {"ms_eps": ms} if "analytic" in method else {}
    drawn = run(start(), method=method, steps=5, eta=eta, generator=torch.Generator().manual_seed(1), **options)
    gen, x, bar = torch.Generator().manual_seed(1), start(), torch.cat([torch.ones(1), SCHEDULE.alphas_cumprod])
    for s, t in reversed(list(itertools.pairwise([0, *nodes]))):
        eps = exact_noise(x, torch.full((4,), t - 1))
        x0 = ((x - (1 - bar[t]).sqrt() * eps) / bar[t].sqrt()).clamp(-1, 1)
        floor = (1.0 if "ddpm" in method else eta) ** 2 * (1 - bar[t] / bar[s]) * (1 - bar[s]) / (1 - bar[t])
        if "ddpm" in method:
            a = bar[s].sqrt() * (1 - bar[t] / bar[s]) / (1 - bar[t])
            mean = a * x0 + (bar[t] / bar[s]).sqrt() * (1 - bar[s]) / (1 - bar[t]) * x
        else:
            # With the analytic variance too, λ² is what the mean leaves room for.
            mean = bar[s].sqrt() * x0 + (1 - bar[s] - floor).clamp(min=0).sqrt() * eps
        variance = floor
        if "analytic" in method and s > 0:
            variance = reverse_variance(SCHEDULE, ms, s, t, eta=1.0 if "ddpm" in method else eta)
        x = mean
        if s > 0 and variance > 0:
            x = x + variance.sqrt() * torch.randn(x.shape, generator=gen, dtype=x.dtype)
    torch.testing.assert_close(drawn, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_analytic_variances_keep_the_spread_of_gaussian_data(steps):
    """Each step then draws from the true q(x_s | x_t); β̃ falls short of the spread at few steps."""
    options = {"steps": steps, "data_range": None}
    ms = exact_moments()
    bar = SCHEDULE.alphas_cumprod
    # The last step takes the mean, which loses the data's variance given x at node 1.
    expected = math.sqrt(STD**2 - STD**2 * (1 - bar[0]) / (bar[0] * STD**2 + 1 - bar[0]))
    x = start(4000).float()
    gen = torch.Generator().manual_seed(2)
    analytic = run(x, method="analytic-ddpm", ms_eps=ms, generator=gen, **options).std()
    usual = run(x, method="ddpm", generator=gen, **options).std()
    assert abs(analytic - expected) < 0.01 * expected
    if steps < 20:
        assert usual < 0.97 * expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_repeats_to_the_bit_and_leaves_its_input_alone(dtype):
    x = start(dtype=torch.float32).to(dtype)
    before = x.clone()
    draws = [run(x, steps=6, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    other = run(x, steps=6, generator=torch.Generator().manual_seed(4))
    assert draws[0].dtype == dtype
    assert torch.equal(*draws)
    assert torch.equal(x, before)
    assert not torch.equal(draws[0], other)


def test_trajectories_are_taken_as_they_are():
    ms = exact_moments()
    found = analytic_trajectory(SCHEDULE, ms, 6)
    kwargs = {"method": "ddim"}
    assert torch.equal(run(start(), steps=found, **kwargs), run(start(), steps=found.steps, **kwargs))
    times = []

    def model(x, t):
        times.append(int(t[0]))
        return exact_noise(x, t)

    sample(model, SCHEDULE, start(), steps=found, progress=False)
    assert times == [int(n) - 1 for n in found.steps.flip(0)]
    edges = optimal_trajectory(torch.rand(N + 1, N + 1), 4)
    assert torch.equal(run(start(), steps=edges, **kwargs), run(start(), steps=edges.steps[1:], **kwargs))


def test_guidance_is_that_of_the_predictions():
    uncond = partial(exact_noise, mean=-0.2)
    guided = run(start(), method="ddim", steps=5, uncond_model=uncond, guidance_scale=2.5)
    both = sample(
        lambda x, t: uncond(x, t) + 2.5 * (exact_noise(x, t) - uncond(x, t)),
        SCHEDULE,
        start(),
        method="ddim",
        steps=5,
        progress=False,
    )
    torch.testing.assert_close(guided, both)


def test_the_last_noise_is_capped():
    options = {"method": "analytic-ddpm", "ms_eps": exact_moments(), "steps": 3}
    gens = [torch.Generator().manual_seed(5) for _ in range(2)]
    free, capped = (
        run(start(), generator=gens[0], **options),
        run(start(), generator=gens[1], max_last_std=0.01, **options),
    )
    assert not torch.equal(free, capped)
    with pytest.raises(ValueError, match="max_last_std must be >= 0"):
        run(start(), max_last_std=-1.0, **options)


def test_one_step_of_a_network_that_knows_the_data():
    x0 = start(seed=6).float().clamp(-1, 1)
    for method in ("ddpm", "ddim"):
        out = sample(
            lambda x, t: x0, SCHEDULE, start().float(), method=method, steps=1, prediction_type="sample", progress=False
        )
        torch.testing.assert_close(out, x0)


def test_the_loop_does_not_wait_for_the_device():
    """The plan looks at numbers, on the CPU, before the first call of the network."""
    in_loop = []

    def model(x, t):
        in_loop.append(syncs.count)
        return exact_noise(x, t)

    with Syncs() as syncs:
        sample(model, SCHEDULE, start(), steps=8, progress=False)
    assert len(set(in_loop)) == 1


def test_a_scheduler_of_diffusers_draws_the_same():
    pytest.importorskip("diffusers")
    from fastgen.diffusers import AnalyticDPMScheduler

    ms = exact_moments()
    bar = torch.cat([torch.ones(1), SCHEDULE.alphas_cumprod])
    betas = (1 - bar[1:] / bar[:-1]).tolist()
    scheduler = AnalyticDPMScheduler(N, trained_betas=betas, ms_eps=ms.tolist(), trajectory="even")
    scheduler.set_timesteps(7)
    x, gen = start(), torch.Generator().manual_seed(7)
    for t in scheduler.timesteps:
        x = scheduler.step(exact_noise(x, t.expand(len(x))), t, x, generator=gen).prev_sample
    ours = run(start(), method="analytic-ddpm", ms_eps=ms, steps=7, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(ours, x, rtol=1e-5, atol=1e-5)  # diffusers keeps its tables in float32


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"method": "dpm"}, ValueError, "method must be one of"),
        ({"method": "analytic-ddpm"}, ValueError, "needs ms_eps"),
        ({"ms_eps": torch.zeros(N + 1)}, ValueError, "ms_eps is for the analytic methods"),
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"steps": N + 1}, ValueError, "steps must be at most 50"),
        ({"steps": 2.0}, TypeError, "steps must be an int"),
        ({"steps": torch.tensor([3, 2])}, ValueError, "steps must increase"),
        ({"steps": optimal_trajectory(torch.rand(5, 5), "all")}, TypeError, "a Trajectory of one K"),
        ({"eta": 2.0}, ValueError, "eta must be <= 1"),
        ({"guidance_scale": 2.0}, ValueError, "needs uncond_model"),
        ({"data_range": (1.0, -1.0)}, ValueError, "data_range must be"),
        ({"prediction_type": "x0"}, ValueError, "prediction_type must be one of"),
        ({"variance": "learned"}, ValueError, "variance must be one of"),
        ({"variance": "learned", "method": "analytic-ddpm"}, ValueError, "variance must be one of"),
        ({"uncond_model": 3}, TypeError, "uncond_model must be callable"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        run(start(), **changes)


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="schedule must be discrete"):
        sample(exact_noise, NoiseSchedule.edm(), start())
    with pytest.raises(TypeError, match="model must be callable"):
        sample(None, SCHEDULE, start())
    with pytest.raises(TypeError, match="noise must be float32"):
        run(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="cond has shape"):
        sample(lambda x, t: x[:1], SCHEDULE, start(), progress=False)
