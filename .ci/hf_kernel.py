"""hf_kernel.py FOLDER: a repository that Hugging Face's ``kernels`` loads, of Python and Triton alone.

It holds a variant for each backend of torch, ``build/torch-<backend>``, which ``kernels`` imports as a module called by
the id in its metadata.json. The package's operators are in namespaces of that name, and the id has a hash of the
sources in it: so several versions, and an installed fastgen, live in one process.
"""

import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "fastgen-kernels"
BACKENDS = ("cpu", "cuda")
BUILT = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")


def lay_out(folder: Path) -> None:
    version = re.search(r'^__version__ = "(\d+)\.', (ROOT / "fastgen/__init__.py").read_text(), re.M)
    assert version is not None
    shutil.rmtree(folder, ignore_errors=True)
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        shutil.copytree(ROOT / "fastgen", variant, ignore=BUILT)
        # A clone's fastgen/triton_kernels is a signpost: here, as in an installation, are the kernels.
        shutil.copytree(ROOT / "triton_kernels", variant / "triton_kernels", ignore=BUILT, dirs_exist_ok=True)
        files = {str(p.relative_to(variant)): p.read_bytes() for p in sorted(variant.rglob("*")) if p.is_file()}
        digests = {name: base64.b64encode(hashlib.sha256(data).digest()).decode() for name, data in files.items()}
        unique = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:10]
        metadata = {
            "name": NAME,
            "id": f"_{NAME.replace('-', '_')}_{backend}_{unique}",
            "version": int(version[1]),
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": digests},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    shutil.copy(ROOT / "LICENSE", folder)


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]))
