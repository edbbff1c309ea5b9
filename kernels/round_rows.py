"""Rows as 8-bit integers, for mode="int8": every 32 elements share a scale. One program rounds a tile of rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from polymoe.kernels._launch import OPTIONS, cdiv, extent, index_type, tile

GROUP = 32  # elements that share a scale
COLUMNS = 1024  # at most, of a tile
ELEMENTS = 2048  # of a tile
WARPS = 4


def round_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [S, D] as codes int8 [S, D rounded up to whole groups] and scales f32 [S, groups], once for every row.

    The scale is the largest magnitude of a group / 127, the code the integer nearest to element * (127 / largest), ties
    to even. A group of zeros has codes 0; one that holds infinity or NaN has codes 0 and the scale NaN.
    """
    (S, D), groups = x.shape, cdiv(x.shape[1], GROUP)
    codes = torch.empty((S, groups * GROUP), dtype=torch.int8, device=x.device)
    scales = torch.empty((S, groups), dtype=torch.float32, device=x.device)
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
            num_warps=WARPS,
            **OPTIONS,
        )
    return codes, scales


SMALLEST = tl.constexpr(2.0**-119)  # 127 / it is finite
TO_INTEGER = tl.constexpr(1.5 * 2.0**23)  # next to it float32 numbers are integers
INFINITY = tl.constexpr(0x7F800000)


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
):
    row = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(INDEX) * (GROUPS * GROUP) + tl.arange(0, GROUPS * GROUP)
    row_ok = (row < S)[:, None]
    place = row[:, None] * stride_s + column[None, :] * stride_d
    values = tl.load(x + place, mask=row_ok & (column < D)[None, :], other=0.0).to(tl.float32)
    values = values.reshape(ROWS, GROUPS, GROUP)
    # As integers, which order magnitudes too, and NaN last.
    bits = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2)
    finite = bits < INFINITY
    largest = tl.maximum(tl.where(finite, bits, 0).to(tl.float32, bitcast=True), SMALLEST)
    scaled = tl.where(finite[:, :, None], values * tl.div_rn(127.0, largest)[:, :, None], 0.0)
    rounded = (scaled + TO_INTEGER) - TO_INTEGER
    width = groups * GROUP
    place = row[:, None] * width + column[None, :]
    tl.store(codes + place, rounded.to(tl.int8).reshape(ROWS, GROUPS * GROUP), mask=row_ok & (column < width)[None, :])
    group = tl.program_id(1).to(INDEX) * GROUPS + tl.arange(0, GROUPS)
    place = row[:, None] * groups + group[None, :]
    scale = tl.where(finite, tl.div_rn(largest, 127.0), float("nan"))
    tl.store(scales + place, scale, mask=row_ok & (group < groups)[None, :])
