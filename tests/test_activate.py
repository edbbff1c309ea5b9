"""polymoe.activate on every backend and ISA level."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import polymoe
from polymoe.testing.cases import ROUTINGS, name_of
from polymoe.testing.conformance import activate


@pytest.mark.parametrize("case", activate.CASES, ids=name_of)
def test_cases(case, target, seed):
    activate.check(case, target, seed)


@pytest.mark.parametrize("case", activate.NAN_CASES, ids=name_of)
def test_nan_propagates(case, target, seed):
    activate.check_nan(case, target, seed)


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    outputs = [torch.float64] if dtype == torch.float64 else [torch.float32, torch.bfloat16, torch.float16]
    out_dtype = draw(st.sampled_from(outputs))
    kind, alpha, limit = draw(st.sampled_from(activate.KINDS))
    pattern = draw(st.sampled_from(["", *sorted(ROUTINGS)]))
    return activate.Case(
        T=draw(st.integers(0, 12)),
        I=draw(st.integers(0, 100)),
        kind=kind,
        alpha=None if alpha is None else draw(st.floats(0.25, 4.0)),
        limit=None if limit is None else draw(st.floats(0.25, 8.0)),
        interleaved=kind not in activate.UNGATED and draw(st.booleans()),
        K=draw(st.integers(0, 4)),
        pattern=pattern,
        weights=draw(st.sampled_from([None, torch.float32, dtype, out_dtype])) if pattern else None,
        dtype=dtype,
        out_dtype=out_dtype,
        layout=draw(st.sampled_from(["contiguous", "transposed", "sliced", "strided", "expanded"])),
    )


@given(case=cases(), seed=st.integers(0, 2**31))
def test_any_case(target, case, seed):
    activate.check(case, target, seed)


def test_known_values(target):
    """From the definitions, by hand."""
    h = torch.tensor([[10.0, 1.0, 20.0, -30.0]])  # gate 10, 1; up 20, -30
    silu_1, silu_3, silu_10 = (z / (1 + math.exp(-z)) for z in (1.0, 3.0, 10.0))

    def expect(kind, values, **options):
        got = polymoe.activate(h, kind, backend=target.backend, **options)
        torch.testing.assert_close(got, torch.tensor([values]), rtol=1e-6, atol=0)

    expect("swiglu", [silu_10 * 20, silu_1 * -30])
    expect("swiglu_clamped", [silu_3 * 3, silu_1 * -3], limit=3.0)
    expect("swiglu_clamped_after", [3.0 * 3, silu_1 * -3], limit=3.0)
    expect("swiglu_oai", [3 / (1 + math.exp(-1.702 * 3)) * 4, 1 / (1 + math.exp(-1.702)) * -2], limit=3.0)
    expect("reglu", [200.0, -30.0])
    expect("relu2", [100.0, 1.0, 400.0, 0.0])
    assert polymoe.activate(h, "reglu", interleaved=True, backend=target.backend).tolist() == [[10.0, -600.0]]
