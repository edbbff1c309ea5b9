"""Checks of polymoe.combine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from polymoe.ops import Plan
from polymoe.testing.cases import Random, laid_out, routing
from polymoe.testing.conformance import plan as plan_checks
from polymoe.testing.conformance._run import run, serial
from polymoe.testing.targets import Target
from polymoe.testing.tolerances import arithmetic_dtype, arithmetic_roundoff, assert_within, rounding_error, smallest


@dataclass(frozen=True)
class Case:
    """weights: None, or their dtype. out_dtype: None is the default."""

    T: int
    H: int
    K: int
    E: int
    pattern: str = "distinct"
    weights: torch.dtype | None = torch.float32
    dtype: torch.dtype = torch.float32
    out_dtype: torch.dtype | None = None
    layout: str = "contiguous"


CASES = [
    Case(T=0, H=8, K=2, E=4),
    Case(T=4, H=0, K=2, E=4),
    Case(T=4, H=8, K=0, E=4),
    Case(T=1, H=1, K=1, E=1),
    Case(T=9, H=33, K=3, E=8, weights=None),
    Case(T=9, H=33, K=3, E=8, weights=None, dtype=torch.bfloat16, pattern="skipping"),
    Case(T=9, H=33, K=3, E=8, out_dtype=torch.bfloat16, pattern="skipping"),
    Case(T=9, H=33, K=3, E=8, out_dtype=torch.float16, weights=torch.float16),
    Case(T=9, H=33, K=3, E=8, dtype=torch.float16, out_dtype=torch.float32, pattern="all_skipped"),
    Case(T=60, H=704, K=4, E=16, dtype=torch.bfloat16, weights=torch.bfloat16, pattern="repeated"),
    Case(T=60, H=704, K=4, E=16, dtype=torch.bfloat16, out_dtype=torch.float16, pattern="one_hot"),
    Case(T=20, H=2880, K=32, E=32, dtype=torch.float16),
    Case(T=20, H=2880, K=8, E=1024, dtype=torch.bfloat16, out_dtype=torch.float32, pattern="few"),
    Case(T=12, H=37, K=5, E=5, dtype=torch.float64, weights=torch.float64),
    Case(T=12, H=37, K=5, E=5, dtype=torch.float64, pattern="skipping"),
    Case(T=12, H=37, K=5, E=5, layout="transposed", dtype=torch.bfloat16),
    Case(T=12, H=37, K=5, E=5, layout="sliced", pattern="skipping"),
    Case(T=12, H=37, K=5, E=5, layout="strided", dtype=torch.float16),
    Case(T=12, H=37, K=5, E=5, layout="expanded", weights=None),
]


def truth(y: Tensor, plan: Plan, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Slot by slot in float64: the sums [T, H] and the sums of the magnitudes of their terms, on the CPU."""
    slot_row = plan.slot_row.cpu().long()
    total, magnitude = torch.zeros(2, slot_row.shape[0], y.shape[1], dtype=torch.float64)
    for k in range(slot_row.shape[1]):
        token = torch.nonzero(slot_row[:, k] >= 0).flatten()
        term = y[slot_row[token, k].to(y.device)].cpu().double()
        if weights is not None:
            term = term * weights[token.to(y.device), k, None].cpu().double()
        total[token] += term
        magnitude[token] += term.abs()
    return total, magnitude


def error(magnitude: Tensor, K: int, dtype: torch.dtype) -> Tensor:
    """K multiply-adds from zero: K roundings of partial sums, each at most `magnitude`; first-order, with one rounding
    more for backends that round the products."""
    return magnitude * ((K + 1) * arithmetic_roundoff(dtype)) + K * smallest(arithmetic_dtype(dtype))


@serial
def check(case: Case, target: Target, seed: int) -> None:
    random = Random(seed, target.device)
    S = case.T * case.K
    y = laid_out(random.normal(S, case.H, dtype=case.dtype), case.layout)
    plan = plan_checks.truth(routing(random, case.pattern, case.T, case.K, case.E), case.E)
    # Rows past the last expert hold whatever their producer left: they must not be read.
    if case.layout != "expanded":
        y[int(plan.offsets[-1]) :] = torch.nan
    weights = None
    if case.weights is not None:
        weights = laid_out(random.weights(case.T, case.K, case.weights), case.layout)
    got = run(target, "combine", y, plan, weights, case.out_dtype)
    out_dtype = case.out_dtype or case.dtype
    assert got.dtype == out_dtype
    value, magnitude = truth(y, plan, weights)
    bound = rounding_error(value, out_dtype, error(magnitude, case.K, case.dtype))
    assert_within(got, value, bound, "combine")
    skipped = plan.slot_row.lt(0).all(dim=1)
    assert not got[skipped].any(), "a token without experts must be zero"
