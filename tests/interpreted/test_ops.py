"""The ops of the Triton backend are torch ops like any other: opcheck and torch.compile take them."""

import pytest
import torch

import polymoe
from polymoe.hal.problem import OPS
from polymoe.hal.registry import find
from polymoe.hal.select import declined

T, K, H, I, E = 5, 2, 16, 8, 3
PLAN = polymoe.plan(torch.tensor([[0, 2], [1, 0], [2, 1], [0, -1], [1, 2]]), E)


def arguments(op):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    weights = normal(T, K).abs()
    return {
        "activate": (normal(T * K, 2 * I), "swiglu", None, None, False, PLAN.row_slot, weights),
        "combine": (normal(T * K, H), PLAN.slot_row, weights),
        "dispatch": (normal(T, H), PLAN.row_slot, PLAN.slot_row, weights),
        "experts": (normal(T, H), normal(E, 2 * I, H), normal(E, H, I), weights, PLAN.slot_row),
        "gate": (normal(T, E), K),
        "grouped_mm": (normal(T * K, H), normal(E, H, I), PLAN.offsets[1:]),
        "plan": (torch.tensor([[0, 2], [1, 0], [2, 1], [0, -1], [1, 2]]), E),
    }[op]


@pytest.mark.parametrize("op", sorted(OPS))
def test_opcheck(op):
    overload = getattr(torch.ops.polymoe, op).default
    torch.library.opcheck(overload, arguments(op), {"backend": "triton"})


def test_one_graph():
    def layer(x, router, gate_up, down):
        weights, ids = polymoe.gate(x @ router, K, renormalize=True)
        return polymoe.experts(x, gate_up, down, weights, ids)

    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(*shape, generator=generator) for shape in ((T, H), (H, E), (E, 2 * I, H), (E, H, I))]
    with torch.no_grad(), polymoe.use_backend("triton"):
        expected = layer(*inputs)
        assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(*inputs), expected)
    torch.testing.assert_close(layer(*inputs), expected)


def test_what_is_served():
    triton = find("triton")
    for op in OPS.values():
        assert declined(triton, op.problem("cpu", torch.bfloat16)) is None
        assert "float64 is for" in declined(triton, op.problem("cpu", torch.float64))
    assert "interpreter" in str(polymoe.explain("combine", torch.ones(10, H), PLAN, backend="triton"))
