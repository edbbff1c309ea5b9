from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polymoe.reference._arithmetic import arithmetic_dtype
from polymoe.reference._quantized import INT8_GROUPS, expert, in_fp8, in_int8
from polymoe.reference.pack_weight import unpack


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
    if scale is not None:
        return _quantized(a, b, offs, bias, weight_format, scale, zero, mode).to(out_dtype or a.dtype)
    if weight_format != "plain":
        transposed = b.is_contiguous()
        plain = unpack(b if transposed else b.mT, weight_format == "packed_gate_up", transposed=transposed)
        b = plain if transposed else plain.mT
    compute = arithmetic_dtype(a.dtype)
    M, N = a.shape[-2], b.shape[-1]
    a_c, b_c = a.to(compute), b.to(compute)
    bias_c = None if bias is None else bias.to(compute)
    if offs is None:  # [G, M, D] @ [G, D, N]
        out = a_c @ b_c
        if bias_c is not None:
            out = out + bias_c[:, None]
    elif a.dim() == 2 and b.dim() == 2:  # the reduction is cut
        out = a_c.new_zeros((offs.shape[0], M, N))
        for g, part in enumerate(_groups(offs, a.shape[1])):
            out[g] = a_c[:, part] @ b_c[part]
        if bias_c is not None:
            out = out + bias_c[:, None]
    elif a.dim() == 2:  # rows are cut
        out = a_c.new_zeros((M, N))
        for g, part in enumerate(_groups(offs, M)):
            out[part] = a_c[part] @ b_c[g] + (0 if bias_c is None else bias_c[g])
    else:  # columns are cut
        out = a_c.new_zeros((M, N))
        for g, part in enumerate(_groups(offs, N)):
            out[:, part] = a_c[g] @ b_c[:, part] + (0 if bias_c is None else bias_c[part])
    return out.to(out_dtype or a.dtype)


def _quantized(
    a: Tensor,
    b: Tensor,
    offs: Tensor | None,
    bias: Tensor | None,
    weight_format: str,
    scale: Tensor,
    zero: Tensor | None,
    mode: str,
) -> Tensor:
    """Weights [G, N, D] that are given as their data [G, width, N]; in float64, a group at a time."""
    data, D = b.mT, a.shape[-1]
    rows = in_fp8(a) if mode == "fp8" else in_int8(a, INT8_GROUPS[mode]) if mode in INT8_GROUPS else a.double()
    out = rows.new_zeros((*a.shape[:-1], b.shape[-1]))
    for g, part in enumerate(parts(offs, a.shape[0])):
        weight = expert(data, scale, zero, weight_format, D, g)
        out[part] = rows[part] @ weight.mT + (0 if bias is None else bias[g].double())
    return out


def parts(offs: Tensor | None, size: int) -> list[Any]:
    """Where the groups lie in the first dimension, of `size`: in ranges of rows, or one after the other."""
    return list(range(size)) if offs is None else _groups(offs, size)


def grouped_mm_dx(grad: Tensor, b: Tensor, offs: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    return grouped_mm(grad, b.mT, offs, None, out_dtype)


def _groups(offs: Tensor, size: int) -> list[slice]:
    """The range of every group. Reading the offsets makes the host wait for the device."""
    ends = offs.tolist()
    starts = [0, *ends][: len(ends)]
    if any(start > end for start, end in zip(starts, ends, strict=True)) or (ends and ends[-1] > size):
        raise ValueError(f"polymoe.grouped_mm: offs: expected ends that do not decrease, in [0, {size}], got {ends}")
    return [slice(start, end) for start, end in zip(starts, ends, strict=True)]
