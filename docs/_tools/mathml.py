"""TeX as MathML, which browsers draw by themselves: a page of formulas needs no script and no font of its own.

The formulas of the docstrings are written to be read in a terminal too: Greek letters as they are, ``²`` and ``√(…)``,
words such as ``mean`` without a command. They become TeX proper here, and pages use the same notation.
"""

from __future__ import annotations

import re
import unicodedata

from latex2mathml.converter import convert

_ACCENTS = {"\u0302": "hat", "\u0303": "tilde", "\u0304": "bar", "\u0305": "bar"}
_POWERS = {"²": "2", "³": "3", "⁺": "+", "⁻": "-", "ᵀ": "T"}
_OPERATORS = "←→∝∼·…‖±×≤≥∈"


def _accents(tex: str) -> str:
    """``ᾱ`` as ``\\bar{α}``."""
    plain = unicodedata.normalize("NFD", tex)
    return re.sub(f"(.)([{''.join(_ACCENTS)}])", lambda m: rf"\{_ACCENTS[m[2]]}{{{m[1]}}}", plain)


def _closing(text: str, start: int, pair: str) -> int:
    """Where the bracket at `start` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == pair[0]) - (text[i] == pair[1])
        if depth == 0:
            return i
    raise ValueError(f"unbalanced {pair} in {text!r}")


def _roots(tex: str) -> str:
    """``√(x + y)`` and ``√x_t`` as ``\\sqrt{…}``."""
    while (at := tex.rfind("√")) >= 0:
        rest = tex[at + 1 :]
        if rest.startswith("("):
            end = _closing(rest, 0, "()")
            inside, rest = rest[1:end], rest[end + 1 :]
        else:
            token = re.match(r"(?:\\[a-z]+\{[^{}]*\}|.)(?:_(?:\{[^{}]*\}|.))?", rest)
            assert token, f"nothing under the root of {tex!r}"
            inside, rest = token[0], rest[token.end() :]
        tex = f"{tex[:at]}\\sqrt{{{inside}}}{rest}"
    return tex


def _words(tex: str) -> str:
    """Runs of letters as names: upright, and apart from what they apply to where they are no index."""
    out, i, indices = [], 0, []  # whether each open brace is an index
    while i < len(tex):
        command = re.compile(r"\\(?:[A-Za-z]+|.)").match(tex, i)
        word = re.compile(r"[A-Za-z](?:[A-Za-z]|\\_)+").match(tex, i)
        if command:
            out.append(command[0])
            i = command.end()
            if command[0] in (r"\mathrm", r"\operatorname"):
                end = _closing(tex, i, "{}") + 1
                out.append(tex[i:end])
                i = end
        elif word:
            name = "mathrm" if any(indices) else "operatorname"
            out.append(word[0] if word[0] == "dt" else rf"\{name}{{{word[0]}}}")
            i = word.end()
        else:
            if tex[i] == "{":
                indices.append(bool(out) and out[-1] in ("_", "^"))
            elif tex[i] == "}":
                indices.pop()
            out.append(tex[i])
            i += 1
    return "".join(out)


def _tidy(mathml: str) -> str:
    letters = re.compile(r'(?:<mi mathvariant="normal">[^<]*</mi>){2,}')
    mathml = letters.sub(lambda m: f"<mi>{re.sub('<[^>]*>', '', m[0]).replace('&#x0005F;', '_')}</mi>", mathml)
    mathml = re.sub(f"<mi>([{_OPERATORS}])</mi>", r"<mo>\1</mo>", mathml)
    mathml = mathml.replace("<mo>‖</mo>", '<mo stretchy="false" lspace="0" rspace="0">‖</mo>')
    mathml = re.sub(
        r"<mo>([A-Za-z_\\]{2,})</mo>(?=<mo[^>]*>&#x00028;)", r'<mo lspace="0.17em" rspace="0">\1</mo>', mathml
    )
    mathml = re.sub(r"<mo>([A-Za-z_\\]{2,})</mo>", r'<mo lspace="0.17em" rspace="0.17em">\1</mo>', mathml)
    mathml = re.sub(r"<mi>(log|min|max)</mi>", r'<mo lspace="0.17em" rspace="0.17em">\1</mo>', mathml)
    return mathml.replace("\\_", "_").replace("&#x0007E;", "˜")


def render(tex: str, display: bool = False) -> str:
    """A ``<math>`` element for a formula, of a line of its own or in the text."""
    tex = _accents(" ".join(tex.split()))
    tex = re.sub(f"[{''.join(_POWERS)}]", lambda m: f"^{{{_POWERS[m[0]]}}}", tex)
    return _tidy(convert(_words(_roots(tex)), display="block" if display else "inline"))
