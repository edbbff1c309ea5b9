from __future__ import annotations

import torch
from torch import Tensor

from polymoe.reference._arithmetic import arithmetic_dtype
from polymoe.reference.pack_weight import unpack


def grouped_mm(
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    weight_format: str = "plain",
) -> Tensor:
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


def _groups(offs: Tensor, size: int) -> list[slice]:
    """The range of every group. Reading the offsets makes the host wait for the device."""
    ends = offs.tolist()
    starts = [0, *ends][: len(ends)]
    if any(start > end for start, end in zip(starts, ends, strict=True)) or (ends and ends[-1] > size):
        raise ValueError(f"polymoe.grouped_mm: offs: expected ends that do not decrease, in [0, {size}], got {ends}")
    return [slice(start, end) for start, end in zip(starts, ends, strict=True)]
