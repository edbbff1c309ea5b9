"""Checks of polymoe.dispatch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polymoe.ops import Plan
from polymoe.testing.cases import Random, laid_out, routing
from polymoe.testing.conformance import plan as plan_checks
from polymoe.testing.conformance._run import run, serial
from polymoe.testing.targets import Target
from polymoe.testing.tolerances import arithmetic_dtype, assert_same_bits


@dataclass(frozen=True)
class Case:
    """weights: None, or their dtype."""

    T: int
    H: int
    K: int
    E: int
    pattern: str = "distinct"
    weights: torch.dtype | None = None
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"


CASES = [
    Case(T=0, H=8, K=2, E=4),
    Case(T=4, H=0, K=2, E=4),
    Case(T=4, H=8, K=0, E=4),
    Case(T=1, H=1, K=1, E=1),
    Case(T=9, H=33, K=3, E=8, dtype=torch.bfloat16),
    Case(T=9, H=33, K=3, E=8, pattern="skipping", dtype=torch.float16),
    Case(T=9, H=33, K=3, E=8, pattern="all_skipped", weights=torch.float32),
    Case(T=60, H=704, K=4, E=16, pattern="skipping", weights=torch.float32, dtype=torch.bfloat16),
    Case(T=60, H=704, K=4, E=16, pattern="repeated", weights=torch.bfloat16, dtype=torch.bfloat16),
    Case(T=30, H=2880, K=2, E=1024, pattern="skipping", weights=torch.float32, dtype=torch.float16),
    Case(T=30, H=2880, K=2, E=8, pattern="one_hot", weights=torch.float32),
    Case(T=12, H=37, K=5, E=5, weights=torch.float64, dtype=torch.float64),
    Case(T=12, H=37, K=5, E=5, weights=torch.float32, dtype=torch.float64, pattern="skipping"),
    Case(T=12, H=37, K=5, E=5, layout="transposed", weights=torch.float32, dtype=torch.bfloat16),
    Case(T=12, H=37, K=5, E=5, layout="sliced", weights=torch.float16, dtype=torch.float16),
    Case(T=12, H=37, K=5, E=5, layout="strided"),
    Case(T=12, H=37, K=5, E=5, layout="expanded", pattern="skipping", dtype=torch.bfloat16),
]


def truth(x: Tensor, plan: Plan, weights: Tensor | None) -> Tensor:
    """Row by row. A weighted row is one float32 product (float64 for float64) and one rounding, which IEEE arithmetic
    fixes to the bit."""
    compute = arithmetic_dtype(x.dtype)
    K = plan.slot_row.shape[1]
    out = x.new_zeros((plan.row_slot.shape[0], x.shape[1]))
    for row, slot in enumerate(plan.row_slot.tolist()):
        if slot >= 0:
            out[row] = x[slot // K]
            if weights is not None:
                out[row] = (x[slot // K].to(compute) * weights[slot // K, slot % K].to(compute)).to(x.dtype)
    return out


@serial
def check(case: Case, target: Target, seed: int) -> None:
    random = Random(seed, target.device)
    x = laid_out(random.normal(case.T, case.H, dtype=case.dtype), case.layout)
    ids = routing(random, case.pattern, case.T, case.K, case.E)
    plan = plan_checks.truth(ids, case.E)
    weights = None
    if case.weights is not None:
        weights = laid_out(random.weights(case.T, case.K, case.weights), case.layout)
    got = run(target, "dispatch", x, plan, weights)
    assert_same_bits(got, truth(x, plan, weights), "dispatch")
