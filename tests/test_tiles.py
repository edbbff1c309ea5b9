"""The choice of tiles: a table of cases, and what must hold for all of them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polymoe.kernels.devices import INTERPRETER, OTHER, TARGETS, Device
from polymoe.kernels.tiles import BYTES, RULES, STAGED_IN_REGISTERS, Problem, choose, offers_scaled, offers_tf32

DEVICES = {**TARGETS, "interpreter": INTERPRETER, "other": OTHER}
FAMILIES = sorted(DEVICES)


@dataclass(frozen=True)
class Case:
    """A product of S rows in G groups by [D, N], and the tile, warps, stages, persistence and band to expect."""

    family: str
    arithmetic: str
    S: int
    G: int
    N: int
    D: int
    tile: tuple[int, int, int]
    warps: int
    stages: int
    persistent: bool
    band: int


CASES = [
    # DeepSeek-V4-Flash on an H100: a single token, a small batch, a long prefill.
    Case("sm_90", "bf16", 6, 256, 4096, 4096, (64, 128, 64), 4, 4, False, 1),
    Case("sm_90", "bf16", 64 * 6, 256, 4096, 4096, (64, 128, 64), 4, 4, True, 1),
    Case("sm_90", "bf16", 8192 * 6, 256, 4096, 4096, (128, 128, 64), 8, 4, True, 2),
    # gpt-oss: its width is a multiple of 64 but not of 128.
    Case("sm_80", "bf16", 4, 32, 5760, 2880, (16, 128, 64), 4, 4, False, 1),
    Case("sm_80", "bf16", 16 * 4, 32, 2880, 2880, (16, 128, 64), 4, 4, False, 1),
    Case("sm_80", "bf16", 2048 * 4, 32, 2880, 2880, (128, 128, 64), 8, 4, False, 2),
    Case("sm_80", "f32", 2048 * 4, 32, 2880, 2880, (64, 64, 32), 8, 3, False, 4),
    # 99 KiB hold fewer stages; 64 KiB fewer still, and one more of them waits in registers.
    Case("sm_120", "bf16", 8192, 8, 14336, 4096, (64, 128, 64), 8, 3, True, 16),
    Case("sm_100", "tf32", 8192, 8, 14336, 4096, (128, 128, 32), 8, 4, True, 8),
    Case("gfx942", "bf16", 8192, 8, 14336, 4096, (128, 128, 64), 8, 2, False, 8),
    Case("gfx1100", "f16", 8192, 8, 14336, 4096, (64, 64, 32), 4, 2, False, 4),
    # Narrow results.
    Case("sm_90", "bf16", 100, 2, 33, 64, (64, 64, 64), 4, 4, False, 1),
    Case("sm_90", "bf16", 100, 2, 1, 64, (64, 16, 64), 4, 4, False, 1),
    # Nothing at all.
    Case("sm_90", "bf16", 0, 4, 128, 64, (64, 128, 64), 4, 4, False, 1),
    Case("gfx950", "f32", 0, 0, 0, 0, (16, 16, 32), 2, 2, False, 1),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}-{case.arithmetic}-{case.S}x{case.N}")
def test_choice(case: Case) -> None:
    tiles = choose(Problem(case.arithmetic, case.S, case.G, case.N, case.D), DEVICES[case.family])
    assert (tiles.block_m, tiles.block_n, tiles.block_k) == case.tile
    assert (tiles.warps, tiles.stages, tiles.persistent) == (case.warps, case.stages, case.persistent)
    assert tiles.band == case.band


problems = st.builds(
    Problem,
    st.sampled_from(["bf16", "f16", "f32"]),
    S=st.integers(0, 1 << 20),
    G=st.integers(0, 1024),
    N=st.integers(0, 20000),
    D=st.integers(0, 20000),
)


@given(problem=problems, rows=st.integers(0, 1 << 20), family=st.sampled_from(FAMILIES))
def test_what_bits_depend_on_does_not_depend_on_rows(problem: Problem, rows: int, family: str) -> None:
    device = DEVICES[family]
    other = Problem(problem.arithmetic, rows, problem.G, problem.N, problem.D)
    some, others = choose(problem, device), choose(other, device)
    assert (some.block_n, some.block_k, some.nonkdim) == (others.block_n, others.block_k, others.nonkdim)


@given(problem=problems, family=st.sampled_from(FAMILIES))
def test_shared_memory_suffices(problem: Problem, family: str) -> None:
    device = DEVICES[family]
    tiles = choose(problem, device)
    stages = tiles.stages - (device.family in STAGED_IN_REGISTERS)
    size = BYTES[problem.arithmetic] * tiles.block_k * (tiles.block_m + tiles.block_n)
    assert max(stages, 1) * size <= device.shared
    assert tiles.stages >= 1


@given(problem=problems, family=st.sampled_from(FAMILIES))
def test_blocks_are_powers_of_two(problem: Problem, family: str) -> None:
    tiles = choose(problem, DEVICES[family])
    for block in (tiles.block_m, tiles.block_n, tiles.block_k, tiles.band, tiles.warps):
        assert block > 0
        assert block & (block - 1) == 0
    assert min(tiles.block_m, tiles.block_n, tiles.block_k) >= 16  # the least that tl.dot takes


def test_every_family_has_its_rules() -> None:
    for family in FAMILIES:
        assert (family, "bf16") in RULES
        assert (family, "f32") in RULES
    assert [family for family in FAMILIES if offers_tf32(family)] == [
        "gfx942", "interpreter", "sm_100", "sm_120", "sm_80", "sm_90"
    ]  # fmt: skip
    assert [family for family in FAMILIES if offers_scaled(family)] == ["gfx950", "interpreter", "sm_100"]
    assert all(device.family == family for family, device in DEVICES.items())


def test_more_units_never_mean_less_persistence() -> None:
    """Persistent where every unit has at least two tiles, as far as the shape shows."""
    problem = Problem("bf16", 64 * 6, 256, 4096, 4096)
    most = next(units for units in range(1, 1 << 20) if not choose(problem, Device("sm_90", units, 1 << 20)).persistent)
    assert choose(problem, Device("sm_90", most - 1, 1 << 20)).persistent
    tiles = (64 * 6 // 64 + 256) * 32
    assert most == tiles // 2 + 1
