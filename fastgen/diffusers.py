"""Analytic-DPM for pipelines of diffusers. Needs that package: ``pip install diffusers``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import ConfigMixin, DDPMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from .analytic_dpm import analytic_trajectory
from .core import checks
from .sampling import StepCoefficients, reverse_step
from .sampling.sampler import plan_steps
from .schedule import NoiseSchedule, add_noise

__all__ = ["AnalyticDPMScheduler"]


class _Moments(list[float]):
    """Numbers of a configuration that prints how many they are, and is saved with all."""

    def __repr__(self) -> str:
        return f"[{len(self)} numbers]"


class AnalyticDPMScheduler(SchedulerMixin, ConfigMixin):
    """Analytic-DPM (arXiv 2201.06503) as a scheduler: optimal variances, and the trajectory with the best bound.

    It takes the place of a ``DDPMScheduler`` or ``DDIMScheduler``:
    ``pipe.scheduler = AnalyticDPMScheduler.from_config(pipe.scheduler.config, ms_eps=…)``. Assign it to the pipeline
    that is there, as a ``DDIMPipeline`` makes a ``DDIMScheduler`` of whatever it is constructed with.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: as of diffusers' ``DDPMScheduler``.
        ms_eps: the N + 1 numbers of :attr:`fastgen.ScoreMoments.ms_eps`, as a list, so that they are saved with the
            configuration. Sampling needs them; best :func:`fastgen.regularize_moments` of them, as at high noise the
            raw ones of few samples leave anything between no variance and the data's range.
        interpolate: whether moments of timesteps that were not visited, which are NaN, are interpolated linearly
            between those of the nearest that were; else they are an error.
        method: ``"ddpm"`` or ``"ddim"``, whose mean a step has.
        eta: DDIM's; from 0 to 1. Pipelines that have an argument `eta` (``DDIMPipeline``, Stable Diffusion's) hand
            theirs to :meth:`step`, where it takes the place of this one.
        trajectory: ``"optimal"`` (:func:`fastgen.analytic_trajectory`) or ``"even"``, from 1 to N.
        max_last_std: caps the standard deviation of the last noise that is added, in units of the data: the paper's
            ``y · 2/255 · sqrt(π/2)``, with y of 1 or 2, keeps it below what y grey levels of an image show.
        clip_sample, clip_sample_range: whether x̂0 is clamped to ``±clip_sample_range``, which is then the range of the
            data for the variances too. False for latents; :meth:`from_config` warns where that is in doubt.
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

    _compatibles: ClassVar[list[str]] = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
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
        interpolate: bool = False,
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
        checks.choice("method", method, ("ddpm", "ddim"))
        checks.choice("trajectory", trajectory, ("optimal", "even"))
        checks.choice("prediction_type", prediction_type, ("epsilon", "sample", "v_prediction"))
        if max_last_std is not None:
            checks.number("max_last_std", max_last_std, low=0)
        for name, value in (("thresholding", thresholding), ("rescale_betas_zero_snr", rescale_betas_zero_snr)):
            if value:
                raise ValueError(f"{name} is not supported by Analytic-DPM")
        checks.share("eta", eta)
        checks.number("clip_sample_range", clip_sample_range, low=0, open_low=True)
        if not isinstance(ms_eps, (list, tuple, type(None))):
            raise TypeError(f"ms_eps must be a list, as moments.ms_eps.tolist(); got {type(ms_eps).__name__}")
        if ms_eps is not None and len(ms_eps) != num_train_timesteps + 1:
            raise ValueError(f"ms_eps must have {num_train_timesteps + 1} numbers, of nodes 0 to N; got {len(ms_eps)}")
        if ms_eps is not None:
            self.register_to_config(ms_eps=_Moments(ms_eps))
        base = DDPMScheduler(num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas)
        self.betas, self.alphas, self.alphas_cumprod = base.betas, base.alphas, base.alphas_cumprod
        self.schedule = NoiseSchedule.from_alphas_cumprod(self.alphas_cumprod)
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self._nodes: Tensor | None = None
        self._plans: dict[Any, dict[int, StepCoefficients]] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__} {dict(self.config)}"

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A scheduler from another's configuration, and from arguments of its own, `ms_eps` among them.

        A ``UserWarning`` says where images that may be latents would be clamped: where the configuration does not speak
        of `clip_sample`, or wants it with the β of latent models. An argument ``clip_sample=…`` settles it.
        """
        if isinstance(config, Mapping) and "ms_eps" not in config and "clip_sample" not in kwargs:  # another's
            latent = config.get("beta_schedule") == "scaled_linear"
            if "clip_sample" not in config or (latent and config["clip_sample"]):
                warnings.warn(
                    "clip_sample is True: predicted images are clamped, as is right for pixels in [-1, 1] and wrong for"
                    " latents. Pass clip_sample=False for a latent model, clip_sample=True for one of pixels.",
                    stacklevel=2,
                )
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Chooses the timesteps and works out the numbers of every step.

        Args:
            num_inference_steps: K, from 1 to N.
            device: of :attr:`timesteps`. On a GPU each :meth:`step` waits for it to read the time.
            timesteps: the times themselves, decreasing, in the place of `num_inference_steps`.
        """
        last = self.config.num_train_timesteps
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("set_timesteps needs num_inference_steps or timesteps, and not both")
        if self.config.ms_eps is None:
            raise ValueError("ms_eps is missing: gather fastgen.ScoreMoments and pass ms_eps=moments.ms_eps.tolist()")
        if timesteps is not None:
            times = [int(t) for t in timesteps]
            if not times or times[0] >= last or times[-1] < 0 or any(s >= t for t, s in pairwise(times)):
                raise ValueError(f"timesteps must decrease, from less than {last} to no less than 0; got {times}")
            nodes = torch.tensor(times).flip(0) + 1
        else:
            assert num_inference_steps is not None
            nodes = self._even_or_optimal(num_inference_steps)
        self._nodes, self._plans = nodes, {}
        self._plan(self.config.eta, False, torch.device("cpu"))  # what does not fit shows here, not in the first step
        self.num_inference_steps = len(nodes)
        self.timesteps = (nodes - 1).flip(0).to(device)

    def _even_or_optimal(self, steps: int) -> Tensor:
        steps = checks.positive_int("num_inference_steps", steps)
        last = self.config.num_train_timesteps
        if steps > last:
            raise ValueError(f"num_inference_steps must be at most {last}, got {steps}")
        if steps == 1:
            return torch.tensor([last])
        if self.config.trajectory == "even":
            return torch.linspace(1, last, steps, dtype=torch.float64).round().long()
        return analytic_trajectory(self.schedule, self._moments(), steps, data_range=self._data_range()).steps

    def _data_range(self) -> tuple[float, float] | None:
        size = self.config.clip_sample_range
        return (-size, size) if self.config.clip_sample else None

    def _moments(self) -> Tensor:
        moments = np.array(self.config.ms_eps, dtype=np.float64)
        if self.config.interpolate:
            nodes, seen = np.arange(len(moments)), ~np.isnan(moments)
            if not seen[1:].any():
                raise ValueError("ms_eps has no moments to interpolate between: all are NaN")
            moments = np.interp(nodes, nodes[seen], moments[seen])
        return torch.from_numpy(moments)

    def _plan(self, eta: float, clipped: bool, device: torch.device) -> dict[int, StepCoefficients]:
        """The numbers of each timestep's step, as long as the timesteps are the same."""
        assert self._nodes is not None
        key = eta, clipped, device
        if key not in self._plans:
            k = plan_steps(
                self.schedule,
                self._nodes,
                method=f"analytic-{self.config.method}",
                eta=eta,
                variance="beta_tilde",
                ms_eps=self._moments(),
                max_last_std=self.config.max_last_std,
                data_range=self._data_range(),
                dtype=torch.float64,
                use_clipped_model_output=clipped,
            )
            k = StepCoefficients(*(v.to(device) for v in k))
            self._plans[key] = {
                int(n) - 1: StepCoefficients(*(v[i : i + 1] for v in k)) for i, n in enumerate(self._nodes)
            }
        return self._plans[key]

    def previous_timestep(self, timestep: int | Tensor) -> int:
        """The one that :meth:`step` goes to from `timestep`; -1, the data, from the last."""
        t = int(timestep)
        if self._nodes is None:
            return t - 1
        return max((int(n) - 1 for n in self._nodes if int(n) - 1 < t), default=-1)

    def scale_model_input(self, sample: Tensor, timestep: int | Tensor | None = None) -> Tensor:
        """`sample` as it is."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float | None = None,
        use_clipped_model_output: bool | None = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """From `sample` at one of :attr:`timesteps` to the next (:func:`fastgen.reverse_step`).

        Args:
            model_output: the network's, in the configuration's prediction type, without learned variances.
            timestep: one of :attr:`timesteps`.
            sample: x_t.
            eta: of this step in the place of the configuration's, from 0 to 1. The method ``"ddpm"`` has none and
                ignores it, as diffusers' does.
            use_clipped_model_output: whether DDIM's ε̂ is that of the clamped x̂0.
            generator: of the noise, one or one an image.
            variance_noise: the noise itself, in the place of a generator.
            return_dict: whether to return a ``DDPMSchedulerOutput`` or a tuple.

        Returns:
            `prev_sample` and `pred_original_sample`, which is x̂0, clamped where `clip_sample` says so.
        """
        t = int(timestep)
        if self._nodes is None or not bool((self._nodes == t + 1).any()):
            raise ValueError(f"timestep {t} is not one of timesteps: call set_timesteps() first")
        if sample.dim() > 1 and model_output.shape == (sample.shape[0], 2 * sample.shape[1], *sample.shape[2:]):
            channels = sample.shape[1]
            raise ValueError(
                f"model_output has {2 * channels} channels where sample has {channels}: variances that a network has"
                " learned (variance_type 'learned' or 'learned_range') are not supported. Analytic-DPM has its own:"
                f" pass the other half, model_output[:, :{channels}]"
            )
        if variance_noise is not None and generator is not None:
            raise ValueError("variance_noise and generator must not both be given")
        ddim = self.config.method == "ddim"
        eta = checks.share("eta", self.config.eta if eta is None or not ddim else eta)
        k = self._plan(eta, ddim and bool(use_clipped_model_output), sample.device)[t]
        noise = variance_noise
        if t == int(self._nodes[0]) - 1:
            noise = None  # the step to the data takes the mean
        elif noise is None:
            noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        zero = torch.zeros_like(k.x0)
        clean = k._replace(x0=zero + 1, x_t=zero, eps=zero, noise=zero)
        kind, clamp = self.config.prediction_type, self._data_range()
        x0 = reverse_step(sample, model_output, clean, prediction_type=kind, clamp=clamp)
        previous = reverse_step(sample, model_output, k, prediction_type=kind, noise=noise, clamp=clamp)
        if not return_dict:
            return previous, x0
        return DDPMSchedulerOutput(prev_sample=previous, pred_original_sample=x0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t of clean images [B, …] at `timesteps`, [B], or [1] for all of them."""
        return self.schedule.add_noise(original_samples, noise, self._times(timesteps, original_samples))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``alpha_t noise - sigma_t sample``, what a network of ``"v_prediction"`` is trained to return."""
        t = self._times(timesteps, sample)
        return add_noise(noise, sample, self.schedule.alpha_t(t), -self.schedule.sigma_t(t))

    @staticmethod
    def _times(timesteps: Tensor, like: Tensor) -> Tensor:
        times = timesteps.to(like.device)
        return times.expand(like.shape[0]) if times.numel() == 1 else times

    def __len__(self) -> int:
        return self.config.num_train_timesteps
