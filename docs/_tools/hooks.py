"""What MkDocs does beyond its plugins: pages from files elsewhere in the repository, links to them, formulas.

A page in ``docs`` links to a file of the repository by its relative path, as it would on a forge; on the site that is
a page with the file's text. A line ``<!-- include PATH # Heading -->`` stands for a section of another Markdown file,
one without ``# Heading`` for the whole file, and ``<!-- include gallery # examples -->`` for a folder of examples.
"""

from __future__ import annotations

import html
import importlib.util
import posixpath
import re
from pathlib import Path
from typing import Any

import mathml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
INCLUDE = re.compile(r"^<!-- include (\S+?)(?: # (.+?))? -->$", re.M)
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)\s#]+)((?:#[^)\s]*)?\))")
LANGUAGES = {".h": "cpp", ".cuh": "cuda", ".cpp": "cpp", ".py": "python", ".toml": "toml", ".md": "markdown"}
QUOTES = str.maketrans({'"': "'"})  # a title stands between double quotes
# Files of the repository that have a page of their own, and where.
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "gallery.md",
    "examples/fashion/README.md": "fashion.md",
    "README.md": "index.md",
}
PAGES |= {f"benchmarks/results/{p.name}": f"results/{p.name}" for p in (ROOT / "benchmarks/results").glob("*.md")}


def section(text: str, heading: str | None) -> str:
    """What stands under a heading, down to the next of its level or above."""
    if heading is None:
        return text
    found = re.search(rf"^(#+) {re.escape(heading)}\n(.*?)(?=^(?!\1#)#+ |\Z)", text, re.S | re.M)
    if found is None:
        raise ValueError(f"no heading {heading!r}")
    return found[2].strip() + "\n"


def _target(path: str) -> str | None:
    """The page of a file of the repository, None if there is no such file."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path in PAGES:
        return PAGES[path]
    if not (ROOT / path).is_file():
        return None
    return f"files/{path}" if path.endswith(".png") else f"source/{path}.md"


def relink(text: str, base: str, page: str) -> str:
    """Links and pictures relative to `base`, a folder of the repository, as those of a page of the site."""

    def one(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(base, match[2]))
        target = _target(path)
        if target is None:
            raise ValueError(f"{page}: there is no {path}")
        return match[1] + posixpath.relpath(target, posixpath.dirname(page) or ".") + match[3]

    parts = re.split(r"(^```.*?^```$|`[^`\n]+`(?!\]))", text, flags=re.S | re.M)
    return "".join(part if i % 2 else LINK.sub(one, part) for i, part in enumerate(parts))


def fences(text: str) -> str:
    """What follows the language of a fence, such as a file's name, as the block's title."""
    return re.sub(r"^```(\w+) (.+)$", lambda m: f'``` {{ .{m[1]} title="{m[2].translate(QUOTES)}" }}', text, flags=re.M)


def gallery(folder: str) -> str:
    """Each script of a folder with its picture, and what it prints folded away; links are relative to the folder."""
    out = []
    text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    for part in re.split(r"^## ", text, flags=re.M)[1:]:
        name, _, rest = part.partition("\n")
        about, command, printed = re.split(r"^    (python [^\n]+)\n", rest.strip(), maxsplit=1, flags=re.M)
        picture = re.search(r"^!\[.*$", printed, re.M)
        assert picture, f"{name} has no picture"
        tables = re.sub(r"^Picture: \S+ ", "", printed.replace(picture[0], "").strip(), flags=re.M)
        out += [f"## {name}", about.strip(), f"Run it: `{command}`. Its code: [{folder}/{name}.py]({name}.py)."]
        out += [picture[0], '??? note "What it prints"']
        out += ["\n".join(f"    {line}".rstrip() for line in tables.splitlines())]
    return "\n\n".join(out)


def expand(text: str, page: str) -> str:
    """A page's Markdown with what it includes, all links being those of the site."""
    out, at = [], 0
    own = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page)))
    for match in INCLUDE.finditer(text):
        path, heading = match[1], match[2]
        if path == "gallery":
            assert heading is not None, "which folder's gallery?"
            found, base = gallery(heading), heading
        else:
            found, base = section((ROOT / path).read_text(encoding="utf-8"), heading), posixpath.dirname(path)
        out += [relink(text[at : match.start()], own, page), fences(relink(found, base, page))]
        at = match.end()
    return "".join([*out, relink(text[at:], own, page)])


def _source_page(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    language = LANGUAGES.get(Path(path).suffix, "text")
    head = f"---\nsearch:\n  exclude: true\nhide:\n  - toc\n---\n\n# {posixpath.basename(path)}\n\n`{path}`\n\n"
    return f"{head}````` {language}\n{text}\n`````\n"


def _math_font() -> Path:
    """STIX Two Math, as the package ziamath brings it: systems without a font for formulas draw them badly."""
    package = importlib.util.find_spec("ziamath")
    if package is None or package.origin is None:
        raise ImportError("ziamath is not installed")
    return Path(package.origin).parent / "fonts" / "STIXTwoMath-Regular.ttf"


def _generated() -> dict[str, str]:
    """Pages whose text is that of a file elsewhere."""
    found = {page: f"<!-- include {path} -->\n" for path, page in PAGES.items() if not (ROOT / "docs" / page).exists()}
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {f.src_uri: Path(f.abs_src_path or "").read_text(encoding="utf-8") for f in files.documentation_pages()}
    generated = _generated()
    targets: set[str] = set()
    for page, text in (pages | generated).items():
        expanded = expand(text, page)
        for link in LINK.finditer(expanded):
            targets.add(posixpath.normpath(posixpath.join(posixpath.dirname(page), link[2])))
    for page, text in generated.items():
        files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "assets/STIXTwoMath-Regular.ttf", abs_src_path=str(_math_font())))
    for target in sorted(targets):
        if target.startswith("source/"):
            content = _source_page(target.removeprefix("source/").removesuffix(".md"))
            files.append(File.generated(config, target, content=content))
        elif target.startswith("files/"):
            path = ROOT / target.removeprefix("files/")
            files.append(File.generated(config, target, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    if page.file.src_uri.startswith("source/"):
        return markdown
    return expand(markdown, page.file.src_uri)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas, which the extension arithmatex has marked, as MathML."""

    def formula(match: re.Match[str]) -> str:
        return mathml.render(html.unescape(match[2]), display=match[1] == "div")

    return re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', formula, content, flags=re.S)
