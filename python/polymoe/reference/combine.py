from __future__ import annotations

import torch
from torch import Tensor

from polymoe.reference._arithmetic import arithmetic_dtype


def combine(y: Tensor, slot_row: Tensor, weights: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    compute = arithmetic_dtype(y.dtype)
    total = y.new_zeros((slot_row.shape[0], y.shape[1]), dtype=compute)  # [T, H]
    for k in range(slot_row.shape[1]):
        row = slot_row[:, k].long()
        y_k = y[row.clamp(min=0)].to(compute)
        added = total + y_k if weights is None else total.addcmul(weights[:, k, None].to(compute), y_k)
        total = added.where(row[:, None] >= 0, total)
    return total.to(out_dtype or y.dtype)
