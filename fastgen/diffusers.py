"""Analytic-DPM for pipelines of diffusers. Needs that package: ``pip install diffusers``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, DDPMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from . import _checks
from .analytic_dpm import analytic_trajectory
from .sampler import plan_steps
from .sampling import reverse_step
from .schedule import NoiseSchedule

__all__ = ["AnalyticDPMScheduler"]


class AnalyticDPMScheduler(SchedulerMixin, ConfigMixin):
    """Analytic-DPM (arXiv 2201.06503) as a scheduler: optimal variances, and the trajectory with the best bound.

    It takes the place of a ``DDPMScheduler``: ``AnalyticDPMScheduler.from_config(pipe.scheduler.config, ms_eps=…)``.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: as of diffusers' ``DDPMScheduler``.
        ms_eps: the N + 1 numbers of :attr:`fastgen.ScoreMoments.ms_eps`, as a list, so that they are saved with the
            configuration. Sampling needs them; best :func:`fastgen.regularize_moments` of them, as at high noise the
            raw ones of few samples leave anything between no variance and the data's range.
        method: ``"ddpm"`` or ``"ddim"``, whose mean a step has.
        eta: DDIM's; from 0 to 1.
        trajectory: ``"optimal"`` (:func:`fastgen.analytic_trajectory`) or ``"even"``, from 1 to N.
        max_last_std: caps the standard deviation of the last noise that is added, in units of the data: the paper's
            ``y · 2/255 · sqrt(π/2)``, with y of 1 or 2, keeps it below what y grey levels of an image show.
        clip_sample, clip_sample_range: whether x̂0 is clamped to ``±clip_sample_range``, which is then the range of the
            data for the variances too.
        prediction_type: ``"epsilon"``, ``"sample"`` or ``"v_prediction"``. The moments are of noise predictions.
        thresholding, rescale_betas_zero_snr: must be False. They are here so that a configuration that has them is
            refused, not misunderstood.

    Raises:
        TypeError, ValueError: naming the argument that does not fit; from :meth:`set_timesteps` without `ms_eps`.

    Example::

        >>> import fastgen, torch
        >>> from fastgen.diffusers import AnalyticDPMScheduler
        >>> moments = fastgen.ScoreMoments(1000)
        >>> moments.update(torch.arange(1000), 0.9 * torch.ones(1000, 4))
        >>> scheduler = AnalyticDPMScheduler(ms_eps=moments.ms_eps.tolist(), trajectory="even")
        >>> scheduler.set_timesteps(5)
        >>> scheduler.timesteps
        tensor([999, 749, 499, 250,   0])
    """

    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        ms_eps: Sequence[float] | None = None,
        method: str = "ddpm",
        eta: float = 0.0,
        trajectory: str = "optimal",
        max_last_std: float | None = None,
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        _checks.choice("method", method, ("ddpm", "ddim"))
        _checks.choice("trajectory", trajectory, ("optimal", "even"))
        _checks.choice("prediction_type", prediction_type, ("epsilon", "sample", "v_prediction"))
        if max_last_std is not None:
            _checks.number("max_last_std", max_last_std, low=0)
        for name, value in (("thresholding", thresholding), ("rescale_betas_zero_snr", rescale_betas_zero_snr)):
            if value:
                raise ValueError(f"{name} is not supported by Analytic-DPM")
        _checks.share("eta", eta)
        _checks.number("clip_sample_range", clip_sample_range, low=0, open_low=True)
        if not isinstance(ms_eps, (list, tuple, type(None))):
            raise TypeError(f"ms_eps must be a list, as moments.ms_eps.tolist(); got {type(ms_eps).__name__}")
        if ms_eps is not None and len(ms_eps) != num_train_timesteps + 1:
            raise ValueError(f"ms_eps must have {num_train_timesteps + 1} numbers, of nodes 0 to N; got {len(ms_eps)}")
        self.alphas_cumprod = DDPMScheduler(
            num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas
        ).alphas_cumprod
        self.schedule = NoiseSchedule.from_alphas_cumprod(self.alphas_cumprod)
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self._steps: dict[int, Any] = {}

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Chooses the timesteps and works out the numbers of every step.

        Args:
            num_inference_steps: K, from 1 to N.
            device: of :attr:`timesteps`. On a GPU each :meth:`step` waits for it to read the time.
        """
        num_inference_steps = _checks.positive_int("num_inference_steps", num_inference_steps)
        config = self.config
        last = config.num_train_timesteps
        if num_inference_steps > last:
            raise ValueError(f"num_inference_steps must be at most {last}, got {num_inference_steps}")
        if config.ms_eps is None:
            raise ValueError("ms_eps is missing: gather fastgen.ScoreMoments and pass ms_eps=moments.ms_eps.tolist()")
        ms_eps = torch.tensor(config.ms_eps, dtype=torch.float64)
        data_range = (-config.clip_sample_range, config.clip_sample_range) if config.clip_sample else None
        if num_inference_steps == 1:
            nodes = torch.tensor([last])
        elif config.trajectory == "optimal":
            nodes = analytic_trajectory(self.schedule, ms_eps, num_inference_steps, data_range=data_range).steps
        else:
            nodes = torch.linspace(1, last, num_inference_steps, dtype=torch.float64).round().long()
        k = plan_steps(
            self.schedule, nodes, method=f"analytic-{config.method}", eta=config.eta, variance="beta_tilde",
            ms_eps=ms_eps, max_last_std=config.max_last_std, data_range=data_range, dtype=torch.float64,
        )  # fmt: skip
        self._steps = {int(n) - 1: type(k)(*(x[i : i + 1] for x in k)) for i, n in enumerate(nodes)}
        self.num_inference_steps = num_inference_steps
        self.timesteps = (nodes - 1).flip(0).to(device)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """`sample` as it is."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor]:
        """From `sample` at one of :attr:`timesteps` to the next, in one pass (:func:`fastgen.reverse_step`).

        Args:
            model_output: the network's, in the configuration's prediction type.
            timestep: one of :attr:`timesteps`.
            sample: x_t.
            generator: of the noise, one or one an image.
            return_dict: whether to return a ``DDPMSchedulerOutput`` or a tuple.

        Returns:
            With `prev_sample` alone.
        """
        t = int(timestep)
        if t not in self._steps:
            raise ValueError(f"timestep {t} is not one of timesteps: call set_timesteps() first")
        k = self._steps[t]
        if k.x0.device != sample.device:
            k = self._steps[t] = type(k)(*(x.to(sample.device) for x in k))
        noise = None
        if t != int(min(self._steps)):
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        size = self.config.clip_sample_range
        previous = reverse_step(
            sample, model_output, k, prediction_type=self.config.prediction_type, noise=noise,
            clamp=(-size, size) if self.config.clip_sample else None,
        )  # fmt: skip
        return DDPMSchedulerOutput(prev_sample=previous) if return_dict else (previous,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t of clean images [B, …] at `timesteps` [B]."""
        return self.schedule.add_noise(original_samples, noise, timesteps.to(original_samples.device))

    def __len__(self) -> int:
        return self.config.num_train_timesteps
