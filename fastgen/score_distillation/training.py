"""A distillation step besides its loss: noise levels, the fake network's loss, inputs of few-step generators."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..core import checks, distributed
from ..elbo import elbo_error
from ..schedule import PREDICTION_TYPES, NoiseSchedule, check_schedule, prediction_target

__all__ = ["backward_simulation", "f_distill_weight", "fake_score_loss", "renoise_times"]

RULES = ("uniform", "cleaner", "beta")

# h of a density ratio, data over fakes.
F_DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "forward_kl": lambda ratio: ratio,
    "js": lambda ratio: ratio / (1 + ratio),
    "squared_hellinger": torch.sqrt,
    "softened_reverse_kl": lambda ratio: 1 / (1 + ratio),
    "neyman": torch.reciprocal,
    "jeffreys": lambda ratio: 1 + ratio,
}


def f_distill_weight(
    logits: Tensor,
    divergence: Literal[
        "reverse_kl", "forward_kl", "js", "squared_hellinger", "softened_reverse_kl", "neyman", "jeffreys"
    ],
    *,
    ratio_bounds: tuple[float, float] = (0.1, 20.0),
    group: Any = None,
) -> Tensor:
    """f-distill (arXiv 2502.15681): the weight that makes :func:`fastgen.dmd_loss`, a reverse KL, another f-divergence.

    .. math:: w_i = \\frac{h(ρ_i)}{mean_B h(ρ) + 10^{-6}}, \\qquad ρ = clamp(e^{clamp(mean\\ logit, ±10)})

    ========================= ============ ========================= =========
    `divergence`              h(ρ)         `divergence`              h(ρ)
    ========================= ============ ========================= =========
    ``"reverse_kl"``          1            ``"softened_reverse_kl"`` 1/(1 + ρ)
    ``"forward_kl"``          ρ            ``"neyman"``              1/ρ
    ``"js"``                  ρ/(1 + ρ)    ``"jeffreys"``            1 + ρ
    ``"squared_hellinger"``   √ρ
    ========================= ============ ========================= =========

    Args:
        logits: of a discriminator of data against fakes, at the renoised fakes, [B, …] in any floating dtype; several
            logits of a sample count by their mean.
        divergence: one of the seven.
        ratio_bounds: what ρ is clamped to, ``0 < low <= high``.
        group: a ``torch.distributed`` process group over which the mean is taken.

    Returns:
        w [B], float32 (float64 if the logits are), without a graph. A NaN logit makes all weights NaN.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> fastgen.f_distill_weight(torch.tensor([0.0, 3.0]), "squared_hellinger")
        tensor([0.3655, 1.6345])
    """
    checks.streams(logits=logits)
    checks.choice("divergence", divergence, tuple(F_DIVERGENCES))
    low, high = ratio_bounds
    low, high = checks.number("ratio_bounds[0]", low, low=0, open_low=True), checks.number("ratio_bounds[1]", high)
    if low > high:
        raise ValueError(f"ratio_bounds must be (low, high) with low <= high, got {ratio_bounds}")
    wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
    ratio = wide.unsqueeze(-1).flatten(1).mean(1).clamp(-10, 10).exp().clamp(low, high)
    h = F_DIVERGENCES[divergence](ratio)
    return h / (distributed.batch_mean(h, group) + 1e-6)


def renoise_times(
    n: int,
    rule: Literal["uniform", "cleaner", "beta"] = "uniform",
    *,
    low: float = 0.02,
    high: float = 0.98,
    generator_times: Tensor | None = None,
    progress: float = 0.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Noise levels τ at which a distillation loss compares the two networks, as fractions: 0 is clean, 1 is noise.

    ============= =========================================================================================
    ``"uniform"`` uniform in [low, high]: DMD and DMD2, and the DM term of Decoupled DMD
    ``"cleaner"`` uniform in [low, min(high, t)] with t of `generator_times`: levels cleaner than what the
                  generator was given, for the CA term of Decoupled DMD (arXiv 2511.22677)
    ``"beta"``    low + (high - low) Beta(a, b) with (a, b) = (4, 1.5) at `progress` 0, which prefers high
                  noise, going linearly to (1, 1), the uniform distribution, at `progress` 1 (arXiv 2511.13649)
    ============= =========================================================================================

    Args:
        n: how many, at least 1.
        rule: one of the three.
        low, high: 0 ≤ low < high ≤ 1.
        generator_times: [n] float32 or float64, the fractions of the generator's inputs; for ``"cleaner"`` alone.
            Where t < low, τ = t.
        progress: how much of the annealing is done, in [0, 1]; for ``"beta"``.
        generator, device: of the random numbers; `device` is the generator's if None.

    Returns:
        τ float32 [n]. For a discrete schedule of N steps take ``(τ * N).long().clamp(max=N - 1)``; for EDM
        ``sigma_min * (sigma_max / sigma_min) ** τ`` is uniform in log σ; for a flow whose times are shifted, as in
        Self-Forcing (arXiv 2506.08009), ``NoiseSchedule.flow(shift=s).quantile_t(τ)`` is ``s τ / (1 + (s - 1) τ)``. No
        host sync.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> tau = fastgen.renoise_times(4, "cleaner", generator_times=torch.tensor([0.25, 0.5, 0.75, 1.0]))
        >>> tau.shape, bool((tau <= torch.tensor([0.25, 0.5, 0.75, 0.98])).all())
        (torch.Size([4]), True)
    """
    n = checks.positive_int("n", n)
    checks.choice("rule", rule, RULES)
    low, high = checks.number("low", low, low=0), checks.number("high", high, low=0)
    if not low < high <= 1:
        raise ValueError(f"low and high must satisfy 0 <= low < high <= 1, got {low} and {high}")
    progress = checks.share("progress", progress)
    if (generator_times is None) == (rule == "cleaner"):
        raise ValueError("generator_times is for rule='cleaner', which needs it")
    if device is None:
        device = generator.device if generator is not None else getattr(generator_times, "device", None)
    if rule == "beta":
        return low + (high - low) * _beta(n, 4 - 3 * progress, 1.5 - 0.5 * progress, generator, device)
    u = torch.rand(n, generator=generator, device=device, dtype=torch.float32)
    if generator_times is None:
        return low + (high - low) * u
    checks.tensor("generator_times", generator_times)
    checks.per_row("generator_times", generator_times, u)
    limit = generator_times.to(torch.float32).clamp(max=high)
    return limit - (limit - low).clamp(min=0) * u


def _beta(n: int, a: float, b: float, generator: torch.Generator | None, device: Any) -> Tensor:
    # torch.distributions.Beta takes no generator.
    shape = torch.tensor([[a], [b]], device=device, dtype=torch.float32).expand(2, n)
    gamma = torch._standard_gamma(shape, generator=generator)
    return gamma[0] / gamma.sum(0)


def fake_score_loss(
    pred: Tensor,
    x0: Tensor,
    noise: Tensor,
    alpha_t: Tensor,
    sigma_t: Tensor,
    *,
    prediction_type: str = "epsilon",
    weight: Tensor | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """The fake network's loss: ordinary denoising of the generator's samples, in the network's own prediction type.

    .. math:: L = mean_i w_i \\, mean_D (pred - target)^2

    as in VSD (arXiv 2305.16213) and DMD2 (arXiv 2405.14867), with the target ε, x0, v = α ε - σ x0 or u = ε - x0
    (:func:`fastgen.prediction_to_x0`).

    Args:
        pred: the fake network's output at ``add_noise(x0, noise, alpha_t, sigma_t)``, [B, …]. Gradients flow to it
            alone.
        x0: the generator's samples, as they come; detached here.
        noise: ε.
        alpha_t, sigma_t: float32 or float64 [B].
        prediction_type: ``"epsilon"``, ``"sample"``, ``"v_prediction"`` or ``"flow_prediction"``.
        weight: w, float32 or float64 [B]; 1 if None. EDM's denoiser is a ``"sample"`` network with
            ``weight=schedule.edm_weight(sigma)``.
        reduction: over the batch; ``"none"`` returns [B].

    Returns:
        The loss, float32 (float64 if an input is).

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> x0, noise, half = torch.ones(2, 3), torch.zeros(2, 3), torch.full((2,), 0.5)
        >>> fastgen.fake_score_loss(torch.zeros(2, 3), x0, noise, half, half, prediction_type="v_prediction")
        tensor(0.2500)
    """
    checks.streams(pred=pred, x0=x0, noise=noise)
    checks.choice("prediction_type", prediction_type, PREDICTION_TYPES)
    checks.choice("reduction", reduction, ("mean", "sum", "none"))
    for name, value in (("alpha_t", alpha_t), ("sigma_t", sigma_t)):
        checks.tensor(name, value)
        checks.per_row(name, value, pred)
    x0, noise = x0.detach(), noise.detach()
    target = prediction_target(x0, noise, alpha_t, sigma_t, prediction_type)
    error = elbo_error(pred, target, weight=weight)
    if reduction == "none":
        return error
    return error.sum() / (max(error.shape[0], 1) if reduction == "mean" else 1)


class Simulated(NamedTuple):
    """What :func:`backward_simulation` returns: the generator's output, its input, and the step and time of that."""

    x0: Tensor
    x_t: Tensor
    t: Tensor
    step: int


def backward_simulation(
    generator: Callable[[Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    times: Tensor,
    noise: Tensor,
    *,
    prediction_type: str = "sample",
    step: int | None = None,
    rng: torch.Generator | None = None,
) -> Simulated:
    """DMD2's backward simulation (arXiv 2405.14867): trains a few-step generator on inputs that it will meet.

    Starting from noise, the generator is rolled through the few-step schedule up to a random step, without gradient and
    with fresh noise between steps, as in sampling: ``x_t ← alpha_t x0 + sigma_t ε``. Its call at that step is the only
    one with a gradient.

    Args:
        generator: ``generator(x_t, t)`` with t [B] in the schedule's own times; returns its output, like x_t.
        schedule: where `times` are.
        times: [K] the few-step schedule, from the noisiest to the cleanest; K = 1 is a one-step generator.
        noise: [B, …] standard normal: the start is ``sigma_t`` of the first time, times it.
        prediction_type: what the generator's output is; ``"sample"``: x0 itself.
        step: which step gets the gradient; drawn uniformly from 0 to K - 1 if None.
        rng: for the step and the fresh noise; of the noise's device. If None the step comes from the global CPU
            generator and, where torch.distributed is initialised, is the same on every rank: they then share a random
            sequence that rank 0 seeds in the first call, so that no later call waits for another rank.

    Returns:
        :class:`Simulated` with x0 [B, …] (with a graph), the x_t and t it was made from, and the step, an int.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> schedule, times = fastgen.NoiseSchedule.flow(), torch.tensor([1.0, 0.75, 0.5, 0.25])
        >>> net = torch.nn.Linear(3, 3)
        >>> out = fastgen.backward_simulation(lambda x, t: net(x), schedule, times, torch.randn(2, 3), step=2)
        >>> out.x0.requires_grad, out.x_t.requires_grad, out.t
        (True, False, tensor([0.5000, 0.5000]))
    """
    checks.function("generator", generator)
    check_schedule(schedule)
    checks.streams(noise=noise)
    checks.choice("prediction_type", prediction_type, PREDICTION_TYPES)
    checks.tensor("times", times)
    if times.dim() != 1 or len(times) == 0:
        raise ValueError(f"times must have shape [K] with K >= 1, got {list(times.shape)}")
    if step is None:
        step = _random_step(len(times), rng)
    else:
        step = checks.integer("step", step)
        if not 0 <= step < len(times):
            raise ValueError(f"step must be from 0 to {len(times) - 1}, got {step}")
    times = times.to(noise.device)

    def at(k: int) -> Tensor:
        return times[k].expand(noise.shape[0])

    def denoise(x_t: Tensor, k: int) -> Tensor:
        return schedule.prediction_to_x0(generator(x_t, at(k)), x_t, at(k), prediction_type)

    with torch.no_grad():
        x_t = schedule.add_noise(torch.zeros_like(noise), noise, at(0))
        for k in range(step):
            fresh = torch.randn(noise.shape, generator=rng, dtype=noise.dtype, device=noise.device)
            x_t = schedule.add_noise(denoise(x_t, k), fresh, at(k + 1))
    return Simulated(denoise(x_t, step), x_t, at(step), step)


# By process group, and gone with it: ranks that took a new group for an old one would wait for each other for ever.
_shared_steps: weakref.WeakKeyDictionary[Any, torch.Generator] = weakref.WeakKeyDictionary()


def _random_step(steps: int, rng: torch.Generator | None) -> int:
    if rng is not None:
        return int(torch.randint(steps, (), generator=rng, device=rng.device))
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return int(torch.randint(steps, ()))
    world = distributed.group.WORLD
    if world not in _shared_steps:
        seed = [int(torch.randint(1 << 62, ()))]
        distributed.broadcast_object_list(seed, src=0)
        _shared_steps[world] = torch.Generator().manual_seed(seed[0])
    return int(torch.randint(steps, (), generator=_shared_steps[world]))
