"""Tensors of more than 2^31 elements, as input and as output of every op that can have them. Up to 10 GiB of memory.

The data repeat, and rows are compared with those of a small problem, at both ends and around element 2^31: an index
that overflows there reads or writes somewhere else.
"""

import pytest
import torch

import polymoe
from polymoe.testing.cases import Random
from polymoe.testing.tolerances import assert_same_bits

pytestmark = pytest.mark.slow

ROWS, WIDTH = 65800, 2**15
BEYOND = 2**31 // WIDTH  # the first row past 2^31
SAMPLE = torch.tensor([0, 1, ROWS // 2, BEYOND - 1, BEYOND, BEYOND + 1, ROWS - 2, ROWS - 1])
assert ROWS * WIDTH > 2**31


@pytest.fixture(scope="module")
def memory():
    return torch.empty(ROWS * WIDTH, dtype=torch.bfloat16)


@pytest.fixture
def rows(memory, seed):
    """[ROWS, WIDTH], all equal but those of SAMPLE."""
    random = Random(seed)
    rows = memory.view(ROWS, WIDTH).copy_(random.normal(1, WIDTH, dtype=torch.bfloat16))
    rows[SAMPLE] = random.normal(len(SAMPLE), WIDTH, dtype=torch.bfloat16)
    return rows


def identity(rows):
    """The plan of one slot a token, all to one expert: row r is token r."""
    return polymoe.plan(torch.zeros(rows, 1, dtype=torch.int32), 1)


def test_dispatch(seed):
    """The input is one row, expanded; the weights tell the rows apart."""
    x = Random(seed).normal(1, WIDTH, dtype=torch.bfloat16).expand(ROWS, WIDTH)
    weights = Random(seed).weights(ROWS, 1)
    got = polymoe.dispatch(x, identity(ROWS), weights)
    expected = polymoe.dispatch(x[SAMPLE], identity(len(SAMPLE)), weights[SAMPLE])
    assert_same_bits(got[SAMPLE], expected, "dispatch")


def test_combine_and_dispatch_of_a_large_input(rows, seed):
    weights = Random(seed).weights(ROWS, 1)
    got = polymoe.combine(rows, identity(ROWS), weights)
    expected = polymoe.combine(rows[SAMPLE], identity(len(SAMPLE)), weights[SAMPLE])
    assert_same_bits(got[SAMPLE], expected, "combine")
    del got
    assert_same_bits(polymoe.dispatch(rows, identity(ROWS))[SAMPLE], rows[SAMPLE], "dispatch")


def test_activate(rows):
    got = polymoe.activate(rows, "swiglu")
    assert_same_bits(got[SAMPLE], polymoe.activate(rows[SAMPLE], "swiglu"), "activate of a large input")
    del got
    got = polymoe.activate(rows, "silu")
    assert_same_bits(got[SAMPLE], polymoe.activate(rows[SAMPLE], "silu"), "activate to a large output")


def test_gate(rows):
    logits = rows.view(-1, 1024)
    sample = torch.cat([row * WIDTH // 1024 + torch.arange(WIDTH // 1024) for row in SAMPLE])
    for got, expected in zip(polymoe.gate(logits, 2), polymoe.gate(logits[sample], 2), strict=True):
        assert_same_bits(got[sample], expected, "gate")


def test_grouped_mm_of_large_rows(rows, seed):
    b = Random(seed).matrix(2, 3, WIDTH, dtype=torch.bfloat16).mT
    ends = torch.tensor([ROWS // 2, ROWS])
    got = polymoe.grouped_mm(rows, b, ends)
    sampled_ends = torch.tensor([int((SAMPLE < ROWS // 2).sum()), len(SAMPLE)])
    assert_same_bits(got[SAMPLE], polymoe.grouped_mm(rows[SAMPLE], b, sampled_ends), "grouped_mm of large rows")


def test_grouped_mm_of_large_weights(rows, seed):
    """b [2, D, N], by rows of N and by rows of D."""
    a = Random(seed).normal(5, WIDTH, dtype=torch.bfloat16)
    ends = torch.tensor([2, 5])
    b = rows.view(2, ROWS // 2, WIDTH).mT
    sample = SAMPLE % (ROWS // 2)
    expected = polymoe.grouped_mm(a, b[:, :, sample].mT.contiguous().mT, ends)
    assert_same_bits(polymoe.grouped_mm(a, b, ends)[:, sample], expected, "grouped_mm of large weights")
    a, b = Random(seed).normal(5, ROWS // 2, dtype=torch.bfloat16), rows.view(2, ROWS // 2, WIDTH)
    columns = torch.tensor([0, 1, WIDTH // 2, WIDTH - 1])
    expected = polymoe.grouped_mm(a, b[:, :, columns], ends)
    assert_same_bits(polymoe.grouped_mm(a, b, ends)[:, columns], expected, "grouped_mm of large transposed weights")


def test_grouped_mm_to_a_large_output(seed):
    random = Random(seed)
    a, b = random.normal(ROWS, 8, dtype=torch.bfloat16), random.normal(1, WIDTH, 8, dtype=torch.bfloat16).mT
    got = polymoe.grouped_mm(a, b, torch.tensor([ROWS - 1]))
    expected = polymoe.grouped_mm(a[SAMPLE], b, torch.tensor([len(SAMPLE) - 1]))
    assert_same_bits(got[SAMPLE], expected, "grouped_mm to a large output")
    assert not got[-1].any()


def test_experts_with_large_weights(memory, seed):
    """Only the experts that are used hold numbers, the others NaN."""
    E, H, width = 257, 4096, 2048
    random = Random(seed)
    used = torch.tensor([0, 255, 256])
    gate_up = memory[: E * width * H].fill_(torch.nan).view(E, width, H)
    gate_up[used] = random.matrix(3, width, H, dtype=torch.bfloat16)
    assert gate_up.numel() > 2**31
    down = random.matrix(1, H, width // 2, dtype=torch.bfloat16).expand(E, H, width // 2)
    x, weights = random.normal(9, H, dtype=torch.bfloat16), random.weights(9, 2)
    choice = random.integers(0, 3, 9, 2)
    got = polymoe.experts(x, gate_up, down, weights, used[choice])
    expected = polymoe.experts(x, gate_up[used], down[used], weights, choice)
    assert_same_bits(got, expected, "experts with large weights")
    transposed = gate_up.view(E, H, width)
    got = polymoe.experts(x, transposed, down.mT, weights, used[choice], transposed=True)
    expected = polymoe.experts(x, transposed[used], down.mT[used], weights, choice, transposed=True)
    assert_same_bits(got, expected, "experts with large transposed weights")


def test_experts_of_a_large_batch(rows, seed):
    random = Random(seed)
    gate_up = random.matrix(2, 2, WIDTH, dtype=torch.bfloat16)
    down = random.normal(2, WIDTH, 1, dtype=torch.bfloat16)
    weights, ids = random.weights(ROWS, 1), random.integers(0, 2, ROWS, 1)
    got = polymoe.experts(rows, gate_up, down, weights, ids)
    expected = polymoe.experts(rows[SAMPLE], gate_up, down, weights[SAMPLE], ids[SAMPLE])
    assert_same_bits(got[SAMPLE], expected, "experts of a large batch")


def test_plan_refuses_2_to_the_31_slots():
    ids = torch.zeros(1, 1, dtype=torch.int32).expand(2**31, 1)
    with pytest.raises(ValueError, match="ids: expected fewer than 2"):
        polymoe.plan(ids, 4)
