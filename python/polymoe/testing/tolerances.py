"""Error bounds derived from the arithmetic: nothing here is fitted to what a kernel happens to give.

Notation: u(dtype) is the unit roundoff, half the distance from 1 to the next number; u32 stands for u(float32), or
u(float64) where the inputs are float64. Truth is float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A sum of n rounding errors that are independent, have mean zero and are at most d_i in magnitude exceeds
# DEVIATIONS * sqrt(sum d_i^2) with probability at most 2 * exp(-DEVIATIONS^2 / 2) = 2.5e-14 (Hoeffding).
DEVIATIONS = 8.0

# Elementary functions (exp, tanh, erf, log1p) of good libraries are within 2 units in the last place, that is 4 u32.
# An activation or a score evaluates at most three of them, and rounds at most 20 times beside: constants, arguments,
# sums, products, quotients. None of these steps amplifies a relative error where a check uses this number.
FUNCTION_ERRORS = 32.0


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that ops compute in for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def arithmetic_roundoff(dtype: torch.dtype) -> float:
    """u32: the unit roundoff of the arithmetic for inputs of `dtype`. For float64 inputs the truth is no more precise
    than the op, and both may be off."""
    return unit_roundoff(torch.float32) if dtype != torch.float64 else 2 * unit_roundoff(torch.float64)


def smallest(dtype: torch.dtype) -> float:
    """Below this a result may be flushed to zero. Hardware instructions for bfloat16 treat subnormal numbers as zero,
    so this is the smallest normal number; float16 values are ordinary in range down to their smallest subnormal."""
    info = torch.finfo(dtype)
    return float(info.smallest_normal * info.eps if dtype == torch.float16 else info.tiny)


def growth(length: int) -> float:
    """By how many u32 * sum|a||b| a dot product of `length` terms may be off, whatever the order of the sum.

    A rounding error of one addition is at most u32 times a partial sum, which is at most sum|a||b|; there are at most
    `length` roundings on the way of any term (products of 8 or 11 bit numbers are exact in float32, those of float32
    numbers enter through a multiply-add or add one rounding each, hence +1). So length + 1 is certain, and as the
    errors are independent, DEVIATIONS * sqrt(length + 1) holds for every element of any test (Higham and Mary, 2019).
    """
    return min(length + 1.0, DEVIATIONS * math.sqrt(length + 1.0))


def dot_error(magnitude: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Bound for a sum of `length` products of inputs of `dtype`; magnitude = sum|a||b|, before its rounding."""
    return magnitude * (growth(length) * arithmetic_roundoff(dtype)) + length * smallest(arithmetic_dtype(dtype))


def frobenius_error(length: int) -> float:
    """By how much relative_frobenius of dot products of `length` independent terms of random sign may be off, if they
    are summed in float32 in blocks of at most 128, as polymoe's kernels promise.

    A rounding is off by at most u32 times a partial sum, and a partial sum of terms of random sign is in the mean
    square at most the whole one. On the way of a term there are at most 128 additions in its block, one for each block,
    and three roundings of products, scales and results. Their errors are independent, so their squares add.
    """
    return unit_roundoff(torch.float32) * math.sqrt(min(length, 128) + math.ceil(length / 128) + 3)


def rounding_error(truth: Tensor, dtype: torch.dtype, before: Tensor | float = 0.0) -> Tensor:
    """Bound for a value that was off by at most `before` and was then rounded once to `dtype`."""
    return unit_roundoff(dtype) * (truth.abs() + before) + before + smallest(dtype)


def relative_frobenius(got: Tensor, truth: Tensor) -> float:
    """||got - truth|| / ||truth||, in float64."""
    return float((got.double() - truth.double()).norm() / truth.double().norm())


def assert_within(got: Tensor, truth: Tensor, bound: Tensor, what: str) -> None:
    """Every element of `got` is within `bound` of `truth`. NaN and infinity must be where the truth has them."""
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    value, special = got.cpu().double(), ~truth.isfinite()
    error = (value - truth).abs()
    same = (value == truth) | (value.isnan() & truth.isnan())
    wrong = torch.where(special, ~same, ~(error <= bound))  # ~(<=) also catches NaN where the truth is a number
    if not wrong.any():
        return
    first = tuple(int(i) for i in wrong.nonzero()[0])
    excess = (error / bound)[wrong & ~special & value.isfinite()]
    worst = f", the worst by a factor {float(excess.max()):.3g}" if excess.numel() else ""
    raise AssertionError(
        f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are off{worst}; the first is {first}: "
        f"got {float(value[first])!r}, truth {float(truth[first])!r}, bound {float(bound[first]):.3g}"
    )


def bits(tensor: Tensor) -> Tensor:
    """The representation as integers, so that NaN equals itself and -0 differs from 0."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(integer)


def assert_same_bits(got: Tensor, expected: Tensor, what: str) -> None:
    assert got.dtype == expected.dtype, f"{what}: dtype {got.dtype}, expected {expected.dtype}"
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    different = bits(got) != bits(expected)
    if different.any():
        first = tuple(int(i) for i in different.nonzero()[0])
        raise AssertionError(
            f"{what}: {int(different.sum())} of {different.numel()} elements differ in their bits; "
            f"the first is {first}: {got[first].item()!r} and {expected[first].item()!r}"
        )
