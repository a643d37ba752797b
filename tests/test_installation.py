"""Extensions, source distributions and wheels, and clones that are not installed."""

import os
import runpy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("*.py", "*.h", "*.cuh", "*.cpp", "*.cu")
BUILT = shutil.ignore_patterns("*.so", "__pycache__")


def run(*command, cwd=ROOT, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def without_site(code, path, *others, **environment):
    """Runs `code` with `path` first, and without what site.py adds, such as the finders of editable installations."""
    ours = [p for p in sys.path if p and Path(p).resolve() != ROOT]
    search = os.pathsep.join(map(str, [path, *ours]))
    return run("-S", "-c", textwrap.dedent(code), *others, cwd=path, PYTHONPATH=search, **environment)


@pytest.fixture
def toolkit(tmp_path):
    """What setup.py takes for a CUDA toolkit."""
    for name in ("bin/nvcc", "include/cuda_runtime.h"):
        file = tmp_path / "cuda" / name
        file.parent.mkdir(parents=True)
        file.touch()
    return tmp_path / "cuda"


@pytest.fixture
def clone(tmp_path):
    """The package and its kernels as a clone has them, with nothing built."""
    for name in ("fastgen", "triton_kernels"):
        shutil.copytree(ROOT / name, tmp_path / "clone" / name, ignore=BUILT)
    return tmp_path / "clone"


# ---------------------------------------------------------------- distributions


def sources_of_sdist(folder, **environment):
    folder.mkdir()
    run("setup.py", "-q", "egg_info", "--egg-base", folder, **environment)
    names = (folder / "fastgen_kernels.egg-info" / "SOURCES.txt").read_text().split("\n")
    return {name for name in names if not name.startswith(str(folder))}


def test_a_source_distribution_holds_every_source_whatever_its_machine_would_build(tmp_path, toolkit):
    pytest.importorskip("pybind11")
    files = sources_of_sdist(tmp_path / "nothing", FASTGEN_CPU="0", FASTGEN_CUDA="0")
    assert files == sources_of_sdist(tmp_path / "all", FASTGEN_CPU="1", FASTGEN_CUDA="1", CUDA_HOME=toolkit)
    needed = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "fastgen/py.typed"}
    for folder in ("csrc", "fastgen", "triton_kernels"):
        needed |= {str(p.relative_to(ROOT)) for pattern in SOURCES for p in (ROOT / folder).rglob(pattern)}
    assert needed <= files
    assert not [name for name in files if Path(name).suffix in (".so", ".o", ".pyc") or name.startswith("build/")]


def test_a_wheel_holds_all_of_the_package_and_the_kernels_themselves(tmp_path):
    run("setup.py", "-q", "build_py", "--build-lib", tmp_path, FASTGEN_CPU="0", FASTGEN_CUDA="0")
    wheel = {p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()}
    package = {p.relative_to(ROOT) for p in (ROOT / "fastgen").rglob("*.py")} | {Path("fastgen/py.typed")}
    assert wheel == package | {Path("fastgen") / p.relative_to(ROOT) for p in (ROOT / "triton_kernels").glob("*.py")}
    for kernels in (ROOT / "triton_kernels").glob("*.py"):
        assert (tmp_path / "fastgen/triton_kernels" / kernels.name).read_bytes() == kernels.read_bytes()


@pytest.mark.slow
def test_an_installed_source_distribution_works(tmp_path):
    """It is built and installed without network, into an environment that borrows this one's torch."""
    source, venv = tmp_path / "source", tmp_path / "venv"
    source.mkdir()
    for name in sources_of_sdist(tmp_path / "list"):
        if name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    run("setup.py", "-q", "sdist", "--dist-dir", tmp_path / "dist", cwd=source, FASTGEN_CPU="0", FASTGEN_CUDA="0")
    (archive,) = (tmp_path / "dist").iterdir()
    run("-m", "venv", "--without-pip", venv)
    python = venv / "bin" / "python"
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip())
    paths = [p for p in sys.path if p and Path(p).resolve() != ROOT and Path(p).is_dir() and Path(p) != ROOT / "tests"]
    (site / "borrowed.pth").write_text("\n".join(paths) + "\n")
    options = ["--quiet", "--no-index", "--no-build-isolation", "--no-deps", "--ignore-installed"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"FASTGEN_CPU": "0", "FASTGEN_CUDA": "0"}
    for command in (
        ["-m", "pip", "install", *options, archive],
        ["-c", f"import fastgen; assert fastgen.__file__.startswith({str(site)!r}), fastgen.__file__"],
        ["-m", "fastgen", "info"],
        ["-m", "fastgen", "verify", "--device", "cpu", "--backend", "reference"],
    ):
        done = subprocess.run(
            [python, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of" not in done.stdout
    assert {p.name for p in (site / "fastgen/triton_kernels").glob("*.py")} == {
        p.name for p in (ROOT / "triton_kernels").glob("*.py")
    }


# ---------------------------------------------------------------- what setup.py builds


@pytest.fixture
def extensions_of_setup(monkeypatch):
    """The names of the extensions that setup.py would build, with an environment set for it."""
    pytest.importorskip("pybind11")
    import setuptools
    from torch.utils import cpp_extension

    def names(**environment):
        for name in ("FASTGEN_CPU", "FASTGEN_CUDA", "CUDA_HOME", "CXX"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        called = {}
        monkeypatch.setattr(setuptools, "setup", called.update)
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", cpp_extension.CUDA_HOME)
        monkeypatch.chdir(ROOT)
        runpy.run_path(str(ROOT / "setup.py"))
        return [extension.name for extension in called["ext_modules"]]

    return names


def test_the_cuda_kernels_do_not_need_the_cpu_ones(extensions_of_setup, toolkit):
    everything = {"CUDA_HOME": toolkit, "FASTGEN_CUDA": "1"}
    assert extensions_of_setup(FASTGEN_CPU="0", **everything) == ["fastgen._C_cuda"]
    assert extensions_of_setup(FASTGEN_CPU="1", **everything) == ["fastgen._C", "fastgen._C_cuda"]
    # What is demanded is not dropped where no compiler is found: its absence then fails the build.
    assert extensions_of_setup(CXX="no-such-compiler", **everything) == ["fastgen._C_cuda"]
    assert extensions_of_setup(CXX="no-such-compiler", FASTGEN_CUDA="0") == []


def test_a_build_finds_the_ninja_of_an_environment_that_is_not_activated(extensions_of_setup, monkeypatch, tmp_path):
    pytest.importorskip("ninja")
    monkeypatch.setenv("PATH", str(tmp_path))
    extensions_of_setup(FASTGEN_CPU="1", FASTGEN_CUDA="0")
    assert shutil.which("ninja") is not None


# ---------------------------------------------------------------- extensions that are not there


INFO = """
    import sys, torch, fastgen
    from fastgen.__main__ import main
    main(["info"])
    print("=" * 9)
    with fastgen.use_backend("native"):
        main(["info"])
        print("=" * 9)
        try:
            fastgen.elbo_error(torch.ones(1, 1), torch.ones(1, 1))
        except RuntimeError as error:
            print(error)
"""


def info(clone):
    """What info says; what it says where native kernels are asked for; the error of a call that asks for them."""
    return without_site(INFO, clone).split("=" * 9)


def test_info_says_once_that_kernels_are_not_built_and_what_to_do(clone):
    out, native, error = info(clone)
    assert out.count("fastgen._C: not built: there was no C++ compiler") == 1
    assert "pip install" in out
    assert out.count("fastgen._C is not built") == 1
    assert "No module named" not in out
    assert "  ddo_loss                   reference\n" in out
    assert "  ddo_loss                   none\n" in native
    assert native.count("fastgen._C is not built") == 1
    wanted = "backend 'native' cannot run elbo_error on cpu: fastgen._C is not built (python -m fastgen info says more)"
    assert error.strip() == wanted


def test_info_tells_kernels_that_do_not_load_from_kernels_that_are_not_built(clone):
    from importlib.machinery import EXTENSION_SUFFIXES

    (clone / "fastgen" / f"_C{EXTENSION_SUFFIXES[0]}").write_text("no library")
    out, _, error = info(clone)
    assert out.count("fastgen._C: built, but does not load: ") == 1
    assert out.count("fastgen._C does not load") == 1
    assert out.count(f"_C{EXTENSION_SUFFIXES[0]}") == 1
    assert "fastgen._C does not load (python -m fastgen info says more)" in error


def test_info_names_kernels_that_were_built_for_another_python(clone):
    (clone / "fastgen/_C.cpython-39.so").touch()
    assert "fastgen._C: not built: there is only _C.cpython-39.so, for another Python" in info(clone)[0]


# ---------------------------------------------------------------- clones


def test_a_clone_is_imported_from_its_root(clone):
    code = """
        import fastgen, torch
        from fastgen.triton_kernels import layout
        print(fastgen.__file__, layout.__file__, fastgen.elbo_error(torch.ones(1, 2), torch.zeros(1, 2)).tolist())
    """
    assert without_site(code, clone).split() == [
        str(clone / "fastgen/__init__.py"),
        str(clone / "triton_kernels/layout.py"),
        "[1.0]",
    ]


def test_a_clone_takes_no_kernels_of_an_installed_copy(clone, tmp_path):
    installed = tmp_path / "installed"
    shutil.copytree(ROOT / "triton_kernels", installed / "triton_kernels", ignore=BUILT)
    (installed / "_C.py").write_text("build_info = dict")
    code = f"""
        import sys
        from importlib.machinery import PathFinder

        class Editable:  # as an editable installation adds it, after the usual finders
            @classmethod
            def find_spec(cls, name, path=None, target=None):
                parent, _, _ = name.rpartition(".")
                rest = parent.split(".")[1:]
                return PathFinder.find_spec(name, ["/".join([{str(installed)!r}, *rest])])

        sys.meta_path.append(Editable)
        import fastgen
        from fastgen.triton_kernels import layout
        print(type(fastgen.build_info()["_C"]).__name__, layout.__file__)
    """
    assert without_site(code, clone).split() == ["NotBuilt", str(clone / "triton_kernels/layout.py")]


def test_the_package_works_under_another_name(clone):
    (clone / "fastgen").rename(clone / "renamed")
    code = """
        import sys
        sys.modules["fastgen"] = None  # nothing may be imported by that name
        import renamed, torch
        from renamed.__main__ import main
        import renamed.core.dispatch as backend
        print(renamed.triton_kernels.layout.__name__, backend.backend_for("elbo_error", "cpu"))
        with renamed.use_backend("triton"):
            print(renamed.elbo_error(torch.ones(1, 2), torch.zeros(1, 2)).tolist())
    """
    assert without_site(code, clone, TRITON_INTERPRET="1").split() == [
        "renamed.triton_kernels.layout",
        "reference",
        "[1.0]",
    ]
