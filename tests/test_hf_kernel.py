"""The package as a repository of Hugging Face's ``kernels``, which imports a folder under a name of its own."""

import base64
import hashlib
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, backends

import fastgen

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf-kernel")
    subprocess.run([sys.executable, ROOT / ".ci/hf_kernel.py", folder], check=True)
    return folder


def test_metadata_tell_what_is_there(repository):
    ids = set()
    for backend in ("cpu", "cuda"):
        variant = repository / "build" / f"torch-{backend}"
        found = json.loads((variant / "metadata.json").read_text())
        ids.add(found["id"])
        assert found["id"].isidentifier()
        assert found["backend"] == {"type": backend}
        assert found["version"] == int(fastgen.__version__.partition(".")[0])
        files = {
            str(p.relative_to(variant)): p for p in variant.rglob("*") if p.is_file() and p.name != "metadata.json"
        }
        assert found["digest"]["files"] == {
            name: base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode() for name, path in files.items()
        }
        sources = {str(p.relative_to(ROOT / "fastgen")) for p in (ROOT / "fastgen").rglob("*.py")}
        sources |= {f"triton_kernels/{p.name}" for p in (ROOT / "triton_kernels").glob("*.py")}
        assert set(files) == sources | {"py.typed"}
        for path in (ROOT / "triton_kernels").glob("*.py"):
            assert files[f"triton_kernels/{path.name}"].read_bytes() == path.read_bytes()
    assert len(ids) == 2


def test_a_variant_works_beside_the_installed_package(repository, monkeypatch):
    """Imported as ``kernels`` imports it: by the path of its ``__init__.py``, under its id."""
    variant = repository / "build" / f"torch-{DEVICE}"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    kernel = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, kernel)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec.loader.exec_module(kernel)
    assert kernel.core.operator.operators["ddo_loss"].native.namespace == name
    served = [b for b in backends() if b != "native"]  # nothing is compiled in it
    assert "reference" in served
    for backend in served:
        pred = torch.zeros(4, 3, device=DEVICE, requires_grad=True)
        real = torch.tensor([True, False, True, False], device=DEVICE)
        target = torch.ones(4, 3, device=DEVICE)
        with kernel.use_backend(backend):
            loss = kernel.ddo_loss(pred, torch.zeros_like(pred), target, real, alpha=2.0, beta=0.5)
            loss.backward()
        torch.testing.assert_close(loss.item(), 3 * math.log(2))  # the model is its reference
        # -β/2 over two real samples, αβ/2 over two fake ones, times the slope of Δ, 2 (y - p) = 2.
        wanted = torch.tensor([[-0.25], [0.5], [-0.25], [0.5]]).expand(4, 3)
        torch.testing.assert_close(pred.grad.cpu(), wanted)


LOAD = """
import sys, torch
from pathlib import Path
from kernels import get_local_kernel
from kernels._rust import Digest, DigestAlgorithm, Metadata

folder = Path(sys.argv[1])
kernel = get_local_kernel(folder, backend="cpu")
variant = folder / "build" / "torch-cpu"
metadata = Metadata.read_from_file(variant / "metadata.json")
metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
assert kernel.__name__ == metadata.id
assert "fastgen" not in sys.modules

pred = torch.zeros(4, 3, requires_grad=True)
given = torch.zeros(4, 3), torch.ones(4, 3), torch.tensor([True, False, True, False])
loss = kernel.ddo_loss(pred, *given, alpha=2.0)
compiled = torch.compile(kernel.ddo_loss, fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(pred, *given, alpha=2.0), loss)
loss.backward()
print(round(loss.item(), 4), bool(pred.grad.isfinite().all()))
"""


@pytest.mark.slow
def test_kernels_loads_it(repository, tmp_path):
    """In a new environment that borrows this one's packages, but not the folder of the clone."""
    pytest.importorskip("kernels")
    from test_installation import Environment

    environment = Environment(tmp_path / "venv", HF_HUB_OFFLINE="1", PYTHONDONTWRITEBYTECODE="1")
    assert environment("-c", LOAD, repository).split() == ["2.0794", "True"]
