"""Results that must not depend on threads, on other tokens or on fusion, to the bit: on every ISA level and dtype, for
inputs whose results are nothing but rounding errors (see polymoe.testing.conformance.bitwise)."""

import pytest

from polymoe.testing.cases import name_of
from polymoe.testing.conformance import bitwise

EXPERTS = bitwise.EXPERTS + bitwise.EXPERTS_OTHER_LAYOUTS


@pytest.mark.declares("deterministic")  # the others show it in test_experts.py, on ordinary inputs
@pytest.mark.parametrize("case", EXPERTS, ids=name_of)
def test_experts_is_the_composition_of_the_small_ops(case, target, seed):
    bitwise.check_experts_composition(case, target, seed)


@pytest.mark.declares("deterministic")
@pytest.mark.parametrize("case", EXPERTS, ids=name_of)
def test_experts_on_any_number_of_threads(case, target, seed):
    bitwise.check_experts_threads(case, target, seed)


@pytest.mark.declares("batch_invariant")
@pytest.mark.parametrize("case", EXPERTS, ids=name_of)
def test_experts_in_any_batch(case, target, seed):
    bitwise.check_experts_batch(case, target, seed)


@pytest.mark.parametrize("case", bitwise.EXPERTS, ids=name_of)
def test_the_inputs_show_the_order_of_a_sum(case, target, seed):
    bitwise.check_experts_sensitive(case, target, seed)


@pytest.mark.declares("deterministic", "batch_invariant")
@pytest.mark.parametrize(("rows", "D", "N", "dtype"), bitwise.GROUPED_MM, ids=str)
def test_grouped_mm(rows, D, N, dtype, target, seed):
    bitwise.check_grouped_mm(rows, D, N, dtype, target, seed)


@pytest.mark.declares("deterministic", "batch_invariant")
@pytest.mark.parametrize(("K", "H", "dtype"), bitwise.COMBINE, ids=str)
def test_combine(K, H, dtype, target, seed):
    bitwise.check_combine(K, H, dtype, target, seed)


@pytest.mark.declares("deterministic", "batch_invariant")
@pytest.mark.parametrize(("E", "k", "scoring", "dtype"), bitwise.GATE, ids=str)
def test_gate(E, k, scoring, dtype, target, seed):
    bitwise.check_gate(E, k, scoring, dtype, target, seed)


@pytest.mark.declares("deterministic", "batch_invariant")
@pytest.mark.parametrize("case", bitwise.ACTIVATE, ids=name_of)
def test_activate(case, target, seed):
    bitwise.check_activate(case, target, seed)
