"""Checks of polymoe.grouped_mm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from polymoe.testing.cases import Random, laid_out
from polymoe.testing.conformance._run import run, serial
from polymoe.testing.targets import Target
from polymoe.testing.tolerances import arithmetic_roundoff, assert_within, dot_error, rounding_error

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    """form: "2x3", "3x2", "2x2" or "3x3", the dimensions of a and b. sizes: of the groups along the dimension that is
    cut; `rest` more rows (columns) belong to no group. The cut dimension's own M, N or D is ignored. layouts: of a and
    b ("T" is the weight of nn.Linear: the reduction is contiguous). bias, out_dtype: None or dtypes."""

    form: str
    M: int
    N: int
    D: int
    sizes: tuple[int, ...]
    rest: int = 0
    dtype: torch.dtype = F32
    out_dtype: torch.dtype | None = None
    bias: torch.dtype | None = None
    layouts: tuple[str, str] = ("contiguous", "transposed")
    offs_dtype: torch.dtype = torch.int32


CASES = [
    # The forward of an expert: rows cut, weights as nn.Linear stores them.
    Case("2x3", 0, 33, 33, (3, 0, 1, 5), dtype=F32),
    Case("2x3", 0, 33, 33, (3, 0, 1, 5), rest=4, dtype=BF16, bias=BF16),
    Case("2x3", 0, 33, 33, (0, 0, 9, 0), rest=1, dtype=F16, bias=F32, out_dtype=F32),
    Case("2x3", 0, 704, 2880, (1, 0, 7), dtype=BF16, out_dtype=F32),
    Case("2x3", 0, 2880, 704, (2, 17), dtype=F16, out_dtype=F32, offs_dtype=torch.int64),
    Case("2x3", 0, 96, 704, (1, 2, 3, 4, 5, 6, 7, 8), dtype=F32, rest=2, bias=F32),
    Case("2x3", 0, 40, 64, tuple(4 * (i % 37 == 5) for i in range(1024)), dtype=BF16, out_dtype=F32),
    Case("2x3", 0, 33, 130, (40,), dtype=F64, bias=F64),
    Case("2x3", 0, 33, 130, (5, 0, 2), dtype=F64, bias=F32, rest=3),
    Case("2x3", 0, 5, 9000, (3, 2), dtype=BF16, out_dtype=F32),  # several blocks of the sum at every level
    Case("2x3", 0, 5, 9000, (3, 2), dtype=F32),
    Case("2x3", 0, 5, 9000, (3, 2), dtype=F16),
    # Every layout of either operand.
    *(
        Case("2x3", 0, 35, 51, (6, 0, 3), rest=2, dtype=dtype, layouts=layouts, bias=dtype)
        for dtype, layouts in (
            (F32, ("contiguous", "contiguous")),
            (BF16, ("contiguous", "contiguous")),
            (F16, ("transposed", "contiguous")),
            (BF16, ("transposed", "sliced")),
            (F32, ("sliced", "strided")),
            (F16, ("strided", "outermost")),
            (BF16, ("strided", "strided")),
            (F32, ("expanded", "expanded")),
            (F64, ("strided", "outermost")),
        )
    ),
    # Nothing of something.
    Case("2x3", 0, 8, 8, (0, 0)),
    Case("2x3", 0, 8, 8, (0, 0), rest=5, bias=F32),
    Case("2x3", 0, 0, 8, (2, 3)),
    Case("2x3", 0, 8, 0, (2, 3), rest=1, bias=F32),
    Case("2x3", 0, 8, 8, (), rest=3),
    Case("3x3", 4, 0, 4, (2,)),
    Case("2x2", 4, 4, 0, (0, 0, 0), bias=F32),
    # The other forms: the backward of an expert.
    Case("3x2", 19, 0, 70, (4, 0, 30), rest=3, dtype=BF16, bias=BF16, layouts=("contiguous", "contiguous")),
    Case("3x2", 7, 0, 33, (1, 65), dtype=F32, layouts=("transposed", "transposed")),
    Case("3x2", 3, 0, 700, (5, 2, 0), dtype=F16, layouts=("strided", "sliced"), out_dtype=BF16),
    Case("3x2", 6, 0, 20, (5, 2, 0), dtype=F64, bias=F32),
    Case("2x2", 33, 65, 0, (7, 0, 50), rest=9, dtype=BF16, out_dtype=F32, layouts=("transposed", "contiguous")),
    Case("2x2", 33, 65, 0, (7, 0, 501), dtype=F32, bias=F32, layouts=("contiguous", "contiguous")),
    Case("2x2", 12, 31, 0, (300, 0, 0, 3), dtype=F16, layouts=("strided", "sliced")),
    Case("2x2", 12, 31, 0, (3, 2), rest=1, dtype=F64, layouts=("transposed", "strided")),
    Case("3x3", 17, 65, 130, (3,), dtype=BF16, bias=BF16, layouts=("contiguous", "contiguous")),
    Case("3x3", 1, 33, 2880, (2,), dtype=F32, layouts=("sliced", "transposed")),
    Case("3x3", 20, 8, 40, (4,), dtype=F16, layouts=("expanded", "outermost"), out_dtype=F32, bias=F32),
    Case("3x3", 4, 8, 40, (3,), dtype=F64, bias=F64),
]


class Inputs(NamedTuple):
    a: Tensor
    b: Tensor
    offs: Tensor | None
    bias: Tensor | None


def make_inputs(case: Case, random: Random) -> Inputs:
    G, cut = len(case.sizes), sum(case.sizes) + case.rest
    M, N, D = case.M, case.N, case.D
    if case.form == "3x3":
        G = case.sizes[0]
    elif case.form == "2x3":
        M = cut
    elif case.form == "3x2":
        N = cut
    else:
        D = cut
    a = random.matrix(*((M, D) if case.form[0] == "2" else (G, M, D)), dtype=case.dtype)
    b = random.normal(*((D, N) if case.form[2] == "2" else (G, D, N)), dtype=case.dtype)
    offs = None if case.form == "3x3" else torch.tensor(case.sizes).cumsum(0).to(case.offs_dtype).to(random.device)
    bias = None
    if case.bias is not None:
        bias = random.normal(*((N,) if case.form == "3x2" else (G, N)), dtype=case.bias)
        bias = laid_out(bias, "strided" if case.layouts[0] == "strided" else "contiguous")
    a, b = laid_out(a, case.layouts[0]), laid_out(b, case.layouts[1])
    if case.rest:  # what belongs to no group must not be read
        used = cut - case.rest
        outside = {"2x3": a[used:], "3x2": b[:, used:], "2x2": a[:, used:]}[case.form]
        if 0 not in outside.stride():
            outside.fill_(torch.nan)
    return Inputs(a, b, offs, bias)


def truth(a: Tensor, b: Tensor, offs: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Group by group in float64: the results, and the sums of the magnitudes of their terms, on the CPU."""
    bias = None if bias is None else bias.cpu().double()
    M, N = a.shape[-2], b.shape[-1]
    groups = a.shape[0] if offs is None else offs.shape[0]
    shape = (M, N) if a.dim() != b.dim() else (groups, M, N)
    value, magnitude = torch.zeros(2, *shape, dtype=torch.float64)
    start = 0
    for g in range(groups):
        end = start if offs is None else int(offs[g])
        at: tuple[int | slice, ...]
        if offs is None:
            at, left, right = (g,), a[g], b[g]
        elif a.dim() == 2 and b.dim() == 3:
            at, left, right = (slice(start, end),), a[start:end], b[g]
        elif a.dim() == 3:
            at, left, right = (slice(None), slice(start, end)), a[g], b[:, start:end]
        else:
            at, left, right = (g,), a[:, start:end], b[start:end]
        added = torch.zeros(()) if bias is None else bias[start:end] if bias.dim() == 1 else bias[g]
        if value[at].numel() > 0:
            left, right = left.cpu().double(), right.cpu().double()
            value[at] = left @ right + added
            magnitude[at] = left.abs() @ right.abs() + added.abs()
        start = end
    return value, magnitude


def error(magnitude: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Bound before the rounding of the result: a dot product, and one addition for the bias (part of `magnitude`)."""
    return dot_error(magnitude, length, dtype) + arithmetic_roundoff(dtype) * magnitude


@serial
def check(case: Case, target: Target, seed: int) -> None:
    a, b, offs, bias = make_inputs(case, Random(seed, target.device))
    got = run(target, "grouped_mm", a, b, offs, bias, case.out_dtype)
    out_dtype = case.out_dtype or case.dtype
    assert got.dtype == out_dtype
    assert got.is_contiguous()
    value, magnitude = truth(a, b, offs, bias)
    bound = rounding_error(value, out_dtype, error(magnitude, a.shape[-1], case.dtype))
    assert_within(got, value, bound, f"grouped_mm {case.form}")
    outside = got[sum(case.sizes) :] if case.form == "2x3" else got[..., sum(case.sizes) :]
    if case.form in ("2x3", "3x2"):
        assert not outside.any(), "what belongs to no group must be zero, without bias"
