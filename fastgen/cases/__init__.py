"""Every public function with a kernel, called: the one list that checks, tests and benchmarks take their calls from."""

from __future__ import annotations

import itertools

from . import adversarial, analytic_dpm, elbo, sampling, schedule, score_distillation, sequence, trajectory
from .case import Case

FAMILIES: dict[str, tuple[Case, ...]] = {
    module.__name__.rpartition(".")[2]: module.CASES
    for module in (elbo, score_distillation, sequence, sampling, schedule, analytic_dpm, trajectory, adversarial)
}
CASES: dict[str, Case] = {case.name: case for case in itertools.chain(*FAMILIES.values())}
FUNCTIONS: dict[str, list[Case]] = {}
for _case in CASES.values():
    FUNCTIONS.setdefault(_case.function, []).append(_case)

__all__ = ["CASES", "FAMILIES", "FUNCTIONS", "Case"]
