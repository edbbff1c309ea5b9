"""Checks of polymoe.plan: its results are integers, so they are checked to the letter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polymoe.ops import Plan
from polymoe.testing.cases import Random, laid_out, routing
from polymoe.testing.conformance._run import run, serial
from polymoe.testing.targets import Target


@dataclass(frozen=True)
class Case:
    T: int
    K: int
    E: int
    pattern: str = "distinct"
    ids_dtype: torch.dtype = torch.int32
    layout: str = "contiguous"


CASES = [
    Case(T=0, K=2, E=4),
    Case(T=5, K=0, E=4),
    Case(T=1, K=1, E=1),
    Case(T=7, K=3, E=3),
    Case(T=64, K=6, E=256),
    Case(T=200, K=8, E=1024, ids_dtype=torch.int64),
    Case(T=50, K=4, E=16, pattern="repeated"),
    Case(T=50, K=4, E=16, pattern="one_hot", ids_dtype=torch.int64),
    Case(T=50, K=4, E=16, pattern="few"),
    Case(T=50, K=4, E=16, pattern="skipping"),
    Case(T=50, K=4, E=16, pattern="skipping", ids_dtype=torch.int64),
    Case(T=50, K=4, E=16, pattern="all_skipped"),
    Case(T=50, K=4, E=1, pattern="skipping"),
    Case(T=40000, K=6, E=64, pattern="skipping"),  # enough for several threads
    Case(T=30000, K=2, E=1024, pattern="sorted"),
    Case(T=30000, K=2, E=1024, pattern="one_hot", ids_dtype=torch.int64),
    Case(T=33, K=5, E=40, pattern="skipping", layout="transposed"),
    Case(T=33, K=5, E=40, pattern="skipping", layout="sliced", ids_dtype=torch.int64),
    Case(T=33, K=5, E=40, pattern="skipping", layout="strided"),
    Case(T=33, K=5, E=40, pattern="skipping", layout="expanded", ids_dtype=torch.int64),
]


def truth(ids: Tensor, E: int) -> Plan:
    """One slot after the other. On the device of `ids`."""
    K = ids.shape[1]
    slots: list[list[int]] = [[] for _ in range(E)]
    for slot, expert in enumerate(ids.flatten().tolist()):
        if 0 <= expert < E:
            slots[expert].append(slot)
    offsets, slot_row = [0], [-1] * ids.numel()
    row_slot: list[int] = []
    for members in slots:
        for slot in members:
            slot_row[slot] = len(row_slot)
            row_slot.append(slot)
        offsets.append(len(row_slot))
    row_slot += [-1] * (ids.numel() - len(row_slot))
    parts = (torch.tensor(part, dtype=torch.int32).to(ids.device) for part in (offsets, row_slot, slot_row))
    result = Plan(*parts)
    return result._replace(slot_row=result.slot_row.reshape(ids.shape[0], K))


def make_ids(case: Case, random: Random) -> Tensor:
    ids = routing(random, case.pattern, case.T, case.K, case.E, case.ids_dtype)
    if case.ids_dtype == torch.int64 and case.pattern == "skipping":
        ids[ids == case.E + 5] = 2**32  # expert 0 if it were cut to 32 bits
    return laid_out(ids, case.layout)


@serial
def check(case: Case, target: Target, seed: int) -> None:
    ids = make_ids(case, Random(seed, target.device))
    got = run(target, "plan", ids, case.E)
    for name, value, expected in zip(Plan._fields, got, truth(ids, case.E), strict=True):
        assert value.dtype == torch.int32, f"{name}: {value.dtype}"
        assert torch.equal(value, expected), f"{name}: got {value.tolist()}, expected {expected.tolist()}"
