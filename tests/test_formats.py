"""The quantised formats against bits written by hand from their specifications, and each format's promises on random
weights."""

from __future__ import annotations

import math
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from polymoe import formats
from polymoe.formats import Fp8Block, Int4, Int8, Mxfp4, Mxfp8, Weight
from polymoe.formats.codes import (
    E2M1_VALUES,
    from_e2m1,
    from_e8m0,
    pack_nibbles,
    round_up_to_e8m0,
    to_e2m1,
    to_e4m3,
    unpack_nibbles,
)
from polymoe.testing.cases import Random

NAMES = tuple(formats.FORMATS)
NAN = math.nan


def quantizers() -> list[formats.Format]:
    """Every way to quantise: the named formats, and the two that a name does not tell."""
    return [*formats.FORMATS.values(), Fp8Block(32, torch.float8_e8m0fnu), Int4(64, zero_points=True)]


def describe(format: formats.Format) -> str:
    zero_points = getattr(format, "zero_points", False)
    exponents = getattr(format, "scale_dtype", None) == torch.float8_e8m0fnu
    return format.name + ("-zero_points" if zero_points else "") + ("-e8m0" if exponents else "")


def e4m3(code: int) -> float:
    """From the definition of the format."""
    sign, exponent, mantissa = (-1) ** (code >> 7), (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return NAN
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


# --- codes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0.0, 0x00),
        (-0.0, 0x80),
        (1.0, 0x38),
        (1.125, 0x39),
        (-1.5, 0xBC),
        (0.1, 0x1D),  # 1.625 * 2^-4
        (240.0, 0x77),
        (256.0, 0x78),
        (448.0, 0x7E),
        (463.9, 0x7E),
        (464.0, 0x7E),  # halfway to the NaN code: saturates
        (1e9, 0x7E),
        (-1e9, 0xFE),
        (2.0**-6, 0x08),  # the smallest normal
        (7 * 2.0**-9, 0x07),
        (2.0**-9, 0x01),  # the smallest
        (1.0625, 0x38),  # ties to even from here on
        (1.1875, 0x3A),
        (2.0**-10, 0x00),
        (-(2.0**-10), 0x80),
        (3 * 2.0**-10, 0x02),
        (15 * 2.0**-10, 0x08),  # a subnormal that rounds up to the smallest normal
    ],
)
def test_to_e4m3(value: float, code: int) -> None:
    assert int(to_e4m3(torch.tensor([value])).view(torch.uint8)) == code


@pytest.mark.parametrize(
    ("value", "code"),
    [
        *((value, code) for code, value in enumerate(E2M1_VALUES)),
        (0.25, 0),  # ties to even
        (0.75, 2),
        (1.25, 2),
        (1.75, 4),
        (2.5, 4),
        (3.5, 6),
        (5.0, 6),
        (0.2501, 1),
        (0.7499, 1),
        (5.0001, 7),
        (7.0, 7),  # saturates
        (1e30, 7),
        (-0.25, 8),  # the sign stays
        (-0.2501, 9),
        (-2.5, 12),
        (-1e30, 15),
    ],
)
def test_to_e2m1(value: float, code: int) -> None:
    assert int(to_e2m1(torch.tensor([value]))) == code


def test_from_e2m1() -> None:
    expected = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert from_e2m1(torch.arange(16)).tolist() == expected + [-value for value in expected]


@pytest.mark.parametrize(
    ("value", "code"),
    [(1.0, 127), (1.0000001, 128), (0.75, 127), (0.5, 126), (2.0**-126, 1), (1.5 * 2.0**-126, 2), (2.0**127, 254)],
)
def test_round_up_to_e8m0(value: float, code: int) -> None:
    assert int(round_up_to_e8m0(torch.tensor([value])).view(torch.uint8)) == code


def test_from_e8m0() -> None:
    codes = torch.tensor([0, 1, 126, 127, 128, 254, 255], dtype=torch.uint8)
    expected = [2.0**-127, 2.0**-126, 0.5, 1.0, 2.0, 2.0**127, NAN]
    for given in (codes, codes.view(torch.float8_e8m0fnu)):
        values = from_e8m0(given).tolist()
        assert values[:-1] == expected[:-1]
        assert math.isnan(values[-1])


def test_nibbles() -> None:
    codes = torch.tensor([[1, 2, 3, 15, 7]], dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.tolist() == [[0x21, 0xF3, 0x07]]
    assert torch.equal(unpack_nibbles(packed, 5), codes)
    assert torch.equal(unpack_nibbles(packed.view(torch.int8), 5), codes)


# --- every code of a format ----------------------------------------------------------------------------------------


def test_every_e4m3_code() -> None:
    data = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[None]
    weight = Weight(data, torch.full((1, 2), 0.5), None, "fp8_block128", 1, 256)
    values = Fp8Block(128).dequantize(weight)[0].tolist()
    for code, value in enumerate(values):
        expected = e4m3(code) * 0.5
        same = struct.pack("<f", value) == struct.pack("<f", expected)
        assert same or (math.isnan(value) and math.isnan(expected)), code
    assert [code for code, value in enumerate(values) if math.isnan(value)] == [0x7F, 0xFF]


def test_every_e2m1_code_in_deepseek_v4s_packing() -> None:
    """int8 in the file; byte 0x10 is element 0 = code 0, element 1 = code 1."""
    codes = torch.arange(16).repeat(2).to(torch.uint8)
    data = torch.tensor([[0x10, 0x32, 0x54, 0x76, -0x68, -0x46, -0x24, -0x02] * 2], dtype=torch.int8)
    assert torch.equal(unpack_nibbles(data, 32)[0], codes)
    weight = Weight(data, torch.tensor([[128]], dtype=torch.uint8).view(torch.float8_e8m0fnu), None, "mxfp4", 1, 32)
    expected = [0, 1, 2, 3, 4, 6, 8, 12]
    assert Mxfp4().dequantize(weight)[0].tolist() == (expected + [-value for value in expected]) * 2


def test_every_int8_code() -> None:
    data = torch.arange(-128, 128).to(torch.int8)[None]
    weight = Weight(data, torch.tensor([0.25]), None, "int8", 1, 256)
    assert torch.equal(Int8().dequantize(weight), torch.arange(-128.0, 128.0)[None] / 4)


def test_every_int4_code_with_every_zero_point() -> None:
    data = pack_nibbles(torch.arange(16, dtype=torch.uint8).repeat(256, 2))
    zero = torch.arange(256, dtype=torch.uint8)[:, None]
    weight = Weight(data, torch.full((256, 1), 0.5), zero, "int4_g32", 256, 32)
    expected = (torch.arange(16.0).repeat(256, 2) - zero) / 2
    assert torch.equal(Int4(32).dequantize(weight), expected)
    assert torch.equal(Int4(32).dequantize(Weight(data, weight.scale, None, "int4_g32", 256, 32))[8], expected[8])


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "fp8_block32"])
def test_a_nan_scale_makes_its_block_nan(name: str) -> None:
    random = Random(0)
    format = formats.parse(name) if name != "fp8_block32" else Fp8Block(32, torch.float8_e8m0fnu)
    weight = format.quantize(random.normal(64, 96))
    weight.scale.view(torch.uint8)[0, 1] = 255
    values = format.dequantize(weight)
    rows = format.block[0]
    assert values[:rows, 32:64].isnan().all()
    assert values.isnan().sum() == rows * 32


# --- quantising by hand --------------------------------------------------------------------------------------------


def group(*values: float) -> Tensor:
    """One row of 32: the values, then zeros."""
    return torch.tensor([[*values, *[0.0] * (32 - len(values))]])


def test_quantize_mxfp4() -> None:
    weight = Mxfp4().quantize(group(6.0, -3.0, 0.25, 0.75, 5.0, -0.1))
    assert weight.scale.view(torch.uint8).tolist() == [[127]]
    assert weight.data.tolist() == [[0xD7, 0x20, 0x86, *[0] * 13]]
    # 7 / 6 is rounded up to 2: codes of 3.5 (a tie, up to 4), 0.5 and -3.
    weight = Mxfp4().quantize(group(7.0, 1.0, -6.0))
    assert weight.scale.view(torch.uint8).tolist() == [[128]]
    assert weight.data.tolist() == [[0x16, 0x0D, *[0] * 14]]


def test_quantize_mxfp8() -> None:
    weight = Mxfp8().quantize(group(448.0, 1.0625, -(2.0**-10)))
    assert weight.scale.view(torch.uint8).tolist() == [[127]]
    assert weight.data.view(torch.uint8).tolist() == [[0x7E, 0x38, 0x80, *[0] * 29]]
    weight = Mxfp8().quantize(group(449.0, 2.0))  # 449 / 448 is rounded up to 2
    assert weight.scale.view(torch.uint8).tolist() == [[128]]
    assert weight.data.view(torch.uint8).tolist() == [[0x76, 0x38, *[0] * 30]]


def test_quantize_fp8() -> None:
    dense = torch.zeros(2, 33)
    dense[0, 0], dense[0, 1], dense[1, 32] = 448 * 0.375, 0.375, -7.0
    weight = Fp8Block(32).quantize(dense)
    assert weight.scale.tolist() == [[0.375, 7 / 448]]
    data = weight.data.view(torch.uint8)
    assert data[0, 0] == 0x7E
    assert data[0, 1] == 0x38
    assert data[1, 32] == 0xFE
    rounded = Fp8Block(32, torch.float8_e8m0fnu).quantize(dense)
    assert rounded.scale.view(torch.uint8).tolist() == [[126, 121]]  # 0.375 up to 0.5; 2^-6
    assert rounded.data.view(torch.uint8)[0, 0] == 0x7A  # 336 = 1.3125 * 256 lies halfway: even is 1.25


def test_quantize_int8() -> None:
    weight = Int8().quantize(torch.tensor([[127.0, -127.0, 0.5, 1.5, -2.5], [254.0, 1.0, 3.0, 0.0, -254.0]]))
    assert weight.scale.tolist() == [1.0, 2.0]
    assert weight.data.tolist() == [[127, -127, 0, 2, -2], [127, 0, 2, 0, -127]]


def test_quantize_int4() -> None:
    weight = Int4(32).quantize(group(7.0, -7.0, 0.5, 1.5, -2.5))
    assert weight.scale.tolist() == [[1.0]]
    assert weight.data.tolist() == [[0x1F, 0xA8, 0x86, *[0x88] * 13]]
    weight = Int4(32, zero_points=True).quantize(group(10.0, -5.0, 0.5, 2.5))
    assert weight.zero is not None
    assert weight.scale.tolist() == [[1.0]]
    assert weight.zero.tolist() == [[5]]
    assert weight.data.tolist() == [[0x0F, 0x75, *[0x55] * 14]]


def test_zeros_and_tiny_weights() -> None:
    zeros = torch.zeros(40, 70)
    smallest = {"mxfp4": 1, "mxfp8": 1}
    for format in quantizers():
        weight = format.quantize(zeros)
        assert torch.equal(format.dequantize(weight), zeros), format
        assert weight.scale.view(torch.float32 if weight.scale.dtype == torch.float32 else torch.uint8).min() > 0
        if format.name in smallest:
            assert int(weight.scale.view(torch.uint8).max()) == smallest[format.name]
        tiny = format.dequantize(format.quantize(torch.full((40, 70), 1e-40)))
        assert tiny.isfinite().all()
        assert tiny.abs().max() <= 2.0**-120
    floor = Fp8Block(128).quantize(zeros).scale
    assert torch.equal(floor, torch.full((1, 1), 1e-4) / 448)


# --- every format on random weights --------------------------------------------------------------------------------


@pytest.mark.parametrize("format", quantizers(), ids=describe)
@pytest.mark.parametrize(("N", "D"), [(1, 1), (33, 31), (130, 257), (64, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_half_a_step(format: formats.Format, N: int, D: int, dtype: torch.dtype, seed: int) -> None:
    """Every element is as near as its neighbours allow: half a code apart, times the scale."""
    dense = Random(seed).normal(2, N, D, dtype=dtype)
    weight = format.quantize(dense)
    assert weight.shape == dense.shape
    scale = format.scales(weight).double()
    error = (format.dequantize(weight, torch.float64) - dense.double()).abs()
    if format.name.startswith("int"):
        half = 0.5 * scale  # the zero point is rounded too
        half = half * (2 if weight.zero is not None else 1)
    else:
        mantissa, least = (1, 0.5) if format.name == "mxfp4" else (3, 2.0**-9)
        step = 2.0 ** (torch.floor(torch.log2(dense.double().abs() / scale)) - mantissa)
        half = 0.5 * torch.clamp(step, min=least) * scale
    assert (error <= half * (1 + 1e-5)).all()


@pytest.mark.parametrize("format", quantizers(), ids=describe)
@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0)])
def test_no_elements(format: formats.Format, shape: tuple[int, ...]) -> None:
    weight = format.quantize(torch.zeros(shape))
    assert weight.shape == format.dequantize(weight).shape == shape
    format.check("formats", "weight", weight)


@pytest.mark.parametrize("format", quantizers(), ids=describe)
def test_neither_strides_nor_gradients_are_taken_over(format: formats.Format, seed: int) -> None:
    dense = Random(seed).normal(2, 70, 130)
    expected, found = format.quantize(dense), format.quantize(dense.mT.contiguous().mT.requires_grad_())
    for part, one in ((found.data, expected.data), (found.scale, expected.scale), (found.zero, expected.zero)):
        if part is None or one is None:
            assert part is one
        else:
            assert part.is_contiguous()
            assert not part.requires_grad
            assert torch.equal(part.view(torch.uint8), one.view(torch.uint8))


@pytest.mark.parametrize("format", quantizers(), ids=describe)
def test_quantising_again_changes_nothing(format: formats.Format, seed: int) -> None:
    values = format.dequantize(format.quantize(Random(seed).normal(70, 130)))
    again = format.dequantize(format.quantize(values))
    torch.testing.assert_close(again, values, rtol=1e-6, atol=0)


@pytest.mark.parametrize("format", quantizers(), ids=describe)
def test_safetensors_round_trip(format: formats.Format, tmp_path: Path, seed: int) -> None:
    weight = format.quantize(Random(seed).normal(3, 33, 65))
    path = str(tmp_path / "weight.safetensors")
    safetensors.torch.save_file(weight.tensors("up"), path, metadata=weight.metadata("up"))
    with safetensors.safe_open(path, "pt") as file:
        read = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        back = Weight.from_tensors("up", read, file.metadata())
    assert (back.format, back.N, back.D) == (format.name, 33, 65)
    for name, tensor in weight.tensors("up").items():
        assert back.tensors("up")[name].dtype == tensor.dtype
        assert torch.equal(back.tensors("up")[name].view(torch.uint8), tensor.view(torch.uint8))
    assert back.nbytes == sum(tensor.nbytes for tensor in read.values())


def test_a_reader_refuses_what_does_not_fit() -> None:
    weight = Mxfp4().quantize(torch.ones(4, 64))
    tensors, metadata = weight.tensors("w"), weight.metadata("w")
    with pytest.raises(ValueError, match=r"polymoe\.formats: w: expected metadata"):
        Weight.from_tensors("w", tensors, {})
    with pytest.raises(ValueError, match=r"polymoe\.formats: w: expected tensors w and w_scale"):
        Weight.from_tensors("w", {"w": weight.data}, metadata)
    with pytest.raises(ValueError, match=r"polymoe\.formats: format: expected one of fp8_block32"):
        Weight.from_tensors("w", tensors, {"w": "mxfp5 4 64"})
    with pytest.raises(ValueError, match=r"polymoe\.formats: w_scale: expected a tensor \[4, 2\]"):
        Weight.from_tensors("w", tensors | {"w_scale": weight.scale[:3]}, metadata)
    with pytest.raises(ValueError, match=r"polymoe\.formats: w: expected uint8 or int8"):
        Weight.from_tensors("w", tensors | {"w": weight.data.float()}, metadata)
    with pytest.raises(ValueError, match=r"polymoe\.formats: w_zero: expected None"):
        Weight.from_tensors("w", tensors | {"w_zero": torch.zeros(4, 2, dtype=torch.uint8)}, metadata)


@pytest.mark.parametrize("name", NAMES)
def test_quantize_refuses(name: str) -> None:
    format = formats.parse(name)
    for bad in (torch.ones(4, 64, dtype=torch.float64), torch.ones(64), torch.tensor([[1.0, math.inf]])):
        with pytest.raises(ValueError, match=r"polymoe\.formats: weight: expected"):
            format.quantize(bad)


def test_sizes_of_blocks_and_groups() -> None:
    with pytest.raises(ValueError, match=r"polymoe\.formats: size: expected one of 32, 64, 128, got 16"):
        Fp8Block(16)
    with pytest.raises(ValueError, match=r"polymoe\.formats: group: expected one of 32, 64, 128, got 16"):
        Int4(16)


# --- published layouts ---------------------------------------------------------------------------------------------


def test_gpt_oss_blocks() -> None:
    blocks = torch.zeros(1, 2, 2, 16, dtype=torch.uint8)
    blocks[0, 1, 1, 15] = 0x7A  # elements 62 and 63 of row 1: codes 10 and 7
    scales = torch.full((1, 2, 2), 129, dtype=torch.uint8)
    weight = formats.mxfp4_from_blocks(blocks, scales)
    assert weight.data.data_ptr() == blocks.data_ptr()
    values = Mxfp4().dequantize(weight)
    assert values.shape == (1, 2, 64)
    assert values[0, 1, 62:].tolist() == [-4.0, 24.0]
    assert values.count_nonzero() == 2
    with pytest.raises(ValueError, match=r"polymoe\.formats: blocks: expected"):
        formats.mxfp4_from_blocks(blocks[..., :15], scales)


def in_int32(nibbles: list[int]) -> int:
    """Eight codes, the first in the low bits."""
    word = sum(code << (4 * place) for place, code in enumerate(nibbles))
    return word - (1 << 32) if word >= 1 << 31 else word


def test_awq() -> None:
    """Channels lie 0, 2, 4, 6, 1, 3, 5, 7 from the low bits up."""
    D, N = 32, 8
    qweight = torch.zeros(D, 1, dtype=torch.int32)
    qweight[3, 0] = in_int32([0, 2, 4, 6, 1, 3, 5, 7])  # code of channel c is c
    qzeros = torch.tensor([[in_int32([8, 10, 12, 14, 9, 11, 13, 15])]], dtype=torch.int32)  # zero of c is 8 + c
    scales = torch.arange(1, 9).half()[None] / 8
    weight = formats.int4_from_awq(qweight, qzeros, scales)
    assert weight.format == "int4_g32"
    expected = -(torch.arange(8.0) + 8)[:, None].repeat(1, D)
    expected[:, 3] = -8
    assert torch.equal(Int4(32).dequantize(weight), expected * scales.float().mT)
    assert weight.shape == (N, D)


def test_gptq() -> None:
    """Eight of the reduction lie in an int32; the zero point is stored less 1."""
    D, N = 64, 8
    qweight = torch.full((D // 8, N), in_int32([8] * 8), dtype=torch.int32)
    qweight[4, 2] = in_int32([0, 1, 2, 3, 4, 5, 6, 7])  # elements 32 to 39 of channel 2
    qzeros = torch.full((2, 1), in_int32([7] * 8), dtype=torch.int32)
    scales = torch.ones(2, N)
    scales[1, 2] = 0.5
    weight = formats.int4_from_gptq(qweight, qzeros, scales, torch.arange(D) // 32)
    assert weight.zero is None  # 8 everywhere
    values = Int4(32).dequantize(weight)
    assert values[2, 32:40].tolist() == [(code - 8) / 2 for code in range(8)]
    assert values.count_nonzero() == 8
    shifted = formats.int4_from_gptq(qweight, qzeros + 1, scales)
    assert shifted.zero is not None
    assert shifted.zero[0, 0] == 9
    assert shifted.zero[1, 0] == 8
    with pytest.raises(ValueError, match=r"polymoe\.formats: g_idx: expected groups of 32 in order"):
        formats.int4_from_gptq(qweight, qzeros, scales, torch.arange(D) % 2)


# --- mxfp4 to fp8 --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 64, 128])
def test_mxfp4_to_fp8_is_lossless(size: int, seed: int) -> None:
    """Scales within 2^11 of one another, which is as far as e4m3 reaches below 6 * 2^6."""
    random = Random(seed)
    data = random.integers(0, 256, 3, 130, 80, dtype=torch.uint8)
    scale = random.integers(100, 112, 3, 130, 5, dtype=torch.uint8)
    source = Weight(data, scale, None, "mxfp4", 130, 160)
    converted = formats.mxfp4_to_fp8(source, size)
    assert converted.format == f"fp8_block{size}"
    target = formats.parse(converted.format)
    assert torch.equal(target.dequantize(converted), Mxfp4().dequantize(source))


def test_mxfp4_to_fp8_says_what_would_be_lost() -> None:
    # 0.5 * 2^-14 beside 6: e4m3's smallest, 2^-9, stands for 2^-15 once 6 is 384.
    data = torch.zeros(1, 32, dtype=torch.uint8)
    data[0, 0], data[0, 16] = 0x07, 0x01
    exact = Weight(data, torch.tensor([[127, 113]], dtype=torch.uint8), None, "mxfp4", 1, 64)
    values = Fp8Block(128).dequantize(formats.mxfp4_to_fp8(exact))
    assert values[0, 0] == 6
    assert values[0, 32] == 2.0**-15
    lossy = Weight(data, torch.tensor([[127, 112]], dtype=torch.uint8), None, "mxfp4", 1, 64)
    with pytest.raises(ValueError, match=r"polymoe\.formats: weight: expected numbers .* the first .* at \[0, 32\]"):
        formats.mxfp4_to_fp8(lossy)
    data[0, 16] = 0  # zeros bind nothing
    assert formats.mxfp4_to_fp8(lossy).data.float().count_nonzero() == 1
