"""down_backward: one product with the transposed down weights, whose epilogue computes the activation once more and
yields three results: the gradient of the pre-activation, the weighted activation, and for every row the part of its
routing weight's gradient that lies in the tile. A second kernel adds these parts in the order of the columns."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from polymoe.kernels._launch import OPTIONS, cdiv, index_type
from polymoe.kernels.activate import UNGATED, activation, parameters
from polymoe.kernels.activate_backward import slopes
from polymoe.kernels.devices import current
from polymoe.kernels.operands import along_d, arithmetic, described, described_weights, precision, reach, strides
from polymoe.kernels.product import product
from polymoe.kernels.schedule import ENTRY, at, dealt, most_tiles, programs, row_tiles, table_entry, tile_at
from polymoe.kernels.tiles import Problem, choose, rule

SLOTS = 128  # of a program that adds parts
# Columns of a tile at most. Beside a product of more the slopes of an activation leave too few registers.
WIDEST, WIDEST_OF_MULTIPLY_ADDS = 64, 32


@triton.jit
def _halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.split(tile.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1))


@triton.jit
def _finish(
    g,
    pre_activation,
    d_pre,
    activated,
    weight,
    row,
    first,
    N,
    used,
    row_ok,
    alpha,
    limit,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """From the gradient g of some columns of the activation, from `first` on: stores what belongs to them, and returns
    for every row the dot product of g and the activation."""
    column = first + tl.arange(0, COLUMNS)
    stored = row_ok[:, None] & (column < N)[None, :]
    read = used[:, None] & (column < N)[None, :]
    width = 2 * N if GATED else N
    start = at(row, width)[:, None]
    if INTERLEAVED:
        # Gate and up in one tile, so that loads and stores are contiguous.
        pair = 2 * first + tl.arange(0, 2 * COLUMNS)
        both = tl.load(pre_activation + start + pair[None, :], mask=used[:, None] & (pair < 2 * N)[None, :], other=0.0)
        gate, up = tl.split(both.to(tl.float32).reshape(ROWS, COLUMNS, 2))
    else:
        gate = tl.load(pre_activation + start + column[None, :], mask=read, other=0.0).to(tl.float32)
        up = gate
        if GATED:
            up = tl.load(pre_activation + start + N + column[None, :], mask=read, other=0.0).to(tl.float32)
    value = activation(gate, up, alpha, limit, KIND)
    dot = tl.sum(tl.where(read, g * value, 0.0), axis=1)
    if activated is not None:
        weighted = tl.where(used[:, None], value * weight[:, None], 0.0)
        tl.store(
            activated + at(row, N)[:, None] + column[None, :], weighted.to(activated.dtype.element_ty), mask=stored
        )
    by_gate, by_up = slopes(gate, up, alpha, limit, KIND)
    g *= weight[:, None]
    d_gate = tl.where(used[:, None], g * by_gate, 0.0).to(d_pre.dtype.element_ty)
    if not GATED:
        tl.store(d_pre + start + column[None, :], d_gate, mask=stored)
    else:
        d_up = tl.where(used[:, None], g * by_up, 0.0).to(d_pre.dtype.element_ty)
        if INTERLEAVED:
            pair = 2 * first + tl.arange(0, 2 * COLUMNS)
            turns = tl.join(d_gate, d_up).reshape(ROWS, 2 * COLUMNS)
            tl.store(d_pre + start + pair[None, :], turns, mask=row_ok[:, None] & (pair < 2 * N)[None, :])
        else:
            tl.store(d_pre + start + column[None, :], d_gate, mask=stored)
            tl.store(d_pre + start + N + column[None, :], d_up, mask=stored)
    return dot


@triton.jit(do_not_specialize=["S", "band"])
def _down_backward(
    rows,
    down,
    pre_activation,
    d_pre,
    activated,
    parts,
    table,
    row_slot,
    weights,
    S,
    N,
    D,
    alpha,
    limit,
    band,
    stride_rm,
    stride_rk,
    stride_dg,
    stride_dk,
    stride_dn,
    stride_weights_t,
    stride_weights_k,
    weights_K,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
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
    row_tiles = tl.load(table)
    total = row_tiles * columns
    for t in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=PERSISTENT):
        row_tile, column_tile = tile_at(dealt(t, total, CHIPLETS), row_tiles, columns, band)
        group, first, end = table_entry(table, row_tile, ENTRY)
        row = first + row_span
        row_ok = row < end
        slot = tl.load(row_slot + row, mask=row_ok, other=-1)
        used = slot >= 0
        column = column_tile * BLOCK_N
        column_ok = column + column_span < N
        length = D
        if group < 0:
            length = 0

        row_tile_start = rows
        if not DESCRIBED_A:
            row_tile_start += at(first, stride_rm)
        weight_tile = down
        if not DESCRIBED_B:
            weight_tile += at(tl.maximum(group, 0), stride_dg) + at(column, stride_dn)
        g = product(
            row_tile_start,
            first,
            row_span.to(INDEX) * stride_rm,
            row_ok,
            stride_rk,
            weight_tile,
            tl.maximum(group, 0),
            column,
            column_span.to(INDEX) * stride_dn,
            column_ok,
            stride_dk,
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

        weight = tl.full([BLOCK_M], 1.0, tl.float32)
        if weights is not None:
            place = at(slot // weights_K, stride_weights_t) + at(slot % weights_K, stride_weights_k)
            weight = tl.load(weights + place, mask=used, other=0.0).to(tl.float32)
        # A quarter of the columns after the other: activations and slopes need many registers.
        PART: tl.constexpr = BLOCK_N // 4
        g0, g1 = _halves(g, BLOCK_M, BLOCK_N)
        g00, g01 = _halves(g0, BLOCK_M, BLOCK_N // 2)
        g10, g11 = _halves(g1, BLOCK_M, BLOCK_N // 2)
        dot = _finish(
            g00, pre_activation, d_pre, activated, weight, row, column, N, used, row_ok, alpha, limit,
            KIND, GATED, INTERLEAVED, BLOCK_M, PART,
        )  # fmt: skip
        dot += _finish(
            g01, pre_activation, d_pre, activated, weight, row, column + PART, N, used, row_ok, alpha, limit,
            KIND, GATED, INTERLEAVED, BLOCK_M, PART,
        )  # fmt: skip
        dot += _finish(
            g10, pre_activation, d_pre, activated, weight, row, column + 2 * PART, N, used, row_ok, alpha, limit,
            KIND, GATED, INTERLEAVED, BLOCK_M, PART,
        )  # fmt: skip
        dot += _finish(
            g11, pre_activation, d_pre, activated, weight, row, column + 3 * PART, N, used, row_ok, alpha, limit,
            KIND, GATED, INTERLEAVED, BLOCK_M, PART,
        )  # fmt: skip
        if parts is not None:
            tl.store(parts + at(column_tile, S) + row, dot, mask=used)


@triton.jit(do_not_specialize=["S"])
def _sum_parts(parts, slot_row, out, S, columns, SLOTS: tl.constexpr):
    """out[s] = the sum of parts [columns, S] over the row of slot s; 0 for a slot without one."""
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    row = tl.load(slot_row + slot, mask=slot < S, other=-1)
    total = tl.zeros((SLOTS,), dtype=tl.float32)
    for column in range(columns):
        total += tl.load(parts + at(column, S) + row, mask=row >= 0, other=0.0)
    tl.store(out + slot, total, mask=slot < S)


def down_backward(
    rows: Tensor,
    down: Tensor,
    pre_activation: Tensor,
    offs: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    kind: str,
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
    weights: Tensor | None = None,
    need_activation: bool = False,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    (S, D), (E, _, N), device = rows.shape, down.shape, current(rows.device)
    pre_activation, row_slot = pre_activation.contiguous(), row_slot.contiguous()
    how = arithmetic(rows, down, device)
    multiply_adds = how == "f32" and not rule(device.family, how).nonkdim  # CDNA has matrix instructions for float32
    tiles = choose(Problem(how, S, E, N, D), device, WIDEST_OF_MULTIPLY_ADDS if multiply_adds else WIDEST)
    columns = cdiv(N, tiles.block_n)
    d_pre = torch.empty_like(pre_activation)
    activated = rows.new_empty((S, N) if need_activation else (0,))
    d_weights = rows.new_empty(slot_row.shape if need_weights else (0,), dtype=torch.float32)
    parts = rows.new_empty((columns, S), dtype=torch.float32) if need_weights else None
    most = most_tiles(S, E + 1, tiles.block_m) * columns
    if most > 0:
        left, right = described(rows, tiles), described_weights(down, tiles)
        b_tile = (tiles.block_k, tiles.block_n)
        _down_backward[(programs(most, tiles, device),)](
            rows if left is None else left,
            down if right is None else right,
            pre_activation,
            d_pre,
            activated if need_activation else None,
            parts,
            row_tiles(offs, S, tiles.block_m, padding=True),
            row_slot,
            weights,
            S,
            N,
            D,
            *parameters(kind, alpha, limit),
            tiles.band,
            *strides(rows, 2),
            *strides(down, 3),
            *strides(weights, 2),
            1 if weights is None else weights.shape[1],
            KIND=kind,
            GATED=kind not in UNGATED,
            INTERLEAVED=interleaved,
            DESCRIBED_A=left is not None,
            DESCRIBED_B=right is not None,
            ALONG_D=right is not None and along_d(down),
            EVEN_D=D % tiles.block_k == 0,
            PRECISION=precision(how),
            INDEX=index_type(max(reach(rows, tiles.block_m, tiles.block_k), reach(down, *b_tile))),
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            BLOCK_K=tiles.block_k,
            CHIPLETS=tiles.chiplets,
            PERSISTENT=tiles.persistent,
            ENTRY=ENTRY,
            **OPTIONS,
            **tiles.options,
        )
    if need_weights and S > 0:
        _sum_parts[(cdiv(S, SLOTS),)](
            parts, slot_row.contiguous(), d_weights, S, columns, SLOTS=SLOTS, num_warps=4, **OPTIONS
        )
    return d_pre, activated, d_weights
