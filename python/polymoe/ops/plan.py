from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from polymoe.hal.select import select
from polymoe.ops import _check as check_that
from polymoe.ops._library import define_op, public


class Plan(NamedTuple):
    """Where every (token, slot) goes when the slots are sorted by expert; see polymoe.plan."""

    offsets: Tensor
    row_slot: Tensor
    slot_row: Tensor


def check_plan(op: str, plan: object) -> None:
    if not isinstance(plan, Plan):
        check_that.fail(op, "plan", "a polymoe.Plan", type(plan).__name__)


def check_ids(op: str, ids: Tensor, num_experts: int) -> None:
    check_that.dtype(op, "ids", ids, check_that.IDS)
    check_that.shape(op, "ids", ids, {"T": None, "K": None})
    if num_experts < 1:
        check_that.fail(op, "num_experts", "at least 1", num_experts)
    check_that.slots(op, ids)


def check(ids: Tensor, num_experts: int) -> None:
    check_ids("plan", ids, num_experts)


def fake(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    offsets = ids.new_empty((num_experts + 1,), dtype=torch.int32)
    row_slot = ids.new_empty((ids.shape[0] * ids.shape[1],), dtype=torch.int32)
    return offsets, row_slot, ids.new_empty(ids.shape, dtype=torch.int32)


_plan = define_op(
    "plan",
    '(Tensor ids, int num_experts, *, str backend="") -> (Tensor offsets, Tensor row_slot, Tensor slot_row)',
    check,
    fake,
)


@public
def plan(ids: Tensor, num_experts: int, *, backend: str | None = None) -> Plan:
    """Sorts the slots by expert: the order in which the grouped ops see them.

    Args:
        ids: [T, K] int32 or int64, the experts of every token. An id < 0 or >= num_experts means: skip this slot.
        num_experts: E, at least 1.

    Returns:
        Plan of int32 tensors, S = T*K:
        offsets [E+1]: the rows of expert e are offsets[e] to offsets[e+1];
        row_slot [S]: the slot t*K + k at each row, rows in order of expert, then of slot; -1 for the padding rows from
            offsets[E] on;
        slot_row [T, K]: the row of each slot; -1 for a slot that is skipped.

    Raises:
        ValueError: any other shape or dtype; num_experts < 1; 2^31 slots or more.
    """
    return Plan(*_plan(ids, num_experts, backend=select("plan", ids, (), backend)))
