from __future__ import annotations

from torch import Tensor

from polymoe.reference._arithmetic import arithmetic_dtype
from polymoe.reference.activate import activate
from polymoe.reference.activate_backward import activate_backward
from polymoe.reference.grouped_mm import grouped_mm


def down_backward(
    rows: Tensor,
    down: Tensor,
    pre_activation: Tensor,
    offs: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    kind: str,
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
    weights: Tensor | None = None,
    need_activation: bool = False,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    act = (kind, alpha, limit, interleaved, row_slot, weights)
    d_activation = grouped_mm(rows, down, offs, None, arithmetic_dtype(rows.dtype))
    d_pre, d_weights = activate_backward(pre_activation, d_activation, *act, need_weights)
    activated = activate(pre_activation, *act, rows.dtype) if need_activation else rows.new_empty(0)
    return d_pre, activated, d_weights
