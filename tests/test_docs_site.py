"""The sources of the documentation name what there is, and link to it; the site itself is built by ``make docs``."""

import ast
import inspect
import json
import re
from pathlib import Path

import pytest

import fastgen
from fastgen.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
INCLUDE = re.compile(r"^<!-- include (\S+?)(?: # (.+?))? -->$", re.M)
GENERATED = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
DESCRIBED = re.findall(r"^::: (\S+)", "\n".join(p.read_text() for p in PAGES if p.parent.name == "api"), re.M)


def public_names():
    yield from (f"fastgen.{name}" for name in fastgen.__all__)
    for module in sorted([*(ROOT / "fastgen" / "integrations").glob("[!_]*.py"), ROOT / "fastgen" / "diffusers.py"]):
        dotted = ".".join(module.relative_to(ROOT).with_suffix("").parts)
        found = re.search(r"^__all__ = (\[.*?\])", module.read_text(), re.S | re.M)
        yield from (f"{dotted}.{name}" for name in ast.literal_eval(found[1]))
    names = (name for name in vars(fastgen.reference) if not name.startswith("_"))
    yield from (f"fastgen.reference.{n}" for n in names if inspect.isfunction(getattr(fastgen.reference, n)))


def test_every_public_name_is_described_once():
    assert sorted(DESCRIBED) == sorted(public_names())


def test_every_page_is_in_the_navigation():
    listed = re.findall(
        r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2].partition("\nhooks:")[0]
    )
    assert sorted(listed) == sorted([*(str(p.relative_to(DOCS)) for p in PAGES), *GENERATED])


def slugs(text):
    """The anchors of a page: explicit ones, and those that MkDocs makes of headings."""
    for match in INCLUDE.finditer(text):
        text += "" if match[1] == "gallery" else (ROOT / match[1]).read_text()
        text += (ROOT / "examples" / "README.md").read_text() if match[1] == "gallery" else ""
    for heading in re.findall(r"^#+ (.+)$", text, re.M):
        explicit = re.search(r"\{ #(\S+) \}$", heading)
        yield explicit[1] if explicit else re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower())).strip("-")
    yield from re.findall(r"^::: (\S+)", text, re.M)


@pytest.mark.parametrize(
    "page", [*PAGES, *(ROOT / n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))], ids=str
)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    for path, anchor in re.findall(r"\]\((?!\w+:)([^)\s#]*)(?:#([^)\s]*))?\)", text):
        generated = page.parent == DOCS and path in GENERATED
        target = ROOT / GENERATED[path] if generated else (page.parent / path) if path else page
        assert target.exists(), f"there is no {path}"
        if anchor:
            assert anchor in set(slugs(target.read_text())), f"{path} has no #{anchor}"


def test_included_sections_exist():
    found = [match for page in PAGES for match in INCLUDE.finditer(page.read_text())]
    assert len(found) > 1
    for path, heading in (m.groups() for m in found):
        if path != "gallery":
            assert re.search(rf"^#+ {re.escape(heading)}$", (ROOT / path).read_text(), re.M), f"{path}: {heading}"


def test_conventions_name_tests_that_there_are():
    named = re.findall(r"`(test_\w+)` \|$", (DOCS / "conventions.md").read_text(), re.M)
    tests = "\n".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 15
    assert [name for name in named if f"\ndef {name}(" not in tests] == []
    own = set(re.findall(r"^def (test_\w+)", (ROOT / "tests" / "test_conventions.py").read_text(), re.M))
    assert own <= set(named), "a convention that is tested and not told"


def test_every_environment_variable_is_told():
    sources = [ROOT / "setup.py", ROOT / "Makefile"]
    for folder, kinds in {"fastgen": ["py"], "csrc": ["h", "cuh", "cpp"], "benchmarks": ["py"]}.items():
        sources += [path for kind in kinds for path in (ROOT / folder).rglob(f"*.{kind}")]
    found = {name for path in sources for name in re.findall(r"\bFASTGEN_[A-Z_]*[A-Z]\b", path.read_text())}
    page = (DOCS / "environment.md").read_text()
    assert "FASTGEN_BACKEND" in found
    assert sorted(name for name in found if f"`{name}`" not in page) == []


def test_one_version_everywhere():
    released = re.findall(r"^## \[(\d\S*)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    cited = re.search(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(), re.M)
    assert released[0] == cited[1] == fastgen.__version__


def test_info_for_a_program(capsys):
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fastgen"] == fastgen.__version__
    for name, entry in found["operators"]["cpu"].items():
        with fastgen.use_backend("auto"):
            assert entry["backend"] == fastgen.core.dispatch.backend_for(name, "cpu")
    assert set(found["extensions"]) == set(fastgen.build_info())
    with fastgen.use_backend("reference"):
        assert main(["info", "--json"]) == 0
    served = json.loads(capsys.readouterr().out)["operators"]["cpu"]
    assert {entry["backend"] for entry in served.values()} == {"reference"}
