"""activate: one program applies the activation to a tile of rows and columns."""

import math

import torch
import triton
import triton.language as tl

from polymoe.kernels._launch import OPTIONS, cdiv, extent, index_type, tile
from polymoe.kernels._math import (
    at_least,
    at_most,
    gelu,
    gelu_tanh,
    product_with_sigmoid,
    scaled_silu,
    silu,
    tanh,
)

UNGATED = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
OAI_ALPHA = 1.702  # of swiglu_oai, where none is given

COLUMNS = 1024  # at most, of a tile
ELEMENTS = 2048  # of a tile
WARPS = 4


def parameters(kind: str, alpha: float | None, limit: float | None) -> tuple[float, float]:
    """alpha and limit as `activation` takes them: numbers also where a kind has none."""
    return OAI_ALPHA if alpha is None else alpha, math.inf if limit is None else limit


@triton.jit
def activation(gate, up, alpha, limit, KIND: tl.constexpr):
    """KIND of the float32 tiles gate and up, in float32; ungated kinds ignore `up`. This one routine also serves
    `experts`, so that both give the same bits."""
    if KIND == "swiglu":
        out = silu(gate) * up
    elif KIND == "swiglu_clamped":
        out = silu(at_most(gate, limit)) * at_least(at_most(up, limit), -limit)
    elif KIND == "swiglu_clamped_after":
        out = at_most(silu(gate), limit) * at_least(at_most(up, limit), -limit)
    elif KIND == "swiglu_oai":
        out = scaled_silu(at_most(gate, limit), alpha) * (at_least(at_most(up, limit), -limit) + 1.0)
    elif KIND == "geglu":
        out = gelu(gate) * up
    elif KIND == "geglu_tanh":
        out = gelu_tanh(gate) * up
    elif KIND == "reglu":
        out = at_least(gate, 0.0) * up
    elif KIND == "softcapped":
        bounded = product_with_sigmoid(tanh(tl.div_rn(gate, alpha)) * alpha, gate)
        out = bounded * (tanh(tl.div_rn(up, limit)) * limit)
    elif KIND == "silu":
        out = silu(gate)
    elif KIND == "gelu":
        out = gelu(gate)
    elif KIND == "gelu_tanh":
        out = gelu_tanh(gate)
    elif KIND == "relu":
        out = at_least(gate, 0.0)
    else:
        tl.static_assert(KIND == "relu2")
        positive = at_least(gate, 0.0)
        out = positive * positive
    return out


@triton.jit(do_not_specialize=["S"])
def _activate(
    h,
    h_row,
    h_column,
    out,
    row_slot,
    weights,
    weights_token,
    weights_slot,
    S,
    I,
    K,
    alpha,
    limit,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(INDEX) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows = row < S
    used = in_rows
    if row_slot is not None:
        slot = tl.load(row_slot + row, mask=in_rows, other=-1)
        used = slot >= 0
    in_columns = column < I

    start = h + row[:, None] * h_row
    if GATED and INTERLEAVED:
        # Gate and up in one tile, so that the load is contiguous.
        pair = tl.program_id(1).to(INDEX) * (2 * COLUMNS) + tl.arange(0, 2 * COLUMNS)
        both = tl.load(start + pair[None, :] * h_column, mask=used[:, None] & (pair < 2 * I)[None, :], other=0.0)
        gate, up = tl.split(tl.reshape(both, (ROWS, COLUMNS, 2)))
    else:
        read = used[:, None] & in_columns[None, :]
        place = start + column[None, :] * h_column
        gate = tl.load(place, mask=read, other=0.0)
        up = gate
        if GATED:
            up = tl.load(place + tl.cast(I, INDEX) * h_column, mask=read, other=0.0)
    result = activation(gate.to(tl.float32), up.to(tl.float32), alpha, limit, KIND)
    if weights is not None:
        at = (slot // K).to(INDEX) * weights_token + (slot % K).to(INDEX) * weights_slot
        weight = tl.load(weights + at, mask=used, other=0.0)
        result *= weight.to(tl.float32)[:, None]
    result = tl.where(used[:, None], result, 0.0)
    place = row[:, None] * I + column[None, :]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])


def activate(
    h: torch.Tensor,
    kind: str,
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
    row_slot: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    gated = kind not in UNGATED
    S = h.shape[0]
    I = h.shape[1] // 2 if gated else h.shape[1]
    out = h.new_empty((S, I), dtype=out_dtype or h.dtype)
    if out.numel() == 0:
        return out
    row_slot = None if row_slot is None else row_slot.contiguous()
    rows, columns = tile(I, COLUMNS, ELEMENTS)
    _activate[cdiv(S, rows), cdiv(I, columns)](
        h,
        h.stride(0),
        h.stride(1),
        out,
        row_slot,
        weights,
        0 if weights is None else weights.stride(0),
        0 if weights is None else weights.stride(1),
        S,
        I,
        1 if weights is None else weights.shape[1],
        *parameters(kind, alpha, limit),
        KIND=kind,
        GATED=gated,
        INTERLEAVED=interleaved,
        INDEX=index_type(extent(h, out, weights)),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=WARPS,
        **OPTIONS,
    )
    return out
