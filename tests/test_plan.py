"""polymoe.plan on every backend and ISA level."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polymoe.testing.cases import ROUTINGS, name_of
from polymoe.testing.conformance import plan


@pytest.mark.parametrize("case", plan.CASES, ids=name_of)
def test_cases(case, target, seed):
    plan.check(case, target, seed)


cases = st.builds(
    plan.Case,
    T=st.integers(0, 300),
    K=st.integers(0, 12),
    E=st.one_of(st.integers(1, 20), st.sampled_from([64, 256, 1000, 1024])),
    pattern=st.sampled_from(sorted(ROUTINGS)),
    ids_dtype=st.sampled_from([torch.int32, torch.int64]),
    layout=st.sampled_from(["contiguous", "transposed", "sliced", "strided", "expanded"]),
)


@given(case=cases, seed=st.integers(0, 2**31))
def test_any_case(target, case, seed):
    plan.check(case, target, seed)
