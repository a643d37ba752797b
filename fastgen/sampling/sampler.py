"""The sampling loop: a trajectory's steps, each one call of the network and one fused pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ..analytic_dpm import reverse_variance
from ..analytic_dpm.operators import DataRange, node_alphas, radius_of, trajectory_nodes
from ..core import checks
from ..schedule import PREDICTION_TYPES, NoiseSchedule
from ..trajectory import Trajectory
from . import VARIANCES, StepCoefficients, reverse_step_, step_coefficients
from .reference import randn_like

__all__ = ["sample"]

METHODS = ("ddpm", "ddim", "analytic-ddpm", "analytic-ddim")

Model = Callable[[Tensor, Tensor], Tensor]


def sample(
    model: Model,
    schedule: NoiseSchedule,
    noise: Tensor,
    *,
    method: Literal["ddpm", "ddim", "analytic-ddpm", "analytic-ddim"] = "ddpm",
    steps: int | Tensor | Trajectory[Any] = 50,
    eta: float = 0.0,
    variance: Literal["beta_tilde", "beta"] = "beta_tilde",
    ms_eps: Tensor | None = None,
    max_last_std: float | None = None,
    prediction_type: str = "epsilon",
    uncond_model: Model | None = None,
    guidance_scale: float = 1.0,
    data_range: DataRange = (-1.0, 1.0),
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> Tensor:
    """Draws samples: ancestral sampling (DDPM, arXiv 2006.11239), DDIM (arXiv 2010.02502), and either with the optimal
    variances of Analytic-DPM (arXiv 2201.06503).

    Nodes n_K > … > n_1 > 0 are visited from the noisiest; node n is time n - 1 of the schedule, and 0 is the data.
    Between two calls of the network all is one pass in place (:func:`reverse_step_`), with the coefficients of all
    steps worked out before. The step to the data takes the mean.

    Args:
        model: ``model(x_t, t)``, with t the schedule's times, int64 [B]; bind conditions with ``functools.partial``.
            x_t is one tensor that every step overwrites: a model that keeps it must clone it.
        schedule: a discrete one.
        noise: x at the noisiest node [B, …], standard normal, in any floating dtype. It is not written to.
        method: whose mean a step has, and whose variance.
        steps: K, evenly spaced from node 1 to N (K = 1: N alone); increasing nodes, int64 [K], of which a first 0 is
            ignored; or a :class:`Trajectory` of one K, as of :func:`analytic_trajectory`.
        eta: λ² = eta² β̃, from 0 to 1; of the DDIM methods.
        variance: of ``"ddpm"``.
        ms_eps: of :func:`regularize_moments`, [N+1]; needed by the analytic methods, and by them alone.
        max_last_std: caps the standard deviation of the last noise that is added, in units of the data. The paper's is
            ``y · 2/255 · sqrt(π/2)`` for images in [-1, 1], with y of 1 or 2: what y grey levels show.
        prediction_type: ``"epsilon"``, ``"sample"``, ``"v_prediction"`` or ``"flow_prediction"``.
        uncond_model: the network without its condition, for guidance.
        guidance_scale: s in ``uncond + s (cond - uncond)``; 1 is no guidance.
        data_range: (a, b): x̂0 is clamped to it, and analytic variances are bounded by it. None for latents.
        generator: of the noise that steps add, on the device of `noise`.
        progress: whether a bar is shown.

    Returns:
        Samples, like `noise`. Two calls with the same arguments and generators in the same state agree to the bit.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> schedule = fastgen.NoiseSchedule.linear(1000)
        >>> def model(x, t):  # exact, where the data is 0.5 everywhere
        ...     return (x - 0.5 * schedule.alpha_t(t)[:, None]) / schedule.sigma_t(t)[:, None]
        >>> fastgen.sample(model, schedule, torch.randn(1, 3), method="ddim", steps=10, progress=False)
        tensor([[0.5000, 0.5000, 0.5000]])
    """
    checks.function("model", model)
    if uncond_model is not None:
        checks.function("uncond_model", uncond_model)
    checks.streams(noise=noise)
    checks.choice("prediction_type", prediction_type, PREDICTION_TYPES)
    guidance = checks.number("guidance_scale", guidance_scale)
    if uncond_model is None and guidance != 1:
        raise ValueError(f"guidance_scale = {guidance:g} needs uncond_model; without it only 1 makes sense")
    nodes = _nodes(schedule, steps)
    plan = plan_steps(
        schedule,
        nodes,
        method=method,
        eta=eta,
        variance=variance,
        ms_eps=ms_eps,
        max_last_std=max_last_std,
        data_range=data_range,
        dtype=torch.float64 if noise.dtype == torch.float64 else torch.float32,
    )
    on_device = StepCoefficients(*(k.to(noise.device) for k in plan))
    times = (nodes - 1).to(noise.device)
    # A step reads one number of each coefficient, in place: no copy to the device in the loop.
    numbers = [StepCoefficients(*(k[i : i + 1] for k in on_device)) for i in range(len(nodes))]
    noisy = [not bool(k == 0) for k in plan.noise]
    x = noise.detach().clone()
    with torch.no_grad(), tqdm(total=len(nodes), desc=method, unit="step", disable=not progress) as bar:
        for i in reversed(range(len(nodes))):
            t = times[i].expand(x.shape[0])
            reverse_step_(
                x,
                model(x, t),
                numbers[i],
                prediction_type=prediction_type,
                uncond=None if uncond_model is None else uncond_model(x, t),
                guidance_scale=guidance,
                noise=randn_like(x, generator) if noisy[i] else None,
                clamp=data_range,
            )
            bar.update()
    return x


def plan_steps(
    schedule: NoiseSchedule,
    nodes: Tensor,
    *,
    method: str,
    eta: float,
    variance: str,
    ms_eps: Tensor | None,
    max_last_std: float | None,
    data_range: DataRange,
    dtype: torch.dtype,
    use_clipped_model_output: bool = False,
) -> StepCoefficients:
    """The coefficients of the steps between increasing nodes, from the data on: each [K], on the CPU."""
    checks.choice("method", method, METHODS)
    checks.choice("variance", variance, VARIANCES)
    radius_of(data_range)
    mean = method.removeprefix("analytic-")
    before = torch.cat([torch.zeros(1, dtype=torch.long), nodes[:-1]])
    given: str | Tensor = variance
    if method != mean:
        if ms_eps is None:
            raise ValueError(f"method {method!r} needs ms_eps, as of fastgen.ScoreMoments and regularize_moments")
        given = reverse_variance(
            schedule, ms_eps, before, nodes, eta=1.0 if mean == "ddpm" else eta, data_range=data_range
        ).cpu()
        given[0] = 0  # the step to the data takes the mean
    elif ms_eps is not None:
        raise ValueError(f"ms_eps is for the analytic methods, and method is {method!r}")
    k = step_coefficients(
        schedule,
        before - 1,
        nodes - 1,
        method=mean,  # type: ignore[arg-type]
        eta=eta,
        variance=given,  # type: ignore[arg-type]
        use_clipped_model_output=use_clipped_model_output,
        dtype=torch.float64,
    )
    if max_last_std is not None:
        checks.number("max_last_std", max_last_std, low=0)
        k.noise[1:2].clamp_(max=max_last_std)
    return StepCoefficients(*(v.to(dtype) for v in k))


def _nodes(schedule: NoiseSchedule, steps: int | Tensor | Trajectory[Any]) -> Tensor:
    last = len(node_alphas(schedule)) - 1
    if isinstance(steps, Trajectory):
        if not isinstance(steps.steps, Tensor):
            raise TypeError("steps must be a Trajectory of one K: pass trajectory.steps[K]")
        steps = steps.steps
    if isinstance(steps, Tensor):
        return trajectory_nodes(steps, last)
    steps = checks.positive_int("steps", steps)
    if steps > last:
        raise ValueError(f"steps must be at most {last}, the schedule's times; got {steps}")
    return torch.tensor([last]) if steps == 1 else torch.linspace(1, last, steps, dtype=torch.float64).round().long()
