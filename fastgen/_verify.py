"""``python -m fastgen verify``: every operator × backend × dtype against the float64 reference, on this machine."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import _analytic_dpm, _backend, _gradient, reference
from ._accuracy import accurate, errors

fastgen = importlib.import_module(__package__)  # the public functions, whatever name the package has

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = ((6, 4, 16, 16), (6, 3, 5, 7), (2, 40_000))

Streams = tuple[Tensor, Tensor, Tensor]


def _is_real(rows: Tensor) -> Tensor:
    return torch.arange(len(rows), device=rows.device) % 3 != 1


def _row_scalars(rows: Tensor) -> Tensor:
    return torch.linspace(0.3, 1.2, len(rows), device=rows.device, dtype=torch.float64)


def _ddo(m: ModuleType, p: Tensor, q: Tensor, y: Tensor) -> Tensor:
    return m.ddo_loss(p, q, y, _is_real(p), weight=_row_scalars(p), alpha=2.0, beta=0.05)


def _dmd(m: ModuleType, p: Tensor, q: Tensor, y: Tensor, reduction: str, fake_type: str = "v_prediction") -> Tensor:
    c = _row_scalars(p)
    return m.dmd_loss(
        p, y, q, p.detach() - q, alpha_t=c, sigma_t=c, real_uncond=y, guidance_scale=2.0, weight=c, reduction=reduction,
        prediction_type="v_prediction", fake_prediction_type=fake_type,
    )  # fmt: skip


def _decoupled(m: ModuleType, p: Tensor, q: Tensor, y: Tensor, reduction: str) -> Tensor:
    c = _row_scalars(p)
    dm, ca = m.ScorePair(y, c, c, q, p.detach() - q), m.ScorePair(q, c, 2 * c, y, q)
    return m.decoupled_dmd_loss(p, dm, ca, guidance_scale=3.0, reduction=reduction)


def _tokens(logits: Tensor) -> Tensor:
    rows = logits[..., 0]
    tokens = torch.arange(rows.numel(), device=logits.device).reshape(rows.shape) * 7 % logits.shape[-1]
    return tokens.masked_fill(tokens % 5 == 3, -100)


def _sequence_ddo(m: ModuleType, p: Tensor, q: Tensor, y: Tensor) -> Tensor:
    p, q = (t.reshape(len(t), -1, t.shape[-1]) for t in (p, q))
    return m.sequence_ddo_loss(p, q, _tokens(p), _is_real(p), alpha=2.0, beta=0.05)


def _scaled(m: ModuleType, p: Tensor, q: Tensor, y: Tensor) -> Tensor:
    # The operator has no reference function of its own: it is one multiplication.
    out = (p.to(torch.promote_types(p.dtype, torch.float32)) * 0.3).to(p.dtype)
    if m is reference:
        return out
    scale = torch.tensor(0.3, device=p.device, dtype=torch.float64 if p.dtype == torch.float64 else torch.float32)
    copy = p.detach().clone()
    return _gradient.scale_gradient(copy, scale, _backend.backend_for("scale_gradient_", p.device.type))


def _mean_square(m: ModuleType, p: Tensor, q: Tensor, y: Tensor) -> Tensor:
    # The public way to it adds up rows in float64.
    return reference.mean_square(p) if m is reference else _analytic_dpm.mean_square(p)


def _reverse_step(m: ModuleType, p: Tensor, q: Tensor, y: Tensor, *, in_place: bool = False) -> Tensor:
    t = 60 * torch.arange(len(p), device=p.device)
    k = fastgen.step_coefficients(
        fastgen.NoiseSchedule.linear(1000), t, t + 300, method="ddim", eta=0.5, dtype=torch.float64
    )
    step = fastgen.reverse_step_ if in_place and m is fastgen else m.reverse_step
    return step(
        p.detach().clone(), q, k, uncond=y, guidance_scale=_row_scalars(p), noise=q, clamp=(-1.0, 1.0),
        prediction_type="v_prediction",
    )  # fmt: skip


def _posterior_sample(m: ModuleType, p: Tensor, q: Tensor, y: Tensor) -> Tensor:
    times = torch.arange(len(p), device=p.device) * 150
    return m.posterior_sample(fastgen.NoiseSchedule.linear(1000), p, q, times, noise=y)


def _trajectory(m: ModuleType, p: Tensor, q: Tensor, y: Tensor) -> Tensor:
    x, h = (t.detach().flatten()[:90].to(torch.promote_types(t.dtype, torch.float32)) for t in (p, q))
    cost = (x[:, None] - h).square()
    if m is reference:
        steps, totals = m.optimal_trajectory(cost, [7, 40])
        return torch.cat([totals, cost.diagonal()[steps[40]]])
    result = m.optimal_trajectory(cost, [7, 40])
    return torch.cat([result.total_cost, cost.diagonal()[result.steps[40]]])


# Operator -> calls that run it, on the public functions or their references.
CASES: dict[str, list[Callable[[ModuleType, Tensor, Tensor, Tensor], Tensor]]] = {
    "elbo_error": [
        lambda m, p, q, y: m.elbo_error(p, y, weight=_row_scalars(p)),
        lambda m, p, q, y: m.elbo_error(p, y, loss="l1", element_reduction="sum"),
    ],
    "elbo_error_backward": [lambda m, p, q, y: m.elbo_error(p, y, weight=_row_scalars(p), loss="huber")],
    "l1_distance": [
        lambda m, p, q, y: m.feature_distance([p, y], [q, p], [0.7, 1.0]),
        lambda m, p, q, y: m.feature_distance([p.transpose(0, -1)], [q.transpose(0, -1)]),
    ],
    "elbo_difference": [lambda m, p, q, y: m.elbo_difference(p, q, y, weight=_row_scalars(p))],
    "ddo_loss": [_ddo],
    "diffusion_dpo_loss": [
        lambda m, p, q, y: m.diffusion_dpo_loss(p, q, y, beta=50.0),
        lambda m, p, q, y: m.diffusion_dpo_loss(p, q, y, beta=50.0, kind="ipo", reduction="none"),
    ],
    "guidance": [
        lambda m, p, q, y: m.guidance(p, q, 7.5),
        lambda m, p, q, y: m.guidance(q, p, _row_scalars(p)),
    ],
    "mean_square": [_mean_square],
    "reverse_step": [_reverse_step, _posterior_sample],
    "reverse_step_": [lambda m, p, q, y: _reverse_step(m, p, q, y, in_place=True)],
    "row_combination": [
        lambda m, p, q, y: m.add_noise(p, y, _row_scalars(p), _row_scalars(p)),
        lambda m, p, q, y: m.prediction_to_x0(p, y, _row_scalars(p), _row_scalars(p), "v_prediction"),
    ],
    "score_difference": [
        lambda m, p, q, y: m.sds_loss(p, q, y, weight=_row_scalars(p), grad_clip=1.0, reduction="sum")
    ],
    "score_difference_backward": [lambda m, p, q, y: m.vsd_loss(p, q, y, weight=y.abs(), reduction="none")],
    "dmd": [lambda m, p, q, y: _dmd(m, p, q, y, "sum")],
    "dmd_backward": [
        lambda m, p, q, y: _dmd(m, p, q, y, "none"),
        lambda m, p, q, y: _dmd(m, p, q, y, "none", "sample"),
    ],
    "decoupled_dmd": [lambda m, p, q, y: _decoupled(m, p, q, y, "sum")],
    "decoupled_dmd_backward": [lambda m, p, q, y: _decoupled(m, p, q, y, "none")],
    "token_logprob": [lambda m, p, q, y: m.token_logprob(p, _tokens(p), temperature=2.0)],
    "token_logprob_backward": [lambda m, p, q, y: m.token_logprob(p, _tokens(p)).sum()],
    "sequence_ddo_loss": [_sequence_ddo],
    "generalized_jsd": [
        lambda m, p, q, y: m.generalized_jsd_loss(p, y, _tokens(p), beta=0.0),
        lambda m, p, q, y: m.generalized_jsd_loss(p, y, beta=0.5, temperature=2.0),
    ],
    "generalized_jsd_backward": [
        lambda m, p, q, y: m.generalized_jsd_loss(p, y, _tokens(p), beta=1.0, reduction="none")
    ],
    "scale_gradient_": [_scaled],
    "trajectory_inspect": [_trajectory],
    "trajectory_table": [_trajectory],
    "trajectory_path": [_trajectory],
}


@dataclass(frozen=True)
class Row:
    """One line of the table: the worst relative L2 errors over cases and shapes."""

    operator: str
    backend: str
    dtype: str
    value_error: float
    grad_error: float
    eager_error: float
    passed: bool


def _streams(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Streams:
    generator = torch.Generator().manual_seed(0)
    p, d, y = (torch.randn(shape, generator=generator) for _ in range(3))
    p, q, y = (t.to(device, dtype) for t in (p, p + 0.1 * d, y))
    return p, q, y


def _value_and_grad(f: Callable[..., Tensor], module: ModuleType, p: Tensor, q: Tensor, y: Tensor) -> list[Tensor]:
    p = p.detach().requires_grad_()
    value = f(module, p, q, y)
    if not value.requires_grad:
        return [value]
    return [value.detach(), torch.autograd.grad(value.sum(), p)[0]]


def _check(name: str, backend: str, dtype: torch.dtype, device: str) -> Row:
    worst: dict[str, float] = {"value": 0.0, "grad": 0.0, "eager": 0.0}
    passed = True
    for f in CASES[name]:
        for shape in SHAPES:
            p, q, y = _streams(shape, dtype, device)
            exact = _value_and_grad(f, reference, p.double(), q.double(), y.double())
            eager = _value_and_grad(f, reference, p, q, y)
            with _backend.use_backend(backend):
                actual = _value_and_grad(f, fastgen, p, q, y)
            for what, mine, theirs, truth in zip(("value", "grad"), actual, eager, exact, strict=False):
                passed &= accurate(mine, theirs, truth) and mine.dtype == theirs.dtype
                worst[what] = max(worst[what], errors(mine, truth)[0])
                worst["eager"] = max(worst["eager"], errors(theirs, truth)[0])
    return Row(
        name,
        backend,
        str(dtype).removeprefix("torch."),
        value_error=worst["value"],
        grad_error=worst["grad"],
        eager_error=worst["eager"],
        passed=passed,
    )


def _combinations(device: str, backends: list[str]) -> Iterator[tuple[str, str, torch.dtype]]:
    for name in CASES:
        for backend in backends:
            if _backend.missing(name, backend, torch.device(device).type) is None:
                for dtype in DTYPES:
                    yield name, backend, dtype


def verify(device: str, backend: str | None = None, progress: bool = True) -> list[Row]:
    """Checks what is there on `device`: every backend, or the one named."""
    work = list(_combinations(device, [backend] if backend else ["native", "triton"]))
    if not work:  # no kernels at all: the reference serves, and is checked against its own float64
        work = list(_combinations(device, ["reference"]))
    return [_check(n, b, dtype, device) for n, b, dtype in tqdm(work, unit="check", disable=not progress, leave=False)]


def table(rows: list[Row]) -> str:
    """The rows as text."""
    lines = [f"{'operator':26}{'backend':11}{'dtype':10}{'value':>10}{'gradient':>10}{'eager':>10}   "]
    for row in rows:
        figures = "".join(f"{x:10.1e}" for x in (row.value_error, row.grad_error, row.eager_error))
        lines.append(f"{row.operator:26}{row.backend:11}{row.dtype:10}{figures}   {'pass' if row.passed else 'FAIL'}")
    return "\n".join(lines)


def main(arguments: Any) -> int:
    rows = verify(arguments.device, arguments.backend)
    print(table(rows))
    failed = sum(not row.passed for row in rows)
    print(f"\n{len(rows) - failed} of {len(rows)} pass on {arguments.device}: relative L2 errors against float64,")
    print("at most twice eager PyTorch's at the same dtype plus one rounding")
    return 1 if failed else 0
