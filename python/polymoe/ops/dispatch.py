from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polymoe.hal.select import select
from polymoe.ops import _check as check_that
from polymoe.ops._library import Gradient, define_op, public
from polymoe.ops.plan import Plan, check_plan
from polymoe.ops.row_dot import row_dot


def check(x: Tensor, row_slot: Tensor, slot_row: Tensor, weights: Tensor | None = None) -> None:
    op = "dispatch"
    check_that.dtype(op, "x", x, check_that.FLOATS)
    check_that.shape(op, "x", x, {"T": None, "H": None})
    check_that.dtype(op, "slot_row", slot_row, check_that.INT32)
    check_that.shape(op, "slot_row", slot_row, {"T": x.shape[0], "K": None})
    check_that.device(op, "slot_row", slot_row, x)
    check_that.dtype(op, "row_slot", row_slot, check_that.INT32)
    check_that.shape(op, "row_slot", row_slot, {"S": slot_row.shape[0] * slot_row.shape[1]})
    check_that.device(op, "row_slot", row_slot, x)
    if weights is not None:
        check_that.routing_weights(op, weights, (x.dtype,), slot_row.shape, x)


def fake(x: Tensor, row_slot: Tensor, slot_row: Tensor, weights: Tensor | None = None) -> Tensor:
    return x.new_empty((row_slot.shape[0], x.shape[1]))


def setup(ctx: Any, args: Any, rows: Tensor) -> None:
    ctx.save_for_backward(args.slot_row, args.weights, args.x if ctx.needs["weights"] else None)


def gradients(ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    slot_row, weights, x = ctx.saved_tensors
    found = {}
    if ctx.needs["x"]:
        found["x"] = torch.ops.polymoe.combine(grad, slot_row, weights, backend=ctx.backend)
    if ctx.needs["weights"]:
        found["weights"] = row_dot(x, grad, slot_row, backend=ctx.backend).to(weights.dtype)
    return found


_dispatch = define_op(
    "dispatch",
    '(Tensor x, Tensor row_slot, Tensor slot_row, Tensor? weights=None, *, str backend="") -> Tensor',
    check,
    fake,
    gradient=Gradient(setup, gradients),
)


@public
def dispatch(x: Tensor, plan: Plan, weights: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Copies every token to the rows of its experts: row r is x[row_slot[r] // K], times its routing weight if given.

    Args:
        x: [T, H], float32, bfloat16, float16 or float64.
        plan: polymoe.plan of ids [T, K].
        weights: [T, K] float32 or x's dtype: multiplies the rows (routing weights on the input, as in Llama-4); the
            product is float32 and rounded once to x's dtype.

    Returns:
        [S, H] of x's dtype; padding rows are zero.

    Raises:
        ValueError: any other shape, dtype or device.
    """
    check_plan("dispatch", plan)
    return _dispatch(x, plan.row_slot, plan.slot_row, weights, backend=select("dispatch", x, (), backend))
