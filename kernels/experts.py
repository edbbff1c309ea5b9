"""experts: the routed part of a layer in few launches. The plan; then one kernel that gathers the rows of x, multiplies
them by the gate and up weights and applies the activation; then the down product and the sum over the slots."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from polymoe.kernels._launch import OPTIONS, cdiv, extent, index_type
from polymoe.kernels.activate import UNGATED, activation, parameters
from polymoe.kernels.combine import combine
from polymoe.kernels.devices import Device, current
from polymoe.kernels.dispatch import dispatch
from polymoe.kernels.grouped_mm import multiply_rows
from polymoe.kernels.grouped_mm_quantized import multiply_quantized_rows
from polymoe.kernels.operands import along_d, arithmetic, described, described_weights, precision, strides
from polymoe.kernels.plan import plan
from polymoe.kernels.product import product
from polymoe.kernels.quantized import Stored
from polymoe.kernels.schedule import ENTRY, at, dealt, most_tiles, programs, row_tiles, table_entry, tile_at
from polymoe.kernels.tiles import Problem, Tiles, choose


def experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor,
    activation: str = "swiglu",
    alpha: float | None = None,
    limit: float | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    transposed: bool = False,
    interleaved: bool = False,
    weight_placement: str = "output",
    save: bool = False,
    weight_format: str = "plain",
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    gate_up_zero: Tensor | None = None,
    down_zero: Tensor | None = None,
    mode: str = "weight_only",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def weights_at(placement: str) -> Tensor | None:
        return weights if weight_placement == placement else None

    (T, K), E, H = ids.shape, gate_up.shape[0], x.shape[1]
    S, device = T * K, current(x.device)
    up: Tensor | Stored = gate_up if transposed else gate_up.mT
    back: Tensor | Stored = down if transposed else down.mT
    if gate_up_scale is not None and down_scale is not None:
        up = Stored(gate_up, gate_up_scale, gate_up_zero, weight_format, H, mode)
        width = up.shape[2] if activation in UNGATED else up.shape[2] // 2
        back = Stored(down, down_scale, down_zero, weight_format, width, mode)
    (_, _, P), (_, I, _) = up.shape, back.shape
    first, second = (_tiles(x, weight, S, device) for weight in (up, back))

    offsets, row_slot, slot_row = plan(ids, E)
    table = row_tiles(offsets[1:], S, first.block_m, padding=save)
    a = x.new_empty((S, I))
    pre_activation = x.new_empty((S, P) if save else (0,))
    gathered = weight_placement != "input"
    _multiply_and_activate(
        x if gathered else dispatch(x, row_slot, slot_row, weights),
        up,
        gate_up_bias,
        a,
        pre_activation if save else None,
        table,
        row_slot,
        weights_at("activation"),
        K if gathered else None,
        activation,
        parameters(activation, alpha, limit),
        interleaved,
        first,
        device,
    )
    if second.block_m != first.block_m:
        table = row_tiles(offsets[1:], S, second.block_m, padding=False)
    y = x.new_empty((S, H), dtype=torch.float32)
    if isinstance(back, Stored):
        multiply_quantized_rows(a, back, table, down_bias, y, second)
    else:
        multiply_rows(a, back, table, down_bias, y, second)
    out = combine(y, slot_row, weights_at("output"), x.dtype)
    if save:
        return out, pre_activation, offsets, row_slot, slot_row
    none = [offsets.new_empty(0) for _ in range(3)]
    return out, pre_activation, none[0], none[1], none[2]


def _tiles(x: Tensor, weight: Tensor | Stored, S: int, device: Device) -> Tiles:
    if isinstance(weight, Stored):
        return weight.tiles(x, S)
    E, D, N = weight.shape
    return choose(Problem(arithmetic(x, weight, device), S, E, N, D), device)


def _multiply_and_activate(
    x: Tensor,
    gate_up: Tensor | Stored,
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
    device: Device,
) -> None:
    """out[r] = activation(x[r] @ gate_up[g] + bias[g]) for the rows r of every group g of the table.

    x [T, H], whose row of slot s is s // K; without K [S, H], sorted by expert already
    gate_up [E, H, 2I] or [E, H, I], plain or quantised, out [S, I], pre_activation [S, 2I] or [S, I]
    """
    (E, H, P), (S, I) = gate_up.shape, out.shape
    most = most_tiles(S, E + 1, tiles.block_m) * cdiv(P, tiles.block_n)
    if most == 0:
        return
    if isinstance(gate_up, Stored):
        from polymoe.kernels.experts_quantized import multiply_quantized_and_activate  # it imports this module

        multiply_quantized_and_activate(
            x, gate_up, bias, out, pre_activation, table, row_slot, weights, K, kind, alpha_limit, interleaved, tiles,
            programs(most, tiles, device),
        )  # fmt: skip
        return
    gated = kind not in UNGATED
    halves = gated and not interleaved
    left = described(x, tiles) if K is None else None
    right = described_weights(gate_up, tiles, halves)
    _gate_up[(programs(most, tiles, device),)](
        x if left is None else left,
        gate_up if right is None else right,
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
        tiles.band,
        *strides(x, 2),
        *strides(gate_up, 3),
        *strides(bias, 2),
        *strides(weights, 2),
        1 if weights is None else weights.shape[1],
        KIND=kind,
        GATED=gated,
        HALVES=halves,
        DESCRIBED_A=left is not None,
        DESCRIBED_B=right is not None,
        ALONG_D=right is not None and along_d(gate_up),
        EVEN_D=H % tiles.block_k == 0,
        PRECISION=precision(arithmetic(x, gate_up, device)),
        INDEX=index_type(max(extent(x), extent(gate_up[0]), extent(weights))),
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.block_k,
        CHIPLETS=tiles.chiplets,
        PERSISTENT=tiles.persistent,
        ENTRY=ENTRY,
        **OPTIONS,
        **tiles.options,
    )


@triton.jit
def _activate_and_store(
    out,
    gate,
    up,
    weight,
    row,
    column,
    I,
    used,
    row_ok,
    alpha,
    limit,
    KIND: tl.constexpr,
    WEIGHTED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Activates a tile, and stores it to out [S, I] from `column` on."""
    result = activation(gate, up, alpha, limit, KIND)
    if WEIGHTED:
        result *= weight[:, None]
    result = tl.where(used[:, None], result, 0.0)
    columns = column + tl.arange(0, COLUMNS)
    place = (out + at(row, I))[:, None] + columns[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=row_ok[:, None] & (columns < I)[None, :])


@triton.jit
def finish(
    sum,
    out,
    bias,
    pre_activation,
    weights,
    group,
    row,
    row_ok,
    slot,
    used,
    unit,
    column,
    column_ok,
    P,
    I,
    alpha,
    limit,
    stride_bias_n,
    stride_weights_t,
    stride_weights_k,
    weights_K,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    UNITS: tl.constexpr,
):
    """Adds the bias [P] to a tile of products, stores it to pre_activation [S, P], and its activation, UNITS columns
    from `unit` on, to out [S, I]. Padding has a negative `group` and no bias."""
    if bias is not None:
        added = tl.load(
            bias + at(column, stride_bias_n), mask=column_ok & (column < tl.where(group < 0, 0, P)), other=0.0
        )
        sum += added.to(tl.float32)[None, :]
    if pre_activation is not None:
        place = (pre_activation + at(row, P))[:, None] + column[None, :]
        stored = row_ok[:, None] & column_ok[None, :]
        tl.store(place, sum.to(pre_activation.dtype.element_ty), mask=stored)
    gate = sum
    up = sum
    if HALVES:
        gate, up = tl.split(sum.reshape(BLOCK_M, 2, UNITS).permute(0, 2, 1))
    elif GATED:
        gate, up = tl.split(sum.reshape(BLOCK_M, UNITS, 2))
    weight = tl.full([BLOCK_M], 1.0, tl.float32)
    if weights is not None:
        place = at(slot // weights_K, stride_weights_t) + at(slot % weights_K, stride_weights_k)
        weight = tl.load(weights + place, mask=used, other=0.0).to(tl.float32)
    # One half of the columns after the other: activations need many registers.
    gate0, gate1 = tl.split(gate.reshape(BLOCK_M, 2, UNITS // 2).permute(0, 2, 1))
    up0, up1 = tl.split(up.reshape(BLOCK_M, 2, UNITS // 2).permute(0, 2, 1))
    _activate_and_store(
        out, gate0, up0, weight, row, unit, I, used, row_ok, alpha, limit, KIND, weights is not None, UNITS // 2
    )
    unit += UNITS // 2
    _activate_and_store(
        out, gate1, up1, weight, row, unit, I, used, row_ok, alpha, limit, KIND, weights is not None, UNITS // 2
    )


@triton.jit(do_not_specialize=["band"])
def _gate_up(
    x,
    gate_up,
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
    band,
    stride_xt,
    stride_xh,
    stride_we,
    stride_wh,
    stride_wn,
    stride_bias_e,
    stride_bias_n,
    stride_weights_t,
    stride_weights_k,
    weights_K,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    HALVES: tl.constexpr,
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
    # A tile holds the gate and the up columns of UNITS columns of the result: in turns, or UNITS gate columns before
    # as many up columns. So one product makes both, and the tile is taken apart where it lies in registers.
    UNITS: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    row_span = tl.arange(0, BLOCK_M)
    column_span = tl.arange(0, BLOCK_N)
    columns = tl.cdiv(I, UNITS)
    rows = tl.load(table)
    total = rows * columns
    for t in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=PERSISTENT):
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
        row_offsets = row_span.to(INDEX) * stride_xt
        if K is not None:
            row_offsets = tl.where(used, slot // K, 0).to(INDEX) * stride_xt
        elif not DESCRIBED_A:
            x_tile += at(first, stride_xt)
        weight_tile = gate_up
        if not DESCRIBED_B:
            weight_tile += at(of, stride_we)
        sum = product(
            x_tile,
            first,
            row_offsets,
            used,
            stride_xh,
            weight_tile,
            of,
            unit if HALVES else column_tile * BLOCK_N,
            column.to(INDEX) * stride_wn,
            column_ok,
            stride_wh,
            length,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            DESCRIBED_A,
            DESCRIBED_B,
            ALONG_D,
            HALVES,
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
