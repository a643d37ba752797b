"""The scheduler for diffusers: in a pipeline, against the formulas, saved and loaded."""

import doctest

import pytest
import torch

import fastgen

pytest.importorskip("diffusers")

import itertools

from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

import fastgen.diffusers
from fastgen.diffusers import AnalyticDPMScheduler

N = 50


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    ).eval()  # fmt: skip


def ms_eps(schedule):
    v = (1 - schedule.alphas_cumprod) / schedule.alphas_cumprod
    return torch.cat([torch.zeros(1, dtype=torch.float64), (v / (v + 0.5) + v / (v + 0.01)) / 2])


def scheduler(**options):
    base = DDPMScheduler(num_train_timesteps=N, beta_end=0.3)
    schedule = fastgen.NoiseSchedule.from_alphas_cumprod(base.alphas_cumprod)
    return AnalyticDPMScheduler.from_config(base.config, ms_eps=ms_eps(schedule).tolist(), **options)


def by_hand(unet, steps, nodes, method, eta, cap, prediction_type="epsilon"):
    """Analytic-DPM's sampler from its formulas, on float64 numbers; noise drawn as a pipeline draws it."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 1, 8, 8, generator=generator)
    schedule = steps.schedule
    bar = [1.0, *schedule.alphas_cumprod.tolist()]
    ms = ms_eps(schedule)
    path = [0, *nodes]
    for s, t in list(itertools.pairwise(path))[::-1]:
        with torch.no_grad():
            pred = unet(x, t - 1).sample
        if prediction_type == "epsilon":
            x0, eps = (x - (1 - bar[t]) ** 0.5 * pred) / bar[t] ** 0.5, pred
        else:
            x0, eps = bar[t] ** 0.5 * x - (1 - bar[t]) ** 0.5 * pred, bar[t] ** 0.5 * pred + (1 - bar[t]) ** 0.5 * x
        x0 = x0.clamp(-1, 1)
        beta = 1 - bar[t] / bar[s]
        tilde = beta * (1 - bar[s]) / (1 - bar[t])
        lam = tilde if method == "ddpm" else eta**2 * tilde
        cov = min(max((1 - bar[t]) / bar[t] * (1 - ms[t].item()), 0), 1)
        gain = bar[s] ** 0.5 - ((1 - bar[s] - lam) * bar[t] / (1 - bar[t])) ** 0.5
        std = (lam + gain**2 * cov) ** 0.5
        if method == "ddpm":
            mean = bar[s] ** 0.5 * beta / (1 - bar[t]) * x0 + (bar[t] / bar[s]) ** 0.5 * (1 - bar[s]) / (1 - bar[t]) * x
        else:
            mean = bar[s] ** 0.5 * x0 + (1 - bar[s] - lam) ** 0.5 * eps
        if s == path[1] and cap is not None:
            std = min(std, cap)
        x = mean if s == 0 else mean + std * torch.randn(x.shape, generator=generator)
    return (x / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize(
    ("method", "eta", "cap", "prediction_type"),
    [
        ("ddpm", 0.0, None, "epsilon"),
        ("ddim", 0.0, 0.01, "epsilon"),
        ("ddim", 0.5, None, "epsilon"),
        ("ddpm", 0.0, 0.01, "v_prediction"),
    ],
)
@pytest.mark.parametrize("trajectory", ["optimal", "even"])
def test_a_pipeline_samples_by_the_papers_formulas(unet, method, eta, cap, prediction_type, trajectory):
    steps = scheduler(method=method, eta=eta, max_last_std=cap, prediction_type=prediction_type, trajectory=trajectory)
    pipe = DDPMPipeline(unet, steps)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(2, torch.Generator().manual_seed(3), num_inference_steps=6, output_type="pt").images
    if trajectory == "optimal":
        nodes = fastgen.analytic_trajectory(steps.schedule, ms_eps(steps.schedule), 6).steps.tolist()
    else:
        nodes = [1, 11, 21, 30, 40, 50]
    assert (steps.timesteps + 1).tolist() == nodes[::-1]
    expected = by_hand(unet, steps, nodes, method, eta, cap, prediction_type)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)
    assert images.std() > 0.05


def test_save_and_load(unet, tmp_path):
    steps = scheduler(method="ddim", eta=0.25, max_last_std=0.02)
    pipe = DDPMPipeline(unet, steps)
    pipe.set_progress_bar_config(disable=True)
    steps.save_pretrained(tmp_path)
    loaded = AnalyticDPMScheduler.from_pretrained(tmp_path)
    assert dict(loaded.config).items() >= {"method": "ddim", "eta": 0.25, "max_last_std": 0.02}.items()
    assert loaded.config.ms_eps == steps.config.ms_eps
    images = [
        DDPMPipeline(unet, s)(1, torch.Generator().manual_seed(0), num_inference_steps=4, output_type="pt").images
        for s in (steps, loaded)
    ]
    assert torch.equal(*images)


def test_single_steps():
    steps = scheduler()
    steps.set_timesteps(1)
    assert steps.timesteps.tolist() == [N - 1]
    x = torch.randn(2, 1, 8, 8)
    x0 = steps.step(x, N - 1, x, return_dict=False)[0]
    bar = steps.alphas_cumprod[-1].double()
    expected = ((x - (1 - bar).sqrt() * x) / bar.sqrt()).clamp(-1, 1)
    torch.testing.assert_close(x0, expected.float(), rtol=1e-4, atol=1e-4)  # dividing by alpha amplifies rounding
    assert steps.scale_model_input(x, 3) is x
    assert len(steps) == N
    base = DDPMScheduler(num_train_timesteps=N, beta_end=0.3)
    t = torch.tensor([0, 30])
    torch.testing.assert_close(steps.add_noise(x, x0, t), base.add_noise(x, x0, t))
    by_image = [torch.Generator().manual_seed(i) for i in range(2)]
    steps.set_timesteps(3)
    assert steps.step(x, int(steps.timesteps[0]), x, generator=by_image).prev_sample.shape == x.shape


BAD_CALLS = {
    "method must be one of": (ValueError, lambda: AnalyticDPMScheduler(method="euler")),
    "trajectory must be one of": (ValueError, lambda: AnalyticDPMScheduler(trajectory="best")),
    "prediction_type must be one of": (ValueError, lambda: AnalyticDPMScheduler(prediction_type="x")),
    "max_last_std must be >= 0": (ValueError, lambda: AnalyticDPMScheduler(max_last_std=-1.0)),
    "eta must be <= 1": (ValueError, lambda: AnalyticDPMScheduler(method="ddim", eta=1.5)),
    "clip_sample_range must be > 0": (ValueError, lambda: AnalyticDPMScheduler(clip_sample_range=-1.0)),
    "ms_eps must be a list": (TypeError, lambda: AnalyticDPMScheduler(ms_eps=torch.zeros(1001))),
    "thresholding is not supported": (ValueError, lambda: AnalyticDPMScheduler(thresholding=True)),
    "rescale_betas_zero_snr is not": (ValueError, lambda: AnalyticDPMScheduler(rescale_betas_zero_snr=True)),
    "ms_eps must have 1001 numbers": (ValueError, lambda: AnalyticDPMScheduler(ms_eps=[0.0, 1.0])),
    "ms_eps is missing": (ValueError, lambda: AnalyticDPMScheduler().set_timesteps(5)),
    "num_inference_steps must be at most 50": (ValueError, lambda: scheduler().set_timesteps(51)),
    "call set_timesteps": (ValueError, lambda: scheduler().step(torch.zeros(1, 1), 3, torch.zeros(1, 1))),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_errors_name_the_argument(message):
    error, call = BAD_CALLS[message]
    with pytest.raises(error, match=message):
        call()


def test_docstring_example():
    assert doctest.testmod(fastgen.diffusers, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0
