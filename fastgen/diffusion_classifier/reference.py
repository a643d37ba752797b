"""The Diffusion Classifier as its paper has it: one image, one class, one (t, noise) pair at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..elbo.reference import elbo_error
from ..schedule.reference import add_noise

__all__ = ["classify"]


def classify(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    x0: Tensor,
    conditions: Tensor,
    times: Tensor,
    alpha_t: Tensor,
    sigma_t: Tensor,
    noise: Tensor,
    *,
    stages: Sequence[tuple[int, int]],
    prediction_type: str = "epsilon",
    weight: Tensor | None = None,
    loss: str = "l2",
) -> tuple[Tensor, Tensor]:
    """Labels [B] and the errors [N, B, C], NaN where eliminated; pair n of N is (times[n], noise[n])."""
    errors = torch.full((len(times), len(x0), len(conditions)), torch.nan, dtype=torch.float64)
    labels = []
    for b in range(len(x0)):
        remaining, evaluated = list(range(len(conditions))), set[int]()
        for n_samples, to_keep in stages:
            grid = {int((k + 0.5) * len(times) / n_samples) for k in range(n_samples)}
            for n in sorted(grid - evaluated):
                x, e, a, s = x0[b, None], noise[n, None], alpha_t[n, None], sigma_t[n, None]
                target = {
                    "epsilon": e,
                    "sample": x,
                    "v_prediction": add_noise(e, x, a, -s),
                    "flow_prediction": e - x,
                }[prediction_type]
                for c in remaining:
                    pred = model(add_noise(x, e, a, s), times[n, None], conditions[c, None])
                    w = None if weight is None else weight[n, None]
                    errors[n, b, c] = elbo_error(pred, target, weight=w, loss=loss)[0]
            evaluated |= grid
            means = errors[sorted(evaluated), b].mean(0)
            remaining = sorted(sorted(remaining, key=lambda c: float(means[c]))[:to_keep])
        labels.append(remaining[0])
    return torch.tensor(labels, dtype=torch.long), errors
