"""What the Triton compiler makes of the trajectory kernels, without a GPU: no spills, registers in budget."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

# The launchers run on meta tensors under a driver that names a target: what they launch is compiled and not run.
REPORT = r"""
import json, re, subprocess, tempfile, torch
from benchmarks.aot import ARCHITECTURES, _Target, _tool
from fastgen.triton_kernels import rowwise, trajectory

found = []
def compile_launch(kernel, programs, like, *args, **constants):
    compiled = kernel.warmup(*args, grid=(programs,), **constants)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [_tool("cuobjdump"), "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True)
    sizes = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    found.append([compiled.metadata.name, sizes["REG"], sizes["STACK"] + sizes["LOCAL"]])

rowwise.launch = compile_launch
for arch in ARCHITECTURES:
    _Target(arch)
    for dtype in (torch.float64, torch.float32):
        cost = torch.empty(2, 101, 101, dtype=dtype, device="meta")
        v = torch.empty(2, 101, dtype=torch.float64, device="meta")
        for problem in ((cost, None), (v, v)):
            _, table = trajectory.trajectory_table(*problem, 0, 3, False)
            trajectory.trajectory_path(*problem, table, 0, 3, False)
        trajectory.trajectory_inspect(cost, None, 0, True)
print(json.dumps(found))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_trajectory_kernels_spill_nothing():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", REPORT], capture_output=True, text=True, env=environment, cwd=root)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert {name for name, _, _ in found} == {"_next_layer", "_path", "_inspect_row"}
    for name, registers, spilled in found:
        assert spilled == 0, f"{name} spills {spilled} bytes"
        assert registers <= 128, f"{name} needs {registers} registers"
