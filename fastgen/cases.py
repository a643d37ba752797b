"""Every public function with a kernel, called: the one list that checks, tests and benchmarks take their calls from."""

from __future__ import annotations

import itertools

from .adversarial import cases as adversarial
from .analytic_dpm import cases as analytic_dpm
from .core.case import Case
from .elbo import cases as elbo
from .policy import cases as policy
from .sampling import cases as sampling
from .schedule import cases as schedule
from .score_distillation import cases as score_distillation
from .sequence import cases as sequence
from .trajectory import cases as trajectory

MODULES = (elbo, policy, score_distillation, sequence, sampling, schedule, analytic_dpm, trajectory, adversarial)
FAMILIES: dict[str, tuple[Case, ...]] = {module.__name__.split(".")[-2]: module.CASES for module in MODULES}
CASES: dict[str, Case] = {case.name: case for case in itertools.chain(*FAMILIES.values())}
FUNCTIONS: dict[str, list[Case]] = {}
for _case in CASES.values():
    FUNCTIONS.setdefault(_case.function, []).append(_case)

__all__ = ["CASES", "FAMILIES", "FUNCTIONS", "Case"]
