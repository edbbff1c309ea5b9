from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polymoe.hal.select import select
from polymoe.ops import _check as check_that
from polymoe.ops._library import Gradient, define_op, public
from polymoe.ops.plan import Plan, check_plan
from polymoe.ops.row_dot import row_dot


def check(y: Tensor, slot_row: Tensor, weights: Tensor | None = None, out_dtype: torch.dtype | None = None) -> None:
    op = "combine"
    check_that.dtype(op, "y", y, check_that.FLOATS)
    check_that.dtype(op, "slot_row", slot_row, check_that.INT32)
    check_that.shape(op, "slot_row", slot_row, {"T": None, "K": None})
    check_that.device(op, "slot_row", slot_row, y)
    check_that.shape(op, "y", y, {"S": slot_row.shape[0] * slot_row.shape[1], "H": None})
    out_dtype = check_that.output_dtype(op, out_dtype, y.dtype)
    if weights is not None:
        check_that.routing_weights(op, weights, (y.dtype, out_dtype), slot_row.shape, y)


def fake(y: Tensor, slot_row: Tensor, weights: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    return y.new_empty((slot_row.shape[0], y.shape[1]), dtype=out_dtype or y.dtype)


def setup(ctx: Any, args: Any, out: Tensor) -> None:
    ctx.save_for_backward(args.slot_row, args.weights, args.y if ctx.needs["weights"] else None)
    ctx.y_dtype = args.y.dtype


def gradients(ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    slot_row, weights, y = ctx.saved_tensors
    found = {}
    if ctx.needs["y"]:
        wide = torch.promote_types(grad.dtype, ctx.y_dtype)  # so that the product is rounded once
        factors = None if weights is None else weights.to(torch.promote_types(weights.dtype, torch.float32))
        row_slot = _inverse(slot_row)
        rows = torch.ops.polymoe.dispatch(grad.to(wide), row_slot, slot_row, factors, backend=ctx.backend)
        found["y"] = rows.to(ctx.y_dtype)
    if ctx.needs["weights"]:
        found["weights"] = row_dot(grad, y, slot_row, backend=ctx.backend).to(weights.dtype)
    return found


def _inverse(slot_row: Tensor) -> Tensor:
    """row_slot [S] of a plan, from its slot_row [T, K]."""
    S = slot_row.shape[0] * slot_row.shape[1]
    rows = slot_row.flatten().long()
    slots = torch.arange(S, dtype=torch.int32, device=slot_row.device)
    none = torch.full((S + 1,), -1, dtype=torch.int32, device=slot_row.device)  # skipped slots go to one more row
    return none.scatter(0, rows.where(rows >= 0, S), slots)[:S]


_combine = define_op(
    "combine",
    '(Tensor y, Tensor slot_row, Tensor? weights=None, ScalarType? out_dtype=None, *, str backend="") -> Tensor',
    check,
    fake,
    gradient=Gradient(setup, gradients),
)


@public
def combine(
    y: Tensor,
    plan: Plan,
    weights: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Sums the rows of every token: out[t] = sum over k of weights[t, k] * y[slot_row[t, k]].

    Args:
        y: [S, H], float32, bfloat16, float16 or float64.
        plan: polymoe.plan of ids [T, K].
        weights: [T, K] float32, y's dtype or out_dtype; absent means 1.
        out_dtype: dtype of the result, by default y's; float64 if and only if y is float64.

    Returns:
        [T, H]. The sum starts at zero and adds slots in the order k = 0 .. K-1, each by one float32 multiply-add
        (float64 for float64), and is rounded once. Skipped slots (slot_row -1) add nothing.

    Raises:
        ValueError: any other shape, dtype or device.
    """
    check_plan("combine", plan)
    return _combine(y, plan.slot_row, weights, out_dtype, backend=select("combine", y, (), backend))
