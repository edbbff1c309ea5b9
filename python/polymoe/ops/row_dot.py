"""The gradient of routing weights that multiply rows: of dispatch, of combine, and of experts."""

from __future__ import annotations

import torch
from torch import Tensor

from polymoe.hal.problem import GRADIENT_OPS
from polymoe.ops import _check as check_that
from polymoe.ops._library import define_op
from polymoe.reference._arithmetic import arithmetic_dtype


def check(x: Tensor, rows: Tensor, slot_row: Tensor) -> None:
    op = "row_dot"
    check_that.dtype(op, "x", x, check_that.FLOATS)
    check_that.shape(op, "x", x, {"T": None, "H": None})
    check_that.dtype(op, "slot_row", slot_row, check_that.INT32)
    check_that.shape(op, "slot_row", slot_row, {"T": x.shape[0], "K": None})
    check_that.device(op, "slot_row", slot_row, x)
    wide = x.dtype == torch.float64
    check_that.dtype(op, "rows", rows, (torch.float64,) if wide else check_that.FLOATS[:3])
    check_that.shape(op, "rows", rows, {"S": slot_row.shape[0] * slot_row.shape[1], "H": x.shape[1]})
    check_that.device(op, "rows", rows, x)


def fake(x: Tensor, rows: Tensor, slot_row: Tensor) -> Tensor:
    return x.new_empty(slot_row.shape, dtype=arithmetic_dtype(x.dtype))


# out[t, k] = <x[t], rows[slot_row[t, k]]>, [T, K] float32 (float64 for float64); 0 for skipped slots. The order of the
# sum depends on H alone.
row_dot = define_op(
    "row_dot",
    '(Tensor x, Tensor rows, Tensor slot_row, *, str backend="") -> Tensor',
    check,
    fake,
    specs=GRADIENT_OPS,
)
