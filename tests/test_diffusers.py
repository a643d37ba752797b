"""The scheduler for diffusers: in a pipeline, against the formulas, saved and loaded."""

import doctest

import pytest
import torch

import fastgen

pytest.importorskip("diffusers")

import itertools
import json
import math
import warnings

from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    UNet2DModel,
)

import fastgen.diffusers
from fastgen.diffusers import AnalyticDPMScheduler

N = 50


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    ).eval()


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


def pipeline(unet, steps, cls=DDPMPipeline):
    pipe = cls(unet, DDPMScheduler(num_train_timesteps=N, beta_end=0.3))
    pipe.scheduler = steps
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, **options):
    generator = torch.Generator().manual_seed(3)
    return pipe(2, generator, num_inference_steps=5, output_type="pt", **options).images


def test_a_ddim_pipeline_hands_its_eta_to_the_step(unet):
    for eta in (0.0, 0.5, 1.0):
        expected = drawn(pipeline(unet, scheduler(method="ddim", eta=eta)))
        steps = scheduler(method="ddim", eta=0.25)
        assert torch.equal(drawn(pipeline(unet, steps, DDIMPipeline), eta=eta), expected)
        assert not torch.equal(drawn(pipeline(unet, steps)), expected)
    ddpm = drawn(pipeline(unet, scheduler()))
    assert torch.equal(drawn(pipeline(unet, scheduler(), DDIMPipeline), eta=0.5), ddpm)  # the method has no eta


def test_ddims_noise_prediction_of_the_clamped_image(unet):
    """Without noise the step to x_s is DDIM's own, where what the moments say of the variance is nothing."""
    base = DDIMScheduler(num_train_timesteps=N, beta_end=0.3)
    steps = AnalyticDPMScheduler.from_config(base.config, ms_eps=[1.0] * (N + 1), method="ddim", trajectory="even")
    steps.set_timesteps(timesteps=[40, 30, 20, 10, 0])
    base.set_timesteps(5)
    x, pred = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    for clipped in (False, True):
        theirs = base.step(pred, 30, x, use_clipped_model_output=clipped)
        mine = steps.step(pred, 30, x, use_clipped_model_output=clipped)
        torch.testing.assert_close(mine.prev_sample, theirs.prev_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(mine.pred_original_sample, theirs.pred_original_sample, rtol=1e-4, atol=1e-4)
    pair = steps.step(pred, 30, x, return_dict=False)
    assert torch.equal(pair[1], steps.step(pred, 30, x).pred_original_sample)


@pytest.mark.parametrize("kind", ["StableDiffusionPipeline", "Img2Img", "Inpaint"])
def test_stable_diffusion_samples_two_images(kind):
    pytest.importorskip("transformers")
    import diffusers

    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=8,
        norm_num_groups=2,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=[4, 8],
        down_block_types=["DownEncoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=2,
        up_block_types=["UpDecoderBlock2D"] * 2,
    )
    base = DDIMScheduler(
        num_train_timesteps=N, beta_schedule="scaled_linear", beta_end=0.2, clip_sample=False, steps_offset=1
    )
    steps = AnalyticDPMScheduler.from_config(base.config, ms_eps=[0.5] * (N + 1), method="ddim", trajectory="even")
    cls = getattr(diffusers, kind if "Pipeline" in kind else f"StableDiffusion{kind}Pipeline")
    pipe = cls(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=net,
        scheduler=steps,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    image, mask = torch.rand(2, 3, 16, 16), torch.ones(2, 1, 16, 16)
    size = {"height": 16, "width": 16}
    options = {
        "StableDiffusionPipeline": {"timesteps": [45, 20, 7, 1], **size},
        "Img2Img": {"image": image, "strength": 0.6, "num_inference_steps": 5},
        "Inpaint": {"image": image, "mask_image": mask, "strength": 0.8, "num_inference_steps": 5, **size},
    }[kind]
    prompts = {"prompt_embeds": torch.randn(2, 4, 8), "negative_prompt_embeds": torch.randn(2, 4, 8)}

    def run(eta):
        generator = torch.Generator().manual_seed(0)
        return pipe(**prompts, **options, eta=eta, generator=generator, output_type="pt").images

    images = run(0.0)
    assert type(pipe.scheduler) is AnalyticDPMScheduler
    assert images.shape == (2, 3, 16, 16)
    assert images.isfinite().all()
    assert not torch.equal(images, run(1.0))  # eta arrives


def latent_pipeline(name):
    """A tiny one, the scheduler in its constructor, and what to call it with."""
    import diffusers

    torch.manual_seed(0)
    cls = getattr(diffusers, name)
    base = DDIMScheduler(num_train_timesteps=N, beta_schedule="scaled_linear", beta_end=0.2, clip_sample=False)
    steps = AnalyticDPMScheduler.from_config(base.config, ms_eps=[0.5] * (N + 1))
    codes = {"latent_channels": 4, "norm_num_groups": 2, "block_out_channels": [4, 8]}
    codes |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    blocks = {"sample_size": 8, "num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2, "in_channels": 4}
    blocks |= {"out_channels": 8, "attention_bias": True, "activation_fn": "gelu-approximate"}
    prompts = {"prompt_embeds": torch.randn(2, 4, 8), "negative_prompt_embeds": torch.randn(2, 4, 8)}
    if name == "LDMPipeline":
        one = {"layers_per_block": 1, "block_out_channels": (8,), "norm_num_groups": 4}
        net = UNet2DModel(8, 4, 4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), **one)
        return cls(diffusers.VQModel(**codes), net, steps), {"batch_size": 2}
    if name == "DiTPipeline":
        net = diffusers.DiTTransformer2DModel(patch_size=4, norm_type="ada_norm_zero", **blocks)
        return cls(net, AutoencoderKL(**codes), steps), {"class_labels": [1, 2]}
    size = {"height": 16, "width": 16}
    if name == "PixArtSigmaPipeline":
        net = diffusers.PixArtTransformer2DModel(caption_channels=8, cross_attention_dim=8, patch_size=2, **blocks)
        masks = {f"{n}prompt_attention_mask": torch.ones(2, 4) for n in ("", "negative_")}
        prompts |= masks | {"negative_prompt": None, "use_resolution_binning": False}
        return cls(None, None, AutoencoderKL(**codes), net, steps), prompts | size
    net = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=8,
        norm_num_groups=2,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
    )
    encoders = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pooled = {f"{n}pooled_prompt_embeds": torch.randn(2, 8) for n in ("", "negative_")}
    pipe = cls(vae=AutoencoderKL(**codes), unet=net, scheduler=steps, add_watermarker=False, **encoders)
    return pipe, prompts | pooled | size


@pytest.mark.parametrize("name", ["LDMPipeline", "DiTPipeline", "PixArtSigmaPipeline", "StableDiffusionXLPipeline"])
def test_pipelines_of_latents_take_it_in_their_constructor(name):
    if name not in ("LDMPipeline", "DiTPipeline"):
        pytest.importorskip("transformers")
    pipe, given = latent_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    taken = []
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda pred, t, *args, **options: taken.append(int(t)) or step(pred, t, *args, **options)
    images = pipe(**given, num_inference_steps=3, output_type="np").images
    assert type(pipe.scheduler) is AnalyticDPMScheduler
    assert taken == pipe.scheduler.timesteps.tolist()
    assert len(images) == 2


def test_a_ddim_pipeline_makes_its_own_scheduler_of_it(unet, tmp_path):
    pipe = DDIMPipeline(unet, scheduler())
    assert type(pipe.scheduler) is DDIMScheduler
    steps = AnalyticDPMScheduler.from_config(pipe.scheduler.config, method="ddim")
    assert steps.config.ms_eps == scheduler().config.ms_eps
    pipe.scheduler = steps
    pipe.save_pretrained(tmp_path)
    assert type(DDIMPipeline.from_pretrained(tmp_path).scheduler) is DDIMScheduler
    assert type(DDPMPipeline.from_pretrained(tmp_path).scheduler) is AnalyticDPMScheduler
    again = AnalyticDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert dict(again.config).items() >= {"method": "ddim", "ms_eps": steps.config.ms_eps}.items()


def test_one_time_is_for_all_images():
    steps, base = scheduler(), DDPMScheduler(num_train_timesteps=N, beta_end=0.3)
    x, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    for t in (torch.tensor([30]), torch.tensor(30), torch.tensor([0, 30]), torch.tensor([0, 30], dtype=torch.int32)):
        torch.testing.assert_close(steps.add_noise(x, noise, t), base.add_noise(x, noise, t.long()))
        torch.testing.assert_close(steps.get_velocity(x, noise, t), base.get_velocity(x, noise, t.long()))
    assert torch.equal(steps.betas, base.betas)
    assert torch.equal(steps.alphas, base.alphas)
    assert DDIMScheduler in steps.compatibles


def test_timesteps_of_the_callers_own():
    steps = scheduler()
    assert steps.previous_timestep(7) == 6
    steps.set_timesteps(timesteps=[40, 11, 3])
    assert steps.timesteps.tolist() == [40, 11, 3]
    assert steps.num_inference_steps == 3
    assert [steps.previous_timestep(t) for t in steps.timesteps] == [11, 3, -1]
    even = scheduler(trajectory="even")
    even.set_timesteps(3)
    steps.set_timesteps(timesteps=even.timesteps.tolist())
    x, pred = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    for t in even.timesteps:
        expected = even.step(pred, t, x, generator=torch.Generator().manual_seed(1)).prev_sample
        assert torch.equal(steps.step(pred, t, x, variance_noise=noise).prev_sample, expected)


def test_moments_that_were_not_visited_are_interpolated_on_request():
    whole = [0.1 * n / N for n in range(N + 1)]
    holes = [v if n in (0, 1, 10, 30, N) else math.nan for n, v in enumerate(whole)]
    base = DDPMScheduler(num_train_timesteps=N, beta_end=0.3).config
    with pytest.raises(ValueError, match="ms_eps"):
        AnalyticDPMScheduler.from_config(base, ms_eps=holes).set_timesteps(5)
    filled, full = (
        AnalyticDPMScheduler.from_config(base, ms_eps=m, interpolate=True, trajectory="even") for m in (holes, whole)
    )
    x, pred = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
    for steps in (filled, full):
        steps.set_timesteps(7)
    for t in full.timesteps:
        a, b = (s.step(pred, t, x, variance_noise=x).prev_sample for s in (filled, full))
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match="ms_eps has no moments"):
        AnalyticDPMScheduler.from_config(base, ms_eps=[0.0] + [math.nan] * N, interpolate=True).set_timesteps(5)


def test_a_warning_where_latents_would_be_clamped():
    ms, latent = [0.5] * (N + 1), {"num_train_timesteps": N, "beta_schedule": "scaled_linear"}
    silent = [
        lambda: AnalyticDPMScheduler.from_config(DDIMScheduler(**latent, clip_sample=False).config, ms_eps=ms),
        lambda: AnalyticDPMScheduler.from_config(DDPMScheduler(num_train_timesteps=N).config, ms_eps=ms),
        lambda: AnalyticDPMScheduler.from_config(DDIMScheduler(**latent).config, ms_eps=ms, clip_sample=True),
        lambda: AnalyticDPMScheduler.from_config(AnalyticDPMScheduler(**latent, ms_eps=ms).config),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for make in silent:
            make()
    for theirs in (
        DDIMScheduler(**latent),
        DPMSolverMultistepScheduler(**latent),
        DPMSolverMultistepScheduler(num_train_timesteps=N),
    ):
        with pytest.warns(UserWarning, match="clip_sample=False for a latent model"):
            AnalyticDPMScheduler.from_config(theirs.config, ms_eps=ms)


def test_a_configuration_prints_how_many_moments_it_has(tmp_path):
    steps = scheduler()
    for text in (repr(steps), repr(steps.config), str(steps)):
        assert "[51 numbers]" in text
        assert len(text) < 1000
    steps.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["ms_eps"] == list(steps.config.ms_eps)
    again = AnalyticDPMScheduler.from_pretrained(tmp_path)
    assert "[51 numbers]" in repr(again)
    assert again.config.ms_eps == steps.config.ms_eps


def stepped(**changes):
    steps = scheduler()
    steps.set_timesteps(3)
    options = {"model_output": torch.zeros(2, 3, 4, 4), "timestep": N - 1, "sample": torch.zeros(2, 3, 4, 4)}
    return steps.step(**{**options, **changes})


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
    "needs num_inference_steps or timesteps": (ValueError, lambda: scheduler().set_timesteps()),
    "or timesteps, and not both": (ValueError, lambda: scheduler().set_timesteps(5, timesteps=[3])),
    "timesteps must decrease": (ValueError, lambda: scheduler().set_timesteps(timesteps=[3, 7])),
    "timesteps must decrease, from less than 50": (ValueError, lambda: scheduler().set_timesteps(timesteps=[50, 7])),
    "no less than 0; got": (ValueError, lambda: scheduler().set_timesteps(timesteps=[7, -1])),
    r"no less than 0; got \[\]": (ValueError, lambda: scheduler().set_timesteps(timesteps=[])),
    "model_output has 6 channels where sample has 3.*variance_type 'learned'.*model_output": (
        ValueError,
        lambda: stepped(model_output=torch.zeros(2, 6, 4, 4)),
    ),
    "variance_noise and generator": (
        ValueError,
        lambda: stepped(generator=torch.Generator(), variance_noise=torch.zeros(2, 3, 4, 4)),
    ),
    "eta must be >= 0": (ValueError, lambda: AnalyticDPMScheduler(method="ddim", eta=-1.0)),
    "call set_timesteps": (ValueError, lambda: scheduler().step(torch.zeros(1, 1), 3, torch.zeros(1, 1))),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_errors_name_the_argument(message):
    error, call = BAD_CALLS[message]
    with pytest.raises(error, match=message):
        call()


def test_docstring_example():
    assert doctest.testmod(fastgen.diffusers, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0
