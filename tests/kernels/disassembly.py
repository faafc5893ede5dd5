"""Reads compiled code: what a thread takes, and the instructions on the way round the loop that multiplies."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import triton

NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Syntax:
    """How to read one vendor's code, as regular expressions.

    Args:
        label: A line that can be jumped to; its name.
        branch: A jump; whether it is conditional (empty: always taken), and where it goes.
        end: A line after which nothing of the kernel follows.
        multiply: What multiplies, the kinds in the order in which a kernel would use them.
        spill: What moves a register to or from memory.
        wide: What loads 16 bytes at once.
    """

    label: str
    branch: str
    end: str
    multiply: tuple[str, ...]
    spill: str
    wide: str


SASS = Syntax(
    label=r"\s*(\.L_x_\d+):",
    branch=r"\*/\s+(@\S+ )?\s*BRA\b.*`\((\.L_x_\d+)\)",
    end=r"\*/\s+(?:EXIT|RET)\b",
    multiply=(r"\bHGMMA\b", r"\bHMMA\b", r"\bFFMA2?\b"),
    spill=r"\b(?:LDL|STL)\b",
    wide=r"\bLDG(?:STS)?\b\S*\.128\b",
)
GCN = Syntax(
    label=r"(\.LBB\d+_\d+):",
    branch=r"\s+s_(c)?branch\S*\s+(\.LBB\d+_\d+)",
    end=r"\s+s_endpgm",
    multiply=(r"\bv_mfma", r"\bv_(?:pk_)?fma"),
    spill=r"\bscratch_(?:load|store)",
    wide=r"\b(?:global|buffer)_load_dwordx4",
)


@dataclass
class Block:
    """Code that is run from its first line to its last, and the numbers of the blocks that may come next."""

    lines: list[str] = field(default_factory=list)
    label: str = ""
    jump: str = ""
    falls_through: bool = True

    @property
    def instructions(self) -> list[str]:
        return [line for line in self.lines if re.search(r"/\*[0-9a-f]{4,}\*/\s+[@\w]", line)]

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.lines)


def resources(compiled: Any) -> dict[str, int]:
    """Read registers, spills, shared memory, and instructions that show how a kernel works.

    Args:
        compiled: As Triton gives it.

    Returns:
        ``shared`` bytes; ``registers`` of a thread; ``spilled``, bytes of a thread (on AMD: registers); where there is
        a loop that multiplies, what :func:`loop_spills` says of it; ``matrix``, ``double`` and ``wide``, instructions
        of matrix units, of float64, and that load 16 bytes.
    """
    taken = {"shared": compiled.metadata.shared}
    if "amdgcn" in compiled.asm:
        code, syntax = compiled.asm["amdgcn"], GCN
        fields = {"registers": r"\.vgpr_count:\s+(\d+)", "spilled": r"\.vgpr_spill_count:\s+(\d+)"}
        matrix, double, taken_by = r"\bv_mfma", r"\bv_\w+_f64\b", code
    else:
        taken_by = _of_cubin(compiled, "cuobjdump", "-res-usage")
        code, syntax = _sass(compiled), SASS
        fields = {"registers": r"REG:(\d+)", "spilled": r"STACK:(\d+)"}
        matrix, double = r"\b(?:HGMMA|HMMA)\b", r"\b(?:DFMA|DMUL|DADD)\b"
    taken |= {name: int(re.search(pattern, taken_by)[1]) for name, pattern in fields.items()}
    taken |= loop_spills(code, syntax)
    patterns = {"matrix": matrix, "double": double, "wide": syntax.wide}
    return taken | {name: len(re.findall(pattern, code)) for name, pattern in patterns.items()}


def instructions(compiled: Any) -> dict[str, int]:
    """Count what a multiprocessor of sm_90 executes in the loop over chunks.

    Args:
        compiled: As Triton gives it, with one loop that multiplies.

    Returns:
        Instructions of a warp: ``chunk``, round the loop where no example ends; ``example``, of the whole loop, waits
        for barriers included, which is at most what a chunk with the end of an example takes; ``selects``, those of the
        loop that select one of two values of a register that products are added to. And of the whole kernel ``loads``,
        ``stores`` and ``adds``, those of TMA.
    """
    code = _sass(compiled)
    blocks, after = _graph(code, SASS)
    start = max(range(len(blocks)), key=lambda number: blocks[number].count(SASS.multiply[0]))
    ahead = [_reached(number, after) for number in range(len(blocks))]
    loop = [number for number in ahead[start] if start in ahead[number]]
    lines = [line for number in loop for line in blocks[number].instructions]
    sums = {register for line in lines if re.search(SASS.multiply[0], line) for register in _sums(line)}
    selects = [line for line in lines if re.search(r"\bF?SEL\b", line) and not sums.isdisjoint(_registers(line))]
    way = _round(start, blocks, after)
    of_tma = {"loads": "UTMALDG", "stores": "UTMASTG", "adds": "UTMAREDG"}
    return {
        "chunk": sum(len(blocks[number].instructions) for number in way),
        "example": len(lines),
        "selects": len(selects),
    } | {name: len(re.findall(rf"\b{pattern}\b", code)) for name, pattern in of_tma.items()}


def loop_spills(code: str, syntax: Syntax) -> dict[str, int]:
    """Count what moves registers to or from memory on the shortest way round each loop that multiplies.

    The shortest way is that of a chunk with which no example ends, so that the squares are not on it.

    Args:
        code: Of one kernel, disassembled.
        syntax: Of its vendor.

    Returns:
        ``loop_spills``: how many instructions; ``accumulator_spills``: how many of them move what products are added
        to, all of them where the code does not tell. Nothing where no loop multiplies.
    """
    blocks, after = _graph(code, syntax)
    kind = next((kind for kind in syntax.multiply if re.search(kind, code)), None)
    if kind is None:
        return {}
    # A loop that is pipelined has copies of its body before and after it, which are on no way round.
    products = [block.count(kind) for block in blocks]
    ways = {start: way for start in range(len(blocks)) if products[start] and (way := _round(start, blocks, after))}
    if not ways:
        return {}
    # A kernel may have several loops that multiply as much; those through a block of an earlier one are no others.
    most, counted = max(products[start] for start in ways), set()
    for start, way in ways.items():
        if products[start] == most and counted.isdisjoint(way):
            counted.update(way)
    lines = [line for number in sorted(counted) for line in blocks[number].lines]
    spills = [line for line in lines if re.search(syntax.spill, line)]
    moved = spills
    if syntax is SASS:
        sums = {register for line in lines if re.search(kind, line) for register in _sums(line)}
        moved = [line for line in spills if not sums.isdisjoint(_moved(line))]
    return {"loop_spills": len(spills), "accumulator_spills": len(moved)}


def _graph(code: str, syntax: Syntax) -> tuple[list[Block], list[list[int]]]:
    """The blocks of a kernel, and for each the numbers of those that may come next."""
    blocks = list(_blocks(code, syntax))
    places = {block.label: number for number, block in enumerate(blocks) if block.label}
    after = [
        [place for place in (places.get(block.jump), number + 1 if block.falls_through else None) if place is not None]
        for number, block in enumerate(blocks)
    ]
    after[-1] = [place for place in after[-1] if place < len(blocks)]
    return blocks, after


def _reached(start: int, after: list[list[int]]) -> set[int]:
    """The numbers of the blocks that may come at any time after one."""
    reached, waiting = set(), [start]
    while waiting:
        fresh = set(after[waiting.pop()]) - reached
        reached |= fresh
        waiting += fresh
    return reached


def _registers(line: str) -> set[int]:
    """All registers that an instruction of SASS names."""
    return {int(number) for number in re.findall(r"\bR(\d+)\b", line)}


def _sums(line: str) -> range:
    """The registers of a thread that an instruction of SASS leaves its sums in."""
    name, first = re.search(r"\b(\w*(?:MMA|FFMA2?)\S*)\s+R(\d+)", line).groups()
    tile = re.match(r"HGMMA\.64x(\d+)x", name)
    count = int(tile[1]) // 2 if tile else 4 if name.startswith("HMMA") else 1
    return range(int(first), int(first) + count)


def _moved(line: str) -> range:
    """The registers that an instruction of SASS moves from or to a thread's memory."""
    name, register = re.search(r"\b((?:LDL|STL)\S*)\s+(?:\[.*\],\s*)?R(\d+|Z)", line).groups()
    size = re.search(r"\.(64|128)\b", name)
    count = int(size[1]) // 32 if size else 1
    return range(int(register), int(register) + count) if register != "Z" else range(0)  # RZ is zero


def _round(start: int, blocks: list[Block], after: list[list[int]]) -> list[int] | None:
    """The blocks on the shortest way, in lines, from one block back to itself."""
    visited: set[int] = set()
    waiting = [(0, start, [])]
    while waiting:
        length, number, way = heappop(waiting)
        if number == start and way:
            return way
        if number in visited:
            continue
        visited.add(number)
        for place in after[number]:
            heappush(waiting, (length + len(blocks[number].lines), place, [*way, number]))
    return None


def _blocks(code: str, syntax: Syntax) -> Iterator[Block]:
    """Cut code where it is jumped to, and where it jumps."""
    block = Block()
    for line in code.splitlines():
        if label := re.match(syntax.label, line):
            yield block
            block = Block(label=label[1])
        block.lines.append(line)
        branch = re.search(syntax.branch, line)
        if branch or re.search(syntax.end, line):
            block.jump = branch[2] if branch else ""
            block.falls_through = bool(branch and branch[1])
            yield block
            block = Block()
    yield block


def _sass(compiled: Any) -> str:
    return _of_cubin(compiled, "nvdisasm", "-c")


def _of_cubin(compiled: Any, tool: str, *arguments: str) -> str:
    """What a tool prints of compiled code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [NVIDIA / tool, *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
