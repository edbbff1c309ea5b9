"""bf16 on AMX tiles: weights are the right operand where they are packed and the left one where they are plain, and
every length is a tile cut short somewhere. Weights along the columns of the result are copied into the packed
layout."""

from __future__ import annotations

import pytest
import torch

import polymoe
from polymoe.formats import pack_

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


@pytest.mark.parametrize("M", [1, 2, 16, 17, 33, 300])
def test_int8_weights_have_the_bits_of_their_codes_in_bf16(M: int, seed: int) -> None:
    """Every row is multiplied by its scale once, at the end; 300 rows are more groups than wait for one another."""
    generator = torch.Generator().manual_seed(seed)
    with polymoe.force_isa_level("amx"):
        for N in (1, 31, 33, 100):
            for D in (1, 31, 33, 128, 545, 2081):
                a = torch.randn(M, D, generator=generator).bfloat16()
                codes = torch.randint(-128, 128, (1, N, D), generator=generator, dtype=torch.int8)
                scale = torch.rand(1, N, generator=generator)
                ends = torch.tensor([M], dtype=torch.int32)
                out = polymoe.grouped_mm(a, codes.mT, ends, None, torch.float32, "int8", scale)
                plain = polymoe.grouped_mm(a, codes.bfloat16().mT, ends, out_dtype=torch.float32)
                assert torch.equal(out, plain * scale), (N, D)


@pytest.mark.parametrize("size", [1.0, 2.0**-90, 2.0**-120, 2.0**90], ids=["usual", "small", "least", "large"])
@pytest.mark.parametrize("spread", [4, 60, 250])
def test_few_rows_of_mxfp4_have_the_bits_of_many(size: float, spread: int, seed: int) -> None:
    """Without tiles, unless a sum could be subnormal or overflow: where groups are far apart or elements of a small or
    large."""
    generator = torch.Generator().manual_seed(seed)
    with polymoe.force_isa_level("amx"):
        for N, D in ((1, 32), (33, 70), (100, 545), (64, 2048)):
            codes = torch.randint(0, 256, (1, N, (D + 1) // 2), generator=generator, dtype=torch.uint8)
            if D % 2:
                codes[..., -1] &= 15
            scale = (
                torch.randint(0, spread, (1, N, -(-D // 32)), generator=generator, dtype=torch.uint8)
                + (254 - spread) // 2
            )
            a = (torch.randn(40, D, generator=generator) * size).bfloat16()
            a[torch.rand(40, D, generator=generator) < 0.1] = 0
            rows = [1, 2, 3, 4, 5, 40]
            out = []
            for M in rows:
                ends = torch.tensor([M], dtype=torch.int32)
                out.append(polymoe.grouped_mm(a[:M], codes.mT, ends, None, torch.float32, "mxfp4", scale))
            for M, few in zip(rows, out, strict=True):
                assert torch.equal(few.view(torch.int32), out[-1][:M].view(torch.int32)), (N, D, M)


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
