"""dispatch: one program copies the tokens of a few rows for a range of columns."""

import torch
import triton
import triton.language as tl

from polymoe.kernels._launch import OPTIONS, cdiv, extent, index_type, tile

COLUMNS = 1024  # at most, of a tile
ELEMENTS = 2048  # of a tile
WARPS = 4


@triton.jit(do_not_specialize=["S"])
def _dispatch(
    x,
    x_token,
    x_column,
    row_slot,
    weights,
    weights_token,
    weights_slot,
    out,
    S,
    H,
    K,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(INDEX) * COLUMNS + tl.arange(0, COLUMNS)
    in_rows = row < S
    in_columns = (column < H)[None, :]
    slot = tl.load(row_slot + row, mask=in_rows, other=-1)
    used = slot >= 0
    token = (slot // K).to(INDEX)
    place = token[:, None] * x_token + column[None, :] * x_column
    # Padding rows read nothing and get the zeros of `other`.
    result = tl.load(x + place, mask=used[:, None] & in_columns, other=0.0)
    if weights is not None:
        at = token * weights_token + (slot % K).to(INDEX) * weights_slot
        weight = tl.load(weights + at, mask=used, other=0.0).to(tl.float32)
        result = (result.to(tl.float32) * weight[:, None]).to(out.dtype.element_ty)
    place = row[:, None] * H + column[None, :]
    tl.store(out + place, result, mask=in_rows[:, None] & in_columns)


def dispatch(
    x: torch.Tensor, row_slot: torch.Tensor, slot_row: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    S, H = row_slot.shape[0], x.shape[1]
    out = x.new_empty((S, H))
    if out.numel() == 0:
        return out
    rows, columns = tile(H, COLUMNS, ELEMENTS)
    _dispatch[cdiv(S, rows), cdiv(H, columns)](
        x,
        x.stride(0),
        x.stride(1),
        row_slot.contiguous(),
        weights,
        0 if weights is None else weights.stride(0),
        0 if weights is None else weights.stride(1),
        out,
        S,
        H,
        slot_row.shape[1],
        INDEX=index_type(extent(x, out, weights, row_slot)),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=WARPS,
        **OPTIONS,
    )
    return out
