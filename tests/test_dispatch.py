"""polymoe.dispatch on every backend and ISA level."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polymoe.testing.cases import ROUTINGS, name_of
from polymoe.testing.conformance import dispatch


@pytest.mark.parametrize("case", dispatch.CASES, ids=name_of)
def test_cases(case, target, seed):
    dispatch.check(case, target, seed)


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    return dispatch.Case(
        T=draw(st.integers(0, 30)),
        H=draw(st.integers(0, 150)),
        K=draw(st.integers(0, 6)),
        E=draw(st.sampled_from([1, 2, 7, 40, 1024])),
        pattern=draw(st.sampled_from(sorted(ROUTINGS))),
        weights=draw(st.sampled_from([None, torch.float32, dtype])),
        dtype=dtype,
        layout=draw(st.sampled_from(["contiguous", "transposed", "sliced", "strided", "expanded"])),
    )


@given(case=cases(), seed=st.integers(0, 2**31))
def test_any_case(target, case, seed):
    dispatch.check(case, target, seed)
