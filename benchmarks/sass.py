"""Reading machine code: the loops of a kernel, what one turn of them issues, and the time that this bounds.

A multiprocessor of an H100 issues 4 warp instructions a clock, that is 128 lanes, and of special functions (MUFU) and
conversions 16 lanes each; integers of 64 bits are counted where their high halves are (``.X``, ``WIDE``). No count is a
measurement: they bound from below what time a kernel takes.
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
# Of an H100: multiprocessors, clocks a second, lanes a clock; bytes a second that a copy moves.
MULTIPROCESSORS, CLOCK, ISSUE, SPECIAL, COPY = 132, 1.755e9, 128, 16, 3.0e12
THREADS, REGISTERS, BLOCKS = 2048, 65536, 32  # of a multiprocessor

_CONVERSIONS = re.compile(r"(F2F|I2F|F2I|I2I|F2IP|I2IP|FRND)\b")  # at a quarter of the rate, where packed at all
_LONG = re.compile(r"(U?IMAD\.WIDE|U?IADD3\.X|IADD3\.64|LEA\.HI\.X|IMAD\.X|IMAD\.HI|ISETP\.\w+\.\w+\.\w+\.EX)")


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
    loads: dict[int, int]  # width in bytes -> global loads, predicated ones among them
    shared: int  # bytes a thread reads of shared memory
    stores: dict[int, int]
    guarded: bool  # a global load is predicated: of a block that is not full


@dataclass(frozen=True)
class Function:
    name: str
    code: list[Instruction] = field(repr=False)

    @cached_property
    def loops(self) -> list[Loop]:
        """The innermost ones, in the order of the code."""
        back = [(i.target, i.address) for i in self.code if i.target is not None and i.target < i.address]
        spans: dict[int, int] = {}
        for start, end in back:
            spans[start] = max(end, spans.get(start, 0))

        def inner(start: int, end: int) -> bool:
            return not any(start <= s and e <= end and (s, e) != (start, end) for s, e in spans.items())

        return [self._turn(s, e) for s, e in sorted(spans.items()) if inner(s, e)]

    @property
    def whole(self) -> Loop:
        """All of a kernel without loops, by its longest way."""
        return self._turn(self.code[0].address, self.code[-1].address)

    def _turn(self, start: int, end: int) -> Loop:
        """The longest way from `start` to `end`: forward branches may be taken or not."""
        code = [i for i in self.code if start <= i.address <= end]
        index = {i.address: k for k, i in enumerate(code)}
        lengths = [-1] * len(code) + [0]  # of the longest way on; -1: it leaves the loop
        following = [0] * len(code)
        for k in range(len(code) - 1, -1, -1):
            i = code[k]
            ways = [index[i.target]] if i.target in index and i.target > i.address else []
            leaves = i.predicate is None and i.opcode.startswith(("EXIT", "RET", "BRA")) and "UP" not in i.operands
            if not leaves or i.address == end:
                ways.append(k + 1)
            ways = [w for w in ways if lengths[w] >= 0]
            if leaves and i.opcode == "EXIT":
                ways = [len(code)]
            if ways:
                following[k] = max(ways, key=lambda w: lengths[w])
                lengths[k] = 1 + lengths[following[k]]
        turn, k = [], 0
        while k < len(code) and lengths[k] > 0:
            turn.append(code[k])
            k = following[k]
        return self._counted(start, [i for i in turn if i.opcode != "NOP"])

    @staticmethod
    def _counted(start: int, turn: list[Instruction]) -> Loop:
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
            any(i.opcode.startswith("LDG") and i.predicate is not None for i in turn),
        )


def tool(name: str) -> str:
    """Triton's package has the disassembler."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def dump(cubin: bytes | Path) -> tuple[str, dict[str, Function]]:
    """What cuobjdump says of a binary, and the kernels in it by symbol."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        if isinstance(cubin, bytes):
            file.write(cubin)
            file.flush()
            cubin = Path(file.name)
        command = [tool("cuobjdump"), "--dump-resource-usage", "--dump-sass", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\s+Function : (\S+)\n", text, flags=re.MULTILINE)
    found = {
        name: Function(name, [Instruction(int(a, 16), p or None, o, x) for a, p, o, x in _LINE.findall(body)])
        for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }
    return text, found


def resident_threads(registers: int, block: int, shared_bytes: int) -> int:
    """Threads of blocks of `block` that a multiprocessor holds: registers come in eights a thread."""
    each = -(-registers // 8) * 8 * block
    blocks = min(BLOCKS, THREADS // block, REGISTERS // each, (227 << 10) // (shared_bytes + 1024))
    return blocks * block


class Bound(NamedTuple):
    """What bounds a kernel, in nanoseconds for 2^20 elements on an H100, and which share of a copy's speed that is."""

    what: str
    time: float
    share: float


def bound(issued: float, special: float, conversions: float, floor_bytes: float, moved_bytes: float) -> Bound:
    """Of instructions and bytes an element. `floor_bytes` is what a copy would move, `moved_bytes` what comes from
    memory."""
    clocks = {"issue": issued / ISSUE, "special": special / SPECIAL, "conversion": conversions / SPECIAL}
    times = {what: c / (MULTIPROCESSORS * CLOCK) for what, c in clocks.items()} | {"memory": moved_bytes / COPY}
    what = max(times, key=lambda w: times[w])
    return Bound(what, times[what] * 1e9 * 2**20, floor_bytes / COPY / times[what] if times[what] else 0.0)
