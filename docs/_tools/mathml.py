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
    out: list[str] = []
    indices: list[bool] = []  # whether each open brace is an index
    i = 0
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
            name = "mathrm" if any(indices) or "_" in word[0] else "operatorname"
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


_LETTERS = re.compile(r'(?:<mi mathvariant="normal">[^<]*</mi>){2,}')
_ACCENT = re.compile(r"<mover>((?:<mrow>)?<mi>[^<]*</mi>(?:</mrow>)?)<mo[^>]*>&#x000(7E|AF);</mo></mover>")
# A name that applies to what follows, and whether brackets touch it.
_NAME = re.compile(r"(&#x00028;</mo>|)(?:<mi>(log|min|max)</mi>|<mo>([A-Za-z]{2,})</mo>)(?=(<mo[^>]*>&#x0002[89C];|))")


def _tidy(mathml: str) -> str:
    """What browsers want otherwise than latex2mathml gives it: names in one piece, operators as such, low accents."""
    mathml = _LETTERS.sub(lambda m: f"<mi>{re.sub('<[^>]*>', '', m[0]).replace('&#x0005F;', '_')}</mi>", mathml)
    mathml = re.sub(f"<mi>([{_OPERATORS}])</mi>", r"<mo>\1</mo>", mathml)
    mathml = mathml.replace("<mo>‖</mo>", '<mo stretchy="false" lspace="0" rspace="0">‖</mo>')
    mathml = mathml.replace("<mi>&#x02032;</mi>", "<mo>&#x02032;</mo>")
    bars = {"7E": "˜", "AF": "¯"}
    mathml = _ACCENT.sub(lambda m: f'<mover accent="true">{m[1]}<mo stretchy="false">{bars[m[2]]}</mo></mover>', mathml)

    def name(match: re.Match[str]) -> str:
        left, right = ("0" if match[side] else "0.17em" for side in (1, 4))
        return f'{match[1]}<mo lspace="{left}" rspace="{right}">{match[2] or match[3]}</mo>'

    return _NAME.sub(name, mathml)


def render(tex: str, display: bool = False) -> str:
    """A ``<math>`` element for a formula, of a line of its own or in the text."""
    tex = _accents(" ".join(tex.split()))
    tex = re.sub(f"[{''.join(_POWERS)}]", lambda m: f"^{{{_POWERS[m[0]]}}}", tex)
    return _tidy(convert(_words(_roots(tex)), display="block" if display else "inline"))
