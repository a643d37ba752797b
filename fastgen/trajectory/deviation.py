"""The cost of skipping timesteps, from a sampler's own trajectories."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..core import checks, distributed
from ..schedule.reference import widened

__all__ = ["deviation_cost"]

METRICS = ("l2", "l1", "deviation")
CHUNK = 2**24  # elements of a temporary


def deviation_cost(
    trajectory: Tensor,
    slopes: Tensor,
    times: Tensor,
    *,
    metric: Literal["l2", "l1", "deviation"] = "l2",
    group: Any = None,
) -> Tensor:
    """What one Euler step from a node of a teacher's trajectory to a later one costs: GITS (arXiv 2405.11326).

    .. math:: C_{ij} = mean_B \\| x_i + (t_j - t_i) d_i - x_j \\|, \\qquad i < j

    Its cheapest path of K edges, :func:`optimal_trajectory` with ``discount=1.15``, is GITS' schedule of K steps.

    Args:
        trajectory: the teacher's points x [n, B, …] at each node, from noise to data, in float32, bfloat16, float16 or
            float64; n ≥ 2.
        slopes: its slopes d = dx/dt at the same nodes, like `trajectory`; that of the last node takes no part.
        times: t [n], float32 or float64, strictly decreasing.
        metric: ``"l2"`` or ``"l1"``: the norm over a sample's elements; ``"deviation"``: how much farther than x_j the
            step's end lies from the chord from x_0 to x_{n-1}, which may be negative.
        group: a ``torch.distributed`` process group over whose trajectories the mean is taken, of which each rank has
            its own, any number of them, at the same times. All ranks get the same costs, so all find the same
            schedule. Two collectives: one compares the times and the metric, one adds.

    Returns:
        C [n, n], float32 (float64 if an input is), ``inf`` where i ≥ j. Means over several batches are costs as well.
        NaN where the trajectory is, which :func:`optimal_trajectory` refuses.

    Raises:
        TypeError, ValueError: naming the argument that does not fit. Looking at `times` synchronises with the device.

    Example::

        >>> import torch, fastgen
        >>> t = torch.tensor([2.0, 1.0, 0.0])
        >>> x = t.square()[:, None, None].expand(3, 1, 2)
        >>> fastgen.deviation_cost(x, 2 * t[:, None, None].expand(3, 1, 2), t)
        tensor([[   inf, 1.4142, 5.6569],
                [   inf,    inf, 1.4142],
                [   inf,    inf,    inf]])
    """
    points = {"trajectory": trajectory, "slopes": slopes}
    if group is not None and all(isinstance(t, Tensor) and t.shape[1:2] == (0,) for t in points.values()):
        points = {name: t.transpose(0, 1) for name, t in points.items()}  # a rank without any: no rows, not empty ones
    checks.streams(**points)
    checks.local("trajectory", trajectory)
    n = trajectory.shape[0]
    if trajectory.dim() < 2 or n < 2:
        raise ValueError(f"trajectory must have shape [n, B, ...] with n at least 2, got {list(trajectory.shape)}")
    checks.tensor("times", times)
    checks.per_row("times", times, trajectory)
    checks.choice("metric", metric, METRICS)
    if not bool((times.diff() < 0).all()):
        raise ValueError(f"times must decrease from node to node, got {times.tolist()}")
    if group is not None:
        given = distributed.fingerprint(times)
        distributed.check_alike(group, times.device, times=given, metric=METRICS.index(metric))

    # [n, B, D], also where a sample is one number.
    x, d = (widened(v.detach()).unsqueeze(-1).flatten(2) for v in (trajectory, slopes))
    dtype = torch.promote_types(x.dtype, d.dtype)
    t = times.detach().to(dtype)
    chord = x[-1] - x[0]
    unit = chord / chord.norm(dim=-1, keepdim=True)

    def distance(points: Tensor) -> Tensor:
        """From the chord, [m, B]."""
        rest = x[-1] - points
        return (rest - (rest * unit).sum(-1, keepdim=True) * unit).norm(dim=-1)

    cost = x.new_full((n, n), torch.inf, dtype=dtype)
    chunk = max(1, CHUNK // max(x[0].numel(), 1))
    for i in range(n - 1):
        for first in range(i + 1, n, chunk):
            nodes = slice(first, min(first + chunk, n))
            end = torch.addcmul(x[i], (t[nodes] - t[i])[:, None, None], d[i])
            if metric == "deviation":
                error = distance(end) - distance(x[nodes])
            else:
                error = (end - x[nodes]).norm(p=1 if metric == "l1" else 2, dim=-1)
            cost[i, nodes] = error.mean(-1) if group is None else error.sum(-1)
    if group is None:
        return cost
    sums = torch.cat([cost.flatten().double(), x.new_tensor([x.shape[1]], dtype=torch.float64)])
    torch.distributed.all_reduce(sums, group=group)
    return (sums[:-1] / sums[-1]).to(dtype).view(n, n)
