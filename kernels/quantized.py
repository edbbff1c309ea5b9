"""Quantised weights in the matrix products: how they are stored, and the main loop.

Codes are read as they are stored and decoded in registers, to numbers that float32, bfloat16 and float16 all hold
exactly; the matrix instructions multiply these. A step along the reduction lies within one group of elements that share
a scale, and its products are summed in a fresh float32 accumulator, which the scale then multiplies: no scale is ever
rounded into a weight. With mode="int8" the rows are 8-bit integers too, and the products int32. With mode="fp8" they
are e4m3 codes, which are decoded as those of weights are; matrix instructions that take such codes with their scales
multiply them as they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from polymoe.kernels.devices import current
from polymoe.kernels.operands import arithmetic, precision
from polymoe.kernels.round_rows import GROUP, round_rows
from polymoe.kernels.tiles import NARROWER_YET, Problem, Tiles, choose_quantized, offers_scaled


@dataclass(frozen=True)
class Format:
    """codes   "e4m3", "e2m1", "int8" or "int4"; see polymoe.formats for all of this
    rows    of the weight that share a scale
    group   elements along the reduction that share a scale; None: all
    """

    codes: str
    rows: int
    group: int | None


FORMATS = {
    "mxfp4": Format("e2m1", 1, 32),
    "mxfp8": Format("e4m3", 1, 32),
    "int8": Format("int8", 1, None),
    **{f"fp8_block{size}": Format("e4m3", size, size) for size in (32, 64, 128)},
    **{f"int4_g{group}": Format("int4", 1, group) for group in (32, 64, 128)},
}


ROWS_CODES = {"weight_only": "", "int8": "int8", "fp8": "e4m3"}  # of rows, by mode


@dataclass(frozen=True)
class Stored:
    """A weight [G, N, D] as polymoe.formats stores it, contiguous."""

    data: Tensor
    scale: Tensor
    zero: Tensor | None
    format: str
    D: int
    mode: str = "weight_only"

    @property
    def shape(self) -> tuple[int, int, int]:
        """[G, D, N], as of a plain weight."""
        return self.data.shape[0], self.D, self.data.shape[1]

    def tiles(self, a: Tensor, S: int) -> Tiles:
        """Of its product with S rows like those of `a`."""
        G, D, N = self.shape
        device, group = current(a.device), FORMATS[self.format].group if self.mode == "weight_only" else GROUP
        if self._scaled(a):
            return choose_quantized(Problem("mx", S, G, N, D), device, None)
        widest = NARROWER_YET if self.mode == "fp8" else None
        return choose_quantized(Problem(self._arithmetic(a), S, G, N, D), device, group, widest)

    def precision(self, a: Tensor) -> str:
        """tl.dot's input_precision of that product."""
        return precision(self._arithmetic(a))

    def rows(self, a: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rows [S, D] as they are multiplied, and the scales of their groups in the modes that round them."""
        return (a, None) if self.mode == "weight_only" else round_rows(a, ROWS_CODES[self.mode])

    def _arithmetic(self, a: Tensor) -> str:
        """Integers take the tiles of 16-bit numbers, which codes of 8-bit floats become."""
        return arithmetic(a, self.data.mT, current(a.device)) if self.mode == "weight_only" else "bf16"

    def _scaled(self, a: Tensor) -> bool:
        """Whether matrix instructions apply the scales."""
        return self.mode == "fp8" and offers_scaled(current(a.device).family)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """data, scale and zero points, for a kernel: 8-bit floats as their bytes."""
        data = self.data if self.format == "int8" else self.data.view(torch.uint8)
        scale = self.scale if self.scale.dtype == torch.float32 else self.scale.view(torch.uint8)
        return data, scale, self.zero

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Of the matrix of one group: bytes of a row of data, scales of a row of scales, and rows of these."""
        rows, columns = self.scale.shape[1], self.scale.shape[2] if self.scale.dim() == 3 else 1
        return self.data.shape[2], columns, rows

    def constants(self, a: Tensor) -> dict[str, str | int | bool]:
        """What a kernel is compiled for that multiplies rows like those of `a`."""
        format = FORMATS[self.format]
        return {
            "CODES": format.codes,
            "ROWS": format.rows,
            "GROUP": format.group or 0,
            "ROWS_CODES": ROWS_CODES[self.mode],
            "SCALED": self._scaled(a),
        }


ROWS_GROUP = tl.constexpr(GROUP)
E4M3_TO_FLOAT32 = tl.constexpr(2.0**120)  # the biases of the exponents differ by 120


@triton.jit
def numbers(codes, zero, CODES: tl.constexpr):
    """What codes stand for before the scale: those of e2m1 doubled, which makes them integers."""
    if CODES == "e4m3":
        byte = codes.to(tl.int32)
        magnitude = byte & 0x7F
        bits = ((byte & 0x80) << 24) | (magnitude << 20)  # subnormal ones come out right too
        values = tl.where(magnitude == 0x7F, float("nan"), bits.to(tl.float32, bitcast=True) * E4M3_TO_FLOAT32)
    elif CODES == "e2m1":
        code = codes.to(tl.int32)
        twice = (-0x379BCDF0 >> (4 * (code & 7))) & 15  # 0xC8643210: 0, 1, 2, 3, 4, 6, 8, 12
        values = tl.where((code & 8) != 0, -twice, twice)
    elif CODES == "int4":
        values = codes.to(tl.int32) - zero
    else:
        values = codes
    return values


@triton.jit
def factors(scale, CODES: tl.constexpr):
    """Scales as float32: uint8 ones are exponents with bias 127, of which 0 is a subnormal number and 255 NaN."""
    if scale.dtype == tl.uint8:
        code = scale.to(tl.int32)
        power = tl.where(code == 0, 1 << 22, code << 23).to(tl.float32, bitcast=True)
        scale = tl.where(code == 255, float("nan"), power)
    if CODES == "e2m1":
        scale *= 0.5
    return scale


@triton.jit
def _scaled_product(
    a,
    row_offsets,
    row_ok,
    stride_ak,
    row_scale,
    row_scale_offsets,
    data,
    scale,
    column,
    column_ok,
    width,
    scales,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CODES: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_D: tl.constexpr,
    INDEX: tl.constexpr,
):
    """quantized_product by matrix instructions that apply the scales: rows of e4m3, and for both operands every GROUP
    elements along the reduction share a power of two. One accumulator sums all of the reduction."""
    BYTES: tl.constexpr = BLOCK_K // 2 if CODES == "e2m1" else BLOCK_K
    k_span = tl.arange(0, BLOCK_K)
    byte_span = tl.arange(0, BYTES)
    group_span = tl.arange(0, BLOCK_K // GROUP)
    a_offsets = row_offsets[:, None] + k_span.to(INDEX)[None, :] * stride_ak
    row_scale_offsets = row_scale_offsets[:, None] + group_span[None, :]
    data_offsets = column.to(INDEX)[:, None] * width + byte_span[None, :]
    scale_offsets = column.to(INDEX)[:, None] * scales + group_span[None, :]
    sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, D, BLOCK_K):
        rows_mask = row_ok[:, None]
        row_scale_mask = row_ok[:, None]
        data_mask = column_ok[:, None]
        scale_mask = column_ok[:, None]
        first_byte = k // 2 if CODES == "e2m1" else k
        if not EVEN_D:
            groups_left = k // GROUP + group_span < scales
            rows_mask = rows_mask & (k + k_span < D)[None, :]
            row_scale_mask = row_scale_mask & groups_left[None, :]
            data_mask = data_mask & (first_byte + byte_span < width)[None, :]
            scale_mask = scale_mask & groups_left[None, :]
        x = tl.load(a + a_offsets, mask=rows_mask, other=0)
        x_scale = tl.load(row_scale + k // GROUP + row_scale_offsets, mask=row_scale_mask, other=0)
        w = tl.load(data + first_byte + data_offsets, mask=data_mask, other=0)
        w_scale = tl.load(scale + k // GROUP + scale_offsets, mask=scale_mask, other=0)
        sum = tl.dot_scaled(x, x_scale, "e4m3", w.T, w_scale, CODES, sum)
        a += tl.cast(stride_ak, tl.int64) * BLOCK_K
    return sum


@triton.jit
def _decoded_product(
    a,
    row_offsets,
    row_ok,
    stride_ak,
    row_scale,
    row_scale_offsets,
    data,
    scale,
    zero,
    column,
    column_ok,
    width,
    scales,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CODES: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS_CODES: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):
    """quantized_product by matrix instructions for the numbers that codes stand for."""
    HALVED: tl.constexpr = CODES == "e2m1" or CODES == "int4"
    BYTES: tl.constexpr = BLOCK_K // 2 if HALVED else BLOCK_K
    k_span = tl.arange(0, BLOCK_K)
    byte_span = tl.arange(0, BYTES)
    a_offsets = row_offsets[:, None] + k_span.to(INDEX)[None, :] * stride_ak
    data_offsets = column.to(INDEX)[:, None] * width + byte_span[None, :]
    scale_offsets = (column // ROWS).to(INDEX) * scales
    sum = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, D, BLOCK_K):
        rows_mask = row_ok[:, None]
        data_mask = column_ok[:, None]
        first_byte = k // 2 if HALVED else k
        if not EVEN_D:
            rows_mask = rows_mask & (k + k_span < D)[None, :]
            data_mask = data_mask & (first_byte + byte_span < width)[None, :]
        x = tl.load(a + a_offsets, mask=rows_mask, other=0)
        codes = tl.load(data + first_byte + data_offsets, mask=data_mask, other=0)
        place = scale_offsets
        if GROUP > 0:
            place += k // GROUP
        factor = factors(tl.load(scale + place, mask=column_ok, other=0), CODES)
        middle = 8
        if zero is not None:
            middle = tl.load(zero + place, mask=column_ok, other=0).to(tl.int32)[:, None]
        if HALVED:
            codes = tl.interleave(codes & 15, codes >> 4)
        if ROWS_CODES == "int8" and zero is not None:
            # A code less its zero point is at least -128 up to 128; what is above that is subtracted from the sum.
            above = tl.maximum(middle - 128, 0)
            products = tl.dot(x, numbers(codes, middle - above, CODES).to(x.dtype).T)
            if tl.max(above) > 0:
                products -= tl.sum(x.to(tl.int32), axis=1)[:, None] * above.T
            row_factor = tl.load(row_scale + row_scale_offsets + k // ROWS_GROUP, mask=row_ok, other=0.0)
            sum = tl.fma(products.to(tl.float32), row_factor[:, None] * factor[None, :], sum)
        elif ROWS_CODES != "":
            if ROWS_CODES == "e4m3":
                x = numbers(x, 0, ROWS_CODES).to(tl.bfloat16)
            w = numbers(codes, middle, CODES).to(x.dtype).T
            row_factor = tl.load(row_scale + row_scale_offsets + k // ROWS_GROUP, mask=row_ok, other=0)
            row_factor = factors(row_factor, ROWS_CODES)
            sum = tl.fma(tl.dot(x, w).to(tl.float32), row_factor[:, None] * factor[None, :], sum)
        else:
            w = numbers(codes, middle, CODES).to(x.dtype).T
            sum = tl.fma(tl.dot(x, w, input_precision=PRECISION), factor[None, :], sum)
        a += tl.cast(stride_ak, tl.int64) * BLOCK_K
    return sum


@triton.jit
def quantized_product(
    a,
    row_offsets,
    row_ok,
    stride_ak,
    row_scale,
    row_scale_offsets,
    data,
    scale,
    zero,
    column,
    column_ok,
    width,
    scales,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CODES: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS_CODES: tl.constexpr,
    SCALED: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):
    """A tile [BLOCK_M, BLOCK_N] of a @ weight^T, in float32.

    a: a pointer, to rows at row_offsets
    row_scale: with ROWS_CODES the rows are codes ("int8" or "e4m3"), ROWS_GROUP of which share a scale; the scales of a
        row are at row_scale_offsets
    data, scale, zero: pointers to the matrix of one group, of which the rows `column` are read; `width` bytes and
        `scales` scales are a row
    SCALED: the matrix instructions apply the scales
    """
    if SCALED:
        sum = _scaled_product(
            a, row_offsets, row_ok, stride_ak, row_scale, row_scale_offsets, data, scale, column, column_ok, width,
            scales, D, BLOCK_M, BLOCK_N, BLOCK_K, CODES, GROUP, EVEN_D, INDEX
        )  # fmt: skip
    else:
        sum = _decoded_product(
            a, row_offsets, row_ok, stride_ak, row_scale, row_scale_offsets, data, scale, zero, column, column_ok,
            width, scales, D, BLOCK_M, BLOCK_N, BLOCK_K, CODES, ROWS, GROUP, ROWS_CODES, EVEN_D, PRECISION, INDEX
        )  # fmt: skip
    return sum
