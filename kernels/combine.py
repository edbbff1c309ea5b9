"""combine: one program sums the rows of a few tokens for a range of columns, slot after slot."""

import torch
import triton
import triton.language as tl

from polymoe.kernels._launch import OPTIONS, cdiv, extent, index_type, tile

COLUMNS = 1024  # at most, of a tile
ELEMENTS = 1024  # of a tile
WARPS = 4


@triton.jit(do_not_specialize=["T"])
def _combine(
    y,
    y_row,
    y_column,
    slot_row,
    weights,
    weights_token,
    weights_slot,
    out,
    T,
    H,
    K: tl.constexpr,
    INDEX: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(INDEX) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1).to(INDEX) * COLUMNS + tl.arange(0, COLUMNS)
    in_tokens = token < T
    in_columns = (column < H)[None, :]
    total = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for k in range(K):
        row = tl.load(slot_row + token * K + k, mask=in_tokens, other=-1)
        used = row >= 0
        place = row.to(INDEX)[:, None] * y_row + column[None, :] * y_column
        term = tl.load(y + place, mask=used[:, None] & in_columns, other=0.0).to(tl.float32)
        if weights is None:
            added = total + term
        else:
            place = token * weights_token + tl.cast(k, INDEX) * weights_slot
            weight = tl.load(weights + place, mask=used, other=0.0).to(tl.float32)
            added = tl.fma(tl.broadcast_to(weight[:, None], (TOKENS, COLUMNS)), term, total)
        total = tl.where(used[:, None], added, total)
    place = token[:, None] * H + column[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=in_tokens[:, None] & in_columns)


def combine(
    y: torch.Tensor,
    slot_row: torch.Tensor,
    weights: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    (T, K), H = slot_row.shape, y.shape[1]
    out = y.new_empty((T, H), dtype=out_dtype or y.dtype)
    if out.numel() == 0:
        return out
    slot_row = slot_row.contiguous()
    tokens, columns = tile(H, COLUMNS, ELEMENTS)
    _combine[cdiv(T, tokens), cdiv(H, columns)](
        y,
        y.stride(0),
        y.stride(1),
        slot_row,
        weights,
        0 if weights is None else weights.stride(0),
        0 if weights is None else weights.stride(1),
        out,
        T,
        H,
        K=K,
        INDEX=index_type(extent(y, out, weights, slot_row)),
        TOKENS=tokens,
        COLUMNS=columns,
        num_warps=WARPS,
        **OPTIONS,
    )
    return out
