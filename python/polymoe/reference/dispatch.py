from __future__ import annotations

from torch import Tensor

from polymoe.reference._arithmetic import arithmetic_dtype


def dispatch(x: Tensor, row_slot: Tensor, slot_row: Tensor, weights: Tensor | None = None) -> Tensor:
    is_row = row_slot >= 0
    slot = row_slot.clamp(min=0).long()
    rows = x[slot // max(slot_row.shape[1], 1)]  # [S, H]
    if weights is not None:
        compute = arithmetic_dtype(x.dtype)
        rows = (rows.to(compute) * weights.flatten()[slot, None].to(compute)).to(x.dtype)
    return rows.where(is_row[:, None], 0)
