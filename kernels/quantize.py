"""quantize: weights as codes, to the bit as polymoe.formats defines them in plain PyTorch. One program quantises a tile
of whole blocks that share a scale; of int8, a few rows, which it reads twice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from polymoe.kernels._launch import OPTIONS, cdiv, extent, index_type, next_power_of_2, tile
from polymoe.kernels.codes import nearest, to_e2m1, to_e4m3
from polymoe.kernels.quantized import FORMATS, Format

COLUMNS = 1024  # at most, of a tile
NARROW = 32  # columns of a tile of int8 codes, where the weight lies in memory along its columns
ELEMENTS = 2048  # of a tile, unless a block has more
WARPS = 4
MORE_WARPS = 8  # for blocks of 128 x 128

DTYPES = {"e4m3": torch.float8_e4m3fn, "e2m1": torch.uint8, "int8": torch.int8, "int4": torch.uint8}
LARGEST = {"e4m3": 448.0, "e2m1": 6.0, "int8": 127.0, "int4": 7.0}  # that a code stands for
BLOCK_FLOOR = 1e-4  # of the largest magnitude in a block of rows and columns; elsewhere the scale is at least 2^-126


def quantize(
    weight: Tensor, weight_format: str, scale_dtype: torch.dtype, zero_points: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Data, scale and zero points of a finite weight [..., N, D] that is not empty."""
    format = FORMATS[weight_format]
    *lead, N, D = weight.shape
    experts = weight.flatten(0, -3) if lead else weight[None]
    width = cdiv(D, 2) if format.codes in ("e2m1", "int4") else D
    data = torch.empty((*lead, N, width), dtype=DTYPES[format.codes], device=weight.device)
    scales = (cdiv(N, format.rows),) if format.group is None else (cdiv(N, format.rows), cdiv(D, format.group))
    scale = torch.empty((*lead, *scales), dtype=scale_dtype, device=weight.device)
    zero = torch.empty_like(scale, dtype=torch.uint8) if zero_points else None
    index = index_type(extent(experts, data.view(-1)))
    if format.group is None:
        _launch_rows(experts, data, scale, index)
    else:
        _launch_blocks(experts, data, scale, zero, format, index)
    return data, scale, zero


def _tile(weight: Tensor, group: int) -> tuple[int, int]:
    """Rows and columns of a tile of whole groups, which is long in the direction in which the weight lies in memory."""
    longest = COLUMNS if weight.stride(2) <= weight.stride(1) else group
    return tile(max(weight.shape[2], group), longest, ELEMENTS)


def _launch_rows(weight: Tensor, data: Tensor, scale: Tensor, index: tl.dtype) -> None:
    E, N, D = weight.shape
    rows, columns = _tile(weight, NARROW)
    _quantize_rows[(E * cdiv(N, rows),)](
        weight,
        *weight.stride(),
        data,
        scale,
        N,
        D,
        LARGEST=LARGEST["int8"],
        INDEX=index,
        BLOCK_N=rows,
        BLOCK_D=columns,
        num_warps=WARPS,
        **OPTIONS,
    )


def _launch_blocks(
    weight: Tensor, data: Tensor, scale: Tensor, zero: Tensor | None, format: Format, index: tl.dtype
) -> None:
    E, N, D = weight.shape
    assert format.group is not None
    if format.rows == 1:
        rows, columns = _tile(weight, format.group)
    else:
        columns, rows = tile(format.rows, format.rows, max(format.rows * format.group, ELEMENTS))
        columns = min(columns, next_power_of_2(max(D, format.group)))
    largest = LARGEST[format.codes]
    _quantize_blocks[E * cdiv(N, rows), cdiv(D, columns)](
        weight,
        *weight.stride(),
        data.view(torch.uint8),
        scale if scale.dtype == torch.float32 else scale.view(torch.uint8),
        zero,
        N,
        D,
        LARGEST=largest,
        FLOOR=BLOCK_FLOOR if format.rows > 1 else largest * 2.0**-126,
        CODES=format.codes,
        ROWS=format.rows,
        GROUP=format.group,
        INDEX=index,
        BLOCK_N=rows,
        BLOCK_D=columns,
        num_warps=MORE_WARPS if format.rows == 128 else WARPS,
        **OPTIONS,
    )


@triton.jit
def _read(weight, row, column, stride_n, stride_d, N, D):
    """A tile of one matrix, and zeros beyond it."""
    inside = (row < N)[:, None] & (column < D)[None, :]
    place = row[:, None] * stride_n + column[None, :] * stride_d
    return tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _quantize_rows(
    weight,
    stride_e,
    stride_n,
    stride_d,
    data,
    scale,
    N,
    D,
    LARGEST: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(N, BLOCK_N)
    expert = (tl.program_id(0) // tiles).to(INDEX)
    row = (tl.program_id(0) % tiles).to(INDEX) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight += expert * stride_e
    largest = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        column = (first + tl.arange(0, BLOCK_D)).to(INDEX)
        largest = tl.maximum(largest, tl.abs(_read(weight, row, column, stride_n, stride_d, N, D)))
    factor = tl.div_rn(tl.maximum(tl.max(largest, axis=1), LARGEST * 2.0**-126), LARGEST)
    tl.store(scale + expert * N + row, factor, mask=row < N)
    for first in range(0, D, BLOCK_D):
        column = (first + tl.arange(0, BLOCK_D)).to(INDEX)
        values = _read(weight, row, column, stride_n, stride_d, N, D)
        codes = nearest(tl.div_rn(values, factor[:, None])).to(tl.int8)
        place = (expert * N + row)[:, None] * D + column[None, :]
        tl.store(data + place, codes, mask=(row < N)[:, None] & (column < D)[None, :])


@triton.jit
def _encode(values, SCALE: tl.constexpr, LARGEST: tl.constexpr, FLOOR: tl.constexpr, CODES: tl.constexpr):
    """Codes of values [.., ROWS, .., GROUP], and the scales [.., ..] of its blocks."""
    largest = tl.max(tl.max(tl.abs(values), axis=3), axis=1)
    scale = tl.div_rn(tl.maximum(largest, FLOOR), LARGEST)
    if SCALE == tl.uint8:
        # Rounded up to a power of two; times the reciprocal of one is the same as divided by it.
        exponent = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF) >> 23
        scaled = values * ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None, :, None]
        scale = exponent.to(tl.uint8)
    else:
        scaled = tl.div_rn(values, scale[:, None, :, None])
    if CODES == "e4m3":
        codes = to_e4m3(scaled)
    elif CODES == "e2m1":
        codes = to_e2m1(scaled)
    else:
        codes = (nearest(scaled) + 8.0).to(tl.uint8)
    return codes, scale


@triton.jit
def _encode_with_zero_points(values):
    """The same as int4, and the zero points."""
    lowest = tl.minimum(tl.min(tl.min(values, axis=3), axis=1), 0.0)
    highest = tl.maximum(tl.max(tl.max(values, axis=3), axis=1), 0.0)
    scale = tl.maximum(tl.div_rn(highest, 15.0) - tl.div_rn(lowest, 15.0), 2.0**-126)
    zero = tl.minimum(nearest(tl.div_rn(-lowest, scale)), 15.0)
    codes = nearest(tl.div_rn(values, scale[:, None, :, None])) + zero[:, None, :, None]
    return tl.minimum(tl.maximum(codes, 0.0), 15.0).to(tl.uint8), scale, zero.to(tl.uint8)


@triton.jit
def _quantize_blocks(
    weight,
    stride_e,
    stride_n,
    stride_d,
    data,
    scale,
    zero,
    N,
    D,
    LARGEST: tl.constexpr,
    FLOOR: tl.constexpr,
    CODES: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    DOWN: tl.constexpr = BLOCK_N // ROWS
    ALONG: tl.constexpr = BLOCK_D // GROUP
    tiles = tl.cdiv(N, BLOCK_N)
    expert = (tl.program_id(0) // tiles).to(INDEX)
    down, along = (tl.program_id(0) % tiles).to(INDEX), tl.program_id(1).to(INDEX)
    row, column = down * BLOCK_N + tl.arange(0, BLOCK_N), along * BLOCK_D + tl.arange(0, BLOCK_D)
    values = _read(weight + expert * stride_e, row, column, stride_n, stride_d, N, D)
    values = values.reshape(DOWN, ROWS, ALONG, GROUP)
    if zero is None:
        codes, factors = _encode(values, scale.dtype.element_ty, LARGEST, FLOOR, CODES)
    else:
        codes, factors, zeros = _encode_with_zero_points(values)
    codes = codes.reshape(BLOCK_N, BLOCK_D)
    width = D
    if CODES == "e2m1" or CODES == "int4":
        codes = tl.where((column < D)[None, :], codes, 0)  # the half of a byte that an odd D leaves
        low, high = tl.split(codes.reshape(BLOCK_N, BLOCK_D // 2, 2))
        codes, width = low | (high << 4), (D + 1) // 2
        column = along * (BLOCK_D // 2) + tl.arange(0, BLOCK_D // 2)
    place = (expert * N + row)[:, None] * width + column[None, :]
    tl.store(data + place, codes, mask=(row < N)[:, None] & (column < width)[None, :])

    block, group = down * DOWN + tl.arange(0, DOWN), along * ALONG + tl.arange(0, ALONG)
    blocks, groups = tl.cdiv(N, ROWS), tl.cdiv(D, GROUP)
    place = (expert * blocks + block)[:, None] * groups + group[None, :]
    inside = (block < blocks)[:, None] & (group < groups)[None, :]
    tl.store(scale + place, factors, mask=inside)
    if zero is not None:
        tl.store(zero + place, zeros, mask=inside)
