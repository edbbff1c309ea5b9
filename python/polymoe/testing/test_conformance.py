"""The conformance kit as tests, for any backend:

    pytest -p polymoe.testing.plugin --pyargs polymoe.testing --polymoe-backend NAME

What a backend declines is skipped with its reason; determinism and batch-invariance are tested where it declares them.
A backend that declines everything fails.
"""

from __future__ import annotations

import pytest
import torch

from polymoe.testing.cases import name_of
from polymoe.testing.conformance import activate, bitwise, combine, dispatch, experts, gate, grouped_mm, plan, protocol
from polymoe.testing.targets import Target


def _require(target: Target, op: str, dtype: torch.dtype, *options: str) -> None:
    reason = target.declines(op, dtype, options)
    if reason is not None:
        pytest.skip(f"{target}: {reason}")


def test_protocol(target: Target) -> None:
    protocol.check(target)


@pytest.mark.parametrize("case", gate.CASES, ids=name_of)
def test_gate(case: gate.Case, target: Target, seed: int) -> None:
    _require(target, "gate", case.dtype, case.scoring)
    gate.check(case, target, seed)


@pytest.mark.parametrize("case", plan.CASES, ids=name_of)
def test_plan(case: plan.Case, target: Target, seed: int) -> None:
    _require(target, "plan", case.ids_dtype)
    plan.check(case, target, seed)


@pytest.mark.parametrize("case", dispatch.CASES, ids=name_of)
def test_dispatch(case: dispatch.Case, target: Target, seed: int) -> None:
    _require(target, "dispatch", case.dtype)
    dispatch.check(case, target, seed)


@pytest.mark.parametrize("case", grouped_mm.CASES, ids=name_of)
def test_grouped_mm(case: grouped_mm.Case, target: Target, seed: int) -> None:
    _require(target, "grouped_mm", case.dtype)
    grouped_mm.check(case, target, seed)


@pytest.mark.parametrize("case", activate.CASES, ids=name_of)
def test_activate(case: activate.Case, target: Target, seed: int) -> None:
    _require(target, "activate", case.dtype, case.kind)
    activate.check(case, target, seed)


@pytest.mark.parametrize("case", activate.NAN_CASES, ids=name_of)
def test_activate_nan(case: activate.Case, target: Target, seed: int) -> None:
    _require(target, "activate", case.dtype, case.kind)
    activate.check_nan(case, target, seed)


@pytest.mark.parametrize("case", combine.CASES, ids=name_of)
def test_combine(case: combine.Case, target: Target, seed: int) -> None:
    _require(target, "combine", case.dtype)
    combine.check(case, target, seed)


@pytest.mark.parametrize("case", experts.CASES, ids=name_of)
def test_experts(case: experts.Case, target: Target, seed: int) -> None:
    _require(target, "experts", case.dtype, case.kind, case.placement)
    experts.check(case, target, seed)


def _require_experts(target: Target, case: experts.Case) -> None:
    _require(target, "experts", case.dtype, case.kind, case.placement)


@pytest.mark.parametrize("case", bitwise.EXPERTS + bitwise.EXPERTS_OTHER_LAYOUTS, ids=name_of)
def test_experts_composition(case: experts.Case, target: Target, seed: int) -> None:
    _require_experts(target, case)
    missing = experts.declined_part(case, target)
    if missing is not None:
        pytest.skip(f"{target}: {missing}")
    bitwise.check_experts_composition(case, target, seed)


@pytest.mark.declares("deterministic")
@pytest.mark.parametrize("case", bitwise.EXPERTS + bitwise.EXPERTS_OTHER_LAYOUTS, ids=name_of)
def test_experts_threads(case: experts.Case, target: Target, seed: int) -> None:
    _require_experts(target, case)
    bitwise.check_experts_threads(case, target, seed)


@pytest.mark.declares("batch_invariant")
@pytest.mark.parametrize("case", bitwise.EXPERTS + bitwise.EXPERTS_OTHER_LAYOUTS, ids=name_of)
def test_experts_batch(case: experts.Case, target: Target, seed: int) -> None:
    _require_experts(target, case)
    bitwise.check_experts_batch(case, target, seed)


@pytest.mark.declares("deterministic", "batch_invariant")
@pytest.mark.parametrize(("rows", "D", "N", "dtype"), bitwise.GROUPED_MM, ids=str)
def test_grouped_mm_bitwise(rows: int, D: int, N: int, dtype: torch.dtype, target: Target, seed: int) -> None:
    _require(target, "grouped_mm", dtype)
    bitwise.check_grouped_mm(rows, D, N, dtype, target, seed)


@pytest.mark.declares("deterministic", "batch_invariant")
@pytest.mark.parametrize(("K", "H", "dtype"), bitwise.COMBINE, ids=str)
def test_combine_bitwise(K: int, H: int, dtype: torch.dtype, target: Target, seed: int) -> None:
    _require(target, "combine", dtype)
    bitwise.check_combine(K, H, dtype, target, seed)


@pytest.mark.declares("deterministic", "batch_invariant")
@pytest.mark.parametrize(("E", "k", "scoring", "dtype"), bitwise.GATE, ids=str)
def test_gate_bitwise(E: int, k: int, scoring: str, dtype: torch.dtype, target: Target, seed: int) -> None:
    _require(target, "gate", dtype, scoring)
    bitwise.check_gate(E, k, scoring, dtype, target, seed)


@pytest.mark.declares("deterministic", "batch_invariant")
@pytest.mark.parametrize("case", bitwise.ACTIVATE, ids=name_of)
def test_activate_bitwise(case: activate.Case, target: Target, seed: int) -> None:
    _require(target, "activate", case.dtype, case.kind)
    bitwise.check_activate(case, target, seed)
