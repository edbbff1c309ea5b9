"""Gradients for a trainer that keeps its own: grouped_mm_dw_, which adds to one, and float32 gradients of bfloat16
weights."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

import polymoe
from polymoe.testing.cases import Random
from polymoe.testing.targets import Target
from polymoe.testing.tolerances import assert_same_bits, assert_within, dot_error, rounding_error

S, D, N, G = 50, 37, 70, 4
ENDS = [13, 13, 44, 47]  # an empty group, and rows past the last


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_adds_the_gradient_of_every_group(
    dtype: torch.dtype, main_dtype: torch.dtype, transposed: bool, target: Target, seed: int
) -> None:
    random = Random(seed)
    a, grad = random.normal(S, D, dtype=dtype), random.normal(S, N, dtype=dtype)
    main = random.normal(G, *((N, D) if transposed else (D, N)), dtype=main_dtype)
    main = main.mT if transposed else main
    before, version = main.clone(), main._version
    polymoe.grouped_mm_dw_(main, a, grad, torch.tensor(ENDS), backend=target.backend)
    assert main._version > version
    for g, (begin, end) in enumerate(zip([0, *ENDS], ENDS, strict=False)):
        if begin == end:
            assert_same_bits(main[g], before[g], "an empty group")
            continue
        left, right, start = a[begin:end].double(), grad[begin:end].double(), before[g].double()
        truth = start + left.mT @ right
        magnitude = start.abs() + left.abs().mT @ right.abs()
        error = dot_error(magnitude, end - begin + 1, dtype)
        assert_within(main[g], truth, rounding_error(truth, main_dtype, error), f"group {g}")


def test_two_passes_in_float32_round_once(seed: int) -> None:
    """The gradient of two batches is that of both at once, as float32 has it."""
    random = Random(seed)
    a, grad = random.normal(S, D, dtype=torch.bfloat16), random.normal(S, N, dtype=torch.bfloat16)
    main = torch.zeros(1, D, N)
    for half in (slice(0, S // 2), slice(S // 2, S)):
        polymoe.grouped_mm_dw_(main, a[half], grad[half], torch.tensor([S // 2]))
    truth = a.double().mT @ grad.double()
    error = dot_error(a.double().abs().mT @ grad.double().abs(), S, torch.bfloat16)
    assert_within(main[0], truth, rounding_error(truth, torch.float32, error), "two passes")


def test_float32_gradients_of_bfloat16_weights(seed: int) -> None:
    """torch's grad_dtype reaches the sums: nothing is rounded to bfloat16 on the way."""
    random, E, H, I, K = Random(seed), 3, 24, 16, 2
    x, weights = random.normal(S, H, dtype=torch.bfloat16), random.weights(S, K)
    ids, grad = random.integers(0, E, S, K), random.normal(S, H, dtype=torch.bfloat16)
    made = [random.matrix(E, 2 * I, H, dtype=torch.bfloat16), random.matrix(E, H, I, dtype=torch.bfloat16)]
    made += [random.normal(E, 2 * I, dtype=torch.bfloat16), random.normal(E, H, dtype=torch.bfloat16)]

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [weight.clone().requires_grad_() for weight in made]
        for leaf in leaves:
            leaf.grad_dtype = dtype
        biases = dict(zip(("gate_up_bias", "down_bias"), leaves[2:], strict=True))
        polymoe.experts(x, *leaves[:2], weights, ids, **biases).backward(grad)
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    found = gradients(torch.float32)
    assert len(found) == len(made)
    for wide, narrow in zip(found, gradients(torch.bfloat16), strict=True):
        assert wide.dtype == torch.float32
        assert_same_bits(wide.bfloat16(), narrow, "rounded once")
        assert not torch.equal(wide, narrow.float())


def test_float32_gradients_of_a_bias_of_grouped_mm(seed: int) -> None:
    random = Random(seed)
    a, b = random.normal(S, D, dtype=torch.bfloat16), random.normal(G, D, N, dtype=torch.bfloat16)
    start, grad, found = random.normal(G, N, dtype=torch.bfloat16), random.normal(S, N, dtype=torch.bfloat16), []
    for dtype in (torch.float32, torch.bfloat16):
        bias = start.clone().requires_grad_()
        bias.grad_dtype = dtype
        polymoe.grouped_mm(a, b, torch.tensor(ENDS), bias).backward(grad)
        assert bias.grad is not None
        assert bias.grad.dtype == dtype
        found.append(bias.grad)
    assert_same_bits(found[0].bfloat16(), found[1], "rounded once")
    assert not torch.equal(found[0], found[1].float())


def test_opcheck(target: Target) -> None:
    a, grad, offs = torch.randn(S, D), torch.randn(S, N), torch.tensor(ENDS)
    arguments = (torch.randn(G, D, N), a, grad, offs)
    opcheck(torch.ops.polymoe.grouped_mm_dw_.default, arguments, {"backend": target.backend})


def test_refuses_what_it_cannot_write() -> None:
    a, grad, offs = torch.randn(S, D), torch.randn(S, N), torch.tensor(ENDS)
    with pytest.raises(ValueError, match=r"grouped_mm_dw_: main: expected .* got float64"):
        polymoe.grouped_mm_dw_(torch.zeros(G, D, N, dtype=torch.float64), a, grad, offs)
    with pytest.raises(ValueError, match=r"grouped_mm_dw_: main: expected .*a stride of 1 in dimension 1 or 2"):
        polymoe.grouped_mm_dw_(torch.zeros(D, N, G).movedim(2, 0), a, grad, offs)
    for strides in ((0, N, 1), (D, 1, D - 1)):  # expanded, and rows that overlap
        for backend in ("cpu", "reference"):
            overlapping = torch.zeros(G * D * N).as_strided((G, D, N), strides)
            with pytest.raises(ValueError, match=r"grouped_mm_dw_: main: expected .* share no memory, got .* strides"):
                polymoe.grouped_mm_dw_(overlapping, a, grad, offs, backend=backend)
    with pytest.raises(ValueError, match=r"grouped_mm_dw_: main: expected a tensor \[G, D=37, N=70\]"):
        polymoe.grouped_mm_dw_(torch.zeros(G, N, D), a, grad, offs)
    with pytest.raises(ValueError, match=r"grouped_mm_dw_: grad: expected float32"):
        polymoe.grouped_mm_dw_(torch.zeros(G, D, N), a, grad.bfloat16(), offs)
