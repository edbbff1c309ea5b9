"""Every Triton kernel by the bodies of the conformance kit, and checked for bounds and races on the way.

The cases are the kit's. A few are made smaller: the interpreter needs milliseconds for every program of a grid, and
nothing in a kernel depends on how many more there are.
"""

from dataclasses import replace

import pytest
import torch

from polymoe.backends.triton import KERNELS
from polymoe.kernels import _launch
from polymoe.testing.cases import name_of
from polymoe.testing.conformance import activate, bitwise, combine, dispatch, experts, gate, grouped_mm, plan
from polymoe.testing.targets import Target
from polymoe.testing.triton_checker import checked

CHECKS = {
    "activate": activate,
    "combine": combine,
    "dispatch": dispatch,
    "experts": experts,
    "gate": gate,
    "grouped_mm": grouped_mm,
    "plan": plan,
}
LARGEST = {  # in all, of these fields of a case
    "experts": {"T": 300, "H": 600, "I": 600, "E": 100},
    "gate": {"k": 64},
    "plan": {"T": 600},
}
TRITON = Target("triton")
F32, BF16 = torch.float32, torch.bfloat16


def cases(op):
    """The kit's cases of an op, but for float64, which the backend declines."""
    for case in CHECKS[op].CASES:
        smaller = {name: min(getattr(case, name), most) for name, most in LARGEST.get(op, {}).items()}
        if getattr(case, "dtype", None) != torch.float64:
            yield replace(case, **smaller)


def check(op, case, seed):
    with checked() as found:
        CHECKS[op].check(case, TRITON, seed)
    assert found == []


def with_ids(pairs):
    return [pytest.param(op, case, id=f"{op}-{name_of(case)}"[:150]) for op, case in pairs]


def test_every_op_is_covered():
    assert set(CHECKS) == set(KERNELS)


@pytest.mark.parametrize(("op", "case"), with_ids((op, case) for op in CHECKS for case in cases(op)))
def test_cases(op, case, seed):
    check(op, case, seed)


@pytest.mark.parametrize("case", [case for case in activate.NAN_CASES if case.dtype == F32], ids=name_of)
def test_nan_propagates(case, seed):
    activate.check_nan(case, TRITON, seed)


@pytest.mark.parametrize(("op", "case"), with_ids((op, list(cases(op))[place]) for op in CHECKS for place in (6, 9)))
def test_64_bit_offsets(op, case, seed, monkeypatch):
    """Tensors so large that offsets need 64 bits take other instructions; here, small ones take them too."""
    monkeypatch.setattr(_launch, "LARGEST_INT32", 0)
    check(op, case, seed)


@pytest.mark.parametrize(
    ("op", "case"),
    with_ids((op, case) for op in ("activate", "combine", "dispatch") for case in list(cases(op))[5:9]),
)
def test_tiles_of_the_size_that_gpus_get(op, case, seed, monkeypatch):
    monkeypatch.setattr(_launch, "INTERPRETED_TILE", 1)
    check(op, case, seed)


EXPERTS = [
    experts.Case(T=70, H=H, I=I, E=3, K=2, dtype=dtype, **options)
    for H, I, options in (
        (521, 25, {}),
        (25, 521, {"transposed": True, "interleaved": True, "placement": "activation", "bias": F32}),
    )
    for dtype in (F32, BF16)
]


@pytest.mark.parametrize("case", EXPERTS, ids=name_of)
def test_experts_equal_their_parts(case, seed):
    bitwise.check_experts_composition(case, TRITON, seed)


@pytest.mark.parametrize("case", EXPERTS, ids=name_of)
def test_experts_are_batch_invariant(case, seed):
    bitwise.check_experts_batch(case, TRITON, seed)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_grouped_mm_is_batch_invariant(dtype, seed):
    bitwise.check_grouped_mm(70, 521, 40, dtype, TRITON, seed)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_combine_is_batch_invariant(dtype, seed):
    bitwise.check_combine(6, 701, dtype, TRITON, seed)


@pytest.mark.parametrize("scoring", ["softmax", "softmax_topk", "sigmoid", "sqrtsoftplus"])
def test_gate_is_batch_invariant(scoring, seed):
    bitwise.check_gate(40, 4, scoring, F32, TRITON, seed)


@pytest.mark.parametrize("case", [case for case in bitwise.ACTIVATE if case.dtype == F32], ids=name_of)
def test_activate_is_batch_invariant(case, seed):
    bitwise.check_activate(case, TRITON, seed)
