"""quantized_backward: rows sent back through the quantised weight of their group."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from polymoe.kernels._launch import OPTIONS, cdiv, index_type
from polymoe.kernels.devices import current
from polymoe.kernels.operands import reach, strides
from polymoe.kernels.quantized import FORMATS, Stored, factors, numbers
from polymoe.kernels.schedule import ENTRY, at, dealt, most_tiles, programs, row_tiles, table_entry, tile_at
from polymoe.kernels.tiles import NARROWER_YET, Problem, choose_quantized

STEP = 32  # along the reduction, at most: a tile of the weight is taken apart in registers


def quantized_backward(
    grad: Tensor,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offs: Tensor | None,
    D: int,
    weight_format: str,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """A weight is code times scale, in float32. With bfloat16 rows it is taken apart into bfloat16 numbers that add up
    to it, one for formats whose scales are powers of two and three for the others, each of which the matrix
    instructions multiply; other rows are multiplied in float32."""
    weight, format = Stored(data, scale, zero, weight_format, D), FORMATS[weight_format]
    G, N = data.shape[:2]
    out = torch.empty((*grad.shape[:-1], D), dtype=out_dtype or grad.dtype, device=grad.device)
    if out.numel() == 0:
        return out
    if offs is None:
        offs = torch.arange(1, G + 1, dtype=torch.int32, device=grad.device) * grad.shape[1]
    rows = grad.reshape(-1, N)
    S = rows.shape[0]
    device = current(grad.device)
    bf16 = grad.dtype == torch.bfloat16
    tiles = choose_quantized(Problem("bf16" if bf16 else "f32", S, G, D, N), device, STEP, NARROWER_YET)
    table = row_tiles(offs, S, tiles.block_m, padding=True)
    most = most_tiles(S, G + 1, tiles.block_m) * cdiv(D, tiles.block_n)
    _quantized_backward[(programs(most, tiles, device),)](
        rows,
        *weight.tensors,
        out,
        table,
        N,
        D,
        *weight.sizes,
        tiles.band,
        *strides(rows, 2),
        CODES=format.codes,
        ROWS=format.rows,
        GROUP=format.group or 0,
        PARTS=(1 if scale.dtype != torch.float32 else 3) if bf16 else 0,
        EVEN_N=N % tiles.block_k == 0,
        INDEX=index_type(max(reach(rows, tiles.block_m, tiles.block_k), N * data.shape[2])),
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        CHIPLETS=tiles.chiplets,
        ENTRY=ENTRY,
        **OPTIONS,
        **tiles.options,
    )
    return out


@triton.jit
def _add_product(x, w, sum, PARTS: tl.constexpr):
    """sum + x @ w, with w in float32."""
    if PARTS == 0:
        sum = tl.fma(tl.dot(x.to(tl.float32), w, input_precision="ieee"), 1.0, sum)
    else:
        for _ in tl.static_range(PARTS):
            part = w.to(tl.bfloat16)
            sum = tl.dot(x, part, sum)
            w -= part.to(tl.float32)
    return sum


@triton.jit(do_not_specialize=["band"])
def _quantized_backward(
    grad,
    data,
    scale,
    zero,
    out,
    table,
    N,
    D,
    width,
    scales,
    scale_rows,
    band,
    stride_gm,
    stride_gn,
    CODES: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    EVEN_N: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHIPLETS: tl.constexpr,
    ENTRY: tl.constexpr,
):
    # BLOCK_N columns of D, BLOCK_K rows of the weight a step.
    HALVED: tl.constexpr = CODES == "e2m1" or CODES == "int4"
    BYTES: tl.constexpr = BLOCK_N // 2 if HALVED else BLOCK_N
    # Of a row of a tile of the weight: one for all columns, if the tile lies within a group, or one for each.
    SCALES: tl.constexpr = 1 if GROUP % BLOCK_N == 0 else BLOCK_N
    row_span = tl.arange(0, BLOCK_M)
    step = tl.arange(0, BLOCK_K)
    columns = tl.cdiv(D, BLOCK_N)
    rows = tl.load(table)
    total = rows * columns
    for t in range(tl.program_id(0), total, tl.num_programs(0)):
        row_tile, column_tile = tile_at(dealt(t, total, CHIPLETS), rows, columns, band)
        group, first, end = table_entry(table, row_tile, ENTRY)
        length = N
        if group < 0:  # padding
            length = 0
        of = tl.maximum(group, 0)
        row_ok = first + row_span < end
        column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        byte = column_tile * BYTES + tl.arange(0, BYTES)
        scaled = column_tile * BLOCK_N + tl.arange(0, SCALES)
        of_block = scaled // GROUP if GROUP > 0 else scaled * 0
        grads = grad + at(first, stride_gm)
        codes_of, scales_of, zeros_of = data + at(of, N) * width, scale + at(of, scale_rows) * scales, zero
        if zero is not None:
            zeros_of += at(of, scale_rows) * scales
        sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k in range(0, length, BLOCK_K):
            n = k + step
            inside = n < N
            place = row_span.to(INDEX)[:, None] * stride_gm + step.to(INDEX)[None, :] * stride_gn
            x = tl.load(grads + place, mask=row_ok[:, None] & (inside[None, :] if not EVEN_N else True), other=0.0)
            place = n.to(INDEX)[:, None] * width + byte[None, :]
            codes = tl.load(codes_of + place, mask=inside[:, None] & (byte < width)[None, :], other=0)
            place = (n // ROWS).to(INDEX)[:, None] * scales + of_block[None, :]
            ok = inside[:, None] & (scaled < D)[None, :]
            factor = factors(tl.load(scales_of + place, mask=ok, other=0), CODES)
            middle = 8
            if zero is not None:
                middle = tl.load(zeros_of + place, mask=ok, other=0).to(tl.int32)
            if HALVED:
                codes = tl.interleave(codes & 15, codes >> 4)
            w = tl.where(ok, numbers(codes, middle, CODES).to(tl.float32) * factor, 0.0)
            sum = _add_product(x, w, sum, PARTS)
            grads += tl.cast(stride_gn, tl.int64) * BLOCK_K
        place = (out + at(first + row_span, D))[:, None] + column[None, :]
        tl.store(place, sum.to(out.dtype.element_ty), mask=row_ok[:, None] & (column < D)[None, :])
