"""What every compiled kernel must look like on its target."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tests.gpu_offline.assembly import Facts

from polymoe.kernels.devices import TARGETS

QUANTIZED = ("quantized_mm", "quantized_gate_up", "quantized_backward")
PRODUCTS = ("grouped_mm", "gate_up", "down_backward", *QUANTIZED)

# Matrix instructions by target and arithmetic; None where multiply-adds do the work.
_MMA_SYNC = {
    "bf16": r"HMMA\.16816\.F32\.BF16",
    "f16": r"HMMA\.16816\.F32",
    "tf32": r"HMMA\.1688\.F32\.TF32",
    "f32": None,
    "int8": r"IMMA\.16832\.S8\.S8\.SAT",
}
_MFMA = {"f32": "v_mfma_f32_16x16x4_f32"}
_WMMA = {
    "bf16": "v_wmma_f32_16x16x16_bf16",
    "f16": "v_wmma_f32_16x16x16_f16",
    "f32": None,
    "int8": "v_wmma_i32_16x16x16_iu8",
}
INSTRUCTIONS: dict[str, dict[str, str | None]] = {
    "sm_80": _MMA_SYNC,
    "sm_90": {
        "bf16": r"HGMMA\.64x\d+x16\.F32\.BF16",
        "f16": r"HGMMA\.64x\d+x16\.F32",
        "tf32": r"HGMMA\.64x\d+x8\.F32\.TF32",
        "f32": None,
        "int8": r"IGMMA\.64x\d+x32\.S8\.S8",
    },
    "sm_100": {
        "bf16": "UTCHMMA",
        "f16": "UTCHMMA",
        "tf32": "UTCHMMA",
        "f32": None,
        "int8": "UTCIMMA",
        "mx": "UTCQMMA",
    },
    "sm_120": _MMA_SYNC,
    "gfx942": _MFMA
    | {
        "bf16": "v_mfma_f32_16x16x16_bf16",
        "f16": "v_mfma_f32_16x16x16_f16",
        "tf32": "v_mfma_f32_16x16x8_xf32",
        "int8": "v_mfma_i32_16x16x32_i8",
    },
    "gfx950": _MFMA
    | {
        "bf16": "v_mfma_f32_16x16x32_bf16",
        "f16": "v_mfma_f32_16x16x32_f16",
        "int8": "v_mfma_i32_16x16x32_i8",
        "mx": "v_mfma_scale_f32_16x16x128_f8f6f4",
    },
    "gfx1100": _WMMA,
    "gfx1200": _WMMA,
}


# Multiply-adds of their epilogues hide which loop is the product's, where that has no matrix instructions.
ACTIVATING = ("down_backward",)

# Triton 3.9 copies these to shared memory by 4 bytes, because of the order in which the instruction reads them.
NARROW = (("gfx950", "f32"),)

# What quantised weights load beside 16 bytes: a scale of a byte or a float for every column, or up to four bytes of a
# row where matrix instructions take them; and codes by 4 or 8 bytes, where there are so many threads that no more is
# left for one.
SCALES = ("1", "2", "4", "8")


def complaints(name: str, arithmetic: str, described: int, target: str, facts: Facts) -> list[str]:
    """What is wrong with a kernel that reads `described` operands through descriptors; empty if nothing is."""
    device = TARGETS[target]
    found = []
    if facts.spilled or facts.local:
        found.append(f"{facts.spilled} spilled registers, {facts.local} bytes of local memory")
    if facts.shared > device.shared:
        found.append(f"{facts.shared} bytes of shared memory, of {device.shared}")
    if facts.atomics:
        found.append(f"{facts.atomics} atomic instructions, whose order is another in every run")
    instruction = INSTRUCTIONS[target][arithmetic] if name in PRODUCTS else None
    others = [opcode for opcode in facts.matrix if instruction is None or not re.fullmatch(instruction, opcode)]
    if others:
        found.append(f"matrix instructions {', '.join(others)}, expected {instruction or 'none'}")
    if instruction is not None and not facts.matrix:
        found.append(f"no matrix instruction, expected {instruction}")
    if len(facts.matrix) > 1:
        found.append(f"more than one matrix instruction: {', '.join(facts.matrix)}")
    if name in PRODUCTS:
        hidden = name in ACTIVATING and not facts.matrix
        found += _loads(described, hidden or (target, arithmetic) in NARROW, SCALES if name in QUANTIZED else (), facts)
    return found


def _loads(described: int, narrow_too: bool, others: Sequence[str], facts: Facts) -> list[str]:
    found = []
    if (described > 0) != ("tma" in facts.loads):
        found.append(f"{described} operands with descriptors, and {facts.loads.get('tma', 0)} bulk copies")
    narrow = [width for width in facts.loop_loads if width not in ("tma", "16", *others)]
    if narrow and not narrow_too:
        found.append(f"loads of {', '.join(narrow)} bytes in the main loop")
    return found


def varying(rows: Sequence[tuple[tuple[str, ...], str]]) -> list[str]:
    """rows: what a result may not depend on beyond (kernel, dtype, N, D, target), and the instruction with its step
    along the reduction. Returns those with more than one."""
    seen: dict[tuple[str, ...], set[str]] = {}
    for key, instruction in rows:
        seen.setdefault(key, set()).add(instruction)
    return [f"{' '.join(key)}: {', '.join(sorted(found))}" for key, found in sorted(seen.items()) if len(found) > 1]
