"""The tool that compiles kernels for GPUs that are not there: what it reads from machine code, what it complains about,
and the part of its table that is made again here, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the compiler under test")

from tests.gpu_offline.assembly import (
    AMD_KINDS,
    MATRIX,
    SASS_KINDS,
    Facts,
    amd_branch,
    amd_instructions,
    amd_load,
    atomics,
    kinds,
    main_loop,
    sass_branch,
    sass_instructions,
    sass_load,
)
from tests.gpu_offline.costs import PEAKS, bound
from tests.gpu_offline.expected import complaints, varying

REPOSITORY = Path(__file__).parent.parent

SASS = """
        /*0000*/                   LDG.E R4, [R2.64] ;                       /* 0x0 */
        /*0010*/               @P0 BRA 0x0090 ;                              /* 0x0 */
        /*0020*/                   LDGSTS.E.BYPASS.128 [R8], [R4.64] ;       /* 0x0 */
        /*0030*/                   LDSM.16.M88.4 R12, [R10] ;                /* 0x0 */
        /*0040*/                   HMMA.16816.F32.BF16 R4, R68.reuse, R2, R4 ; /* 0x0 */
        /*0050*/                   HMMA.16816.F32.BF16 R8, R68, R72, R8 ;    /* 0x0 */
        /*0060*/              @!P1 BRA 0x0020 ;                              /* 0x0 */
        /*0070*/                   HMMA.16816.F32.BF16 R8, R68, R72, R8 ;    /* 0x0 */
        /*0080*/              @!UP1 BRA 0x0000 ;                             /* 0x0 */
        /*0090*/                   EXIT ;                                    /* 0x0 */
"""
AMD = """
	.globl	_kernel
_kernel:
	global_load_dword v1, v0, s[0:1]
.LBB0_1:                                ; outer
	s_nop 0
.LBB0_2:                                ; inner
	buffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
	ds_read_b128 v[0:3], v4
	v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]
	s_cbranch_scc1 .LBB0_2
	s_cbranch_scc1 .LBB0_1
	s_endpgm
"""


def test_sass_is_read() -> None:
    code = sass_instructions(SASS)
    assert len(code) == 10
    assert code[1] == (0x10, "BRA", "@P0 0x0090 ")
    loop = main_loop(code, sass_branch, MATRIX["sm"])
    assert [place for place, _, _ in loop] == [0x20, 0x30, 0x40, 0x50, 0x60]
    assert kinds(loop, SASS_KINDS) == {"copy": 1, "shared": 1, "matrix": 2, "other": 1}


def test_amd_is_read() -> None:
    code = amd_instructions(AMD)
    loop = main_loop(code, amd_branch(AMD), MATRIX["gfx"])
    assert [opcode for _, opcode, _ in loop] == [
        "buffer_load_dwordx4", "ds_read_b128", "v_mfma_f32_16x16x16_bf16", "s_cbranch_scc1"
    ]  # fmt: skip
    assert kinds(loop, AMD_KINDS) == {"copy": 1, "shared": 1, "matrix": 1, "other": 1}


# Code that belongs to no loop, placed amid one; the outer loop goes back from there.
DETOUR = """
        /*0000*/                   MOV R1, R2 ;                              /* 0x0 */
        /*0010*/                   HMMA.16816.F32.BF16 R4, R68, R2, R4 ;     /* 0x0 */
        /*0020*/               @P0 BRA 0x0050 ;                              /* 0x0 */
        /*0030*/                   STG.E [R2.64], R4 ;                       /* 0x0 */
        /*0040*/                   BRA 0x0000 ;                              /* 0x0 */
        /*0050*/                   LDSM.16.M88.4 R12, [R10] ;                /* 0x0 */
        /*0060*/                   BRA 0x0010 ;                              /* 0x0 */
        /*0070*/                   EXIT ;                                    /* 0x0 */
"""


def test_code_amid_a_loop_is_not_of_it() -> None:
    loop = main_loop(sass_instructions(DETOUR), sass_branch, MATRIX["sm"])
    assert [place for place, _, _ in loop] == [0x10, 0x20, 0x50, 0x60]


@pytest.mark.parametrize(
    ("read", "opcode", "width"),
    [
        (sass_load, "LDG.E", "4"),
        (sass_load, "LDG.E.128.CONSTANT", "16"),
        (sass_load, "LDG.E.U16", "2"),
        (sass_load, "LDGSTS.E.BYPASS.128", "16"),
        (sass_load, "UTMALDG.2D", "tma"),
        (sass_load, "LDS.128", None),
        (sass_load, "STG.E.128", None),
        (amd_load, "buffer_load_dwordx4", "16"),
        (amd_load, "buffer_load_b128", "16"),
        (amd_load, "global_load_dword", "4"),
        (amd_load, "global_load_b32", "4"),
        (amd_load, "global_load_ushort", "2"),
        (amd_load, "ds_read_b128", None),
    ],
)
def test_widths_of_loads(read, opcode: str, width: str | None) -> None:
    assert read(opcode) == width


@pytest.mark.parametrize(
    ("opcode", "found"),
    [
        ("ATOMG.E.ADD.F32.FTZ.RN.STRONG.GPU", 1),
        ("ATOM.E.ADD.STRONG.GPU", 1),
        ("REDG.E.ADD.F32.FTZ.RN.STRONG.GPU", 1),
        ("RED.E.ADD.STRONG.GPU", 1),
        ("UTMAREDG.2D.ADD", 1),
        ("UBLKRED.G.S.ADD", 1),
        ("REDUX.SUM", 0),
        ("ATOMS.POPC.INC.32", 0),
        ("global_atomic_add_f32", 1),
        ("buffer_atomic_pk_add_bf16", 1),
        ("ds_add_u32", 0),
    ],
)
def test_atomics_on_global_memory_are_found(opcode: str, found: int) -> None:
    assert atomics([(0, opcode, "")]) == found


GOOD = Facts(
    registers=128,
    shared=100_000,
    spilled=0,
    local=0,
    matrix={"HGMMA.64x128x16.F32.BF16": 4},
    loads={"4": 3, "tma": 2},
    loop={"matrix": 4, "copy": 2},
    loop_loads={"tma": 2},
)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, None),
        ({"spilled": 2}, "2 spilled registers"),
        ({"local": 8}, "8 bytes of local memory"),
        ({"shared": 300_000}, "300000 bytes of shared memory"),
        ({"matrix": {"HMMA.16816.F32.BF16": 8}}, "expected HGMMA"),
        ({"matrix": {}}, "no matrix instruction"),
        ({"matrix": {"HGMMA.64x128x16.F32.BF16": 4, "HGMMA.64x64x16.F32.BF16": 4}}, "more than one"),
        ({"loads": {"4": 3}}, "2 operands with descriptors"),
        ({"loop_loads": {"tma": 1, "4": 1}}, "loads of 4 bytes"),
        ({"atomics": 1}, "1 atomic instructions"),
    ],
)
def test_complaints(change: dict, complaint: str | None) -> None:
    found = complaints("grouped_mm", "bf16", 2, "sm_90", replace(GOOD, **change))
    assert (not found) if complaint is None else any(complaint in line for line in found)


def test_kernels_without_a_product_have_no_matrix_instructions() -> None:
    assert complaints("combine", "bf16", 0, "sm_90", GOOD)
    assert not complaints("combine", "bf16", 0, "sm_90", replace(GOOD, matrix={}, loads={}))


def test_a_second_instruction_is_found() -> None:
    rows = [(("grouped_mm", "bf16", "64", "64", "sm_90"), name) for name in ("A", "A", "B")]
    assert varying(rows[:2]) == []
    assert varying(rows) == ["grouped_mm bf16 64 64 sm_90: A, B"]


def test_roofline() -> None:
    peak = PEAKS["sm_90"]
    assert bound(989e6, 0.0, peak) == (1.0, "c")
    assert bound(0.0, 3.35e6, peak) == (1.0, "m")


def test_part_of_the_table_again() -> None:
    """Compiles the subset and compares it with docs/triton.json, registers and instructions included."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.gpu_offline", "--subset"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


def test_the_table_is_without_faults() -> None:
    kernels = json.loads((REPOSITORY / "docs" / "triton.json").read_text())["kernels"]
    assert [entry for entry in kernels if entry["wrong"]] == []
    assert all(entry["facts"]["spilled"] == entry["facts"]["local"] == 0 for entry in kernels)
