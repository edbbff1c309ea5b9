"""grouped_mm with quantised weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from polymoe.kernels._launch import OPTIONS, cdiv, index_type
from polymoe.kernels.devices import current
from polymoe.kernels.operands import reach, strides
from polymoe.kernels.quantized import Stored, quantized_product
from polymoe.kernels.schedule import ENTRY, at, dealt, most_tiles, programs, row_tiles, table_entry, tile_at
from polymoe.kernels.tiles import Tiles


def grouped_mm_quantized(
    a: Tensor, weight: Stored, offs: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """a [M, D] with offs [G], or [G, M, D] without."""
    G, D, N = weight.shape
    out = torch.empty((*a.shape[:-1], N), dtype=out_dtype, device=a.device)
    if out.numel() == 0:
        return out
    if offs is None:
        offs = torch.arange(1, G + 1, dtype=torch.int32, device=a.device) * a.shape[1]
    rows = a.reshape(-1, D)
    S = rows.shape[0]
    tiles = weight.tiles(a, S)
    table = row_tiles(offs, S, tiles.block_m, padding=True)
    multiply_quantized_rows(rows, weight, table, bias, out.view(-1, N), tiles)
    return out


def multiply_quantized_rows(
    a: Tensor, weight: Stored, table: Tensor, bias: Tensor | None, out: Tensor, tiles: Tiles
) -> None:
    """out[r] = a[r] @ weight[g]^T + bias[g] for the rows r of every group g of the table; zero for padding.

    a [S, D], weight [G, N, D], bias [G, N], out [S, N] contiguous
    """
    (S, D), (G, _, N) = a.shape, weight.shape
    most = most_tiles(S, G + 1, tiles.block_m) * cdiv(N, tiles.block_n)
    if most == 0:
        return
    rows, row_scale = weight.rows(a)
    _quantized_mm[(programs(most, tiles, current(a.device)),)](
        rows,
        row_scale,
        *weight.tensors,
        bias,
        out,
        table,
        N,
        D,
        *weight.sizes,
        tiles.band,
        *strides(rows, 2),
        *strides(row_scale, 2)[:1],
        *strides(bias, 2),
        **weight.constants(a),
        EVEN_D=D % tiles.block_k == 0,
        PRECISION=weight.precision(a),
        INDEX=index_type(max(reach(a, tiles.block_m, tiles.block_k), N * weight.data.shape[2])),
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        CHIPLETS=tiles.chiplets,
        ENTRY=ENTRY,
        **OPTIONS,
        **tiles.options,
    )


@triton.jit(do_not_specialize=["band"])
def _quantized_mm(
    a,
    row_scale,
    data,
    scale,
    zero,
    bias,
    out,
    table,
    N,
    D,
    width,
    scales,
    scale_rows,
    band,
    stride_am,
    stride_ak,
    row_scales,
    stride_bias_g,
    stride_bias_n,
    CODES: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS_CODES: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHIPLETS: tl.constexpr,
    ENTRY: tl.constexpr,
):
    row_span = tl.arange(0, BLOCK_M)
    columns = tl.cdiv(N, BLOCK_N)
    rows = tl.load(table)
    total = rows * columns
    for t in range(tl.program_id(0), total, tl.num_programs(0)):
        row_tile, column_tile = tile_at(dealt(t, total, CHIPLETS), rows, columns, band)
        group, first, end = table_entry(table, row_tile, ENTRY)
        length = D
        if group < 0:  # padding
            length = 0
        of = tl.maximum(group, 0)
        row_ok = first + row_span < end
        column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        column_ok = column < N
        zero_of = zero
        if zero is not None:
            zero_of += at(of, scale_rows) * scales
        row_scale_of = row_scale
        if row_scale is not None:
            row_scale_of += at(first, row_scales)
        sum = quantized_product(
            a + at(first, stride_am),
            row_span.to(INDEX) * stride_am,
            row_ok,
            stride_ak,
            row_scale_of,
            row_span.to(INDEX) * row_scales,
            data + at(of, N) * width,
            scale + at(of, scale_rows) * scales,
            zero_of,
            column,
            column_ok,
            width,
            scales,
            length,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            CODES,
            ROWS,
            GROUP,
            ROWS_CODES,
            SCALED,
            EVEN_D,
            PRECISION,
            INDEX,
        )
        if bias is not None:
            place = bias + at(of, stride_bias_g) + at(column, stride_bias_n)
            added = tl.load(place, mask=column < tl.where(group < 0, 0, N), other=0.0)
            sum += added.to(tl.float32)[None, :]
        place = (out + at(first + row_span, N))[:, None] + column[None, :]
        tl.store(place, sum.to(out.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])
