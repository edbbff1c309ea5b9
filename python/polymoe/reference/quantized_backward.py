from __future__ import annotations

import torch
from torch import Tensor

from polymoe.reference._quantized import expert
from polymoe.reference.grouped_mm import parts


def quantized_backward(
    grad: Tensor,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offs: Tensor | None,
    D: int,
    weight_format: str,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    out = grad.new_zeros((*grad.shape[:-1], D), dtype=torch.float64)
    for g, rows in enumerate(parts(offs, grad.shape[0])):
        out[rows] = grad[rows].double() @ expert(data, scale, zero, weight_format, D, g)
    return out.to(out_dtype or grad.dtype)
