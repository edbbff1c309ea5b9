"""The first of the two kernels of experts, with quantised weights."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from polymoe.kernels._launch import OPTIONS, extent, index_type
from polymoe.kernels.activate import UNGATED
from polymoe.kernels.experts import finish
from polymoe.kernels.operands import strides
from polymoe.kernels.quantized import Stored, quantized_product
from polymoe.kernels.schedule import ENTRY, at, dealt, table_entry, tile_at
from polymoe.kernels.tiles import Tiles


def multiply_quantized_and_activate(
    x: Tensor,
    gate_up: Stored,
    bias: Tensor | None,
    out: Tensor,
    pre_activation: Tensor | None,
    table: Tensor,
    row_slot: Tensor,
    weights: Tensor | None,
    K: int | None,
    kind: str,
    alpha_limit: tuple[float, float],
    interleaved: bool,
    tiles: Tiles,
    programs: int,
) -> None:
    """What kernels/experts.py does with plain weights, by so many programs."""
    (_, H, P), I, gated = gate_up.shape, out.shape[1], kind not in UNGATED
    constants, precision = gate_up.constants(x), gate_up.precision(x)
    x, row_scale = gate_up.rows(x)
    _quantized_gate_up[(programs,)](
        x,
        row_scale,
        *gate_up.tensors,
        bias,
        out,
        pre_activation,
        table,
        row_slot,
        weights,
        P,
        I,
        H,
        K,
        *alpha_limit,
        *gate_up.sizes,
        tiles.band,
        *strides(x, 2),
        *strides(row_scale, 2)[:1],
        *strides(bias, 2),
        *strides(weights, 2),
        1 if weights is None else weights.shape[1],
        KIND=kind,
        GATED=gated,
        HALVES=gated and not interleaved,
        **constants,
        EVEN_D=H % tiles.block_k == 0,
        PRECISION=precision,
        INDEX=index_type(max(extent(x), P * gate_up.data.shape[2], extent(weights))),
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        CHIPLETS=tiles.chiplets,
        ENTRY=ENTRY,
        **OPTIONS,
        **tiles.options,
    )


@triton.jit(do_not_specialize=["band"])
def _quantized_gate_up(
    x,
    row_scale,
    data,
    scale,
    zero,
    bias,
    out,
    pre_activation,
    table,
    row_slot,
    weights,
    P,
    I,
    H,
    K,
    alpha,
    limit,
    width,
    scales,
    scale_rows,
    band,
    stride_xt,
    stride_xh,
    row_scales,
    stride_bias_e,
    stride_bias_n,
    stride_weights_t,
    stride_weights_k,
    weights_K,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    HALVES: tl.constexpr,
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
    # A tile holds gate and up columns of the same UNITS columns of the result, as in kernels/experts.py.
    UNITS: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    row_span = tl.arange(0, BLOCK_M)
    column_span = tl.arange(0, BLOCK_N)
    columns = tl.cdiv(I, UNITS)
    rows = tl.load(table)
    total = rows * columns
    for t in range(tl.program_id(0), total, tl.num_programs(0)):
        row_tile, column_tile = tile_at(dealt(t, total, CHIPLETS), rows, columns, band)
        group, first, end = table_entry(table, row_tile, ENTRY)
        row = first + row_span
        row_ok = row < end
        slot = tl.load(row_slot + row, mask=row_ok, other=-1)
        used = slot >= 0
        unit = column_tile * UNITS
        if HALVES:
            column = unit + column_span % UNITS + column_span // UNITS * I
            column_ok = unit + column_span % UNITS < I
        else:
            column = column_tile * BLOCK_N + column_span
            column_ok = column < P
        length = H
        if group < 0:
            length = 0
        of = tl.maximum(group, 0)

        x_tile = x
        row_scale_of = row_scale
        of_rows = row_span.to(INDEX)
        if K is not None:
            of_rows = tl.where(used, slot // K, 0).to(INDEX)
        else:
            x_tile += at(first, stride_xt)
            if row_scale is not None:
                row_scale_of += at(first, row_scales)
        zero_of = zero
        if zero is not None:
            zero_of += at(of, scale_rows) * scales
        sum = quantized_product(
            x_tile,
            of_rows * stride_xt,
            used,
            stride_xh,
            row_scale_of,
            of_rows * row_scales,
            data + at(of, P) * width,
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

        bias_of = bias
        if bias is not None:
            bias_of += at(of, stride_bias_e)
        finish(
            sum, out, bias_of, pre_activation, weights, group, row, row_ok, slot, used, unit, column, column_ok, P, I,
            alpha, limit, stride_bias_n, stride_weights_t, stride_weights_k, weights_K, KIND, GATED, HALVES, BLOCK_M,
            UNITS,
        )  # fmt: skip
