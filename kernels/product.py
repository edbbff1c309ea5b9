"""The main loop of the matrix products: one tile of a product.

Sums run in steps of BLOCK_K along the reduction, ascending, in one program, so that a result does not depend on the
tile it lies in. In true float32 every step has a fresh accumulator, which keeps the rounding error of long sums small;
the accumulators of matrix instructions are carried along.
"""

import triton
import triton.language as tl


@triton.jit
def load_weights(
    b,
    offsets,
    mask,
    group,
    column,
    k,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIBED: tl.constexpr,
    ALONG_D: tl.constexpr,
    HALVES: tl.constexpr,
):
    """A tile [BLOCK_K, BLOCK_N] of weights: from pointers, or from a descriptor of [G, N, D] (ALONG_D) or [G, D, N].
    With HALVES the descriptor has N as [2, N / 2], and the tile is made of BLOCK_N / 2 columns from `column` on in
    either half. Weight formats enter here."""
    if not DESCRIBED:
        tile = tl.load(b + offsets, mask=mask, other=0.0)
    elif ALONG_D:
        rows = b.load([group, 0, column, k]) if HALVES else b.load([group, column, k])
        tile = rows.reshape(BLOCK_N, BLOCK_K).T
    else:
        tile = b.load([group, k, 0, column]) if HALVES else b.load([group, k, column])
        tile = tile.reshape(BLOCK_K, BLOCK_N)
    return tile


@triton.jit
def add_product(x, w, sum, PRECISION: tl.constexpr):
    if PRECISION == "ieee" and x.dtype == tl.float32:
        sum = tl.fma(tl.dot(x, w, input_precision=PRECISION), 1.0, sum)  # an addition would be merged into the dot
    else:
        sum = tl.dot(x, w, sum, input_precision=PRECISION)
    return sum


@triton.jit
def product(
    a,
    first_row,
    row_offsets,
    row_ok,
    stride_ak,
    b,
    group,
    column,
    column_offsets,
    column_ok,
    stride_bk,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DESCRIBED_A: tl.constexpr,
    DESCRIBED_B: tl.constexpr,
    ALONG_D: tl.constexpr,
    HALVES: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):
    """A tile [BLOCK_M, BLOCK_N] of a @ b, in float32.

    a: a descriptor of [S, D], read from first_row on; or a pointer, to rows at row_offsets
    b: a descriptor, see load_weights; or a pointer, to columns at column_offsets
    """
    k_span = tl.arange(0, BLOCK_K).to(INDEX)
    row_offsets = row_offsets[:, None] + k_span[None, :] * stride_ak
    column_offsets = k_span[:, None] * stride_bk + column_offsets[None, :]
    sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, D, BLOCK_K):
        rows_mask = row_ok[:, None]
        columns_mask = column_ok[None, :]
        if not EVEN_D:
            inside = k + tl.arange(0, BLOCK_K) < D
            rows_mask = rows_mask & inside[None, :]
            columns_mask = columns_mask & inside[:, None]
        if DESCRIBED_A:
            x = a.load([first_row, k])
        else:
            x = tl.load(a + row_offsets, mask=rows_mask, other=0.0)
            a += tl.cast(stride_ak, tl.int64) * BLOCK_K
        w = load_weights(
            b, column_offsets, columns_mask, group, column, k, BLOCK_N, BLOCK_K, DESCRIBED_B, ALONG_D, HALVES
        )
        sum = add_product(x, w, sum, PRECISION)
        if not DESCRIBED_B:
            b += tl.cast(stride_bk, tl.int64) * BLOCK_K
    return sum
