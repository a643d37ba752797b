"""Choosing a backend, and the command line."""

import os
import re
import subprocess
import sys

import pytest
import torch
from recorder import Recorder

import fastgen
from fastgen.__main__ import main
from fastgen.core import dispatch, verify

X = torch.ones(2, 3)


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="backend must be one of"), fastgen.use_backend("cuda"):
        pass
    run = python("import fastgen", FASTGEN_BACKEND="fast")
    assert run.returncode != 0
    assert "FASTGEN_BACKEND must be one of" in run.stderr


def test_asking_for_what_is_missing_says_what_is_missing():
    code = """
import torch, fastgen
with fastgen.use_backend("triton"):
    fastgen.elbo_error(torch.ones(1, 1), torch.ones(1, 1))
"""
    run = python(code, TRITON_INTERPRET="0")
    assert run.returncode != 0
    assert "backend 'triton' cannot run elbo_error on cpu" in run.stderr


def test_the_environment_variable_sets_the_process():
    code = "import fastgen.core.dispatch as b; print(b.backend_for('ddo_loss', 'cpu'))"
    assert python(code, FASTGEN_BACKEND="reference").stdout.strip() == "reference"


def test_backends_nest_and_restore():
    before = dispatch.backend_for("ddo_loss", "cpu")
    with fastgen.use_backend("reference"):
        with fastgen.use_backend("auto"):
            assert dispatch.backend_for("ddo_loss", "cpu") == before
        assert dispatch.backend_for("ddo_loss", "cpu") == "reference"
        with pytest.raises(KeyError), fastgen.use_backend("auto"):
            raise KeyError
        assert dispatch.backend_for("ddo_loss", "cpu") == "reference"
    assert dispatch.backend_for("ddo_loss", "cpu") == before


def test_without_the_extension_the_reference_serves():
    code = """
import sys
sys.modules["fastgen._C"] = None  # as if it were not built
import torch, fastgen
p = torch.randn(4, 3, requires_grad=True)
fastgen.ddo_loss(p, torch.randn(4, 3), torch.randn(4, 3), torch.tensor([True, False] * 2)).backward()
print(p.grad.shape, fastgen.core.dispatch.backend_for("ddo_loss", "cpu"), type(fastgen.build_info()["_C"]).__name__)
try:
    with fastgen.use_backend("native"):
        fastgen.elbo_error(p, p)
except RuntimeError as error:
    print(error)
"""
    run = python(code)
    assert run.returncode == 0, run.stderr
    assert "torch.Size([4, 3]) reference NotBuilt" in run.stdout
    assert "fastgen._C is not built" in run.stdout


def test_triton_is_not_imported_before_it_is_needed():
    assert python("import sys, fastgen; print('triton' in sys.modules)").stdout.strip() == "False"


def test_info_names_every_operator(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert fastgen.__version__ in out
    assert torch.__version__ in out
    for name in dispatch.operators:
        assert f"  {name} " in out


def test_info_gives_no_reasons_where_a_backend_is_asked_for(capsys):
    with fastgen.use_backend("reference"):
        assert main(["info"]) == 0
    _, *tables = capsys.readouterr().out.split("\non ")
    found = {heading: lines for heading, *lines in map(str.splitlines, tables)}
    assert list(found) == (["cpu:", "cuda:"] if torch.cuda.is_available() else ["cpu:"])
    for lines in found.values():
        assert [line.split()[1] for line in lines] == ["reference"] * len(dispatch.operators)


def test_verify_covers_every_operator_and_fails_on_a_wrong_one(monkeypatch, capsys, kernel_backend, device):
    monkeypatch.setattr(verify, "SHAPES", ((2, 2, 6),))
    if kernel_backend == "native":  # all functions; interpreted ones take a minute, and other tests run them
        with Recorder() as recorder:
            assert main(["verify", "--device", device, "--backend", "native"]) == 0
        assert set(recorder.calls) == set(dispatch.operators)
    monkeypatch.setattr(verify, "FUNCTIONS", {"elbo_error": verify.FUNCTIONS["elbo_error"]})
    assert main(["verify", "--device", device, "--backend", kernel_backend]) == 0
    assert "FAIL" not in capsys.readouterr().out
    right = fastgen.elbo_error
    monkeypatch.setattr(fastgen, "elbo_error", lambda *args, **kwargs: right(*args, **kwargs) * 1.001)
    assert main(["verify", "--device", device, "--backend", kernel_backend]) == 1
    assert "FAIL" in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--backend", "reference"]], ids=["no extension", "reference"])
def test_verify_passes_without_kernels(options):
    code = f"""
import sys
if not {options}:
    sys.modules["fastgen._C"] = None  # as if it were not built
from fastgen.core import verify
from fastgen.__main__ import main
verify.SHAPES = ((2, 2, 6),)
verify.FUNCTIONS = dict(list(verify.FUNCTIONS.items())[::5])
sys.exit(main(["verify", "--device", "cpu", *{options}]))
"""
    run = python(code, TRITON_INTERPRET="0", FASTGEN_BACKEND="auto")
    assert run.returncode == 0, run.stderr
    for function in list(verify.FUNCTIONS)[::5]:
        assert re.search(rf"^{re.escape(function)} +reference +float64 .* pass$", run.stdout, re.MULTILINE), function


@pytest.mark.parametrize(
    ("architectures", "runs", "not_"),
    [
        (
            "80;90a;100;120;120+PTX",
            [(8, 0), (8, 6), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1), (13, 0)],
            [(7, 5), (11, 0)],
        ),
        ("90a", [(9, 0)], [(8, 9), (10, 0)]),
        ("80", [(8, 9)], [(9, 0)]),
        ("80+PTX", [(8, 0), (9, 0), (12, 0)], [(7, 5)]),
    ],
)
def test_which_gpus_run_what_was_built(architectures, runs, not_):
    assert all(dispatch.runs_on(architectures, capability) for capability in runs)
    assert not any(dispatch.runs_on(architectures, capability) for capability in not_)
