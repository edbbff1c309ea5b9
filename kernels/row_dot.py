"""row_dot: one program takes a few tokens, and multiplies each with the rows of its slots, one after the other."""

import torch
import triton
import triton.language as tl

from polymoe.kernels._launch import OPTIONS, cdiv, extent, index_type, tile

COLUMNS = 1024  # at most, of a tile
ELEMENTS = 1024  # of a tile
WARPS = 4


@triton.jit(do_not_specialize=["T"])
def _row_dot(
    x,
    x_token,
    x_column,
    rows,
    rows_row,
    rows_column,
    slot_row,
    out,
    T,
    H,
    K: tl.constexpr,
    INDEX: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(INDEX) * TOKENS + tl.arange(0, TOKENS)
    in_tokens = token < T
    for k in range(K):
        row = tl.load(slot_row + token * K + k, mask=in_tokens, other=-1)
        used = row >= 0
        place = row.to(INDEX) * rows_row
        total = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
        for first in range(0, H, COLUMNS):
            column = (first + tl.arange(0, COLUMNS)).to(INDEX)
            read = used[:, None] & (column < H)[None, :]
            a = tl.load(x + token[:, None] * x_token + column[None, :] * x_column, mask=read, other=0.0)
            b = tl.load(rows + place[:, None] + column[None, :] * rows_column, mask=read, other=0.0)
            total = tl.fma(a.to(tl.float32), b.to(tl.float32), total)
        tl.store(out + token * K + k, tl.sum(total, axis=1), mask=in_tokens)


def row_dot(x: torch.Tensor, rows: torch.Tensor, slot_row: torch.Tensor) -> torch.Tensor:
    (T, K), H = slot_row.shape, x.shape[1]
    out = x.new_empty((T, K), dtype=torch.float32)
    if out.numel() == 0:
        return out
    tokens, columns = tile(max(H, 1), COLUMNS, ELEMENTS)
    _row_dot[(cdiv(T, tokens),)](
        x,
        x.stride(0),
        x.stride(1),
        rows,
        rows.stride(0),
        rows.stride(1),
        slot_row.contiguous(),
        out,
        T,
        H,
        K=K,
        INDEX=index_type(extent(x, rows, slot_row)),
        TOKENS=tokens,
        COLUMNS=columns,
        num_warps=WARPS,
        **OPTIONS,
    )
    return out
