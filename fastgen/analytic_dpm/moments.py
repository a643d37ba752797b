"""Moments of a network's noise predictions, gathered over batches and made such as data could have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core import checks, dispatch, distributed
from ..schedule import NoiseSchedule
from . import reference
from .operators import DataRange, checked_moments, isotonic, mean_square, node_alphas, radius_of, with_data_node

__all__ = ["ScoreMoments", "regularize_moments"]


def row_mean_square(pred: Tensor) -> Tensor:
    """:func:`mean_square` by the backend that serves; not differentiable."""
    backend = dispatch.backend_for("mean_square", pred.device.type)
    return reference.mean_square(pred) if backend == "reference" else mean_square(backend, pred=pred.detach())


class ScoreMoments:
    """The mean square of a network's noise predictions at every timestep, accumulated over batches in float64.

    ``ms_eps[n] = E‖ε̂(x_t, t)‖² / D = β̄_n Γ_n`` at t = n - 1 is all that Analytic-DPM (arXiv 2201.06503) needs to know
    of a model; 10 to 100 samples a timestep give the paper's quality. Draw t in turn or at random, x_t from data, and
    call :meth:`update`.

    Args:
        num_timesteps: N, as of the schedule.
        device: where the predictions are.

    Raises:
        TypeError, ValueError: for a `num_timesteps` that is not a positive int; from the methods, naming the argument.

    Example::

        >>> import torch, fastgen
        >>> moments = fastgen.ScoreMoments(2)
        >>> moments.update(torch.tensor([0, 1, 1]), torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 0.5]]))
        >>> moments.ms_eps, moments.count
        (tensor([0.0000, 0.2500, 0.3125], dtype=torch.float64), tensor([0, 1, 2]))
    """

    def __init__(self, num_timesteps: int, *, device: torch.device | str | None = None) -> None:
        num_timesteps = checks.positive_int("num_timesteps", num_timesteps)
        # Columns: how many, their sum, the sum of their squares.
        self._sums = torch.zeros(num_timesteps, 3, dtype=torch.float64, device=device)
        self._reduced = False

    @torch.no_grad()
    def update(self, t: Tensor, pred: Tensor) -> None:
        """Counts a batch: one pass over `pred`, no synchronisation.

        Args:
            t: the schedule's times [B], integers in [0, N), on the device of `pred`. Their range is not checked.
            pred: noise predictions [B, …], float32, bfloat16, float16 or float64. Networks that predict something else:
                ``ε̂ = (x_t - alpha_t x0) / sigma_t`` with x0 of :func:`fastgen.prediction_to_x0`.

        A prediction that is not finite makes the moments of its timestep NaN, which their users report.
        """
        checks.streams(pred=pred)
        if distributed.is_dtensor(pred):
            raise TypeError(
                "pred must be a plain tensor: pass pred.full_tensor() on every rank, or the rank's own samples and in"
                " the end call all_reduce()"
            )
        t = checks.indices("t", t, pred)
        if pred.device != self._sums.device:
            raise ValueError(
                f"pred is on {pred.device}, the moments on {self._sums.device}: give ScoreMoments a device"
            )
        square = row_mean_square(pred).double()
        terms = torch.stack([torch.ones_like(square), square, square.square()], 1)
        # Accumulating index_put_ adds in a fixed order, on GPUs too, where index_add_ would use atomics.
        self._sums.index_put_((t,), terms, accumulate=True)

    @property
    def count(self) -> Tensor:
        """Samples seen at each node, int64 [N+1]; 0 at node 0."""
        return with_data_node(self._sums[:, 0].long())

    @property
    def ms_eps(self) -> Tensor:
        """The means, float64 [N+1]; 0 at node 0, NaN where nothing was seen."""
        return with_data_node(self._sums[:, 1] / self._sums[:, 0])

    @property
    def standard_error(self) -> Tensor:
        """Of each mean, float64 [N+1]; 0 at node 0, NaN where fewer than two samples were seen."""
        n, total, squares = self._sums.unbind(1)
        variance = (squares - total.square() / n).clamp(min=0) / (n - 1)
        return with_data_node(torch.where(n > 1, (variance / n).sqrt(), torch.nan))

    def all_reduce(self, group: Any = None) -> None:
        """Sums over a ``torch.distributed`` process group, so that every rank has the moments of all samples.

        Raises:
            RuntimeError: the second time, when what the others have seen would be counted again.
        """
        if self._reduced:
            raise RuntimeError(
                "these moments are already those of all ranks: call all_reduce() once, after all updates"
            )
        torch.distributed.all_reduce(self._sums, group=group)
        self._reduced = True

    def state_dict(self) -> dict[str, Tensor]:
        """The sums, to be saved and loaded with a model, and whether they are those of all ranks already."""
        return {"sums": self._sums.clone(), "reduced": torch.tensor(self._reduced)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes over the sums of :meth:`state_dict`; they come to this object's device."""
        if set(state) != {"sums", "reduced"}:
            raise ValueError(f"state must have the keys 'sums' and 'reduced', got {sorted(state)}")
        sums = state["sums"]
        checks.tensor("state['sums']", sums)
        if sums.shape != self._sums.shape or sums.dtype != torch.float64:
            raise ValueError(
                f"state['sums'] must be float64 {list(self._sums.shape)}, of as many timesteps;"
                f" got {sums.dtype} {list(sums.shape)}"
            )
        self._sums.copy_(sums)
        self._reduced = bool(state["reduced"])


def regularize_moments(schedule: NoiseSchedule, ms_eps: Tensor, *, data_range: DataRange = (-1.0, 1.0)) -> Tensor:
    """The nearest moments that some data could have: Monte-Carlo noise taken out where it contradicts theory.

    ``h = v (1 - ms_eps) / ms_eps``, see :func:`trajectory_cost`, does not decrease with the noise, for any distribution
    (Stam's inequality), and for data in [a, b] it is at most ``((b - a)/2)²``. Here h becomes its isotonic regression,
    weighted by ``1/(v + r²/4)²`` with ``r = (b - a)/2``, about the inverse of the noise's variance, and is then clipped
    to ``[0, r²]``. An optimal trajectory through raw moments chases their errors; through these it does not. (The
    paper, arXiv 2201.06503, takes raw moments.)

    Args:
        schedule: a discrete one.
        ms_eps: float32 or float64 [N+1]; entry 0 takes no part, the others must be positive.
        data_range: (a, b), or None for data without bounds, such as latents.

    Returns:
        The moments, float64 [N+1], at most 1.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> schedule = fastgen.NoiseSchedule.from_alphas_cumprod(torch.tensor([0.8, 0.5, 0.2]))
        >>> fastgen.regularize_moments(schedule, torch.tensor([0.0, 0.5, 1.1, 0.9]))
        tensor([0.0000, 0.5519, 0.8313, 0.9000], dtype=torch.float64)
    """
    alpha_bar = node_alphas(schedule)
    ms = checked_moments("ms_eps", ms_eps, alpha_bar, positive=True)
    radius = radius_of(data_range)
    v = ((1 - alpha_bar) / alpha_bar)[1:]
    h = v * (1 - ms[1:]) / ms[1:]
    weight = (v + 0.25 * (1.0 if math.isinf(radius) else radius**2)) ** -2
    fitted = torch.from_numpy(isotonic(h.numpy(), weight.numpy())).clamp(0, radius**2)
    return with_data_node(v / (v + fitted)).to(ms_eps.device)
