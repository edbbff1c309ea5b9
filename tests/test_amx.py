"""bf16 on AMX tiles: weights are the right operand where they are packed and the left one where they are plain, and
every length is a tile cut short somewhere. Weights along the columns of the result are copied into the packed
layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import polymoe
from polymoe import formats
from polymoe.formats import Weight, pack_
from polymoe.testing.cases import Random
from polymoe.testing.poison import poisoned
from polymoe.testing.tolerances import assert_same_bits

pytestmark = pytest.mark.skipif(
    "amx" not in polymoe.isa_supported(), reason="this machine does not have AMX, or its system does not grant it"
)
# A sum of D products that are exact in f32, over their magnitudes: D roundings at most.
EPSILON = torch.finfo(torch.float32).eps


@pytest.mark.parametrize("M", [1, 2, 15, 16, 17, 31, 32, 33, 70, 300])
def test_weights_give_the_same_bits_however_they_lie(M: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with polymoe.force_isa_level("amx"):
        for N in (1, 15, 16, 31, 32, 33, 100):
            for D in (1, 2, 31, 32, 33, 545, 1100, 2081):
                a = torch.randn(M, D, generator=generator).bfloat16()
                w = torch.randn(1, N, D, generator=generator).bfloat16()
                ends = torch.tensor([M], dtype=torch.int32)
                plain = polymoe.grouped_mm(a, w.mT, ends, out_dtype=torch.float32)
                packed = polymoe.grouped_mm(
                    a, pack_(w.clone()).mT, ends, out_dtype=torch.float32, weight_format="packed"
                )
                columns = polymoe.grouped_mm(a, w.mT.contiguous(), ends, out_dtype=torch.float32)
                assert torch.equal(plain, packed), (N, D)
                assert torch.equal(plain, columns), (N, D)
                exact, magnitude = a.double() @ w[0].double().T, a.double().abs() @ w[0].double().abs().T
                assert ((plain - exact).abs() <= D * EPSILON * magnitude).all(), (N, D)


def in_the_order_of_tiles(x: Tensor, name: str) -> Tensor:
    """The last dimension as a product with weights of a format takes it: for codes of four bits every fourth element of
    128, or of what is left in 32, after the other; the halves of 32 in turn for bytes that are integers, and the even
    ones of 32 before the odd ones for e4m3."""
    x = torch.nn.functional.pad(x, (0, -x.shape[-1] % 32))
    D, whole = x.shape[-1], x.shape[-1] // 128 * 128 if name == "mxfp4" else 0
    parts = torch.arange(whole).reshape(-1, 32, 4).mT, torch.arange(whole, D).reshape(-1, 32)
    if name == "mxfp4":
        return x[..., torch.cat([parts[0].flatten(), parts[1].reshape(-1, 8, 4).mT.flatten()])]
    return x[..., parts[1].reshape(-1, *((2, 16) if name == "int8" else (16, 2))).mT.flatten()]


@pytest.mark.parametrize("M", [1, 2, 16, 17, 33, 300])
@pytest.mark.parametrize("name", ["int8", "mxfp4", "mxfp8"])
def test_weights_without_scales_of_blocks_have_the_bits_of_bf16(name: str, M: int, seed: int) -> None:
    """bf16 holds codes times powers of two. Every row of int8 is multiplied by its scale once, at the end; 300 rows are
    more groups than wait for one another."""
    random = Random(seed)
    with polymoe.force_isa_level("amx"):
        for N in (1, 31, 33, 100):
            for D in (1, 31, 33, 128, 545, 2081):
                a = random.normal(M, D).bfloat16()
                if name == "int8":
                    codes = random.integers(-128, 128, 1, N, D, dtype=torch.int8)
                    dense, scale = codes.bfloat16(), torch.exp(random.normal(1, N))
                    weight = Weight(codes, scale, None, name, N, D)
                else:
                    weight = random_weight(name, N, D, 60, random)
                    weight.scale.clamp_(70, 127)
                    dense, scale = formats.parse(name).dequantize(weight).bfloat16(), torch.ones(1, N)
                ends = torch.tensor([M], dtype=torch.int32)
                plain = polymoe.grouped_mm(
                    in_the_order_of_tiles(a, name),
                    in_the_order_of_tiles(dense, name).mT,
                    ends,
                    out_dtype=torch.float32,
                )
                assert torch.equal(products(a, weight), plain * scale), (N, D)


@pytest.mark.parametrize("mode", ["int8", "int8_g128"])
@pytest.mark.parametrize("M", [6, 7, 16, 17, 40])
def test_rounded_rows_by_int8_weights_have_the_bits_of_vectors(M: int, mode: str, seed: int) -> None:
    """Tiles take from seven rows on; the level below has none. Extremes of the codes, rows of zeros, of a NaN and of an
    infinity, and scales from subnormal to large."""
    random = Random(seed)
    for N in (1, 15, 16, 17, 33, 130):
        for D in (1, 31, 32, 96, 127, 128, 545, 1024):
            codes = random.integers(-128, 128, 1, N, D, dtype=torch.int8)
            codes[0, 0] = -128
            a = random.normal(M, D).bfloat16()
            a[0], a[1], a[2, 0], a[3, D // 2] = 0, -1, torch.nan, torch.inf
            scale = torch.exp2(random.integers(-140, 30, 1, N, dtype=torch.float32))
            ends = torch.tensor([M], dtype=torch.int32)
            outs = []
            for level in ("amx", "avx512_bf16"):
                with polymoe.force_isa_level(level), poisoned():
                    outs.append(polymoe.grouped_mm(a, codes.mT, ends, None, torch.float32, "int8", scale, None, mode))
            assert_same_bits(*outs, f"N={N} D={D}")


def random_weight(name: str, N: int, D: int, spread: int, random: Random) -> Weight:
    """Any codes but NaN. Exponents of scales differ by up to `spread`; "+e8m0" after the name makes them those of
    fp8_block, "+zero" adds zero points, "+any" zero points that are mostly too large to be looked up."""
    name, _, more = name.partition("+")
    format = formats.parse(name)
    halves, shape = name == "mxfp4" or name.startswith("int4"), (1, *format.scale_shape(N, D))
    codes = random.integers(0, 256, 1, N, (D + 1) // 2 if halves else D, dtype=torch.uint8)
    if halves and D % 2:
        codes[..., -1] &= 15
    exponents = random.integers((254 - spread) // 2, (254 + spread) // 2, *shape, dtype=torch.uint8)
    scale = exponents
    if not name.startswith("mx") and not more.startswith("e8m0"):
        scale = torch.ldexp(random.weights(1, exponents.numel()).reshape(shape) + 0.5, exponents.int() - 127)
    zero = None
    if more in ("zero", "any"):
        zero = random.integers(0, 17 if more == "zero" else 256, *shape, dtype=torch.uint8)
    if "fp8" in name:
        codes = codes.where(codes & 0x7F != 0x7F, 0).view(torch.float8_e4m3fn)
    return Weight(codes, scale, zero, name, N, D)


def products(a: Tensor, weight: Weight, mode: str = "weight_only") -> Tensor:
    ends = torch.tensor([len(a)], dtype=torch.int32)
    with poisoned():
        return polymoe.grouped_mm(
            a, weight.data.mT, ends, None, torch.float32, weight.format, weight.scale, weight.zero, mode
        )


@pytest.mark.parametrize("spread", [3, 8, 250])
@pytest.mark.parametrize("name", ["mxfp4", "int4_g128", "int4_g128+zero", "int4_g128+any", "int4_g64"])
@pytest.mark.parametrize("M", [5, 6, 7, 16, 33, 150])
def test_rounded_rows_by_weights_of_four_bits_have_the_bits_of_vectors(
    M: int, name: str, spread: int, seed: int
) -> None:
    """Tiles take many rows in groups of 128, if 16 rows of W have scales near enough and zero points that bytes can
    hold. 150 rows are more tiles than wait for one another."""
    random = Random(seed)
    for N in (1, 16, 17, 130):
        for D in (64, 128, 545, 1024, 2176):
            a = random.normal(M, D).bfloat16()
            a[0], a[1], a[2, 0], a[3, D // 2] = 0, -1, torch.nan, torch.inf
            weight = random_weight(name, N, D, spread, random)
            outs = []
            for level in ("amx", "avx512_bf16"):
                with polymoe.force_isa_level(level):
                    outs.append(products(a, weight, "int8_g128"))
            assert_same_bits(*outs, f"N={N} D={D}")


SUMMED_IN_BLOCKS = [
    *("mxfp4", "mxfp8", "fp8_block32", "fp8_block64+e8m0", "fp8_block128", "int4_g32", "int4_g64", "int4_g128"),
    *("int4_g32+zero", "int4_g64+any", "int4_g128+zero"),
]


@pytest.mark.parametrize("size", [1.0, 2.0**-90, 2.0**-120, 2.0**90], ids=["usual", "small", "least", "large"])
@pytest.mark.parametrize("spread", [4, 60, 250])
@pytest.mark.parametrize("name", SUMMED_IN_BLOCKS)
def test_few_rows_have_the_bits_of_many(name: str, size: float, spread: int, seed: int) -> None:
    """Without tiles, unless a sum could be subnormal or overflow: where groups are far apart or elements of a small or
    large. 300 rows are more groups than wait for one another."""
    random = Random(seed)
    with polymoe.force_isa_level("amx"):
        for N, D in ((1, 32), (33, 70), (100, 545), (64, 2048)):
            weight = random_weight(name, N, D, spread, random)
            a = (random.normal(300, D) * size).bfloat16()
            a[random.normal(300, D) < -1.3] = 0
            many = products(a, weight)
            for M in (1, 2, 3, 4, 5, 17, 40):
                few = products(a[:M], weight)
                assert torch.equal(few.view(torch.int32), many[:M].view(torch.int32)), (N, D, M)


@pytest.mark.parametrize("name", SUMMED_IN_BLOCKS)
@pytest.mark.parametrize("M", [1, 3, 33])
def test_quantised_weights_are_summed_in_float32(name: str, M: int, seed: int) -> None:
    random = Random(seed)
    with polymoe.force_isa_level("amx"):
        for N, D in ((1, 31), (33, 70), (100, 1334)):
            weight = random_weight(name, N, D, 4, random)
            a = random.normal(M, D).bfloat16()
            dense = formats.parse(weight.format).dequantize(weight, torch.float64)[0]
            exact, magnitude = a.double() @ dense.T, a.double().abs() @ dense.abs().T
            # A rounding for every element but the first, and one for every multiplication by a scale.
            assert ((products(a, weight) - exact).abs() <= (D + -(-D // 32)) * EPSILON * magnitude).all(), (N, D)


@pytest.mark.parametrize("name", ["mxfp8", "fp8_block128"])
def test_subnormal_codes_where_the_thread_flushes_subnormal_numbers(name: str, seed: int) -> None:
    random = Random(seed)
    weight = random_weight(name, 40, 600, 4, random)
    weight.data.view(torch.uint8).bitwise_and_(0x87)
    a = random.normal(2, 600).bfloat16()
    with polymoe.force_isa_level("amx"):
        usual = products(a, weight)
        assert torch.set_flush_denormal(True)
        try:
            flushed = products(a, weight)
        finally:
            torch.set_flush_denormal(False)
    assert usual.all()
    assert torch.equal(flushed, usual)


@pytest.mark.parametrize("name", ["mxfp8", "fp8_block32"])
def test_nan_among_few_rows_has_the_bits_of_many(name: str, seed: int) -> None:
    random = Random(seed)
    weight = random_weight(name, 70, 1100, 4, random)
    codes = weight.data.view(torch.uint8)
    for row, column, code in ((3, 0, 0x7F), (17, 700, 0xFF), (64, 1099, 0x7F)):
        codes[0, row, column] = code
    a = random.normal(40, 1100).bfloat16()
    with polymoe.force_isa_level("amx"):
        many = products(a, weight)
        assert many.isnan().any(0).nonzero().flatten().tolist() == [3, 17, 64]
        for M in (1, 2, 3):
            assert torch.equal(products(a[:M], weight).view(torch.int32), many[:M].view(torch.int32)), M


@pytest.mark.parametrize("D", [2500, 4200])
def test_columns_of_weights_in_slices_of_the_reduction(D: int, seed: int) -> None:
    """As many rows as the L2 cache does not hold, and few of them alone, with several blocks of columns."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(250, D, generator=generator).bfloat16()
    w = torch.randn(1, 300, D, generator=generator).bfloat16()
    columns, bits = w.mT.contiguous(), {}
    with polymoe.force_isa_level("amx"):
        for M in (3, 40, 250):
            ends = torch.tensor([M], dtype=torch.int32)
            plain = polymoe.grouped_mm(a[:M], w.mT, ends, out_dtype=torch.float32)
            bits[M] = polymoe.grouped_mm(a[:M], columns, ends, out_dtype=torch.float32)
            assert torch.equal(plain, bits[M])
    assert torch.equal(bits[3], bits[250][:3])
    assert torch.equal(bits[40], bits[250][:40])


def test_it_is_not_the_level_below(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(64, 4096, generator=generator).bfloat16()
    w = torch.randn(1, 64, 4096, generator=generator).bfloat16()
    bits = {}
    for level in ("avx512_bf16", "amx"):
        with polymoe.force_isa_level(level):
            ends = torch.tensor([64], dtype=torch.int32)
            bits[level] = polymoe.grouped_mm(a, w.mT, ends, out_dtype=torch.float32)
    assert not torch.equal(bits["avx512_bf16"], bits["amx"])  # they sum in different orders
