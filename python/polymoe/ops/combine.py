from __future__ import annotations

import torch
from torch import Tensor

from polymoe.hal.select import select
from polymoe.ops import _check as check_that
from polymoe.ops._library import define_op, public
from polymoe.ops.plan import Plan


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


_combine = define_op(
    "combine",
    '(Tensor y, Tensor slot_row, Tensor? weights=None, ScalarType? out_dtype=None, *, str backend="") -> Tensor',
    check,
    fake,
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
    return _combine(y, plan.slot_row, weights, out_dtype, backend=select("combine", y, (), backend))
