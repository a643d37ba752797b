"""What a sampler does between two calls of its network, in one pass: guidance, x0, clamp, mean and noise.

The operators are in ``operators.py``, the loop over steps is :func:`fastgen.sample`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..core import checks, dispatch
from ..core.autograd import apart, needs_grad
from ..schedule import NoiseSchedule
from ..triton_kernels.layout import arithmetic_dtype
from . import operators, reference
from .reference import StepCoefficients, randn_like

__all__ = [
    "StepCoefficients",
    "guidance",
    "langevin_step",
    "langevin_step_",
    "posterior_sample",
    "reverse_step",
    "reverse_step_",
    "step_coefficients",
]

VARIANCES = ("beta_tilde", "beta")


def step_coefficients(
    schedule: NoiseSchedule,
    s: int | Tensor,
    t: int | Tensor,
    *,
    method: Literal["ddpm", "ddim"] = "ddpm",
    eta: float = 0.0,
    variance: Literal["beta_tilde", "beta"] | Tensor = "beta_tilde",
    use_clipped_model_output: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> StepCoefficients:
    """The numbers of :func:`reverse_step` from time t to time s, any two of a discrete schedule.

    With ``β̄ = 1 - ᾱ``, ``β_{t|s} = 1 - ᾱ_t/ᾱ_s`` and ``β̃ = β_{t|s} β̄_s/β̄_t``:

    ========== =================================================================== ============================
    method     mean                                                                variance
    ========== =================================================================== ============================
    ``"ddpm"`` ``√ᾱ_s β_{t|s}/β̄_t x̂0 + √(ᾱ_t/ᾱ_s) β̄_s/β̄_t x_t``                     β̃, or ``β_{t|s}``
    ``"ddim"`` ``√ᾱ_s x̂0 + √(β̄_s - λ²) ε̂``                                          ``λ² = eta² β̃``
    ========== =================================================================== ============================

    Args:
        schedule: a discrete one.
        s, t: both ints, or both integer tensors [B]; ``-1 <= s < t < num_timesteps``, where s = -1 is the data itself,
            whose variance is 0. They are the schedule's times, one less than the nodes of a trajectory.
        method: DDPM (arXiv 2006.11239) or DDIM (arXiv 2010.02502).
        eta: from 0, deterministic, to 1; for DDIM.
        variance: DDPM's choice; or σ² itself, float32 or float64 like t, for either method's mean. Analytic-DPM's
            (arXiv 2201.06503) is :func:`fastgen.reverse_variance` of nodes ``s + 1`` and ``t + 1``.
        use_clipped_model_output: DDIM's ε̂ comes from the clamped x̂0; as of diffusers. By default from the unclamped.
        dtype: float32, or float64 for float64 images. What is computed is float64 until the end.
        device: where ints' numbers go; the CPU if None. Tensors' stay with t.

    Returns:
        :class:`StepCoefficients`, [B], or [1] for ints: numbers for all rows. No host sync for tensors, whose values
        are not looked at.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> schedule = fastgen.NoiseSchedule.from_alphas_cumprod(torch.tensor([0.8, 0.5]))
        >>> k = fastgen.step_coefficients(schedule, 0, 1, method="ddim")
        >>> k.x0, k.eps, k.noise
        (tensor([0.8944]), tensor([0.4472]), tensor([0.]))
    """
    operators.check_discrete(schedule)
    checks.choice("method", method, ("ddpm", "ddim"))
    eta = checks.share("eta", eta)
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be float32 or float64, got {dtype}")
    s, t = operators.checked_times(schedule, s, t)
    if isinstance(variance, Tensor):
        operators.check_row_numbers("variance", variance, t)
    else:
        checks.choice("variance", variance, VARIANCES)
        if method == "ddim" and variance != "beta_tilde":
            raise ValueError("variance 'beta' is DDPM's; DDIM's is set by eta")
    k = reference.step_coefficients(
        schedule,
        s,
        t,
        method=method,
        eta=eta,
        variance=variance,
        use_clipped_model_output=use_clipped_model_output,
        dtype=dtype,
    )
    return k if device is None else StepCoefficients(*(v.to(device) for v in k))


def reverse_step(
    x_t: Tensor,
    cond: Tensor,
    coefficients: StepCoefficients,
    *,
    prediction_type: str = "epsilon",
    uncond: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    noise: Tensor | None = None,
    clamp: tuple[float, float] | None = None,
) -> Tensor:
    """All that lies between a network's output and its next input, in one pass over memory.

    .. math:: x_s = k_{x0} clamp(x̂_0) + k_{x_t} x_t + k_{eps} ε̂ + k_{noise} z

    where x̂0 and ε̂ are what the guided prediction ``uncond + s (cond - uncond)`` means at x_t
    (:func:`fastgen.prediction_to_x0`), and the coefficients are those of :func:`step_coefficients`.

    Args:
        x_t: [B, …], any floating dtype.
        cond: the network's output there, like `x_t`; dtypes may differ.
        coefficients: each [B] or [1], float32 or float64. Make your own for other samplers.
        prediction_type: ``"epsilon"``, ``"sample"``, ``"v_prediction"`` or ``"flow_prediction"``.
        uncond: its output without the condition, for guidance.
        guidance_scale: s, a number, or float32 or float64 [B]; 1 is no guidance. Codes that add ``s (cond - uncond)``
            to ``cond`` use s + 1 here.
        noise: z, standard normal, like `x_t`. None leaves the term out, whatever its coefficient: the mean. (For a
            variance of each pixel, scale the noise, and let its coefficient be 1.)
        clamp: (low, high) of x̂0, such as (-1, 1) for images; not for latents. ε̂ is of the unclamped x̂0
            (see `use_clipped_model_output` of :func:`step_coefficients`).

    Returns:
        x_s in the dtype of `x_t`, computed in float32 (float64 if an input is). Where gradients are on and an input
        requires one (a coefficient or `guidance_scale` too), plain PyTorch computes it, differentiably but not fused.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> schedule = fastgen.NoiseSchedule.linear(1000)
        >>> x_t, pred = torch.ones(1, 3), torch.zeros(1, 3)
        >>> k = fastgen.step_coefficients(schedule, 499, 999, method="ddim")
        >>> fastgen.reverse_step(x_t, pred, k, clamp=(-1.0, 1.0))
        tensor([[0.2803, 0.2803, 0.2803]])
    """
    streams = operators.check_step(x_t, cond, coefficients, prediction_type, uncond, guidance_scale, noise, clamp)
    backend = dispatch.backend_for("reverse_step", x_t.device.type)
    if backend == "reference" or _needs_grad(streams, coefficients, guidance_scale):
        return reference.reverse_step(
            x_t,
            cond,
            coefficients,
            prediction_type=prediction_type,
            uncond=uncond,
            guidance_scale=guidance_scale,
            noise=noise,
            clamp=clamp,
        )
    return operators.launch_step(
        operators.reverse_step,
        backend,
        x_t,
        cond,
        coefficients,
        prediction_type=prediction_type,
        uncond=uncond,
        guidance_scale=operators.scale_vector(guidance_scale, uncond, streams),
        noise=noise,
        clamp=clamp,
    )


def _needs_grad(streams: list[Tensor], coefficients: StepCoefficients, guidance_scale: float | Tensor) -> bool:
    scale = [guidance_scale] if isinstance(guidance_scale, Tensor) else []
    return needs_grad(*streams, *coefficients, *scale)


def reverse_step_(
    x_t: Tensor,
    cond: Tensor,
    coefficients: StepCoefficients,
    *,
    prediction_type: str = "epsilon",
    uncond: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    noise: Tensor | None = None,
    clamp: tuple[float, float] | None = None,
) -> Tensor:
    """:func:`reverse_step` in place: x_t becomes x_s, and no other image is allocated.

    Args:
        x_t: written to. Its rows must be packed and all streams laid out alike, as contiguous ones or those of one
            memory format are; else a copy is made. Other tensors may be `x_t` itself, but must not overlap it shifted.
        cond, coefficients, prediction_type, uncond, guidance_scale, noise, clamp: as of :func:`reverse_step`.

    Returns:
        `x_t`.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.
        RuntimeError: where gradients are on and an input requires one.

    Example::

        >>> import torch, fastgen
        >>> k = fastgen.step_coefficients(fastgen.NoiseSchedule.linear(1000), -1, 0)
        >>> x = torch.ones(1, 2)
        >>> fastgen.reverse_step_(x, torch.zeros(1, 2), k, prediction_type="sample") is x, x
        (True, tensor([[0., 0.]]))
    """
    streams = operators.check_step(x_t, cond, coefficients, prediction_type, uncond, guidance_scale, noise, clamp)
    if _needs_grad(streams, coefficients, guidance_scale):
        raise RuntimeError("reverse_step_ has no derivative: use reverse_step, or torch.no_grad()")
    backend = dispatch.backend_for("reverse_step_", x_t.device.type)
    if backend == "reference" or not operators.in_place(*streams):
        x_s = reverse_step(
            x_t,
            cond,
            coefficients,
            prediction_type=prediction_type,
            uncond=uncond,
            guidance_scale=guidance_scale,
            noise=noise,
            clamp=clamp,
        )
        return x_t.copy_(x_s)
    operators.launch_step(
        operators.reverse_step_,
        backend,
        x_t,
        cond,
        coefficients,
        prediction_type=prediction_type,
        uncond=uncond,
        guidance_scale=operators.scale_vector(guidance_scale, uncond, streams),
        noise=noise,
        clamp=clamp,
    )
    _tell_autograd(x_t)
    return x_t


def _tell_autograd(x: Tensor) -> None:
    """That a kernel has written to x: else a backward that has saved x would use what is no longer there."""
    # A compiled graph copies its results to what it changes; tensors of inference mode have no version.
    if not torch.compiler.is_compiling() and not x.is_inference():
        torch.autograd.graph.increment_version(x)


def guidance(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598), fused and differentiable: ``uncond + scale (cond - uncond)``.

    Args:
        cond, uncond: a network's outputs with and without the condition [B, …], any floating dtypes.
        scale: a number, or float32 or float64 [B]; 1 is no guidance. Codes that add ``scale (cond - uncond)`` to
            ``cond`` use scale + 1 here.

    Returns:
        In the promoted dtype of the two, computed in float32 (float64 if an input is). Gradients flow to `cond` and
        `uncond`, any number of times.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> fastgen.guidance(torch.ones(1, 2), torch.zeros(1, 2), 7.5)
        tensor([[7.5000, 7.5000]])
    """
    checks.streams(cond=cond, uncond=uncond)
    operators.check_number_or_rows("scale", scale, cond)
    backend = dispatch.backend_for("guidance", cond.device.type)
    if backend == "reference":
        return reference.guidance(cond, uncond, scale)
    scale = operators.vector(scale, cond, uncond)
    if needs_grad(cond, uncond):
        return operators.Guidance.apply(backend, *apart(cond, uncond, scale))
    return operators.guidance(backend, cond=cond, uncond=uncond, scale=scale)


def posterior_sample(
    schedule: NoiseSchedule,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    *,
    s: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A sample of ``q(x_s | x_t, x0)``, as Denoising Diffusion GANs take it (arXiv 2112.07804); fused, differentiable.

    .. math:: x_s = \\frac{\\sqrt{ᾱ_s} β_{t|s}}{1 - ᾱ_t} x_0
        + \\frac{\\sqrt{ᾱ_t/ᾱ_s} (1 - ᾱ_s)}{1 - ᾱ_t} x_t + \\sqrt{β̃} ε

    with ``β_{t|s} = 1 - ᾱ_t/ᾱ_s`` and ``β̃ = β_{t|s} (1 - ᾱ_s)/(1 - ᾱ_t)``. At s = -1, clean data, that is x0: no noise.

    Args:
        schedule: a discrete one; DDGAN's has 2 to 4 steps of ``vp``.
        x0: the generator's output [B, …], any floating dtype.
        x_t: like `x0`.
        t: integers [B] in [0, num_timesteps), any mix of them.
        s: integers [B], ``-1 <= s < t``; t - 1 if None.
        noise: ε, like `x0`; drawn if None.
        generator: for that.

    Returns:
        x_s, in the dtype of `x_t`, computed in float32 (float64 if an input is). Gradients flow to `x0`, `x_t` and
        `noise`, any number of times. No host sync.

    Raises:
        TypeError, ValueError: naming the argument that does not fit. The values in `t` and `s` are not looked at.

    Example::

        >>> import torch, fastgen
        >>> schedule = fastgen.NoiseSchedule.from_alphas_cumprod(torch.tensor([0.9, 0.5]))
        >>> x0, x_t, t = torch.ones(2, 3), torch.zeros(2, 3), torch.tensor([0, 1])
        >>> fastgen.posterior_sample(schedule, x0, x_t, t, noise=torch.zeros(2, 3))
        tensor([[1.0000, 1.0000, 1.0000],
                [0.8433, 0.8433, 0.8433]])
    """
    operators.check_discrete(schedule)
    checks.streams(x0=x0, x_t=x_t, **checks.given(noise=noise))
    t = checks.indices("t", t, x_t)
    s = t - 1 if s is None else checks.indices("s", s, x_t)
    if noise is None:
        noise = randn_like(x_t, generator)
    backend = dispatch.backend_for("reverse_step", x_t.device.type)
    if backend == "reference":
        return reference.posterior_sample(schedule, x0, x_t, t, s=s, noise=noise)
    dtype = arithmetic_dtype(x0, x_t, noise)
    k = reference.step_coefficients(schedule, s, t, dtype=dtype)
    if needs_grad(x0, x_t, noise):
        return operators.Posterior.apply(backend, *apart(x0, x_t, noise, k.x0, k.x_t, k.noise))
    return operators.launch_mix(operators.reverse_step, backend, x_t, x0, noise, k.x_t, k.x0, k.noise)


def langevin_step(
    x: Tensor,
    grad: Tensor,
    step_size: float | Tensor,
    noise_scale: float | Tensor,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One step of Langevin dynamics, fused: ``x + step_size · grad + noise_scale · noise``.

    With `grad` the score ``∇ log p(x)``, ``step_size = ε²/2`` and ``noise_scale = ε`` this samples p; JEM
    (arXiv 1912.03263) takes ``∇ logsumexp f(x)``, 1 and 0.01.

    Args:
        x: [B, …], any floating dtype.
        grad: like `x`.
        step_size: a number, or float32 or float64 [B].
        noise_scale: likewise.
        noise: like `x`; standard normal if None.
        generator: for that.

    Returns:
        The next x, in x's dtype, computed in float32 (float64 if an input is). No gradient flows through it: samples
        of a chain are constants.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> x = torch.zeros(1, 3)
        >>> fastgen.langevin_step(x, torch.ones(1, 3), 0.5, 0.1, noise=torch.ones(1, 3))
        tensor([[0.6000, 0.6000, 0.6000]])
    """
    noise = operators.check_langevin(x, grad, step_size, noise_scale, noise, generator)
    backend = dispatch.backend_for("reverse_step", x.device.type)
    if backend == "reference":
        return reference.langevin_step(x, grad, step_size, noise_scale, noise=noise)
    numbers = operators.langevin_numbers(x, grad, step_size, noise_scale, noise)
    with torch.no_grad():
        return operators.launch_mix(operators.reverse_step, backend, x, grad, noise, *numbers)


def langevin_step_(
    x: Tensor,
    grad: Tensor,
    step_size: float | Tensor,
    noise_scale: float | Tensor,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """:func:`langevin_step` in place: x becomes the next x. With `noise` given, no other image is allocated.

    Args:
        x: written to, also where it is a leaf that requires a gradient. Its rows must be packed and all streams laid
            out alike; else a copy is made. Other tensors may be `x` itself, but must not overlap it shifted.
        grad, step_size, noise_scale, noise, generator: as of :func:`langevin_step`.

    Returns:
        `x`.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> x = torch.zeros(1, 3)
        >>> fastgen.langevin_step_(x, torch.ones(1, 3), 0.5, 0.1, noise=torch.ones(1, 3)) is x, x
        (True, tensor([[0.6000, 0.6000, 0.6000]]))
    """
    noise = operators.check_langevin(x, grad, step_size, noise_scale, noise, generator)
    backend = dispatch.backend_for("reverse_step_", x.device.type)
    with torch.no_grad():
        if backend == "reference" or not operators.in_place(x, grad, noise):
            return x.copy_(langevin_step(x, grad, step_size, noise_scale, noise=noise))
        numbers = operators.langevin_numbers(x, grad, step_size, noise_scale, noise)
        operators.launch_mix(operators.reverse_step_, backend, x, grad, noise, *numbers)
    _tell_autograd(x)
    return x
