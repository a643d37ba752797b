"""Cheapest trajectories: which K of N timesteps to keep, by dynamic programming.

The exhaustive solver's skeleton is ``csrc/skeleton/minplus.h``, the divide-and-conquer one's
``csrc/skeleton/monge.h``; both work on the semirings of ``csrc/skeleton/costs.h``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar, overload

import torch
from torch import Tensor
from torch import library as torch_library

from ..core import checks, dispatch
from ..core.operator import Whole, operator
from . import reference
from .deviation import deviation_cost

__all__ = ["FactoredCost", "Trajectory", "deviation_cost", "optimal_trajectory"]

CONVENTIONS = ("edges", "nodes")
METHODS = ("auto", "exact", "monge")

Steps = TypeVar("Steps", Tensor, Mapping[int, Tensor])


class TableOutputs(NamedTuple):
    """Of :func:`trajectory_table`."""

    totals: Whole
    table: Whole


@operator
def trajectory_table(cost: Whole, h: Whole | None, first: int, edges: int, monge: bool) -> TableOutputs:
    """The totals [B, edges + 1] of every number of edges, and what recovers their paths."""
    # The table's layout is the implementation's own; only trajectory_path of the same one reads it.
    table = cost.new_empty((torch_library.get_ctx().new_dynamic_size(),))
    return TableOutputs(cost.new_empty((cost.shape[0], edges + 1)), table)


@operator
def trajectory_path(cost: Whole, h: Whole | None, table: Whole, first: int, edges: int, monge: bool) -> Whole:
    """The nodes of the cheapest paths of `edges` edges, int64 [B, edges + 1]."""
    return cost.new_empty((cost.shape[0], edges + 1), dtype=torch.int64)


@operator
def trajectory_inspect(cost: Whole, h: Whole | None, first: int, certify: bool) -> Whole:
    """What is wrong with each problem, and whether it is certified: bits, int64 [B]."""
    return cost.new_empty((cost.shape[0],), dtype=torch.int64)


@dataclass(frozen=True)
class FactoredCost:
    """The edge cost ``F[s,t] = log((v_s + h_t) / (v_t + h_t))``, s < t, from two vectors; no matrix is ever made.

    This is the trajectory cost of Analytic-DPM (arXiv 2201.06503), ``log(1 - β_{t|s} Γ_t)``, with the noise-to-signal
    ratio ``v_t = (1 - ᾱ_t)/ᾱ_t`` and ``h_t = (1 - (1 - ᾱ_t) Γ_t)/(ᾱ_t Γ_t)``, the mean variance of x0 given x_t. It
    satisfies the quadrangle inequality if and only if h does not decrease, as is true of the exact Γ of any data.

    Args:
        v: [..., N+1], float32 or float64, not decreasing.
        h: like `v`; ``h[..., 0]`` takes no part. Every ``v_s + h_t``, s < t, must be positive.

    Raises:
        TypeError, ValueError: for other dtypes or shapes; the values are checked when a trajectory is asked for.

    Example::

        >>> import torch, fastgen
        >>> cost = fastgen.FactoredCost(torch.tensor([0.0, 1.0, 3.0]), torch.tensor([0.0, 1.0, 1.0]))
        >>> cost.matrix().exp()
        tensor([[   inf, 0.5000, 0.2500],
                [   inf,    inf, 0.5000],
                [   inf,    inf,    inf]], dtype=torch.float64)
    """

    v: Tensor
    h: Tensor

    def __post_init__(self) -> None:
        for name, value in (("v", self.v), ("h", self.h)):
            _check_floats(name, value)
        if self.v.dim() == 0 or self.v.shape[-1] < 2:
            raise ValueError(f"v must have shape [..., N+1] with N at least 1, got {list(self.v.shape)}")
        if self.h.shape != self.v.shape or self.h.device != self.v.device:
            raise ValueError(
                f"h must be like v, {list(self.v.shape)} on {self.v.device};"
                f" got {list(self.h.shape)} on {self.h.device}"
            )

    def matrix(self) -> Tensor:
        """F [..., N+1, N+1] in float64, infinite where s >= t."""
        v, h = self.v.double(), self.h.double().unsqueeze(-2)
        cost = ((v.unsqueeze(-1) + h) / (v.unsqueeze(-2) + h)).log()
        return cost.masked_fill(torch.ones_like(cost, dtype=torch.bool).tril(), torch.inf)


@dataclass(frozen=True)
class _Solution:
    """What the solver leaves behind, from which any path is recovered."""

    backend: str
    problems: Tensor
    h: Tensor | None
    first: int
    totals: Tensor  # [B, len(counts)]
    table: Tensor
    monge: bool
    batch: torch.Size
    device: torch.device
    counts: tuple[int, ...]
    discount: float

    def path(self, k: int) -> Tensor:
        _require_paths(self.totals[:, [self.counts.index(k)]], [k], self.problems, self.h, self.first)
        problem: dict[str, Any] = {
            "cost": self.problems,
            "h": self.h,
            "table": self.table,
            "first": self.first,
            "monge": self.monge,
            "edges": k - self.first,
        }
        if self.backend == "reference":
            path = reference.trajectory_path(**problem, discount=self.discount)
        else:
            path = trajectory_path(self.backend, **problem)
        return path.reshape(*self.batch, path.shape[1]).to(self.device)


class Paths(Mapping[int, Tensor]):
    """The paths of several numbers of steps, ``paths[K]``, each recovered from the solver's table when asked for."""

    def __init__(self, solution: _Solution) -> None:
        self._solution = solution
        self._counts = dict.fromkeys(solution.counts)

    def __getitem__(self, num_steps: int) -> Tensor:
        if num_steps not in self._counts:
            raise KeyError(num_steps)
        return self._solution.path(num_steps)

    def __iter__(self) -> Iterator[int]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)

    def __repr__(self) -> str:
        return f"Paths({list(self._counts)})"


@dataclass(frozen=True)
class Trajectory(Generic[Steps]):
    """What :func:`optimal_trajectory` returns; a type checker knows which of the two `steps` are.

    Attributes:
        steps: the path's nodes, int64 [..., K+1] from 0 to N (``"edges"``) or [..., K] from 1 to N (``"nodes"``). For
            several K a mapping from K to such a tensor: each path is recovered when it is looked up, from the solver's
            table and the cost, which must not have been changed in place by then. Pickled they go along, for the same
            version of fastgen and the same type of device.
        total_cost: [...], or [..., number of Ks] in the order asked for.
        method: ``"exact"`` or ``"monge"``, what ran.

    Example::

        >>> import torch, fastgen
        >>> cost = torch.tensor([[0.0, 1.0, 5.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
        >>> result = fastgen.optimal_trajectory(cost, "all")
        >>> result.total_cost, result.steps[2]
        (tensor([5., 3.]), tensor([0, 1, 2]))
    """

    steps: Steps
    total_cost: Tensor
    method: str


@overload
def optimal_trajectory(
    cost: Tensor | FactoredCost,
    num_steps: int,
    *,
    convention: Literal["edges", "nodes"] = ...,
    method: Literal["auto", "exact", "monge"] = ...,
    discount: float = ...,
) -> Trajectory[Tensor]: ...
@overload
def optimal_trajectory(
    cost: Tensor | FactoredCost,
    num_steps: Sequence[int] | Literal["all"],
    *,
    convention: Literal["edges", "nodes"] = ...,
    method: Literal["auto", "exact", "monge"] = ...,
    discount: float = ...,
) -> Trajectory[Mapping[int, Tensor]]: ...
def optimal_trajectory(
    cost: Tensor | FactoredCost,
    num_steps: int | Sequence[int] | Literal["all"],
    *,
    convention: Literal["edges", "nodes"] = "edges",
    method: Literal["auto", "exact", "monge"] = "auto",
    discount: float = 1.0,
) -> Trajectory[Tensor] | Trajectory[Mapping[int, Tensor]]:
    """The cheapest increasing path through timesteps 0 … N, for each wanted number of steps.

    .. math:: \\min_{s_0 < s_1 < … < s_K} \\sum_i F[s_{i-1}, s_i]

    All numbers of steps come from one solve, ``C[t,k+1] = min_{s<t} C[s,k] + F[s,t]``. The exact method takes any cost
    in O(K N²), as blocked (min, +) products. The Monge method needs ``F[s,t] + F[s',t'] <= F[s,t'] + F[s',t]`` for
    s < s' < t < t' and takes O(K N log N). Among predecessors of the same cost the lowest is taken. By either method a
    matrix gives the totals of a plain loop over k to the bit, and a factored cost, whose paths carry the product of
    their ratios rather than the sum of logarithms, gives them to about an ulp an edge.

    Args:
        cost: F [..., N+1, N+1], float32 or float64 (computed in its own precision), of which entries with s < t are
            used; ``inf`` forbids an edge. Leading dimensions are independent problems. Or a :class:`FactoredCost`,
            computed in float64, by which K = 100 of N = 100 000 steps take a fraction of a second.
        num_steps: K, several of them, or ``"all"``.
        convention: ``"edges"``: K edges from 0 to N, 1 <= K <= N (Watson et al., arXiv 2106.03802; F[0,t] is the last
            denoising step's cost). ``"nodes"``: K nodes from 1 to N, 2 <= K <= N (Analytic-DPM's).
        method: ``"exact"``, ``"monge"``, or ``"auto"``: Monge for a factored cost that is certified, else exact (for
            a matrix the certificate costs what Monge saves). Monge runs on CPUs, where a GPU's certified factored
            costs are solved too; other implementations take the exact method for a certified cost.
        discount: γ > 0: the path's i-th edge, from i = 0, counts γ^i times. GITS (arXiv 2405.11326) takes 1.15 with
            :func:`deviation_cost`. Other than 1 it is solved exactly, in plain PyTorch on any backend, and needs a
            matrix.

    Returns:
        A :class:`Trajectory` on the cost's device. With ``"all"`` a K that ``inf`` entries rule out, or whose
        total overflows, has total ``inf``; its path is an error.

    Raises:
        TypeError: for other dtypes or arguments of other types.
        ValueError: if a cost that takes part is NaN or ``-inf``, or a total overflows; K is out of range, or no path
            of K steps is allowed; ``"monge"`` without certificate (a matrix must satisfy the inequality exactly and
            have no ``inf``).

    This is a solver and synchronises with the device; it is not differentiable. The result depends neither on the
    number of threads nor on the processor.

    Example::

        >>> import torch, fastgen
        >>> v = torch.linspace(0.0, 1.0, 9) ** 4
        >>> fastgen.optimal_trajectory(fastgen.FactoredCost(v, 0.1 + v), 3).steps
        tensor([0, 4, 6, 8])
    """
    checks.choice("convention", convention, CONVENTIONS)
    checks.choice("method", method, METHODS)
    discount = checks.number("discount", discount, low=0, open_low=True)
    if discount != 1 and (method == "monge" or isinstance(cost, FactoredCost)):
        what = "method 'exact' or 'auto'" if method == "monge" else "a matrix, as FactoredCost.matrix() makes it"
        raise ValueError(f"discount = {discount:g} needs {what}")
    first = 0 if convention == "edges" else 1
    problems, h, batch = _problems(cost)
    device, last = problems.device, problems.shape[1] - 1
    counts = _step_counts(num_steps, first, last)
    backend = dispatch.backend_for("trajectory_table", device.type) if discount == 1 else "reference"
    certified = _certified(backend, problems, h, first, method)
    if certified and h is not None and dispatch.is_automatic("trajectory_table", "native", "cpu"):
        # Copying two vectors from a GPU costs less than its exhaustive sweep.
        backend, problems, h = "native", problems.cpu(), h.cpu()
    monge = certified and backend == "native" and problems.device.type == "cpu"
    problem: dict[str, Any] = {"cost": problems, "h": h, "first": first, "edges": max(counts) - first, "monge": monge}
    if backend == "reference":
        totals, table = reference.trajectory_table(**problem, discount=discount)
    else:
        totals, table = trajectory_table(backend, **problem)
    totals = totals[:, slice(counts[0] - first, None) if num_steps == "all" else [k - first for k in counts]]
    totals = totals if h is None else totals.log()
    if num_steps != "all":
        _require_paths(totals, counts, problems, h, first)

    solution = _Solution(backend, problems, h, first, totals, table, monge, batch, device, tuple(counts), discount)
    name = "monge" if monge else "exact"
    if not isinstance(num_steps, Iterable):
        return Trajectory(solution.path(counts[0]), totals.reshape(batch).to(device), name)
    return Trajectory(Paths(solution), totals.reshape(*batch, len(counts)).to(device), name)


def _check_floats(name: str, value: object) -> None:
    checks.tensor(name, value)
    assert isinstance(value, Tensor)
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {value.dtype}")


def _problems(cost: Tensor | FactoredCost) -> tuple[Tensor, Tensor | None, torch.Size]:
    """The costs as [B, N+1, N+1] and None, or v and h [B, N+1] in float64; and the batch dimensions."""
    if isinstance(cost, FactoredCost):
        points = cost.v.shape[-1]
        v, h = (t.detach().double().reshape(-1, points).contiguous() for t in (cost.v, cost.h))
        return v, h, cost.v.shape[:-1]
    if not isinstance(cost, Tensor):
        raise TypeError(f"cost must be a torch.Tensor or a FactoredCost, got {type(cost).__name__}")
    _check_floats("cost", cost)
    if cost.dim() < 2 or cost.shape[-1] != cost.shape[-2]:
        raise ValueError(f"cost must have shape [..., N+1, N+1], got {list(cost.shape)}")
    if cost.shape[-1] < 2:
        raise ValueError(f"cost must have at least 2 timesteps, 0 and N = 1; got {list(cost.shape[-2:])}")
    return cost.detach().reshape(-1, *cost.shape[-2:]).contiguous(), None, cost.shape[:-2]


def _step_counts(num_steps: int | Sequence[int] | str, first: int, last: int) -> list[int]:
    low = 2 if first == 1 and last > 1 else 1  # one node is a path only where node 1 is node N
    if num_steps == "all":
        return list(range(low, last + 1))
    if isinstance(num_steps, str):
        raise ValueError(f"num_steps must be an int, a sequence of ints or 'all', got {num_steps!r}")
    try:
        several = list(num_steps)  # type: ignore[arg-type]
    except TypeError:  # one number, or what is none
        several = [num_steps]  # type: ignore[list-item]
    counts = [checks.integer("num_steps", k) for k in several]
    if not counts:
        raise ValueError("num_steps is empty")
    for k in counts:
        if not low <= k <= last:
            what = "edges from 0 to N" if first == 0 else "nodes from 1 to N"
            raise ValueError(f"num_steps must be from {low} to {last} ({what} = {last}), got {k}")
    return counts


_FAULTS = (
    (4, "v decreases: it must be non-decreasing, as a noise-to-signal ratio is"),
    (1, "{what} is not positive and finite"),
    (8, "v + h spans more than its precision's range"),
)


def _certified(backend: str, problems: Tensor, h: Tensor | None, first: int, method: str) -> bool:
    """Raises for invalid costs; says whether the Monge method is wanted and right."""
    certify = method == "monge" or (method == "auto" and h is not None)
    inspect = reference.trajectory_inspect if backend == "reference" else trajectory_inspect.of(backend)
    status = inspect(cost=problems, h=h, first=first, certify=certify).tolist()
    where = f"problem {{}} of {len(status)}: " if len(status) > 1 else ""
    for i, faults in enumerate(status):
        if h is None and faults & 1:
            raise ValueError(
                f"{where.format(i)}cost has NaN or -inf at an s < t; only inf, a forbidden edge, is allowed"
            )
        for bit, message in _FAULTS:
            if h is not None and faults & bit:
                raise ValueError(where.format(i) + message.format(what="v_s + h_t of an s < t"))
        if method == "monge" and faults & 2:
            reason = "h decreases" if h is not None else "the quadrangle inequality fails, or an entry is inf"
            raise ValueError(f"{where.format(i)}method 'monge' needs a certified cost, but {reason}")
    return certify and all(not faults & 2 for faults in status)


def _require_paths(totals: Tensor, counts: Sequence[int], problems: Tensor, h: Tensor | None, first: int) -> None:
    if all(map(math.isfinite, totals.flatten().tolist())):
        return
    problem, column = (~torch.isfinite(totals)).nonzero()[0].tolist()
    where = f" in problem {problem} of {len(totals)}" if len(totals) > 1 else ""
    if h is None:
        forbidden = problems[problem : problem + 1].isinf()
        cost = torch.zeros_like(forbidden, dtype=totals.dtype).masked_fill(forbidden, torch.inf)
        free, _ = reference.trajectory_table(cost, None, first, counts[column] - first, False)
        if free[0, -1].item() != 0:
            raise ValueError(f"no path of num_steps = {counts[column]} avoids the forbidden (inf) edges{where}")
    raise ValueError(
        f"cost is too large{where}: the total of num_steps = {counts[column]} steps overflows {totals.dtype}; scale it"
    )
