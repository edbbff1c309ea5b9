"""polymoe.gate on every backend and ISA level."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import polymoe
from polymoe.testing.cases import name_of
from polymoe.testing.conformance import gate

SCORINGS = ("softmax", "softmax_topk", "sigmoid", "sqrtsoftplus")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("case", gate.CASES, ids=name_of)
def test_cases(case, target, seed):
    gate.check(case, target, seed)


@st.composite
def cases(draw):
    n_group = draw(st.sampled_from([1, 1, 2, 3, 5]))
    size = draw(st.integers(1, 20))
    topk_group = draw(st.integers(1, n_group))
    E = n_group * size
    indices = draw(st.sampled_from(["", "", "int32", "int64"])) if n_group == 1 else ""
    return gate.Case(
        T=draw(st.integers(0, 20)),
        E=E,
        k=draw(st.integers(1, topk_group * size if n_group > 1 else E)),
        scoring=draw(st.sampled_from(SCORINGS)),
        bias=not indices and draw(st.booleans()),
        n_group=n_group,
        topk_group=topk_group,
        group_top=draw(st.integers(1, size)),
        renormalize=draw(st.sampled_from(["none", "max", "add"])),
        eps=draw(st.sampled_from([1e-20, 1e-6, 0.25])),
        scale=draw(st.sampled_from([1.0, 2.5])),
        indices=indices,
        mask=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        logits=draw(st.sampled_from(["ties", "wild"])),  # "normal" has close calls when k is large
        layout=draw(st.sampled_from(["contiguous", "transposed", "sliced", "strided", "expanded"])),
    )


@given(case=cases(), seed=st.integers(0, 2**31))
def test_any_case(target, case, seed):
    gate.check(case, target, seed)


def one_row(target, logits, k, scoring="softmax", **options):
    weights, ids = polymoe.gate(torch.tensor([logits]), k, scoring, backend=target.backend, **options)
    return weights[0], ids[0].tolist()


def test_ties_go_to_the_smaller_index(target):
    for scoring in SCORINGS:
        assert one_row(target, [1.0, 3.0, 1.0, 3.0, 3.0, 1.0], 4, scoring)[1] == [1, 3, 4, 0]
    _, ids = one_row(target, [0.0] * 12, 4, "sigmoid", n_group=4, topk_group=2, group_top=2)
    assert ids == [0, 1, 2, 3]
    assert one_row(target, [-0.0, 0.0, -0.0], 3, "softmax_topk")[1] == [0, 1, 2]


def test_bias_selects_and_does_not_weigh(target):
    weights, ids = one_row(target, [2.0, 1.0, 0.0], 2, "sigmoid", bias=torch.tensor([-5.0, 0.0, 3.0]))
    assert ids == [2, 1]
    torch.testing.assert_close(weights, torch.tensor([0.5, 1 / (1 + math.exp(-1))]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_unusable_experts_are_absent(target, scoring):
    """Their logits change nothing, not even the softmax of the others."""
    logits = torch.tensor([[1.0, math.nan, -2.0, -math.inf, 0.5, 0.25]])
    weights, ids = polymoe.gate(logits, 5, scoring, backend=target.backend)
    alone, order = polymoe.gate(logits[:, [0, 2, 4, 5]], 4, scoring, backend=target.backend)
    assert order.tolist() == [[0, 2, 3, 1]]
    assert ids.tolist() == [[0, 4, 5, 2, -1]]
    torch.testing.assert_close(weights[:, :4], alone, rtol=1e-6, atol=0)
    assert weights[0, 4] == 0


@pytest.mark.parametrize("scoring", SCORINGS)
def test_a_row_without_usable_experts(target, scoring):
    logits = torch.tensor([[math.nan] * 3, [-math.inf] * 3, [1.0, math.nan, -math.inf]])
    for renormalize in ("none", "max", "add"):
        weights, ids = polymoe.gate(logits, 2, scoring, renormalize=renormalize, backend=target.backend)
        assert ids.tolist() == [[-1, -1], [-1, -1], [0, -1]]
        assert not weights[:2].any()
        assert weights[2, 0] > 0
        assert weights[2, 1] == 0


def test_infinite_logits_count_as_the_largest_finite_value(target):
    weights, ids = one_row(target, [math.inf, 0.0, math.inf], 3)
    assert ids == [0, 2, 1]
    assert weights.tolist() == [0.5, 0.5, 0.0]
