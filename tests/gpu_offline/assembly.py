"""What a compiled kernel consists of, read from its machine code: registers, memory, instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.compiler import CompiledKernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Which of an instruction's kinds a main loop is made of, the first that matches.
SASS_KINDS = (
    ("matrix", r"[HQIDO]G?MMA|UTC\w*MMA"),
    ("copy", r"UTMALDG|UBLKCP|LDGSTS|LDG"),
    ("shared", r"LDSM|LDS|STS|STSM|LDTM|STTM"),
    ("local", r"LDL|STL"),
    ("fma", r"FFMA"),
    ("sync", r"BAR|SYNCS|WARPSYNC|DEPBAR|LDGDEPBAR|WARPGROUP|UTCBAR|ARRIVES|FENCE|NANOSLEEP|MEMBAR"),
)
AMD_KINDS = (
    ("matrix", r"v_s?w?mfma|v_s?wmma"),
    ("copy", r"buffer_load|global_load"),
    ("shared", r"ds_"),
    ("local", r"scratch_"),
    ("fma", r"v_(pk_|dual_)?fma"),
    ("sync", r"s_barrier|s_waitcnt|s_wait_|s_delay_alu|s_nop"),
)
# Branches without a condition, and ends; the instruction after them does not follow.
ALWAYS = r"(BRA\S* 0x|(EXIT|RET)\S* (?!@)|s_branch |s_endpgm)"
FMA = r"FFMA|v_(pk_|dual_)?fma"
# Not those in shared memory, where integers are counted.
ATOMIC = r"ATOMG?\b|REDG?\b|UTMAREDG|UBLKRED|(global|buffer|flat)_atomic"
MATRIX = {"sm": SASS_KINDS[0][1], "gfx": AMD_KINDS[0][1]}


Code = list[tuple[int, str, str]]  # of every instruction its place, opcode and operands
Branch = Callable[[str, str], int | None]  # where an instruction branches to, by opcode and operands


@dataclass
class Facts:
    """registers   of a thread
    shared      bytes of shared memory
    spilled     registers that did not fit and live in memory
    local       bytes of memory private to a thread
    matrix      matrix instructions by opcode
    loads       global loads by bytes; "tma" for bulk copies
    loop        instructions of the main loop, by kind
    loop_loads  global loads of the main loop, as `loads`
    atomics     atomic instructions on global memory
    """

    registers: int
    shared: int
    spilled: int
    local: int
    matrix: dict[str, int] = field(default_factory=dict)
    loads: dict[str, int] = field(default_factory=dict)
    loop: dict[str, int] = field(default_factory=dict)
    loop_loads: dict[str, int] = field(default_factory=dict)
    atomics: int = 0


def facts(kernel: CompiledKernel) -> Facts:
    shared = kernel.metadata.shared
    if "cubin" in kernel.asm:
        return _nvidia(kernel.asm["cubin"], shared)
    return _amd(kernel.asm["amdgcn"], shared)


def _nvidia(cubin: bytes, shared: int) -> Facts:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, listing = (
            subprocess.run([TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    code = sass_instructions(listing)
    spilled = sum(re.match("LDL|STL", opcode) is not None for _, opcode, _ in code)
    loop = main_loop(code, sass_branch, MATRIX["sm"])
    return Facts(
        registers,
        shared,
        spilled,
        stack + local,
        _count_matrix(code, MATRIX["sm"]),
        _count(code, sass_load),
        kinds(loop, SASS_KINDS),
        _count(loop, sass_load),
        atomics(code),
    )


def _amd(listing: str, shared: int) -> Facts:
    def metadata(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)", listing, re.MULTILINE)
        return int(found[1]) if found else 0

    code = amd_instructions(listing)
    loop = main_loop(code, amd_branch(listing), MATRIX["gfx"])
    return Facts(
        metadata("vgpr_count") + metadata("agpr_count"),
        shared,
        metadata("vgpr_spill_count"),
        metadata("private_segment_fixed_size"),
        _count_matrix(code, MATRIX["gfx"]),
        _count(code, amd_load),
        kinds(loop, AMD_KINDS),
        _count(loop, amd_load),
        atomics(code),
    )


def atomics(code: Code) -> int:
    """How many instructions add to global memory, or exchange with it, in no order of their own."""
    return sum(re.match(ATOMIC, opcode) is not None for _, opcode, _ in code)


def sass_instructions(listing: str) -> Code:
    """A predicate counts as an operand."""
    pattern = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
    return [(int(place, 16), opcode, guard + rest) for place, guard, opcode, rest in pattern.findall(listing)]


def amd_instructions(listing: str) -> Code:
    """The place of an instruction is its line."""
    pattern = re.compile(r"^\s+([a-z]\w*)[ \t]*(.*)$")
    return [
        (place, found[1], found[2])
        for place, line in enumerate(listing.splitlines())
        if (found := pattern.match(line)) and not line.lstrip().startswith(".")
    ]


def sass_branch(opcode: str, operands: str) -> int | None:
    """Where a branch goes, if it is one."""
    if not opcode.startswith("BRA"):
        return None
    found = re.search(r"0x([0-9a-f]+)\s*$", operands)
    return int(found[1], 16) if found else None


def amd_branch(listing: str) -> Branch:
    labels = {line.split(":")[0]: place for place, line in enumerate(listing.splitlines()) if line.startswith(".LBB")}

    def target(opcode: str, operands: str) -> int | None:
        return labels.get(operands.split()[0]) if re.match("s_c?branch", opcode) else None

    return target


def main_loop(code: Code, branch: Branch, matrix: str) -> Code:
    """Of the loops that hold matrix instructions, or multiply-adds where a kernel has no others, and that hold no such
    loop themselves, the one with most; empty if there is none."""
    multiply = re.compile(matrix if _count_matrix(code, matrix) else FMA)
    loops = []
    for place, opcode, operands in code:
        start = branch(opcode, operands)
        if start is not None and start <= place:
            body = _between(code, start, place, branch)
            work = sum(multiply.match(entry[1]) is not None for entry in body)
            if work:
                loops.append((work, body))
    innermost = [loop for loop in loops if not any(_holds(loop[1], body) for _, body in loops)]
    return max(innermost, key=lambda loop: loop[0], default=(0, []))[1]


def _holds(outer: Code, inner: Code) -> bool:
    """Whether a loop has another inside: it comes by where the other starts, which does not come by its own start."""
    return inner[0] in outer and outer[0] not in inner


def _between(code: Code, start: int, end: int, branch: Branch) -> Code:
    """The instructions through which the one at `end` is reached from the one at `start`: compilers place code between
    them that belongs to no loop, or to one around it."""
    body = [entry for entry in code if start <= entry[0] <= end]
    places = [entry[0] for entry in body]
    after: list[list[int]] = [[] for _ in body]
    before: list[list[int]] = [[] for _ in body]
    for i, (_, opcode, operands) in enumerate(body):
        jump = branch(opcode, operands)
        if jump is not None and start <= jump <= end:
            after[i].append(bisect_left(places, jump))
        if i + 1 < len(body) and not re.match(ALWAYS, f"{opcode} {operands}"):
            after[i].append(i + 1)
        for j in after[i]:
            before[j].append(i)
    kept = _reached(0, after) & _reached(len(body) - 1, before)
    return [entry for i, entry in enumerate(body) if i in kept]


def _reached(start: int, edges: list[list[int]]) -> set[int]:
    seen, todo = {start}, [start]
    while todo:
        new = [place for place in edges[todo.pop()] if place not in seen]
        seen.update(new)
        todo += new
    return seen


def sass_load(opcode: str) -> str | None:
    if re.match("UTMALDG|UBLKCP", opcode):
        return "tma"
    if not re.match(r"LDG(STS)?\.", opcode):
        return None
    found = re.search(r"\.(128|64|U?16|U8|S16|S8)\b", opcode)
    bits = int(found[1].lstrip("US")) if found else 32
    return str(bits // 8)


def amd_load(opcode: str) -> str | None:
    found = re.match(r"(?:buffer|global)_load_(?:lds_|async_to_lds_)?(dword|b|u?short|ubyte|d16)(?:x?(\d+))?", opcode)
    if found is None:
        return None
    kind, number = found[1], int(found[2] or 1)
    return str({"dword": 4 * number, "b": number // 8, "ubyte": 1}.get(kind, 2))


def _count_matrix(code: Code, matrix: str) -> dict[str, int]:
    return dict(Counter(opcode for _, opcode, _ in code if re.match(matrix, opcode)))


def _count(code: Code, classify: Callable[[str], str | None]) -> dict[str, int]:
    return dict(Counter(kind for _, opcode, _ in code if (kind := classify(opcode)) is not None))


def kinds(code: Code, table: tuple[tuple[str, str], ...]) -> dict[str, int]:
    def kind(opcode: str) -> str:
        return next((name for name, pattern in table if re.match(pattern, opcode)), "other")

    return dict(Counter(kind(opcode) for _, opcode, _ in code))
