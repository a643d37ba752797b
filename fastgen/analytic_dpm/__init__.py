"""Analytic-DPM (arXiv 2201.06503): optimal reverse variances and trajectories, from moments of noise predictions.

Nodes are the paper's timesteps, 0 … N: node 0 is the data, and node n > 0 is time n - 1 of a discrete
:class:`fastgen.NoiseSchedule`, whose ``alphas_cumprod`` has no entry for the data. ᾱ is of nodes here, so ᾱ_0 = 1;
β̄ = 1 - ᾱ and v = β̄/ᾱ. Moments and what comes of them are float64, and worked out once, before sampling: these functions
check values, and so synchronise with a GPU that moments, s or t are on. What runs in loops does not:
:meth:`ScoreMoments.update`, and :func:`pixel_reverse_variance` of s and t that are ints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from ..core import checks
from ..schedule import NoiseSchedule
from ..trajectory import FactoredCost, Trajectory, optimal_trajectory
from ..triton_kernels.layout import arithmetic_dtype
from .moments import ScoreMoments, regularize_moments
from .operators import (
    DataRange,
    Step,
    checked_moments,
    node_alphas,
    nodes_of_steps,
    radius_of,
    trajectory_nodes,
    with_data_node,
)

__all__ = [
    "ScoreMoments",
    "VariationalBound",
    "analytic_trajectory",
    "pixel_reverse_variance",
    "regularize_moments",
    "reverse_variance",
    "trajectory_cost",
    "variational_bound",
]

VARIANCES = ("analytic", "beta", "beta_tilde")


def trajectory_cost(schedule: NoiseSchedule, ms_eps: Tensor) -> FactoredCost:
    """What a step from node t to s costs the likelihood bound, ``F[s,t] = log(1 - β_{t|s} Γ_t)``, in factored form.

    The bound of a DDPM with optimal variances (arXiv 2201.06503) on nodes ``τ_1 < … < τ_K`` is
    ``½ Σ F[τ_{k-1}, τ_k]`` nats a dimension, up to what all trajectories share. With ``v = β̄/ᾱ`` and
    ``h = (1 - ms_eps)/(ᾱ Γ) = v (1 - ms_eps)/ms_eps``, ``F[s,t] = log((v_s + h_t)/(v_t + h_t))``.

    Args:
        schedule: a discrete one.
        ms_eps: float32 or float64 [N+1], positive; entry 0 takes no part. Of Monte-Carlo moments take
            :func:`regularize_moments` first: noise makes h decrease, which fakes cheap edges.

    Returns:
        A :class:`fastgen.FactoredCost` on the device of `ms_eps`, for :func:`fastgen.optimal_trajectory`.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> schedule = fastgen.NoiseSchedule.from_alphas_cumprod(torch.tensor([0.8, 0.5]))
        >>> fastgen.trajectory_cost(schedule, torch.tensor([0.0, 0.5, 0.8])).matrix()[1, 2].exp()
        tensor(0.4000, dtype=torch.float64)
    """
    alpha_bar = node_alphas(schedule)
    ms = checked_moments("ms_eps", ms_eps, alpha_bar, positive=True)
    v = (1 - alpha_bar) / alpha_bar
    h = with_data_node(v[1:] * (1 - ms[1:]) / ms[1:])
    # A decrease within the rounding of ms_eps is none: it would cost the certificate, and the solver its speed.
    highest = h.cummax(0).values
    h = torch.where(highest - h <= 4 * torch.finfo(ms_eps.dtype).eps * (v + h), highest, h)
    return FactoredCost(v.to(ms_eps.device), h.to(ms_eps.device))


@overload
def analytic_trajectory(
    schedule: NoiseSchedule,
    ms_eps: Tensor,
    num_steps: int,
    *,
    convention: Literal["nodes", "edges"] = ...,
    data_range: DataRange = ...,
) -> Trajectory[Tensor]: ...
@overload
def analytic_trajectory(
    schedule: NoiseSchedule,
    ms_eps: Tensor,
    num_steps: Sequence[int] | Literal["all"],
    *,
    convention: Literal["nodes", "edges"] = ...,
    data_range: DataRange = ...,
) -> Trajectory[Mapping[int, Tensor]]: ...
def analytic_trajectory(
    schedule: NoiseSchedule,
    ms_eps: Tensor,
    num_steps: int | Sequence[int] | Literal["all"],
    *,
    convention: Literal["nodes", "edges"] = "nodes",
    data_range: DataRange = (-1.0, 1.0),
) -> Trajectory[Tensor] | Trajectory[Mapping[int, Tensor]]:
    """The K timesteps with the best likelihood bound: :func:`regularize_moments`, :func:`trajectory_cost` and
    :func:`fastgen.optimal_trajectory` in a row.

    Analytic-DPM's (arXiv 2201.06503). Such trajectories improve the bound; whether samples look better is another
    question.

    Args:
        schedule: a discrete one.
        ms_eps: of :class:`ScoreMoments`, [N+1].
        num_steps: K, several of them, or ``"all"``.
        convention: ``"nodes"`` (the paper's): K nodes from 1 to N. ``"edges"``: K edges from 0 to N, where the least
            noisy node is chosen too, by the entropy of the data given it.
        data_range: as for :func:`regularize_moments`.

    Returns:
        A :class:`fastgen.Trajectory` of nodes.

    Raises:
        TypeError, ValueError: naming the argument that does not fit; with ``"edges"`` where regularised moments leave
            no variance to the data at node 1, as too few samples may.

    Example::

        >>> import torch, fastgen
        >>> schedule = fastgen.NoiseSchedule.cosine(100)
        >>> v = (1 - schedule.alphas_cumprod) / schedule.alphas_cumprod
        >>> gamma = (v / (v + 0.5) + v / (v + 0.001)) / 2  # Gaussian data, half of whose dimensions hardly vary
        >>> ms_eps = torch.cat([torch.zeros(1), gamma])
        >>> fastgen.analytic_trajectory(schedule, ms_eps, 5).steps
        tensor([  1,   4,  10,  23, 100])
    """
    cost = trajectory_cost(schedule, regularize_moments(schedule, ms_eps, data_range=data_range))
    if convention == "edges" and not bool(cost.h[1] > 0):
        raise ValueError(
            "ms_eps leaves the data no variance at node 1 (it is about 1 or more there), which has no finite cost with"
            " convention='edges': gather more samples, or take 'nodes'"
        )
    return optimal_trajectory(cost, num_steps, convention=convention)


def reverse_variance(
    schedule: NoiseSchedule,
    ms_eps: Tensor,
    s: int | Tensor,
    t: int | Tensor,
    *,
    eta: float = 1.0,
    data_range: DataRange = (-1.0, 1.0),
) -> Tensor:
    """The optimal variance of the reverse step from node t to node s (Analytic-DPM, arXiv 2201.06503, theorem 1).

    .. math:: σ²(s,t) = λ² + (√ᾱ_s - √((β̄_s - λ²) ᾱ_t/β̄_t))² cov_t, \\quad
              λ² = η² \\tilde β, \\quad cov_t = clip(v_t (1 - ms\\_eps_t), 0, ((b-a)/2)²)

    with ``β̃ = β_{t|s} β̄_s/β̄_t``. cov_t is the mean variance of the data given x_t. The clip is theorem 2:
    ``λ² ≤ σ² ≤ λ² + (√(β̄_t/α_{t|s}) - √(β̄_s - λ²))²``, and what the data's range allows.

    Args:
        schedule: a discrete one.
        ms_eps: of :class:`ScoreMoments` or :func:`regularize_moments`, float32 or float64 [N+1].
        s, t: nodes, ints or integer tensors of shapes that broadcast, 0 ≤ s < t ≤ N.
        eta: 1 is DDPM, 0 is DDIM; from 0 to 1.
        data_range: (a, b), or None for data without bounds.

    Returns:
        σ², float64, of the broadcast shape, on the device of `ms_eps`.

    Raises:
        TypeError, ValueError: naming the argument that does not fit; a t whose moments are NaN is named.

    Example::

        >>> import torch, fastgen
        >>> schedule = fastgen.NoiseSchedule.from_alphas_cumprod(torch.tensor([0.8, 0.5]))
        >>> ms_eps, nodes = torch.tensor([0.0, 0.4, 0.6]), torch.tensor([0, 1, 2])
        >>> fastgen.reverse_variance(schedule, ms_eps, nodes[:-1], nodes[1:])
        tensor([0.1500, 0.3300], dtype=torch.float64)
    """
    alpha_bar = node_alphas(schedule)
    ms = checked_moments("ms_eps", ms_eps, alpha_bar, finite=False)
    s, t = nodes_of_steps(s, t, len(alpha_bar) - 1)
    unknown = ~torch.isfinite(ms[t])
    if bool(unknown.any()):
        raise ValueError(f"ms_eps is not finite at t = {int(t[unknown].flatten()[0])}: were samples seen there?")
    step = Step.of(alpha_bar, s, t, checks.share("eta", eta))
    cov = (step.ratio * (1 - ms[t])).clamp(0, radius_of(data_range) ** 2)
    return (step.floor + step.gain.square() * cov).to(ms_eps.device)


def pixel_reverse_variance(
    schedule: NoiseSchedule,
    head: Tensor,
    s: int | Tensor,
    t: int | Tensor,
    *,
    pred: Tensor | None = None,
    eta: float = 1.0,
    data_range: DataRange = (-1.0, 1.0),
) -> Tensor:
    """:func:`reverse_variance` for each pixel, from a second head of the network (arXiv 2206.07309).

    NPR-DPM's head learns the squared residual of the noise prediction, ``E[(ε - ε̂)² | x_t]``, and
    ``cov = v_t head``; SN-DPM's learns the squared noise, ``E[ε² | x_t]``, and ``cov = v_t (head - ε̂²)``. Either is
    clipped to ``[0, ((b - a)/2)²]`` pixel by pixel.

    Args:
        schedule: a discrete one.
        head: the head's output [B, …], any floating dtype.
        s, t: nodes, ints or integer tensors [B], 0 ≤ s < t ≤ N.
        pred: ε̂ like `head`: SN-DPM. None: NPR-DPM.
        eta, data_range: as for :func:`reverse_variance`.

    Returns:
        σ² [B, …], float32 (float64 if an input is).

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> schedule = fastgen.NoiseSchedule.from_alphas_cumprod(torch.tensor([0.8, 0.5]))
        >>> fastgen.pixel_reverse_variance(schedule, torch.tensor([[0.4, 0.1]]), 1, 2, pred=torch.tensor([[0.0, 0.5]]))
        tensor([[0.3300, 0.1500]])
    """
    checks.streams(head=head, **({} if pred is None else {"pred": pred}))
    alpha_bar = node_alphas(schedule)
    s, t = nodes_of_steps(s, t, len(alpha_bar) - 1)
    if t.dim() > 1 or (t.dim() == 1 and len(t) != len(head)):
        raise ValueError(f"s and t must be ints or have shape [{len(head)}], got {list(t.shape)}")
    dtype = arithmetic_dtype(*(x for x in (head, pred) if x is not None))
    step = Step.of(alpha_bar, s, t, checks.share("eta", eta))
    # Numbers stay where they are: as zero-dimensional tensors they go into a GPU's operations without a copy.
    floor, gain, ratio = (
        x if x.dim() == 0 else x.to(head.device, dtype).reshape(-1, *[1] * (head.dim() - 1))
        for x in (step.floor, step.gain, step.ratio)
    )
    share = head.to(dtype) if pred is None else head.to(dtype) - pred.to(dtype).square()
    return floor + gain.square() * (ratio * share).clamp(0, radius_of(data_range) ** 2)


class VariationalBound(NamedTuple):
    """What :func:`variational_bound` returns: nats per dimension, float64, smaller is better.

    Attributes:
        total: the bound on ``-log p(x0) / D``, 0-dimensional.
        prior: ``KL(q(x_N | x0) ‖ N(0, I))``, from above.
        steps: the KL of each step from node τ_k to τ_{k-1}, k = 2 … K, [K-1].
        reconstruction: ``-log p(x0 | x_{τ_1}) / D``, of the step into node 0.

    Example::

        >>> import torch, fastgen
        >>> schedule = fastgen.NoiseSchedule.from_alphas_cumprod(torch.tensor([0.8, 0.5]))
        >>> bound = fastgen.variational_bound(schedule, torch.tensor([0.0, 0.5, 0.8]), torch.tensor([1, 2]))
        >>> torch.equal(bound.total, bound.prior + bound.steps.sum() + bound.reconstruction)
        True
    """

    total: Tensor
    prior: Tensor
    steps: Tensor
    reconstruction: Tensor


def variational_bound(
    schedule: NoiseSchedule,
    ms_eps: Tensor,
    steps: Tensor,
    *,
    variance: Literal["analytic", "beta", "beta_tilde"] = "analytic",
    mse_eps: Tensor | None = None,
    data_range: tuple[float, float] = (-1.0, 1.0),
    levels: int | None = None,
) -> VariationalBound:
    """The likelihood bound of a DDPM (arXiv 2006.11239) that samples on a trajectory, for one choice of its variances.

    A step's KL, in nats per dimension, is ``½ (log(σ²/β̃) + (β̃ + g² v_t mse_eps_t)/σ² - 1)``, where g is what the step's
    mean is multiplied with of x0, and σ² is

    ================ =======================================================================
    ``"analytic"``   :func:`reverse_variance`, the minimiser where ``mse_eps = 1 - ms_eps``
    ``"beta"``       ``β_{t|s}``
    ``"beta_tilde"`` ``β̃``
    ================ =======================================================================

    The last step, into node 0, is ``-log p(x0 | x_{τ_1})``, Gaussian about x̂0 with the best variance, whatever
    `variance` is: neither β nor β̃ suits it, and it would hide what the other steps differ by.

    Args:
        schedule: a discrete one.
        ms_eps: [N+1], float32 or float64.
        steps: nodes τ_1 < … < τ_K, int64 [K], as :func:`analytic_trajectory` gives them; a leading 0 is left out.
        variance: one of the three.
        mse_eps: [N+1], the mean square ``E‖ε - ε̂‖²/D`` of the network's errors: :class:`ScoreMoments` gathers it from
            ``update(t, noise - pred)``. If None, ``1 - ms_eps``, which is an exact score's; where `steps` were
            chosen by noisy `ms_eps` this flatters them, and is ``-inf`` where they leave x0 no variance.
        data_range: (a, b) that the data lie in; the prior term takes the largest square in it.
        levels: if given, of quantised data, evenly spaced from a to b: the bound is then on minus the logarithm of
            their probability (from uniform dequantisation), else of their density.

    Returns:
        A :class:`VariationalBound`; divide by ``math.log(2)`` for bits per dimension.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> schedule = fastgen.NoiseSchedule.cosine(100)
        >>> v = (1 - schedule.alphas_cumprod) / schedule.alphas_cumprod
        >>> ms_eps = torch.cat([torch.zeros(1), (v / (v + 0.5) + v / (v + 0.001)) / 2])
        >>> best = fastgen.analytic_trajectory(schedule, ms_eps, 5).steps
        >>> even = torch.linspace(1, 100, 5).long()
        >>> [f"{fastgen.variational_bound(schedule, ms_eps, x).total:.3f}" for x in (best, even)]
        ['0.008', '0.353']
    """
    alpha_bar = node_alphas(schedule)
    ms = checked_moments("ms_eps", ms_eps, alpha_bar)
    mse = (1 - ms).clamp(min=0) if mse_eps is None else checked_moments("mse_eps", mse_eps, alpha_bar)
    nodes = trajectory_nodes(steps, len(alpha_bar) - 1)
    checks.choice("variance", variance, VARIANCES)
    if data_range is None:
        raise TypeError("data_range must be a pair (a, b), got None: the bound is on data with a range")
    radius = radius_of(data_range)
    v = (1 - alpha_bar) / alpha_bar
    residual = v * mse  # E‖x0 - x̂0‖²/D
    s, t = nodes[:-1], nodes[1:]
    step = Step.of(alpha_bar, s, t, 1.0)
    error = step.floor + step.gain.square() * residual[t]
    if variance == "analytic":
        sigma2 = step.floor + step.gain.square() * (v * (1 - ms)).clamp(0, radius**2)[t]
    else:
        sigma2 = 1 - alpha_bar[t] / alpha_bar[s] if variance == "beta" else step.floor
    kl = 0.5 * ((sigma2 / step.floor).log() + error / sigma2 - 1)
    reconstruction = _best_gaussian(residual[nodes[0]], 2 * radius, levels)
    signal, noise = alpha_bar[nodes[-1]], 1 - alpha_bar[nodes[-1]]
    prior = 0.5 * (signal * max(map(abs, data_range)) ** 2 + noise - 1 - noise.log())
    total = prior + kl.sum() + reconstruction
    return VariationalBound(*(x.to(ms_eps.device) for x in (total, prior, kl, reconstruction)))


def _best_gaussian(mse: Tensor, extent: float, levels: int | None) -> Tensor:
    """``-E log N(x0; x̂0, σ²)`` at its best σ²; of quantised data ``-E log`` of its integral over a level's cell, from
    above by Jensen's inequality: the mean over the cell adds the cell's variance, width²/12, to the error."""
    if levels is None:
        return 0.5 * (1 + (2 * math.pi * mse).log())
    levels = checks.positive_int("levels", levels)
    if levels < 2:
        raise ValueError(f"levels must be at least 2, got {levels}")
    width = extent / (levels - 1)
    return 0.5 * (1 + (2 * math.pi * (mse + width**2 / 12)).log()) - math.log(width)
