from __future__ import annotations

import torch
from torch import Tensor

from polymoe.reference._arithmetic import arithmetic_dtype
from polymoe.reference.activate import UNGATED, activate
from polymoe.reference.combine import combine
from polymoe.reference.dispatch import dispatch
from polymoe.reference.grouped_mm import grouped_mm
from polymoe.reference.pack_weight import unpack
from polymoe.reference.plan import plan


def experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor,
    activation: str = "swiglu",
    alpha: float | None = None,
    limit: float | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    transposed: bool = False,
    interleaved: bool = False,
    weight_placement: str = "output",
    save: bool = False,
    weight_format: str = "plain",
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    gate_up_zero: Tensor | None = None,
    down_zero: Tensor | None = None,
    mode: str = "weight_only",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def weights_at(placement: str) -> Tensor | None:
        return weights if weight_placement == placement else None

    compute = arithmetic_dtype(x.dtype)
    if weight_format == "packed":
        gate_up = unpack(gate_up, activation not in UNGATED, interleaved, transposed)
        down = unpack(down, transposed=transposed)
        weight_format = "plain"
    if not transposed:
        gate_up, down = gate_up.mT, down.mT
    offsets, row_slot, slot_row = plan(ids, gate_up.shape[0])
    rows = dispatch(x, row_slot, slot_row, weights_at("input"))
    up_how = (weight_format, gate_up_scale, gate_up_zero, mode)
    h = grouped_mm(rows, gate_up, offsets[1:], gate_up_bias, compute, *up_how)
    a = activate(h, activation, alpha, limit, interleaved, row_slot, weights_at("activation"), x.dtype)
    y = grouped_mm(a, down, offsets[1:], down_bias, compute, weight_format, down_scale, down_zero, mode)
    out = combine(y, slot_row, weights_at("output"), x.dtype)
    if save:
        return out, h.to(x.dtype, copy=True), offsets, row_slot, slot_row
    none = [torch.empty(0, dtype=torch.int32, device=x.device) for _ in range(3)]
    return out, x.new_empty(0), none[0], none[1], none[2]
