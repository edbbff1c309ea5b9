from __future__ import annotations

from torch import Tensor

from polymoe.reference._arithmetic import arithmetic_dtype


def row_dot(x: Tensor, rows: Tensor, slot_row: Tensor) -> Tensor:
    compute = arithmetic_dtype(x.dtype)
    dots = x.new_zeros(slot_row.shape, dtype=compute)  # [T, K]
    for k in range(slot_row.shape[1]):
        row = slot_row[:, k].long()
        dots[:, k] = (x.to(compute) * rows[row.clamp(min=0)].to(compute)).sum(dim=1).where(row >= 0, 0)
    return dots
