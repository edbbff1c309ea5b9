"""polymoe.grouped_mm on every backend and ISA level."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import polymoe
from polymoe.testing.cases import LAYOUTS, Random, name_of
from polymoe.testing.conformance import grouped_mm
from polymoe.testing.poison import poisoned


@pytest.mark.parametrize("case", grouped_mm.CASES, ids=name_of)
def test_cases(case, target, seed):
    grouped_mm.check(case, target, seed)


@st.composite
def cases(draw):
    form = draw(st.sampled_from(["2x3", "2x3", "3x2", "2x2", "3x3"]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    outputs = [torch.float64] if dtype == torch.float64 else [torch.float32, torch.bfloat16, torch.float16]
    sizes = [draw(st.integers(0, 4))] if form == "3x3" else draw(st.lists(st.integers(0, 40), max_size=6))
    return grouped_mm.Case(
        form,
        M=draw(st.integers(0, 40)),
        N=draw(st.integers(0, 80)),
        D=draw(st.integers(0, 150)),
        sizes=tuple(sizes),
        rest=0 if form == "3x3" else draw(st.integers(0, 3)),
        dtype=dtype,
        out_dtype=draw(st.sampled_from([None, *outputs])),
        bias=draw(st.sampled_from([None, dtype, torch.float32])),
        layouts=(draw(st.sampled_from(sorted(LAYOUTS))), draw(st.sampled_from(sorted(LAYOUTS)))),
        offs_dtype=draw(st.sampled_from([torch.int32, torch.int64])),
    )


@given(case=cases(), seed=st.integers(0, 2**31))
def test_any_case(target, case, seed):
    grouped_mm.check(case, target, seed)


@pytest.mark.parametrize("form", ["2x3", "3x2", "2x2", "3x3"])
def test_takes_the_arguments_of_torch(form, target, seed):
    """What torch.nn.functional.grouped_mm takes, with the same meaning."""
    case = grouped_mm.Case(form, 32, 48, 64, (4,) if form == "3x3" else (16, 0, 32), dtype=torch.bfloat16)
    a, b, offs, _ = grouped_mm.make_inputs(case, Random(seed))
    expected = F.grouped_mm(a, b, offs=offs)
    got = polymoe.grouped_mm(a, b, offs=offs, backend=target.backend)
    assert got.dtype == expected.dtype
    value, magnitude = grouped_mm.truth(a, b, offs, None)
    for result in (got, expected):  # both within the same bound of the same truth
        error = (result.double() - value).abs()
        assert (error <= 2**-8 * value.abs() + grouped_mm.error(magnitude, a.shape[-1], a.dtype) * 1.01).all()


# Rows of groups. A level may have a kernel for few and one for many, but then each is one for the groups alone too.
FEW_ROWS = (3, 0, 1, 12, 0, 2, 9, 1, 0, 5, 1, 1, 2, 3)
MANY_ROWS = (17, 0, 33, 150, 0, 40, 16, 64, 0, 20, 31, 32, 16, 18)


@pytest.mark.parametrize("width", [704, 701])
@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)],
)
@pytest.mark.parametrize("sizes", [FEW_ROWS, MANY_ROWS], ids=["few", "many"])
def test_a_result_past_the_caches_has_the_same_bits(width, dtype, out_dtype, sizes, target, seed):
    """A large result is written past the caches, one group of it is not; with rows aligned for that, and not."""
    if target.backend != "cpu":
        pytest.skip("a property of the cpu backend")
    M = 2048 if out_dtype == torch.bfloat16 else 1024
    source = Random(seed)
    a, b = (source.normal(sum(sizes) + 2, n, dtype=dtype) for n in (M, width))
    ends = torch.tensor(sizes, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    with poisoned():
        found = polymoe.grouped_mm(a.mT, b, ends, out_dtype=out_dtype, backend=target.backend)
        assert found.nbytes >= 32 << 20
        for g, (end, size) in enumerate(zip(ends.tolist(), sizes, strict=True)):
            rows, only = slice(end - size, end), torch.tensor([size], dtype=torch.int32)
            expected = polymoe.grouped_mm(a[rows].mT, b[rows], only, out_dtype=out_dtype, backend=target.backend)
            assert torch.equal(found[g], expected[0]), f"group {g}"


@pytest.mark.parametrize("width", [4096, 4095])
def test_values_of_every_kind_are_rounded_alike_past_the_caches(width, target, seed):
    """Random bits, so huge and tiny numbers, infinities and NaNs, among ordinary ones and zeros."""
    if target.backend != "cpu":
        pytest.skip("a property of the cpu backend")
    M, generator = 4160, torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**15), 2**15, (2, width), generator=generator, dtype=torch.int16)
    ordinary = torch.rand(2, width, generator=generator) < 0.5
    b = torch.where(ordinary, torch.randn(2, width, generator=generator).bfloat16(), bits.view(torch.bfloat16))
    a = torch.randn(2, M, generator=generator).bfloat16()
    a[1, ::2] = 0
    ends = torch.tensor([2], dtype=torch.int32)
    with poisoned():
        found = polymoe.grouped_mm(a.mT, b, ends, backend=target.backend)
        assert found.nbytes >= 32 << 20
        for rows in torch.arange(M).split(1040):
            expected = polymoe.grouped_mm(a[:, rows].mT, b, ends, backend=target.backend)
            # Which of two NaNs a sum keeps is nobody's promise.
            torch.testing.assert_close(found[0, rows], expected[0], rtol=0, atol=0, equal_nan=True)
