"""What the Triton compiler makes of every kernel, without a GPU: 16-byte accesses, no spills, registers in budget."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")

# Of a multiprocessor's 65536: 112 let one program of 512 threads hold its tile; 64 let four of 256 run, 48 five.
REGISTERS = {"held_groups": 112, "looped_groups": 64, "partial_sums": 64, "finish": 48, "_scale_in_place": 40}
REGISTERS["_scatter"] = 72  # seven programs of 128 threads
REGISTERS["_write_labels"] = 72
REGISTERS |= dict.fromkeys(("_next_layer", "_path", "_inspect_row"), 128)
# Over logits: four programs of 256 threads or more.
REGISTERS |= {"_sweep normalizers": 64, "_sweep sums": 64, "_sweep results": 32, "_sweep map": 80}
REGISTERS |= {"_sweep normalizers to results": 64, "_sweep normalizers to map": 64}
# By function. A step with its seven numbers and four half-precision streams: four programs of 256 threads.
# More streams and sums: two programs of 256 threads.
MORE_REGISTERS = dict.fromkeys(("reverse_step", "reverse_step_", "posterior_sample", "langevin_step"), 64)
MORE_REGISTERS |= {"langevin_step_": 64, "sds_loss": 112, "vsd_loss": 112, "dmd_loss": 128, "decoupled_dmd_loss": 128}
# Two whole rows of 16384 float32: 128 still let one program of 512 threads run. (Features come in rows of 4096.)
MORE_REGISTERS["feature_distance"] = 128
MORE_REGISTERS["_sweep results sparse_divergence_loss"] = 64
MORE_REGISTERS["flow_sde_step"] = 64  # two outputs where it draws
MORE_REGISTERS["fake_score_loss"] = 64  # its target, of a float32 and a half-precision stream
# ptxas for sm_100 trades registers of a few looped kernels, of steps of four streams and of float32 beside bfloat16
# logits, for occupancy. Triton 3.9 does so for sm_90 too, with 24 bytes in the gradient of a mixed divergence; 3.7 not.
SPILL_BYTES = {80: 0, 90: 24, 100: 24}

TYPICAL = (
    "^(ScoreMoments held|feature_distance held apart grad|ddo_loss (held|looped|split) grad"
    "|diffusion_dpo_loss small grad|elbo_error-huber held|elbo_error-l1 held grad|add_noise held|vsd_loss looped grad"
    "|dmd_loss-guided small grad|dmd_loss-mixed split grad|reverse_step-epsilon held|posterior_sample held"
    "|guidance held|decoupled_dmd_loss looped grad|optimal_trajectory.*|token_logprob odd|token_logprob var grad"
    "|generalized_jsd_loss-(0|0.5|1|hard-0.3) llm grad|token_logprob llm|generalized_jsd_loss-1 few grad"
    "|sparse_divergence_loss-forward-bucket few grad)$"
)


# Instructions an element, or a pair, of all sweeps over bfloat16 logits on sm_90.
INSTRUCTIONS = {"token_logprob": 7, "generalized_jsd_loss-0": 40, "generalized_jsd_loss-0.5": 62}
INSTRUCTIONS["generalized_jsd_loss-1"] = 54


def reports(*options):
    """In a process of its own: in that of the tests Triton interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.aot", "--part", "triton", "--json", *options]
    root = Path(__file__).parent.parent
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)["triton"]


def check(found):
    for r in found:
        what = f"{r['kernel']} ({r['variant']}) for sm_{r['arch']}"
        assert r["spill_bytes"] <= SPILL_BYTES[r["arch"]], f"{what} spills {r['spill_bytes']} bytes"
        # Rows that start at different places have single elements; log-probabilities of a sequence are few.
        of_tokens = r["variant"].startswith("sequence_ddo_loss") and not r["kernel"].startswith("_sweep")
        if " narrow" not in r["variant"] and not of_tokens:
            assert r["narrow_reads"] == r["narrow_writes"] == 0, f"{what}: loads {r['loads']}, stores {r['stores']}"
        function = re.match(r"\w+", r["variant"])[0]
        more = (MORE_REGISTERS.get(key, 0) for key in (function, f"{r['kernel']} {function}"))
        budget = max(REGISTERS[r["kernel"]], *more)
        assert r["registers"] <= budget, f"{what} needs {r['registers']} registers"
        most = INSTRUCTIONS.get(r["variant"].split()[0])
        if most and re.search(" llm( grad)? bf16$", r["variant"]) and r["arch"] == 90 and r["floor_bytes"]:
            issued = sum(loop[0] for loop in r["loops"])
            assert issued <= most, f"{what} issues {issued} instructions an element"


def test_typical_kernels():
    found = reports("--arch", "90", "--dtype", "f32", "--dtype", "bf16", "--only", TYPICAL)
    assert {r["kernel"] for r in found} == set(REGISTERS)
    check(found)


@pytest.mark.slow
def test_every_kernel():
    found = reports()
    assert {r["arch"] for r in found} == {80, 90, 100}
    check(found)


def test_later_launches_hand_over_what_the_first_does():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / "launched_twice.py")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 20
