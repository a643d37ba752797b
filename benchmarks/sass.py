"""Reading machine code: the loops of a kernel, what one turn of them issues, and the time that this bounds.

A multiprocessor of an H100 issues 4 warp instructions a clock, and of special functions (MUFU) and conversions 16
lanes; integers of 64 bits take two instructions each, and are counted where their high halves are (``.X``, ``WIDE``).
No count is a measurement: they bound what a kernel can do from below.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
_CONVERSIONS = re.compile(r"(F2F|I2F|F2I|I2I|F2IP|I2IP|FRND)\b")  # at a quarter of the rate, where packed at all
_LONG = re.compile(r"(IMAD\.WIDE|IADD3\.X|IADD3\.64|LEA\.HI\.X|IMAD\.X|IMAD\.HI|ISETP\.\w+\.\w+\.\w+\.EX|UIADD3\.X|UIMAD\.WIDE)")


class Instruction(NamedTuple):
    address: int
    predicate: str | None
    opcode: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch goes; None for all else."""
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands) if self.opcode.startswith("BRA") else None
        return int(found[1], 16) if found else None

    @property
    def width(self) -> int:
        """Bytes that one thread's access of memory moves."""
        found = re.search(r"\.(128|64|U16|S16|U8|S8)(?:\.|$)", self.opcode)
        return {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[found[1]] if found else 4


@dataclass(frozen=True)
class Loop:
    """One turn of an innermost loop, by the longest way through it."""

    start: int
    issued: int
    special: int  # MUFU: exponentials, logarithms, reciprocals, roots
    conversions: int
    long: int  # of 64-bit integers
    loads: dict[int, int]  # width in bytes -> global loads; predicated ones among them
    shared: int  # bytes a thread reads of shared memory
    stores: dict[int, int]


@dataclass(frozen=True)
class Function:
    name: str
    code: list[Instruction] = field(repr=False)

    def opcodes(self, prefix: str) -> Counter[int]:
        """Widths of the accesses whose opcode starts so."""
        return Counter(i.width for i in self.code if i.opcode.startswith(prefix))

    @cached_property
    def loops(self) -> list[Loop]:
        """The innermost ones, in the order of the code."""
        back = [(i.target, i.address) for i in self.code if i.target is not None and i.target < i.address]
        spans: dict[int, int] = {}
        for start, end in back:
            spans[start] = max(end, spans.get(start, 0))
        inner = [
            (s, e) for s, e in spans.items() if not any(s <= s2 and e2 <= e and (s, e) != (s2, e2) for s2, e2 in spans.items())
        ]
        return [self._turn(s, e) for s, e in sorted(inner)]

    def _turn(self, start: int, end: int) -> Loop:
        """The longest way from `start` to the branch at `end`: forward branches may be taken or not."""
        code = [i for i in self.code if start <= i.address <= end]
        index = {i.address: k for k, i in enumerate(code)}
        best: list[list[int] | None] = [None] * (len(code) + 1)
        best[len(code)] = []
        lengths = [-1] * len(code) + [0]
        following: list[int] = [0] * len(code)
        for k in range(len(code) - 1, -1, -1):
            i = code[k]
            ways = []
            if i.target is not None and i.target > i.address:
                ways = [index[i.target]] if i.target in index else []
            stops = i.opcode.startswith(("EXIT", "RET", "BRA", "BRX")) and i.predicate is None
            if i.target is not None and re.match(r"!?UP", i.operands):  # a branch on an operand, not on a predicate
                stops = False
            if not stops or i.address == end:
                ways.append(k + 1)
            ways = [w for w in ways if lengths[w] >= 0]
            if ways:
                following[k] = max(ways, key=lambda w: lengths[w])
                lengths[k] = 1 + lengths[following[k]]
        turn, k = [], 0
        while k < len(code) and lengths[k] > 0:
            turn.append(code[k])
            k = following[k]
        turn = [i for i in turn if i.opcode != "NOP"]

        def count(pattern: re.Pattern[str]) -> int:
            return sum(bool(pattern.match(i.opcode)) for i in turn)

        def widths(prefix: str) -> dict[int, int]:
            return dict(sorted(Counter(i.width for i in turn if i.opcode.startswith(prefix)).items()))

        return Loop(
            start,
            len(turn),
            sum(i.opcode.startswith("MUFU") for i in turn),
            count(_CONVERSIONS),
            count(_LONG),
            widths("LDG"),
            sum(w * n for w, n in widths("LDS").items()),
            widths("STG"),
        )


def tool(name: str) -> str:
    """Triton's package has the disassembler."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def functions(cubin: bytes | Path) -> dict[str, Function]:
    """The kernels in a binary, by symbol."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        if isinstance(cubin, bytes):
            file.write(cubin)
            file.flush()
            cubin = Path(file.name)
        dump = subprocess.run([tool("cuobjdump"), "--dump-sass", str(cubin)], capture_output=True, text=True, check=True)
    parts = re.split(r"^\s+Function : (\S+)\n", dump.stdout, flags=re.MULTILINE)
    return {
        name: Function(name, [Instruction(int(a, 16), p or None, o, x) for a, p, o, x in _LINE.findall(body)])
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }
