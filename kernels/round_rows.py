"""Rows as codes of 8 bits, for mode="int8" and mode="fp8": every 32 elements share a scale. One program rounds a tile
of rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from polymoe.kernels._launch import OPTIONS, cdiv, extent, index_type, tile
from polymoe.kernels.codes import nearest, to_e4m3

GROUP = 32  # elements that share a scale
COLUMNS = 1024  # at most, of a tile
ELEMENTS = 2048  # of a tile
WARPS = 4


def round_rows(x: Tensor, codes_of: str) -> tuple[Tensor, Tensor]:
    """x [S, D] as codes [S, D rounded up to whole groups] and scales [S, groups], once for every row.

    "int8": int8 and float32. The scale is the largest magnitude of a group / 127, the code the integer nearest to
    element * (127 / largest), ties to even.
    "e4m3": uint8, the bytes of e4m3 and of e8m0. The scale is that of polymoe.formats.Mxfp8, the code the e4m3 nearest
    to element / scale, ties to even.

    A group of zeros has codes 0; one that holds infinity or NaN has codes 0 and the scale NaN.
    """
    (S, D), groups = x.shape, cdiv(x.shape[1], GROUP)
    code, factor = (torch.int8, torch.float32) if codes_of == "int8" else (torch.uint8, torch.uint8)
    codes = torch.empty((S, groups * GROUP), dtype=code, device=x.device)
    scales = torch.empty((S, groups), dtype=factor, device=x.device)
    if codes.numel() > 0:
        rows, columns = tile(groups * GROUP, COLUMNS, ELEMENTS)
        _round_rows[cdiv(S, rows), cdiv(D, columns)](
            x,
            codes,
            scales,
            S,
            D,
            groups,
            *x.stride(),
            INDEX=index_type(extent(x, codes)),
            ROWS=rows,
            GROUPS=columns // GROUP,
            GROUP=GROUP,
            CODES=codes_of,
            num_warps=WARPS,
            **OPTIONS,
        )
    return codes, scales


SMALLEST = tl.constexpr(2.0**-119)  # 127 / it is finite
INFINITY = tl.constexpr(0x7F800000)
SMALLEST_SCALED = tl.constexpr(0x04E00000)  # 448 * 2**-126


@triton.jit
def _int8(values, bits):
    """values [.., .., GROUP] as integers, and the scales of groups whose largest magnitude has the bits `bits`."""
    finite = bits < INFINITY
    largest = tl.maximum(tl.where(finite, bits, 0).to(tl.float32, bitcast=True), SMALLEST)
    scaled = tl.where(finite[:, :, None], values * tl.div_rn(127.0, largest)[:, :, None], 0.0)
    return nearest(scaled).to(tl.int8), tl.where(finite, tl.div_rn(largest, 127.0), float("nan"))


@triton.jit
def _e4m3(values, bits):
    """The same as e4m3, with exponents for scales."""
    finite = bits < INFINITY
    largest = tl.maximum(tl.where(finite, bits, 0), SMALLEST_SCALED)
    # largest / 448, which is 1.75 * 2**8, rounded up to a power of two; and the reciprocal of that
    exponent = (largest >> 23) - 8 + ((largest & 0x7FFFFF) > 0x600000).to(tl.int32)
    factor = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    scaled = tl.where(finite[:, :, None], values * factor[:, :, None], 0.0)
    return to_e4m3(scaled), tl.where(finite, exponent, 255).to(tl.uint8)


@triton.jit(do_not_specialize=["S"])
def _round_rows(
    x,
    codes,
    scales,
    S,
    D,
    groups,
    stride_s,
    stride_d,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    CODES: tl.constexpr,
):
    row = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(INDEX) * (GROUPS * GROUP) + tl.arange(0, GROUPS * GROUP)
    row_ok = (row < S)[:, None]
    place = row[:, None] * stride_s + column[None, :] * stride_d
    values = tl.load(x + place, mask=row_ok & (column < D)[None, :], other=0.0).to(tl.float32)
    values = values.reshape(ROWS, GROUPS, GROUP)
    # As integers, which order magnitudes too, and NaN last.
    bits = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2)
    if CODES == "int8":
        rounded, scale = _int8(values, bits)
    else:
        rounded, scale = _e4m3(values, bits)
    width = groups * GROUP
    place = row[:, None] * width + column[None, :]
    tl.store(codes + place, rounded.reshape(ROWS, GROUPS * GROUP), mask=row_ok & (column < width)[None, :])
    group = tl.program_id(1).to(INDEX) * GROUPS + tl.arange(0, GROUPS)
    place = row[:, None] * groups + group[None, :]
    tl.store(scales + place, scale, mask=row_ok & (group < groups)[None, :])
