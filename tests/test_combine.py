"""polymoe.combine on every backend and ISA level."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import polymoe
from polymoe.testing.cases import ROUTINGS, name_of
from polymoe.testing.conformance import combine


@pytest.mark.parametrize("case", combine.CASES, ids=name_of)
def test_cases(case, target, seed):
    combine.check(case, target, seed)


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    outputs = [torch.float64] if dtype == torch.float64 else [torch.float32, torch.bfloat16, torch.float16]
    out_dtype = draw(st.sampled_from(outputs))
    return combine.Case(
        T=draw(st.integers(0, 30)),
        H=draw(st.integers(0, 150)),
        K=draw(st.integers(0, 9)),
        E=draw(st.sampled_from([1, 2, 7, 40, 1024])),
        pattern=draw(st.sampled_from(sorted(ROUTINGS))),
        weights=draw(st.sampled_from([None, torch.float32, dtype, out_dtype])),
        dtype=dtype,
        out_dtype=out_dtype,
        layout=draw(st.sampled_from(["contiguous", "transposed", "sliced", "strided", "expanded"])),
    )


@given(case=cases(), seed=st.integers(0, 2**31))
def test_any_case(target, case, seed):
    combine.check(case, target, seed)


def test_a_multiply_add_of_the_cpu_kernels_rounds_once():
    """-c + w * w, with c the rounded product: what is left is the rounding error of the product, which a separate
    multiplication loses. (The portable level has no such instruction; torch's addcmul, in the reference, is one on some
    machines only.)"""
    w = torch.tensor(1 + 2.0**-12)
    y = torch.stack([-(w * w), w])[:, None]
    plan = polymoe.plan(torch.tensor([[0, 1]]), 2)
    for level in set(polymoe.isa_supported()) - {"portable"}:
        with polymoe.force_isa_level(level):
            out = polymoe.combine(y, plan, torch.stack([torch.ones(()), w])[None], backend="cpu")
        assert out.item() == 2.0**-24, level


def test_the_sum_is_in_slot_order(target):
    """2^24 + 1 rounds to even and loses the 1; the other way round nothing is lost."""
    y = torch.tensor([[2.0**24], [1.0], [-(2.0**24)]])
    for order, expected in (([0, 1, 2], 0.0), ([0, 2, 1], 1.0)):
        ids = torch.tensor([order])
        plan = polymoe.plan(ids, 3)
        assert polymoe.combine(y, plan, backend=target.backend).item() == expected
