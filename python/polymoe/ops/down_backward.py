"""The gradient of experts through the down projection and the activation, on rows sorted by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from polymoe.hal.problem import GRADIENT_OPS
from polymoe.ops import _check as check_that
from polymoe.ops._library import define_op
from polymoe.ops.activate import KINDS, activate_backward
from polymoe.ops.activate import check as check_activate
from polymoe.ops.grouped_mm_gradient import check_dx, grouped_mm_dx
from polymoe.reference._arithmetic import arithmetic_dtype


def check(
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
) -> None:
    op = "down_backward"
    check_dx(rows, down.mT, offs)
    check_that.dtype(op, "pre_activation", pre_activation, (rows.dtype,))
    check_that.device(op, "pre_activation", pre_activation, rows)
    check_activate(pre_activation, kind, alpha, limit, interleaved, row_slot, weights)
    N = down.shape[2]
    check_that.shape(
        op, "pre_activation", pre_activation, {"S": rows.shape[0], "2I": 2 * N if KINDS[kind].gated else N}
    )
    check_that.dtype(op, "slot_row", slot_row, check_that.INT32)
    check_that.shape(op, "slot_row", slot_row, {"T": None, "K": None})
    check_that.device(op, "slot_row", slot_row, rows)
    if slot_row.shape[0] * slot_row.shape[1] != rows.shape[0]:
        check_that.fail(op, "slot_row", f"a plan of {rows.shape[0]} slots", check_that.describe(slot_row))
    if need_weights and weights is None:
        check_that.fail(op, "need_weights", "False without weights", True)


def fake(
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
    d_weights = rows.new_empty(slot_row.shape if need_weights else (0,), dtype=arithmetic_dtype(rows.dtype))
    activated = rows.new_empty((rows.shape[0], down.shape[2]) if need_activation else (0,))
    return rows.new_empty(pre_activation.shape), activated, d_weights


def compose(
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
    *,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    act = (kind, alpha, limit, interleaved, row_slot, weights)
    d_activation = grouped_mm_dx(rows, down.mT, offs, arithmetic_dtype(rows.dtype), backend=backend)
    d_pre, d_weights = activate_backward(pre_activation, d_activation, *act, need_weights, backend=backend)
    del d_activation
    activated = rows.new_empty(0)
    if need_activation:
        activated = torch.ops.polymoe.activate(pre_activation, *act, rows.dtype, backend=backend)
    return d_pre, activated, d_weights


# From the gradient of the down projection's output, rows [S, H], with down [E, H, I] and pre_activation [S, 2I] or
# [S, I] of one dtype: the gradient of the pre-activation; the activation times the routing weights [S, I], the other
# operand of down's gradient; and the gradient of the routing weights [T, K], float32 (float64 for float64). The last
# two are of size 0 unless asked for. See activate_backward for clamps and padding rows.
down_backward = define_op(
    "down_backward",
    "(Tensor rows, Tensor down, Tensor pre_activation, Tensor offs, Tensor row_slot, Tensor slot_row, str kind, "
    "float? alpha=None, float? limit=None, bool interleaved=False, Tensor? weights=None, bool need_activation=False, "
    'bool need_weights=False, *, str backend="") -> (Tensor d_pre, Tensor activated, Tensor d_weights)',
    check,
    fake,
    options={"kind": "swiglu"},
    specs=GRADIENT_OPS,
    composed=compose,
)
