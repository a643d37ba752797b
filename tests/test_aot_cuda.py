"""The CUDA kernels without a GPU: what nvcc makes of them, and, emulated on a CPU, what they compute."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import aot_cuda, sass
from benchmarks.emulated import COMPILER, EMULATOR, build_emulated

ROOT = Path(__file__).resolve().parent.parent

needs_nvcc = pytest.mark.skipif(aot_cuda.cuda_home() is None, reason="no CUDA toolkit")
needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler")


# The sources of both skeletons' most used formulas say whether a skeleton is well; all families take ten minutes.
@pytest.fixture(scope="module", params=["typical", pytest.param("every", marks=pytest.mark.slow)])
def report(request):
    if request.param == "every":
        return aot_cuda.cuda_report()
    return aot_cuda.cuda_report(("90a",), "^(elbo|sequence|generalized_jsd)")


def registers(kernel):
    """64 let a multiprocessor hold 1024 threads, 128 half of them, 224 a quarter: that is for seven streams with seven
    sums. The doubles' kernels are for correctness."""
    if "Decoupled" in kernel:
        return 224
    # With guidance and noise a reverse step has four streams, and seven numbers of a row; a draw has two outputs.
    if re.search("ReverseStep|FlowDraw", kernel):
        return 96 if "float" in kernel else 112
    if kernel.startswith("sweep_rows"):
        return 128 if "float" in kernel else 152
    if re.search("ScoreField|DmdField|Nft", kernel):  # an NFT loss has five streams, five sums and three slopes
        return 128 if "float" in kernel else 160
    return 64 if "float" in kernel else 84


def test_no_unit_defines_what_another_does():
    """All units include the headers: a kernel that is no template has to be its unit's own, or nothing links."""
    for header in sorted((ROOT / "csrc").rglob("*.cuh")):
        lines = header.read_text().splitlines()
        for before, line in itertools.pairwise(lines):
            assert "__global__" not in line or before.startswith("template") or line.startswith("static"), (
                header,
                line,
            )


# Instructions an element, or a pair, over all passes of a row that stays on chip.
INSTRUCTIONS = {"TokenLogprob": 8, "forward, true": 46, "forward": 45, "mixed": 51, "reverse": 51}
SUMS = {"forward": 28, "mixed": 28, "reverse": 27}  # of the one pass over a slice of a vocabulary


@needs_nvcc
class TestReport:
    def test_kernels_spill_nothing_and_stay_within_their_registers(self, report):
        for row in report:
            budget = registers(row["kernel"])
            assert row["spill_bytes"] == row["stack_bytes"] == 0, row
            assert row["registers"] <= budget, row
            many_sums = re.search("Decoupled|Nft|sweep_rows", row["kernel"])
            assert row["static_shared_bytes"] <= (2976 if many_sums else 1280), row

    @pytest.mark.skipif(find_spec("triton") is None, reason="the disassembler is in Triton's package")
    def test_sweeps_issue_no_more_than_their_budget(self, report):
        kernels = [r for r in report if r["arch"] == "sm_90a" and "<wide, bf16, float, " in r["kernel"]]
        losses = [r for r in kernels if not re.search("Backward|Sparse|Sums", r["kernel"])]
        assert len(losses) == len(INSTRUCTIONS)
        for row in losses:
            cost = aot_cuda.sweep_cost(row)
            budget = next(n for name, n in INSTRUCTIONS.items() if name in row["kernel"])
            assert sum(cost) <= budget, f"{row['kernel']}: {cost}"
            assert sass.resident_threads(row["registers"], 256, 0) >= 1024, row
        slices = [r for r in kernels if "Sums" in r["kernel"]]
        assert len(slices) == len(SUMS)
        for row in slices:
            (turn,) = [t for t in row["loops"] if t["loads"].get(16) and t["special"]]
            assert turn["issued"] / 8 <= next(n for name, n in SUMS.items() if name in row["kernel"]), row

    def test_kernels_move_16_bytes_at_a_time_and_use_no_atomics(self, report):
        wide = [row for row in report if re.search("<(wide|peeled), ", row["kernel"])]
        assert {row["kernel"].partition("<")[2].partition(",")[0] for row in wide} == {"wide", "peeled"}
        for row in wide:
            assert row["wide_loads"], row
            maps = r"map<|on_chip<.*(?<!Sequence)(?<!SequenceDdo)Loss|sweep_rows<(?!.*(TokenLogprob|Sums)<)"
            if re.match(maps, row["kernel"]):
                assert row["wide_stores"], row
        for row in report:
            assert not row["atomics"], row


@needs_nvcc
@needs_compiler
def test_the_hosts_compiler_takes_what_nvcc_makes_of_the_sources(tmp_path):
    """The report compiles for the device alone, and nvcc writes the rest of the sources anew."""
    units = aot_cuda.units()
    source, made = tmp_path / "all.cu", tmp_path / "all.ii"
    source.write_text(units.text(list(units.parts()), "CUDA"))
    command = [str(aot_cuda.cuda_home() / "bin" / "nvcc"), "-cuda", "-O0", "-Xcicc", "-O0"]
    command += ["-gencode=arch=compute_90,code=compute_90", *aot_cuda.compiler_flags(), str(source), "-o", str(made)]
    for step in (command, [COMPILER, "-std=c++20", "-fsyntax-only", "-w", str(made)]):
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]


@needs_compiler
def test_partition_covers_every_element_once(tmp_path):
    program = tmp_path / "partition"
    source = EMULATOR / "partition.cpp"
    subprocess.run([COMPILER, "-std=c++20", "-O1", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)], check=True)
    assert subprocess.run([str(program)], capture_output=True, text=True, check=False).stdout == "ok\n"


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    return build_emulated(tmp_path_factory.mktemp("emulated"))


# A GPU as "multiprocessors, shared bytes of a block, blocks of a cluster", and what runs on it: cuda_emulator/check.py.
# Of each list the first four always, and all of them where slow tests are asked for.
CASES = {
    # Parts of warps, blocks of several teams, clusters; whole vectors and odd sizes; dtypes alike and mixed.
    ("images", "132,232448,16"): ["6,3,hbf", "2,9001,bbb", "70,64,fff", "0,8,fff", "6,1,fff", "4,33,dfb", "2,300,hhd"],
    ("images", "108,166912,1"): ["2,4096,fff", "2,6000,dfh"],  # no clusters, as before sm_90
    ("images", "8,4096,2"): ["2,6001,bbb", "4,777,fbf", "2,2048,ddd"],  # groups that fit nowhere: two passes
    # Rows of logits on a block or a cluster, read once; odd sizes, mixed dtypes; on one block; too long for the chip.
    ("logits", "132,232448,16"): ["3,1271,bb", "3,264,hf", "2,9000,ff", "3,7,ff", "0,40,ff", "2,33,dd", "9,4101,fb"],
    ("logits", "108,166912,1"): ["2,8192,bf"],
    ("logits", "8,4096,2"): ["2,6000,fb", "5,2048,bb", "3,2051,bb"],
}


def run_emulated(script: str, *arguments: str, **environment: str) -> None:
    command = [sys.executable, str(EMULATOR / script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    environment.pop("FASTGEN_BACKEND", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_compiler
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the emulator needs ucontext")
class TestEmulated:
    @pytest.mark.parametrize("how_many", [4, pytest.param(None, marks=pytest.mark.slow)], ids=["few", "all"])
    @pytest.mark.parametrize(("kind", "gpu"), CASES)
    def test_emulated_kernels_agree_with_the_reference(self, emulated, kind, gpu, how_many):
        run_emulated("check.py", str(emulated), kind, *CASES[kind, gpu][:how_many], EMULATED_GPU=gpu)

    @pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
    def test_what_the_host_does_is_timed(self, emulated):
        command = [sys.executable, "-m", "benchmarks.host", "--emulator", str(emulated), "--only", "dmd_loss"]
        environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
        assert [row[0] for row in rows] == ["`dmd_loss-guided`", "`decoupled_dmd_loss`"]
        for _, eager, cuda, cuda_launches, triton, triton_launches in rows:
            assert min(float(eager), float(cuda), float(triton)) > 0
            assert cuda_launches == triton_launches == "2"

    def test_emulated_trajectories_are_the_references_to_the_bit(self, emulated):
        run_emulated("check_trajectory.py", str(emulated))
