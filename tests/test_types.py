"""What a type checker knows of the public functions."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STATS = "fastgen.DistillationStats"
PATHS = "Mapping[int, Tensor]"
# Calls, and their types by what the option after them is: absent, False, True, a bool that is not known.
WITH_OPTION = {
    "fastgen.sds_loss(x, x, x, return_stats=": f"Tensor, {STATS}",
    "fastgen.vsd_loss(x, x, x, return_stats=": f"Tensor, {STATS}",
    "fastgen.dmd_loss(x, x, x, x, alpha_t=x, sigma_t=x, return_stats=": f"Tensor, {STATS}",
    "fastgen.decoupled_dmd_loss(x, pair, pair, guidance_scale=2.0, return_stats=": f"Tensor, {STATS}",
    "fastgen.ddo_loss(x, x, x, x, return_delta=": "Tensor, Tensor",
    "fastgen.diffusion_dpo_loss(x, x, x, return_delta=": "Tensor, Tensor",
    "fastgen.sequence_ddo_loss(x, x, x, x, return_delta=": "Tensor, Tensor",
    "fastgen.joint_energy_loss(x, x, x, return_energies=": "Tensor, Tensor, Tensor",
}
EXPRESSIONS = {
    "fastgen.optimal_trajectory(x, 3).steps": "Tensor",
    "fastgen.optimal_trajectory(x, [3, 4]).steps": PATHS,
    "fastgen.optimal_trajectory(x, 'all').steps": PATHS,
    "fastgen.analytic_trajectory(schedule, x, 3).steps": "Tensor",
    "fastgen.reverse_step(x, x, k)": "Tensor",
    "fastgen.reverse_step_(x, x, k)": "Tensor",
    "fastgen.langevin_step(x, x, 1.0, 1.0)": "Tensor",
    "fastgen.guidance(x, x, 2.0)": "Tensor",
    "fastgen.posterior_sample(schedule, x, x, x)": "Tensor",
    "fastgen.sample(lambda x, t: x, schedule, x, steps=2)": "Tensor",
    "fastgen.elbo_error(x, x)": "Tensor",
    "fastgen.token_logprob(x, x)": "Tensor",
}
for start, several in WITH_OPTION.items():
    call, _, option = start.rpartition(", ")
    EXPRESSIONS[f"{call})"] = "Tensor"
    EXPRESSIONS[f"{start}False)"] = "Tensor"
    EXPRESSIONS[f"{start}True)"] = f"tuple[{several}]"
    EXPRESSIONS[f"{start}unknown)"] = f"Tensor | tuple[{several}]"


def test_a_type_checker_knows_what_comes_back(tmp_path):
    pytest.importorskip("mypy")
    lines = [
        "from collections.abc import Mapping",
        "from torch import Tensor",
        "from typing_extensions import assert_type",
        "import fastgen",
        "def f(x: Tensor, pair: fastgen.ScorePair, k: fastgen.StepCoefficients, schedule: fastgen.NoiseSchedule,"
        " unknown: bool) -> None:",
        *[f"    assert_type({expression}, {type_})" for expression, type_ in EXPRESSIONS.items()],
    ]
    (tmp_path / "user.py").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", tmp_path / "user.py"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
