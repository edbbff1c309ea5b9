"""The checker of bounds and races finds what is planted, and nothing else. Most of it is planted in a small grouped
matrix product."""

import re
from dataclasses import dataclass

import pytest
import torch
import triton
import triton.language as tl

from polymoe.testing.triton_checker import checked

E, ROWS, D, N = 3, 4, 16, 16  # experts, rows of each, widths


@triton.jit
def _grouped(x, w, order, experts, out, S, D, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr):
    """out[order[r]] = x[order[r]] @ w[experts[r]]; a program per block of ROWS rows of one expert."""
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    k, column = tl.arange(0, COLUMNS), tl.arange(0, COLUMNS)
    mask = row < S if MASKED else row >= 0
    token = tl.load(order + row, mask=mask, other=0)
    expert = tl.load(experts + first)
    a = tl.load(x + token[:, None] * D + k[None, :], mask=mask[:, None] & (k < width)[None, :], other=0.0)
    b = tl.load(w + expert * D * D + k[:, None] * D + column[None, :], mask=(k < width)[:, None], other=0.0)
    place = out + token[:, None] * D + column[None, :]
    tl.store(place, tl.dot(a, b, input_precision="ieee"), mask=mask[:, None])


@triton.jit
def _described(x, out, rows, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    block = tl.make_tensor_descriptor(x, shape=[rows, D], strides=[D, 1], block_shape=[ROWS, COLUMNS])
    first = tl.program_id(0) * ROWS
    tile = block.load([first, 0])
    place = (first + tl.arange(0, ROWS))[:, None] * D + tl.arange(0, COLUMNS)[None, :]
    tl.store(out + place, tile, mask=((first + tl.arange(0, ROWS)) < 9)[:, None])


@triton.jit
def _count(x, total, ATOMIC: tl.constexpr):
    one = tl.load(x + tl.program_id(0))
    if ATOMIC:
        tl.atomic_add(total, one)
    else:
        tl.store(total, tl.load(total) + one)


@dataclass
class Problem:
    rows: int = E * ROWS - 1  # the last block is not full
    width: int = D
    masked: bool = True
    order: torch.Tensor | None = None
    experts: torch.Tensor | None = None

    def run(self):
        S = E * ROWS - 1
        x, w, out = torch.randn(S, D), torch.randn(E, D, D), torch.full((S, D), torch.nan)
        order = torch.arange(S) if self.order is None else self.order
        experts = torch.arange(S) // ROWS if self.experts is None else self.experts
        with checked() as found:
            _grouped[(E,)](x, w, order, experts, out, self.rows, D, self.width, ROWS, COLUMNS=16, MASKED=self.masked)
        return x, w, out, found


def test_a_right_kernel_passes():
    x, w, out, found = Problem().run()
    assert found == []
    torch.testing.assert_close(out, torch.stack([x[r] @ w[r // ROWS] for r in range(len(x))]))


def swapped(index, value):
    tensor = torch.arange(E * ROWS - 1)
    tensor[index] = value
    return tensor


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (Problem(experts=torch.arange(E * ROWS - 1) // ROWS + 1), "load out of bounds"),
        (Problem(experts=torch.arange(E * ROWS - 1) // ROWS - 1), "load out of bounds"),
        (Problem(rows=E * ROWS), "load out of bounds: byte .* of order"),
        (Problem(masked=False), "load out of bounds: byte .* of order"),
        (Problem(order=swapped(7, 0)), "race: store and another program's store of byte 0 of out"),
        (Problem(order=swapped(1, 0)), "race: two lanes store to byte 0 of out"),
    ],
    ids=["expert too large", "expert too small", "too many rows", "no mask", "duplicated row", "duplicated in a block"],
)
def test_planted_bugs_are_found(problem, message):
    *_, found = problem.run()
    assert any(re.search(message, entry) for entry in found), found


def test_a_wrong_width_is_found_between_the_elements_of_a_view():
    """The bytes are those of the buffer, but not of the view that the kernel was given."""
    x, w, out = torch.randn(ROWS, D)[:, : D - 1], torch.randn(D, D), torch.empty(ROWS, D)
    order, experts = torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.int64)
    for width, right in ((D - 1, True), (D, False)):
        with checked() as found:
            _grouped[(1,)](x, w, order, experts, out, ROWS, D, width, ROWS, COLUMNS=16, MASKED=True)
        assert (found == []) == right, found
    assert any(f"load out of bounds: byte {4 * (D - 1)} of x" in entry for entry in found), found


def test_an_oversized_descriptor_is_found():
    x, out = torch.randn(9, D), torch.empty(9, D)
    for rows, right in ((9, True), (12, False)):
        with checked() as found:
            _described[(3,)](x, out, rows, D, ROWS=4, COLUMNS=D)
        assert (found == []) == right, found
        assert right or "load out of bounds" in found[0]


def test_a_race_through_memory_is_found_and_atomics_are_none():
    x, total = torch.ones(5), torch.zeros(1)
    with checked() as found:
        _count[(5,)](x, total, ATOMIC=True)
    assert (found, total.item()) == ([], 5)
    with checked() as found:
        _count[(5,)](x, total, ATOMIC=False)
    assert any("race: load and another program's store of byte 0 of total" in entry for entry in found), found


def test_nothing_is_checked_outside():
    with checked():
        pass
    total = torch.zeros(1)
    _count[(2,)](torch.ones(2), total, ATOMIC=False)
    assert total.item() == 2
