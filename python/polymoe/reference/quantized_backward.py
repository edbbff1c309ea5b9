from __future__ import annotations

import torch
from torch import Tensor

from polymoe.reference._quantized import expert


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
    ends = [0] * data.shape[0] if offs is None else offs.tolist()
    for g, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        rows = g if offs is None else slice(start, end)
        out[rows] = grad[rows].double() @ expert(data, scale, zero, weight_format, D, g)
    return out.to(out_dtype or grad.dtype)
