"""The closed-form choice of tiles, warps, stages and schedule from a problem and a device: pure Python, no tuning runs.

What a result's bits may depend on is chosen without looking at the number of rows: BLOCK_N, BLOCK_K, the matrix
instruction. Rows decide BLOCK_M, among heights that compile to the same instruction, and the order of the tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from polymoe.kernels.devices import Device

# Of a thread on NVIDIA devices. Left to itself the assembler spills a few to make room for a second program, which no
# persistent one needs; and multiply-adds hide their own latency.
MOST_REGISTERS = 255


@dataclass(frozen=True)
class Problem:
    """A grouped product of S rows in G groups: [rows of a group, D] @ [D, N].

    arithmetic: "bf16", "f16", "tf32", "f32", or "mx" for codes of 8 and 4 bits with scales that the matrix
        instructions apply themselves
    """

    arithmetic: str
    S: int
    G: int
    N: int
    D: int


@dataclass(frozen=True)
class Tiles:
    """warps by program, stages of the software pipeline; whether operands come through descriptors where they can;
    registers of a thread at most, 0 for as many as the compiler likes; see kernels/schedule.py for band and chiplets.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    descriptors: bool
    persistent: bool
    band: int
    chiplets: int
    nonkdim: int = 0
    registers: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """What Triton takes beside a kernel's arguments."""
        options = {"num_warps": self.warps, "num_stages": self.stages}
        if self.nonkdim:
            options["matrix_instr_nonkdim"] = self.nonkdim
        if self.registers:
            options["maxnreg"] = self.registers
        return options


@dataclass(frozen=True)
class Rule:
    """warps: of every BLOCK_M to choose from. nonkdim: rows of the matrix instruction, where Triton would let BLOCK_M
    decide. descriptors: multiply-adds have nothing to gain from them, nor from a persistent schedule that fetches the
    next tile early, and too few registers for their bookkeeping."""

    warps: dict[int, int]
    block_n: int
    block_k: int
    stages: int
    nonkdim: int = 0
    descriptors: bool = True


_HOPPER = {64: 4, 128: 8}
_AMPERE = {16: 4, 32: 4, 64: 4, 128: 8}
# GeForce-class Blackwell has the matrix instructions of _AMPERE; beside them and bulk copies, tall tiles leave too few
# registers to activate.
_GEFORCE = {16: 4, 32: 4, 64: 8}
_FMA = {16: 4, 32: 4, 64: 8}
# Short tiles have few warps, so that each lane still loads 16 bytes of the rows.
_CDNA = {16: 2, 32: 4, 64: 4, 128: 8}
_RDNA = {16: 2, 32: 4, 64: 4}
_RDNA_FMA = {16: 4, 32: 8, 64: 8}

# By family and arithmetic. sm_90 and sm_100 have no instruction below 64 rows, sm_100 none of "mx" below 128; bf16 and
# f16 share their rules.
RULES: dict[tuple[str, str], Rule] = {
    ("sm_80", "bf16"): Rule(_AMPERE, 128, 64, 4),
    ("sm_80", "tf32"): Rule(_AMPERE, 128, 32, 4),
    ("sm_80", "f32"): Rule(_FMA, 64, 32, 3),
    ("sm_90", "bf16"): Rule(_HOPPER, 128, 64, 4),
    ("sm_90", "tf32"): Rule(_HOPPER, 128, 32, 4),
    ("sm_90", "f32"): Rule(_FMA, 64, 32, 2, descriptors=False),
    ("sm_100", "bf16"): Rule(_HOPPER, 128, 64, 4),
    ("sm_100", "tf32"): Rule(_HOPPER, 128, 32, 4),
    ("sm_100", "mx"): Rule({128: 8}, 128, 128, 3),
    ("sm_100", "f32"): Rule(_FMA, 64, 32, 2, descriptors=False),
    ("sm_120", "bf16"): Rule(_GEFORCE, 128, 64, 3),
    ("sm_120", "tf32"): Rule(_GEFORCE, 128, 32, 3),
    ("sm_120", "f32"): Rule(_FMA, 64, 32, 2, descriptors=False),
    ("gfx942", "bf16"): Rule(_CDNA, 128, 64, 2, nonkdim=16),
    ("gfx942", "tf32"): Rule(_CDNA, 128, 32, 2, nonkdim=16),
    ("gfx942", "f32"): Rule(_CDNA, 128, 32, 2, nonkdim=16),
    ("gfx950", "bf16"): Rule(_CDNA, 128, 64, 2, nonkdim=16),
    ("gfx950", "mx"): Rule(_CDNA, 128, 128, 2, nonkdim=16),
    ("gfx950", "f32"): Rule(_CDNA, 128, 32, 2, nonkdim=16),
    ("gfx1100", "bf16"): Rule(_RDNA, 64, 32, 2),
    ("gfx1100", "f32"): Rule(_RDNA_FMA, 64, 32, 2),
    ("gfx1200", "bf16"): Rule(_RDNA, 64, 32, 2),
    ("gfx1200", "f32"): Rule(_RDNA_FMA, 64, 32, 2),
    ("other", "bf16"): Rule({16: 4, 32: 4, 64: 4}, 64, 32, 2),
    ("other", "f32"): Rule(_FMA, 64, 32, 2),
    # Few, large blocks.
    ("interpreter", "bf16"): Rule(dict.fromkeys((16, 64, 256, 1024), 4), 1024, 512, 1),
    ("interpreter", "tf32"): Rule(dict.fromkeys((16, 64, 256, 1024), 4), 1024, 512, 1),
    ("interpreter", "mx"): Rule(dict.fromkeys((16, 64, 256, 1024), 4), 1024, 128, 1),
    ("interpreter", "f32"): Rule(dict.fromkeys((16, 64, 256, 1024), 4), 1024, 128, 1),
}

BYTES = {"bf16": 2, "f16": 2, "tf32": 4, "f32": 4, "mx": 1}
SMALLEST_N = 16
LONGEST_STEP = 128  # along the reduction, of quantised weights
# Columns at most of a tile of quantised weights, where a thread would hold too many scales beside two accumulators.
NARROWER = {(family, kind): 64 for family in ("sm_90", "sm_100") for kind in ("bf16", "f16", "tf32")}
NARROWER["gfx1200", "f32"] = 32
# The same where the rows are codes too, which are decoded, and where every element of a tile of weights has a scale.
NARROWER_YET = 64
STAGED_IN_REGISTERS = ("gfx942", "gfx1100", "gfx1200")


def rule(family: str, arithmetic: str) -> Rule:
    return RULES[family, "bf16" if arithmetic == "f16" else arithmetic]


def offers_tf32(family: str) -> bool:
    return (family, "tf32") in RULES


def offers_scaled(family: str) -> bool:
    """Whether it has matrix instructions that apply the scales of microscaling formats."""
    return (family, "mx") in RULES


def block_m(problem: Problem, device: Device) -> int:
    """The smallest height that takes an average group in one tile. Groups without rows cost nothing and are not part
    of the average, as far as the shape shows."""
    heights = sorted(rule(device.family, problem.arithmetic).warps)
    average = problem.S / max(min(problem.S, problem.G), 1)
    return next((height for height in heights if height >= average), heights[-1])


def power_of_2(n: float) -> int:
    """The largest power of 2 that is at most n, for n >= 1."""
    return 1 << int(math.log2(n))


_refined: dict[tuple[Problem, Device], Tiles] = {}


def bucket(S: int) -> int:
    """Numbers of rows that share a refined choice: those up to the same power of 2."""
    return 1 << max(S - 1, 0).bit_length()


def refine(problem: Problem, device: Device, tiles: Tiles) -> None:
    """Makes `choose` return these tiles for such problems, instead of the closed form's. See kernels/tuner.py."""
    _refined[replace(problem, S=bucket(problem.S)), device] = tiles


@contextmanager
def refined(problem: Problem, device: Device, tiles: Tiles) -> Iterator[None]:
    """The same inside alone."""
    global _refined
    before = _refined
    _refined = dict(before)
    refine(problem, device, tiles)
    try:
        yield
    finally:
        _refined = before


def choose(problem: Problem, device: Device, widest: int | None = None) -> Tiles:
    """widest: BLOCK_N at most, of a kernel whose epilogue needs many registers; such are not refined."""
    if _refined and widest is None:
        found = _refined.get((replace(problem, S=bucket(problem.S)), device))
        if found is not None:
            return found
    return closed_form(problem, device, widest)


def closed_form(problem: Problem, device: Device, widest: int | None = None) -> Tiles:
    its = rule(device.family, problem.arithmetic)
    height = block_m(problem, device)
    width = min(its.block_n, widest or its.block_n, max(SMALLEST_N, power_of_2(max(2 * problem.N - 1, 1))))
    rows = problem.S // height + min(problem.S, problem.G)
    columns = -(-problem.N // width)
    descriptors = device.descriptors and its.descriptors
    persistent = descriptors and rows * columns >= 2 * device.units
    return Tiles(
        block_m=height,
        block_n=width,
        block_k=its.block_k,
        warps=its.warps[height],
        stages=stages_that_fit(problem, device, height, width),
        descriptors=descriptors,
        persistent=persistent,
        band=_band(problem, height, width, device.units),
        chiplets=device.chiplets,
        nonkdim=its.nonkdim,
        registers=most_registers(problem, device, persistent),
    )


def choose_quantized(problem: Problem, device: Device, group: int | None, widest: int | None = None) -> Tiles:
    """For weights of codes, of which `group` along the reduction share a scale (None: all). Pointers read them, and a
    step is no longer than a group, nor than what a fresh accumulator sums with a small rounding error. `widest` as in
    `choose`. Not refined."""
    tiles = closed_form(problem, device, NARROWER.get((device.family, problem.arithmetic), widest))
    step = min(tiles.block_k, group or LONGEST_STEP, LONGEST_STEP)
    registers = MOST_REGISTERS if device.family.startswith("sm_") else 0
    return replace(tiles, block_k=step, descriptors=False, persistent=False, registers=registers)


def most_registers(problem: Problem, device: Device, persistent: bool) -> int:
    multiply_adds = not rule(device.family, problem.arithmetic).descriptors
    return MOST_REGISTERS if device.descriptors and (persistent or multiply_adds) else 0


def stages_that_fit(problem: Problem, device: Device, height: int, width: int) -> int:
    """As many as the shared memory holds, with one KiB to spare for barriers. One of them waits in registers on devices
    that cannot copy to shared memory past them."""
    its = rule(device.family, problem.arithmetic)
    fit = (device.shared - 1024) // ((height + width) * its.block_k * BYTES[problem.arithmetic])
    return max(1, min(its.stages, fit + (device.family in STAGED_IN_REGISTERS)))


def _band(problem: Problem, height: int, width: int, units: int) -> int:
    """Of the tiles that run at one time, band * (units / band), the rows and columns read are fewest at this height of
    a band; beyond the tiles of one group, though, there are no more weights to share."""
    square = math.sqrt(units * width / height)
    group = -(-problem.S // (max(min(problem.S, problem.G), 1) * height))
    return power_of_2(max(1.0, min(square, group, 16.0)))
