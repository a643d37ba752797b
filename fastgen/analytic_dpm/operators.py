"""What :mod:`fastgen.analytic_dpm` is made of: its operator, checks, a step's coefficients, isotonic regression."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core import checks
from ..core.operator import PerRow, Stream, operator
from ..schedule import NoiseSchedule, check_schedule

DataRange = tuple[float, float] | None


@operator
def mean_square(pred: Stream) -> PerRow:
    """``Σ_D pred² / D`` of each row."""


class Step(NamedTuple):
    """Of reverse steps from nodes t to s: λ², the gain of x0 in the mean at a fixed x_t, and v_t."""

    floor: Tensor
    gain: Tensor
    ratio: Tensor

    @staticmethod
    def of(alpha_bar: Tensor, s: Tensor, t: Tensor, eta: float) -> Step:
        signal, noise = alpha_bar[t], 1 - alpha_bar[t]
        clean, left = alpha_bar[s], 1 - alpha_bar[s]
        floor = eta**2 * (1 - signal / clean) * left / noise
        gain = clean.sqrt() - ((left - floor).clamp(min=0) * signal / noise).sqrt()
        return Step(floor, gain, noise / signal)


def with_data_node(values: Tensor) -> Tensor:
    return torch.cat([values.new_zeros(1), values])


def node_alphas(schedule: NoiseSchedule) -> Tensor:
    """ᾱ of nodes 0 … N, float64, on the CPU."""
    check_schedule(schedule)
    if schedule.alphas_cumprod is None:
        raise ValueError(f"schedule must be discrete (linear, cosine, from_alphas_cumprod), got {schedule.kind!r}")
    if bool(schedule.alphas_cumprod[0] == 1):
        raise ValueError("schedule has no noise at its first times: alphas_cumprod must be below 1")
    return torch.cat([schedule.alphas_cumprod.new_ones(1), schedule.alphas_cumprod])


def checked_moments(
    name: str, value: Tensor, alpha_bar: Tensor, *, finite: bool = True, positive: bool = False
) -> Tensor:
    checks.tensor(name, value)
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {value.dtype}")
    if value.shape != alpha_bar.shape:
        raise ValueError(f"{name} must have shape [{len(alpha_bar)}], of nodes 0 to N; got {list(value.shape)}")
    moments = value.detach().double().cpu()
    bad = (~torch.isfinite(moments) | (moments < 0) if finite else moments < 0)[1:]
    if positive:
        bad = bad | (moments[1:] == 0)
    if bool(bad.any()):
        node = 1 + int(bad.long().argmax())
        raise ValueError(
            f"{name} must be {'positive' if positive else 'non-negative'} and finite, got {moments[node]:g} at node"
            f" {node} ({int(bad.sum())} in all); it is NaN where no samples were seen"
        )
    return moments


def nodes_of_steps(s: int | Tensor, t: int | Tensor, last: int) -> tuple[Tensor, Tensor]:
    nodes = []
    for name, value in (("s", s), ("t", t)):
        value = checks.integers(name, value) if isinstance(value, Tensor) else checks.integer(name, value)
        nodes.append(torch.as_tensor(value).detach().cpu())
    try:
        lower, upper = torch.broadcast_tensors(*nodes)
    except RuntimeError:
        raise ValueError(f"s and t have shapes {list(nodes[0].shape)} and {list(nodes[1].shape)}") from None
    if bool(((lower < 0) | (lower >= upper) | (upper > last)).any()):
        raise ValueError(f"s and t must satisfy 0 <= s < t <= {last}")
    return lower, upper


def trajectory_nodes(steps: Tensor, last: int) -> Tensor:
    nodes = checks.integers("steps", steps).detach().cpu()
    if nodes.dim() == 1 and len(nodes) and int(nodes[0]) == 0:
        nodes = nodes[1:]
    if nodes.dim() != 1 or len(nodes) == 0:
        raise ValueError(f"steps must have shape [K] with K at least 1, got {list(steps.shape)}")
    if int(nodes[0]) < 1 or int(nodes[-1]) > last or bool((nodes.diff() <= 0).any()):
        raise ValueError(f"steps must increase and lie between 1 and {last}")
    return nodes


def radius_of(data_range: DataRange) -> float:
    """(b - a)/2; infinite where there is no range."""
    if data_range is None:
        return math.inf
    if not isinstance(data_range, (tuple, list)) or len(data_range) != 2:
        raise TypeError(f"data_range must be a pair (a, b) or None, got {data_range!r}")
    low, high = (checks.number("data_range", x) for x in data_range)
    if not low < high:
        raise ValueError(f"data_range must be (a, b) with a < b, got {data_range}")
    return (high - low) / 2


def isotonic(y: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The non-decreasing sequence with the least weighted squared distance to y, by pooling adjacent violators."""
    means: list[float] = []
    masses: list[float] = []
    sizes: list[int] = []
    for mean, mass in zip(y.tolist(), weight.tolist(), strict=True):
        size = 1
        while means and means[-1] >= mean:
            before = masses.pop()
            mean = (means.pop() * before + mean * mass) / (before + mass)
            mass += before
            size += sizes.pop()
        means.append(mean)
        masses.append(mass)
        sizes.append(size)
    return np.repeat(means, sizes)
