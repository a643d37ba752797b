"""Policy gradients for flow models: the stochastic step, its log-probability, and the clipped loss of ratios."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from ..core import checks, distributed
from ..core.autograd import apart, needs_grad, once_differentiable
from ..triton_kernels.layout import arithmetic_dtype
from . import operators, reference
from .reference import FlowStep

__all__ = ["GrpoStats", "flow_sde_step", "grpo_loss"]

REDUCTIONS = ("mean", "sum", "none")


class _FlowStep(torch.autograd.Function):
    """Mean and log-probability as functions of the prediction."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, pred: Tensor, x_t: Tensor, sample: Tensor, k_x: Tensor, k_v: Tensor, std: Tensor
    ) -> tuple[Tensor, Tensor]:
        mean, log_prob = operators.flow_sde_step(backend, pred=pred, x_t=x_t, sample=sample, k_x=k_x, k_v=k_v, std=std)
        # pred is kept for second derivatives alone, which have to reach it to be refused.
        ctx.save_for_backward(pred, sample, mean, k_v, std)
        ctx.backend, ctx.dtype = backend, pred.dtype
        ctx.set_materialize_grads(False)
        return mean, log_prob

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor | None, grad_log_prob: Tensor | None) -> Any:
        if grad_mean is None and grad_log_prob is None:
            return (None,) * 7
        with torch.no_grad():
            pred, sample, mean, k_v, std = ctx.saved_tensors
            grad = operators.flow_sde_step_backward(
                ctx.backend,
                grad_log_prob=std.new_zeros(std.shape) if grad_log_prob is None else grad_log_prob,
                sample=sample,
                mean=mean,
                grad_mean=grad_mean,
                k_v=k_v,
                std=std,
                dtype=ctx.dtype,
            )
        if torch.is_grad_enabled():
            given = tuple(g for g in (grad_mean, grad_log_prob) if g is not None)
            (grad,) = once_differentiable((grad,), (pred, *given))
        return None, grad, None, None, None, None, None


def flow_sde_step(
    pred: Tensor,
    x_t: Tensor,
    t: float | Tensor,
    t_next: float | Tensor,
    *,
    noise_level: float = 0.7,
    noise: Tensor | None = None,
    sample: Tensor | None = None,
    t_max: float | None = None,
) -> FlowStep:
    """A stochastic step of a flow model and the log-probability of where it went (Flow-GRPO, arXiv 2505.05470).

    .. math::
        s^2 = η^2 \\frac{t}{1 - t}, \\quad dt = t_{next} - t < 0, \\quad
        μ = x_t (1 + \\tfrac{s^2}{2t} dt) + v (1 + \\tfrac{s^2 (1-t)}{2t}) dt, \\quad S = s \\sqrt{-dt}

        x' = μ + S ε, \\qquad \\log p = mean_D [ -\\tfrac{(x' - μ)^2}{2 S^2} ] - \\log S - \\tfrac12 \\log 2π

    which keeps the marginals of the flow ``x_t = (1 - t) x_0 + t noise``. While sampling, draw x' or give its noise;
    while training, give the `sample` that was drawn, and the mean and the log-probability are made again as functions
    of `pred`. Either is one pass; a draw that `pred` is to be learnt from takes both. The log-probability is of x' as
    it is stored: rounded to the dtype of x_t.

    Args:
        pred: the network's velocity v = noise - x0 at x_t [B, …], in float32, bfloat16, float16 or float64. Gradients
            flow to it, and to it alone, through `log_prob` and `mean`.
        x_t: like `pred`; its dtype may differ. float32 is advised: what bfloat16 loses of a step of size S is noise
            that no log-probability knows of.
        t, t_next: numbers, or float32 or float64 [B]: ``0 <= t_next < t <= 1``.
        noise_level: η > 0.
        noise: ε, like `x_t`; drawn if neither it nor `sample` is given.
        sample: x', like `x_t`; not together with `noise`.
        t_max: what stands for t in ``1 - t`` where t = 1, a number below 1; `t_next` if None.

    Returns:
        :class:`FlowStep`. A row whose times are out of range is NaN as a whole; non-finite elements stay in their row.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    The ratio of two such log-probabilities is not 1 where the network's outputs differ for other reasons than its
    parameters, as in bfloat16 with another batch size; with a clip of 1e-4 that can be all there is. See
    :func:`grpo_loss`. A penalty to a reference is ``elbo_error(step.mean, ref_step.mean, weight=0.5 / step.std**2)``.

    Example::

        >>> import torch, fastgen
        >>> v, x = torch.ones(1, 4), torch.zeros(1, 4)
        >>> with torch.no_grad():
        ...     drawn = fastgen.flow_sde_step(v, x, 0.5, 0.25, noise=torch.ones(1, 4))
        >>> again = fastgen.flow_sde_step(v.requires_grad_(), x, 0.5, 0.25, sample=drawn.sample)
        >>> again.log_prob.backward()
        >>> drawn.sample[0, 0], v.grad[0, 0]
        (tensor(0.0387), tensor(-0.2223))
    """
    given = checks.given(noise=noise, sample=sample)
    checks.streams(pred=pred, x_t=x_t, **given)
    if len(given) == 2:
        raise ValueError("noise and sample exclude each other: a step that was taken has its noise")
    start, end = _times("t", t, x_t), _times("t_next", t_next, x_t)
    noise_level = checks.number("noise_level", noise_level, low=0, open_low=True)
    if t_max is not None:
        t_max = checks.share("t_max", t_max)
        if t_max == 1:
            raise ValueError("t_max must be below 1, got 1")
    backend = distributed.backend_of(operators.flow_sde_step.name, pred)
    if sample is None and noise is None:
        noise = torch.randn_like(x_t)
    if backend == "reference":
        times = (_of_rows(t, x_t) for t in (start, end))
        return reference.flow_sde_step(
            pred, x_t, *times, noise_level=noise_level, noise=noise, sample=sample, t_max=t_max
        )
    k_x, k_v, std = _coefficients(start, end, noise_level, t_max, x_t, arithmetic_dtype(pred, x_t))
    numbers = {"k_x": k_x, "k_v": k_v, "std": std}
    if noise is not None:
        rows = {"x_t": x_t.detach(), "pred": pred.detach(), "noise": noise.detach()}
        sample, mean, log_prob = operators.flow_sde_draw(backend, **rows, **numbers)
        if not needs_grad(pred):
            return FlowStep(sample, log_prob, mean, std)
    assert sample is not None  # one of the two is there
    sample = sample.detach()
    if needs_grad(pred):
        mean, log_prob = _FlowStep.apply(*apart(backend, pred, x_t.detach(), sample, k_x, k_v, std))
    else:
        mean, log_prob = operators.flow_sde_step(backend, pred=pred, x_t=x_t, sample=sample, **numbers)
    return FlowStep(sample, log_prob, mean, std)


def _times(name: str, value: float | Tensor, like: Tensor) -> float | Tensor:
    if not isinstance(value, Tensor):
        return checks.number(name, value)
    checks.per_row(name, value, like)
    return value


def _of_rows(value: float | Tensor, like: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    return value if isinstance(value, Tensor) else like.new_full((like.shape[0],), value, dtype=dtype)


def _coefficients(
    t: float | Tensor, t_next: float | Tensor, noise_level: float, t_max: float | None, like: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """k_x, k_v and std [B]. Of two numbers they are numbers too, which spares a GPU some twenty tiny kernels a step."""
    if isinstance(t, Tensor) or isinstance(t_next, Tensor):
        numbers = reference.flow_sde_coefficients(_of_rows(t, like), _of_rows(t_next, like), noise_level, t_max)
        k_x, k_v, std = (n.to(dtype) for n in numbers)
        return k_x, k_v, std
    of_all = (math.nan,) * 3
    if 0 <= t_next < t <= 1:
        top = t if t < 1 else t_next if t_max is None else t_max
        square, dt = noise_level**2 * t / (1 - top), t_next - t
        pull, deviation = square / (2 * t) * dt, math.sqrt(square * -dt)
        if deviation > 0:
            of_all = 1 + pull, dt + pull * (1 - t), deviation
    k_x, k_v, std = (_of_rows(number, like, dtype) for number in of_all)
    return k_x, k_v, std


class GrpoStats(NamedTuple):
    """What :func:`grpo_loss` saw, as 0-dimensional device tensors without a graph.

    `ratio` is the mean ratio, `clipped` the share of terms that the clip cut off from the gradient, `kl` the estimate
    ``½ mean (log_prob - old_log_prob)²`` of the divergence from the policy that sampled.

    Example::

        >>> import torch, fastgen
        >>> log_prob, advantages = torch.tensor([0.0, 0.1]), torch.ones(2)
        >>> _, stats = fastgen.grpo_loss(log_prob, torch.zeros(2), advantages, return_stats=True)
        >>> stats.clipped
        tensor(0.5000)
    """

    ratio: Tensor
    clipped: Tensor
    kl: Tensor


@overload
def grpo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    clip: float = ...,
    advantage_clip: float = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...
@overload
def grpo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    clip: float = ...,
    advantage_clip: float = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, GrpoStats]: ...
@overload
def grpo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    clip: float = ...,
    advantage_clip: float = ...,
    reduction: Literal["mean", "sum", "none"] = ...,
    return_stats: bool,
) -> Tensor | tuple[Tensor, GrpoStats]: ...
def grpo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    clip: float = 1e-4,
    advantage_clip: float = 5.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, GrpoStats]:
    """The clipped policy-gradient loss of Flow-GRPO (arXiv 2505.05470) and DanceGRPO (arXiv 2505.07818), a step each.

    .. math:: L = -\\min(A ρ, A · clip(ρ, 1 - ε, 1 + ε)), \\qquad ρ = e^{\\log p - \\log p_{old}}

    Args:
        log_prob: log p of :func:`flow_sde_step`, float32 or float64, of any shape, such as [B]. Gradients flow to it,
            and to it alone.
        old_log_prob: like `log_prob`: of the policy that sampled.
        advantages: A, like `log_prob`; clamped to ±`advantage_clip`.
        clip: ε ≥ 0. 1e-4 is Flow-GRPO's: its log-probabilities are means over a sample's elements.
        advantage_clip: > 0.
        reduction: over all terms; ``"none"`` returns each.
        return_stats: also return :class:`GrpoStats`.

    Returns:
        The loss, or ``(loss, stats)``. What is not finite makes its own term so. Without terms the mean is 0.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> log_prob = torch.zeros(2, requires_grad=True)
        >>> fastgen.grpo_loss(log_prob, torch.zeros(2), torch.tensor([1.0, -2.0])).backward()
        >>> log_prob.grad
        tensor([-0.5000,  1.0000])
    """
    for name, value in (("log_prob", log_prob), ("old_log_prob", old_log_prob), ("advantages", advantages)):
        checks.tensor(name, value)
        if value.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be float32 or float64, got {value.dtype}")
        if value.shape != log_prob.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, but log_prob has {tuple(log_prob.shape)}")
        if value.device != log_prob.device:
            raise ValueError(f"{name} is on {value.device}, but log_prob is on {log_prob.device}")
    clip = checks.number("clip", clip, low=0)
    bound = checks.number("advantage_clip", advantage_clip, low=0, open_low=True)
    checks.choice("reduction", reduction, REDUCTIONS)
    difference = log_prob - old_log_prob.detach()
    ratio = difference.exp()
    advantage = advantages.detach().clamp(-bound, bound)
    free, held = -advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)
    term = torch.maximum(free, held)
    count = max(term.numel(), 1)
    loss = term if reduction == "none" else term.sum() / (count if reduction == "mean" else 1)
    if not return_stats:
        return loss
    with torch.no_grad():
        clipped = (held > free).to(term.dtype)
        return loss, GrpoStats(*(part.sum() / count for part in (ratio, clipped, 0.5 * difference.square())))
