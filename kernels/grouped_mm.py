"""One matrix product per group. The form whose columns are cut is the transpose of the form whose rows are cut."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from polymoe.kernels._launch import OPTIONS, cdiv, index_type
from polymoe.kernels.devices import current
from polymoe.kernels.grouped_mm_quantized import grouped_mm_quantized
from polymoe.kernels.operands import along_d, arithmetic, described, described_weights, precision, reach, strides
from polymoe.kernels.product import product
from polymoe.kernels.quantized import Stored
from polymoe.kernels.schedule import ENTRY, at, dealt, most_tiles, programs, row_tiles, table_entry, tile_at
from polymoe.kernels.tiles import Problem, Tiles, choose


def grouped_mm(
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    weight_format: str = "plain",
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    mode: str = "weight_only",
) -> Tensor:
    dtype = out_dtype or a.dtype
    if scale is not None:
        return grouped_mm_quantized(a, Stored(b.mT, scale, zero, weight_format, a.shape[-1], mode), offs, bias, dtype)
    M, N = a.shape[-2], b.shape[-1]
    if a.dim() == b.dim():
        G = a.shape[0] if offs is None else offs.shape[0]
        out = torch.empty((G, M, N), dtype=dtype, device=a.device)
        _multiply("none" if offs is None else "reduction", a, b, offs, bias, out, _tiles(a, b, G * M, G))
        return out
    assert offs is not None
    out = torch.empty((M, N), dtype=dtype, device=a.device)
    if a.dim() == 2:
        _multiply_cut_rows(a, b, offs, bias, out)
    else:
        _multiply_cut_rows(b.mT, a.mT, offs, bias, out.mT)
    return out


def _multiply_cut_rows(a: Tensor, b: Tensor, offs: Tensor, bias: Tensor | None, out: Tensor) -> None:
    tiles = _tiles(a, b, a.shape[0], b.shape[0])
    multiply_rows(a, b, row_tiles(offs, a.shape[0], tiles.block_m, padding=True), bias, out, tiles)


def _tiles(a: Tensor, b: Tensor, S: int, G: int) -> Tiles:
    device = current(a.device)
    return choose(Problem(arithmetic(a, b, device), S, G, b.shape[-1], a.shape[-1]), device)


def multiply_rows(a: Tensor, b: Tensor, table: Tensor, bias: Tensor | None, out: Tensor, tiles: Tiles) -> None:
    """out[r] = a[r] @ b[g] + bias for the rows r of every group g of the table (see row_tiles); zero for padding.

    a [S, D], b [G, D, N], out [S, N]; bias [G, N], or [S] for a number that a whole row adds.
    """
    _multiply("rows", a, b, table, bias, out, tiles)


def _multiply(
    cut: str, a: Tensor, b: Tensor, cuts: Tensor | None, bias: Tensor | None, out: Tensor, tiles: Tiles
) -> None:
    """cut: "rows" with a table of row tiles, "reduction" with offsets, or "none"."""
    M, N, D = a.shape[-2], b.shape[-1], a.shape[-1]
    most_rows = out.shape[0] * cdiv(M, tiles.block_m)
    if cut == "rows":
        most_rows = most_tiles(M, b.shape[0] + 1, tiles.block_m)
    columns = cdiv(N, tiles.block_n)
    if most_rows * columns == 0:
        return
    device = current(a.device)
    a_tile, b_tile = (tiles.block_m, tiles.block_k), (tiles.block_k, tiles.block_n)
    left = described(a, tiles) if cut == "rows" else None
    right = described_weights(b, tiles) if b.dim() == 3 else None
    _grouped_mm[(programs(most_rows * columns, tiles, device),)](
        a if left is None else left,
        b if right is None else right,
        bias,
        out,
        None if cuts is None else cuts.contiguous(),
        0 if cut == "rows" else M,
        N,
        D,
        most_rows,
        tiles.band,
        *strides(a, 3),
        *strides(b, 3),
        *strides(bias, 2),
        *strides(out, 3),
        CUT=cut,
        BIAS_OF_ROWS=bias is not None and bias.dim() == 1,
        DESCRIBED_A=left is not None,
        DESCRIBED_B=right is not None,
        ALONG_D=along_d(b) if right is not None else False,
        EVEN_D=cut != "reduction" and D % tiles.block_k == 0,
        PRECISION=precision(arithmetic(a, b, device)),
        INDEX=index_type(max(reach(a, *a_tile), reach(b, *b_tile), reach(out, 1, N))),
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        CHIPLETS=tiles.chiplets,
        PERSISTENT=tiles.persistent,
        ENTRY=ENTRY,
        **OPTIONS,
        **tiles.options,
    )


@triton.jit(do_not_specialize=["most_rows", "band"])
def _grouped_mm(
    a,
    b,
    bias,
    out,
    cuts,
    M,
    N,
    D,
    most_rows,
    band,
    stride_ag,
    stride_am,
    stride_ak,
    stride_bg,
    stride_bk,
    stride_bn,
    stride_bias_g,
    stride_bias_n,
    stride_og,
    stride_om,
    stride_on,
    CUT: tl.constexpr,
    BIAS_OF_ROWS: tl.constexpr,
    DESCRIBED_A: tl.constexpr,
    DESCRIBED_B: tl.constexpr,
    ALONG_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHIPLETS: tl.constexpr,
    PERSISTENT: tl.constexpr,
    ENTRY: tl.constexpr,
):
    row_span = tl.arange(0, BLOCK_M)
    column_span = tl.arange(0, BLOCK_N)
    columns = tl.cdiv(N, BLOCK_N)
    rows = tl.load(cuts) if CUT == "rows" else most_rows
    total = rows * columns
    for t in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=PERSISTENT):
        row_tile, column_tile = tile_at(dealt(t, total, CHIPLETS), rows, columns, band)
        column = column_tile * BLOCK_N
        column_ok = column + column_span < N
        length = D
        if CUT == "rows":
            group, first, end = table_entry(cuts, row_tile, ENTRY)
            if group < 0:
                length = 0
        else:
            group = row_tile // tl.cdiv(M, BLOCK_M)
            first = row_tile % tl.cdiv(M, BLOCK_M) * BLOCK_M
            end = M
        row_ok = first + row_span < end

        a_tile = a
        b_tile = b
        if not DESCRIBED_A:
            a_tile += at(first, stride_am)
        if not DESCRIBED_B:
            b_tile += at(column, stride_bn)
        if CUT == "none":
            a_tile += at(group, stride_ag)
        if CUT == "reduction":
            start = tl.load(cuts + group - 1, mask=group > 0, other=0)
            length = (tl.load(cuts + group) - start).to(tl.int32)
            a_tile += at(start, stride_ak)
            b_tile += at(start, stride_bk)
        elif not DESCRIBED_B:
            b_tile += at(tl.maximum(group, 0), stride_bg)

        sum = product(
            a_tile,
            first,
            row_span.to(INDEX) * stride_am,
            row_ok,
            stride_ak,
            b_tile,
            tl.maximum(group, 0),
            column,
            column_span.to(INDEX) * stride_bn,
            column_ok,
            stride_bk,
            length,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            DESCRIBED_A,
            DESCRIBED_B,
            ALONG_D,
            False,
            EVEN_D,
            PRECISION,
            INDEX,
        )

        if bias is not None:
            # Padding gets none.
            if BIAS_OF_ROWS:
                has_bias = first + row_span < tl.where(group < 0, 0, end)
                added = tl.load(bias + at(first + row_span, stride_bias_n), mask=has_bias, other=0.0)
                sum += added.to(tl.float32)[:, None]
            else:
                of_group = bias + at(tl.maximum(group, 0), stride_bias_g)
                has_bias = column + column_span < tl.where(group < 0, 0, N)
                added = tl.load(of_group + at(column + column_span, stride_bias_n), mask=has_bias, other=0.0)
                sum += added.to(tl.float32)[None, :]
        # Offsets from the tile's corner would not change from tile to tile, and so be kept in registers all the while.
        column_place = (column + column_span).to(INDEX) * stride_on
        place = (out + at(first + row_span, stride_om))[:, None] + column_place[None, :]
        if CUT != "rows":
            place += at(group, stride_og)
        tl.store(place, sum.to(out.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])
