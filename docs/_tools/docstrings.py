"""The docstrings as Markdown: formulas, roles, literal blocks, tables and sections. An extension of griffe."""

from __future__ import annotations

import ast
import re
import textwrap
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from griffe import Extension, Object

ROOT = Path(__file__).parents[2]
_SECTIONS = {"Args": "Arguments", "Attributes": "Attributes", "Raises": "Raises", "Returns": "Returns"}


def documented() -> dict[str, str]:
    """Where each name is described, by its last part: ``ddo_loss`` at ``fastgen.ddo_loss``."""
    found: dict[str, str] = {}
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        for path in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.M):
            if not path.startswith("fastgen.reference."):
                found[path.rpartition(".")[2]] = path
    return found


DOCUMENTED = documented()


def _role(match: re.Match[str], owner: str) -> str:
    kind, name = match["kind"], match["name"]
    head, _, tail = name.removeprefix("fastgen.").partition(".")
    if kind in ("meth", "attr") and not tail:
        return f"[`{name}`][{owner}.{name}]" if owner else f"`{name}`"
    if head not in DOCUMENTED:
        return f"`{name}`"
    shown = f"{head}.{tail}" if tail else head
    return f"[`{shown}`][{DOCUMENTED[head]}{'.' + tail if tail else ''}]"


def _table(lines: list[str]) -> str:
    """A simple table of reStructuredText, with a head or without. Its columns are those of a terminal."""
    starts = [m.start() for m in re.finditer("=+", lines[0])]
    rows = []
    for line in lines:
        if "==" in line:
            continue
        cells, column = [""] * len(starts), 0
        for c in line:
            column += not unicodedata.combining(c)  # an accent stands above the character before it
            cells[sum(start < column for start in starts) - 1] += c
        rows.append([cell.strip() for cell in cells])
    if sum("==" in line for line in lines) == 2:
        rows.insert(0, [""] * len(starts))
    rows.insert(1, ["---"] * len(starts))
    return "\n".join("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows)


def _cell(text: str) -> str:
    """A bar is part of a cell in code, and has to be marked elsewhere."""
    parts = re.split("(``?[^`]+``?)", text)
    return "".join(part if i % 2 else part.replace("|", r"\|") for i, part in enumerate(parts))


def _formula(match: re.Match[str]) -> str:
    """Literals with accents over letters, which few fonts for code have, as formulas."""
    text = match[1]
    if not any(unicodedata.combining(c) for c in unicodedata.normalize("NFD", text)):
        return match[0]
    text = re.sub("\u0302(\\d)", "\u0302_\\1", unicodedata.normalize("NFD", text))
    text = re.sub("([a-z]{2,})_([a-z]{2,})", r"\1\\_\2", text)  # a name, not an index
    text = re.sub(r"(?<![\w{])([xk])(\d)", r"\1_\2", text.replace("<=", "≤").replace(">=", "≥"))
    return f"${text.replace('|', chr(92) + 'vert ').strip()}$"


def _language(code: str) -> str:
    if code.lstrip().startswith(">>>"):
        return "pycon"
    try:
        ast.parse(code)
    except SyntaxError:
        return "text"
    return "python"


def _indented(lines: list[str], start: int, indent: int) -> int:
    """The end of the block that is indented by more than `indent`, without blank lines after it."""
    end = start
    for i in range(start, len(lines)):
        if lines[i].strip():
            if len(lines[i]) - len(lines[i].lstrip()) <= indent:
                break
            end = i + 1
    return end


def _blocks(text: str, owner: str) -> str:
    lines, out, i = text.splitlines(), [], 0
    while i < len(lines):
        line = lines[i]
        indent = len(line) - len(line.lstrip())
        pad = " " * indent
        if math := re.match(r"\s*\.\. math::(.*)", line):
            end = _indented(lines, i + 1, indent)
            formulas = textwrap.dedent("\n".join(lines[i + 1 : end])).split("\n\n")
            formulas[0] = f"{math[1]} {formulas[0]}"
            out += [part for f in formulas for part in ("", f"{pad}$$", f"{pad}{' '.join(f.split())}", f"{pad}$$", "")]
            i = end
        elif re.match(r"\s*==+ +==", line):
            end = next(n for n in range(i, len(lines) + 1) if n == len(lines) or not lines[n].strip())
            out += ["", *_inline(_table([row[indent:] for row in lines[i:end]]), owner).splitlines(), ""]
            i = end
        elif line.rstrip().endswith("::"):
            end = _indented(lines, i + 1, indent)
            code = textwrap.dedent("\n".join(lines[i + 1 : end])).strip("\n")
            out += [f"{pad}**Example**" if line.strip() == "Example::" else _inline(line.rstrip()[:-1], owner), ""]
            out += [f"{pad}``` {_language(code)}", *(pad + c for c in code.splitlines()), f"{pad}```", ""]
            i = end
        elif line.lstrip().startswith(">>>"):
            end = next(n for n in range(i, len(lines) + 1) if n == len(lines) or not lines[n].strip())
            out += ["", f"{pad}``` pycon", *lines[i:end], f"{pad}```", ""]
            i = end
        else:
            out.append(_inline(line, owner))
            i += 1
    return "\n".join(out)


def _inline(line: str, owner: str) -> str:
    line = re.sub("``([^`]+)``", _formula, line)
    return re.sub(r":(?P<kind>\w+):`(?P<name>[^`]+)`", lambda m: _role(m, owner), line)


def _items(body: str) -> Iterator[tuple[str, str]]:
    """The terms of a section and what is said of each."""
    for item in re.split(r"\n(?=\S)", body):
        term, _, text = item.partition(":")
        first, _, rest = text.strip().partition("\n")
        yield term, f"{first}\n{textwrap.dedent(rest)}".strip()


def markdown(text: str, owner: str = "") -> str:
    """A docstring as Markdown; `owner` is the class whose members are meant where a role names a member alone."""
    text = re.sub(r":(\w+):`([^`\n]*)\n\s*([^`\n]*)`", r":\1:`\2\3`", text)
    lines, out, i = text.splitlines(), [], 0
    while i < len(lines):
        section = re.fullmatch(rf"({'|'.join(_SECTIONS)}):", lines[i])
        if not section:
            end = next(
                (n for n in range(i + 1, len(lines)) if re.fullmatch(rf"({'|'.join(_SECTIONS)}):", lines[n])),
                len(lines),
            )
            out.append(_blocks("\n".join(lines[i:end]), owner))
            i = end
            continue
        end = _indented(lines, i + 1, 0)
        body = textwrap.dedent("\n".join(lines[i + 1 : end]))
        out.append(f"\n**{_SECTIONS[section[1]]}**\n")
        if section[1] == "Returns":
            out.append(_blocks(body, owner))
        else:
            for term, said in _items(body):
                names = ", ".join(f"`{name.strip()}`" for name in term.split(","))
                out.append(f"{names}\n:   {textwrap.indent(_blocks(said, owner), '    ').lstrip()}\n")
        out.append("")
        i = end
    return "\n".join(out)


class Convert(Extension):
    """Rewrites every docstring as it is loaded."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is None or not str(obj.path).startswith("fastgen"):
            return
        of_class = obj if obj.is_class else obj.parent if obj.parent is not None and obj.parent.is_class else None
        owner = DOCUMENTED.get(of_class.name, "") if of_class is not None else ""
        obj.docstring.value = markdown(obj.docstring.value, owner)
