"""polymoe.experts on every backend and ISA level."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polymoe.testing.cases import LAYOUTS, ROUTINGS, name_of
from polymoe.testing.conformance import experts


@pytest.mark.parametrize("case", experts.CASES, ids=name_of)
def test_cases(case, target, seed):
    experts.check(case, target, seed)


@st.composite
def cases(draw):
    kind, alpha, limit = draw(st.sampled_from(experts.KINDS))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    return experts.Case(
        T=draw(st.integers(0, 40)),
        H=draw(st.integers(1, 100)),
        I=draw(st.integers(1, 100)),
        E=draw(st.sampled_from([1, 2, 3, 7, 20])),
        K=draw(st.integers(0, 5)),
        kind=kind,
        alpha=alpha,
        limit=limit,
        bias=draw(st.sampled_from([None, torch.float32, dtype])),
        transposed=draw(st.booleans()),
        interleaved=kind not in experts.UNGATED and draw(st.booleans()),
        placement=draw(st.sampled_from(["output", "activation", "input"])),
        pattern=draw(st.sampled_from(sorted(ROUTINGS))),
        dtype=dtype,
        weights=draw(st.sampled_from([torch.float32, dtype])),
        ids_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
        layout=draw(st.sampled_from(sorted(set(LAYOUTS) - {"outermost"}))),
        weight_layout=draw(st.sampled_from(sorted(LAYOUTS))),
    )


@given(case=cases(), seed=st.integers(0, 2**31))
def test_any_case(target, case, seed):
    experts.check(case, target, seed)
