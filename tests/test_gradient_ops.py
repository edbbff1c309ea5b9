"""The ops that gradients are made of, on every backend and ISA level; and their bits at any number of threads."""

import pytest
import torch

import polymoe
from polymoe.ops.activate import activate_backward
from polymoe.ops.down_backward import down_backward
from polymoe.ops.grouped_mm_gradient import grouped_mm_dx
from polymoe.testing.cases import Random, name_of, routing
from polymoe.testing.conformance import gradients
from polymoe.testing.conformance._run import threads
from polymoe.testing.tolerances import assert_same_bits


@pytest.mark.parametrize("case", gradients.ACTIVATE_CASES, ids=name_of)
def test_activate_backward(case, target, seed):
    gradients.check_activate(case, target, seed)


@pytest.mark.parametrize("case", gradients.DOT_CASES, ids=name_of)
def test_row_dot(case, target, seed):
    gradients.check_row_dot(case, target, seed)


@pytest.mark.parametrize("case", gradients.GATE_CASES, ids=name_of)
def test_gate_backward(case, target, seed):
    gradients.check_gate(case, target, seed)


def test_the_same_bits_at_any_thread_count_and_in_any_batch(seed):
    random, T, K, E, I = Random(seed), 90, 3, 70, 2500
    plan = polymoe.plan(routing(random, "distinct", T, K, E), E)
    h, grad = random.normal(T * K, 2 * I, dtype=torch.bfloat16), random.normal(T * K, I)
    weights, logits, x = random.weights(T, K), random.normal(T, E), random.normal(T, I)
    ids, ops = polymoe.gate(logits, K)[1], torch.ops.polymoe

    def everything(tokens):
        """By token, whatever the rows' order."""
        rows, slots = plan.slot_row[tokens].flatten().long(), torch.arange(len(tokens) * K).int()
        back = (h[rows], grad[rows], "swiglu", None, None, False, slots, weights[tokens], True)
        dots = ops.row_dot(x[tokens], grad[rows], slots.view(-1, K), backend="cpu")
        d_logits = ops.gate_backward(logits[tokens], weights[tokens], ids[tokens], backend="cpu")
        d_h, d_weights = ops.activate_backward(*back, backend="cpu")
        return d_h.view(len(tokens), K, -1), d_weights, dots, d_logits

    found = []
    for count in (1, 2, 3, 4):
        with threads(count):
            found.append(everything(torch.arange(T)))
    for other in found[1:]:
        for got, expected in zip(other, found[0], strict=True):
            assert_same_bits(got, expected, "threads")
    few = random.permutation(T)[:7]
    for got, expected in zip(everything(few), found[0], strict=True):
        assert_same_bits(got, expected[few], "another batch")


@pytest.mark.parametrize("grad", [False, True])
def test_down_backward_is_composed_of_ops_of_its_backend(grad, seed):
    """Without a gradient to record as well, as it is in every backward."""
    torch.manual_seed(seed)
    T, H, I, E, K = 33, 512, 160, 4, 2
    offsets, row_slot, slot_row = polymoe.plan(torch.randint(0, E, (T, K)), E)
    rows, down, pre = torch.randn(T * K, H), torch.randn(E, H, I), torch.randn(T * K, 2 * I)
    weights, ends = torch.rand(T, K), offsets[1:]
    act = ("swiglu", None, None, False)
    with torch.set_grad_enabled(grad):
        found = down_backward(rows, down, pre, ends, row_slot, slot_row, *act, weights, False, True, backend="cpu")
        d_activation = grouped_mm_dx(rows, down.mT, ends, torch.float32, backend="cpu")
        d_pre, d_weights = activate_backward(pre, d_activation, *act, row_slot, weights, True, backend="cpu")
    assert torch.equal(found[0], d_pre)
    assert torch.equal(found[2], d_weights)
