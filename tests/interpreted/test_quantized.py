"""Triton kernels for quantised weights, by the test bodies of the CPU backend, and checked for bounds and races."""

from dataclasses import replace

import pytest
import torch
from tests import test_quantized, test_quantized_kernels
from tests.interpreted.test_products import NoReads
from tests.test_quantized_kernels import NAMES, dequantized, multiply, weight_of
from triton.runtime.interpreter import InterpretedFunction

import polymoe
from polymoe import formats
from polymoe.hal.problem import OPS, Problem
from polymoe.hal.registry import find
from polymoe.hal.select import declined
from polymoe.kernels import _launch, quantized
from polymoe.kernels.devices import INTERPRETER, TARGETS, pretend
from polymoe.kernels.round_rows import round_rows
from polymoe.kernels.tiles import RULES, choose_quantized
from polymoe.kernels.tiles import Problem as Product
from polymoe.reference._quantized import in_fp8, in_int8
from polymoe.testing.cases import Random
from polymoe.testing.conformance.bitwise import check_batch
from polymoe.testing.targets import Target
from polymoe.testing.tolerances import assert_same_bits, assert_within, dot_error, relative_frobenius, unit_roundoff
from polymoe.testing.triton_checker import checked

TRITON = Target("triton")
INT8_FORMATS = [name for name in NAMES if "int8" in formats.parse(name).modes]
FP8_FORMATS = [name for name in NAMES if "fp8" in formats.parse(name).modes]
ROUNDED = [(name, "int8") for name in INT8_FORMATS] + [(name, "fp8") for name in FP8_FORMATS]
MODES = [(name, "weight_only") for name in NAMES] + ROUNDED
# Without the scaled matrix instructions that the interpreter has.
DECODING = replace(INTERPRETER, family="other", shared=1 << 40)
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def in_bounds():
    with checked() as found:
        yield
    assert found == []


def test_the_formats_are_those_of_polymoe():
    assert set(quantized.FORMATS) == set(formats.FORMATS)
    for name, format in quantized.FORMATS.items():
        assert (format.rows, format.group) == formats.parse(name).block


@pytest.mark.parametrize("name", NAMES)
def test_every_code_in_every_place(name, seed):
    test_quantized_kernels.test_every_code_in_every_place(name, 289, TRITON, seed)


@pytest.mark.parametrize("name", INT8_FORMATS)
def test_every_code_in_every_place_with_int8_activations(name, seed):
    test_quantized_kernels.test_every_code_in_every_place_with_int8_activations(name, "int8", 289, TRITON, seed)


def test_int8_activations_that_are_not_finite(seed):
    test_quantized_kernels.test_int8_activations_that_are_not_finite("int8", TRITON, seed)


@pytest.mark.parametrize("name", INT8_FORMATS)
def test_int8_rounds_what_is_multiplied(name, seed):
    test_quantized.test_int8_rounds_what_is_multiplied(name, "int8", seed)


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16], ids=str)
def test_rows_are_rounded_as_the_reference_does(dtype, seed):
    random = Random(seed)
    a = random.normal(7, 3, 109, dtype=F32) * 2.0 ** random.integers(-30, 12, 109)
    for rows in (a[:, 1].to(dtype), a[:, 0].mT.contiguous().mT.to(dtype)):
        codes, scales = round_rows(rows, "int8")
        assert codes.abs().max() <= 127
        assert not codes[:, 109:].any()
        assert torch.equal((codes.double() * scales.double().repeat_interleave(32, -1))[:, :109], in_int8(rows, 32))


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16], ids=str)
def test_rows_become_mxfp8(dtype, seed):
    """Bit for bit, in groups of every size, with ties; a group that is not finite is NaN."""
    random = Random(seed)
    a = random.normal(9, 3, 173, dtype=F32) * 2.0 ** random.integers(-40, 12, 173)
    a[:, :, 32:64] = random.integers(-64, 65, 9, 3, 32) / 16  # ties
    a[2, :, 64:96] = 448 * 2.0 ** random.integers(-126, -9, 3, 1)  # the largest of a scale, and beyond
    a[3, :, 64:96] = a[2, :, 64:96] * (1 + 2.0**-10)
    a[4], a[5] = 0, a[5] * 2.0**-100
    for rows in (a[:, 1].to(dtype), a[:, 0].mT.contiguous().mT.to(dtype)):
        codes, scales = round_rows(rows, "e4m3")
        expected = formats.Mxfp8().quantize(rows)
        assert not codes[:, 173:].any()
        assert torch.equal(codes[:, :173], expected.data.view(torch.uint8))
        assert torch.equal(scales, expected.scale.view(torch.uint8))
        rows[0, 40], rows[6, 172] = torch.inf, torch.nan
        codes, scales = round_rows(rows, "e4m3")
        bad = torch.zeros(9, 6, dtype=torch.bool)
        bad[0, 1] = bad[6, 5] = True
        assert torch.equal(scales == 255, bad)
        assert torch.equal(in_fp8(rows).isnan(), bad.repeat_interleave(32, -1)[:, :173])


@pytest.mark.parametrize("name", FP8_FORMATS)
@pytest.mark.parametrize("device", [INTERPRETER, DECODING], ids=lambda device: device.family)
def test_every_code_in_every_place_with_fp8_activations(name, device, seed):
    """448 times the unit matrix is exact in e4m3."""
    random, count, D = Random(seed), test_quantized_kernels.CODES[name], 289 if device == INTERPRETER else 70
    codes = (torch.arange(count)[:, None] + torch.arange(D) * 3) % count
    if name == "mxfp8":
        codes = codes.where(codes & 0x7F != 0x7F, 0)  # NaN
    weight = weight_of(name, codes[None], random)
    expected = (448 * dequantized(weight)[0].mT).float()
    with pretend(device):
        for rows in (random.permutation(D)[:5], torch.arange(D)):
            unit = 448 * torch.eye(D)[rows]
            for dtype in (F32, BF16, torch.float16) if len(rows) == D else (F32,):
                assert torch.equal(multiply(unit.to(dtype), weight, TRITON, mode="fp8"), expected[rows]), dtype


@pytest.mark.parametrize("name", FP8_FORMATS)
@pytest.mark.parametrize("device", [INTERPRETER, DECODING], ids=lambda device: device.family)
def test_fp8_activations(name, device, seed):
    """Rounded rows times the weight; a row with infinity or NaN is NaN, and no other. Of a term there are at most D + 3
    roundings, of independent errors: see polymoe.testing.tolerances.frobenius_error, but for its blocks."""
    random = Random(seed)
    T, N, D = 37, 40, 227
    weight = weight_of(name, random.integers(0, 0x77, 2, N, D), random)
    a, ends = random.normal(T, D) * 2.0 ** random.integers(-6, 6, D), torch.tensor([9, T])
    a[3, 200], a[20, 1] = torch.inf, torch.nan
    with pretend(device):
        out = multiply(a, weight, TRITON, ends, mode="fp8")
    rows, expert = in_fp8(a), (torch.arange(T) >= 9).long()
    truth = torch.einsum("td,tnd->tn", rows, dequantized(weight)[expert])
    assert torch.equal(out.isnan().all(1), out.isnan().any(1))
    assert torch.equal(out.isnan().any(1).nonzero().flatten(), torch.tensor([3, 20]))
    fine = ~out.isnan().any(1)
    assert relative_frobenius(out[fine], truth[fine]) < unit_roundoff(F32) * (D + 3) ** 0.5
    assert_same_bits(multiply(a, weight, Target("reference"), ends, mode="fp8"), truth.float(), "the reference")


def test_explain_says_whether_fp8_is_decoded():
    layer = test_quantized.Layer("mxfp4", 0)
    for device in (INTERPRETER, DECODING):
        with pretend(device):
            notes = polymoe.explain("experts", **layer.arguments, mode="fp8", backend="triton").notes
        assert any("decoded to bfloat16" in note for note in notes) == (device == DECODING), notes
    assert any("fp8" in note for note in notes)


@pytest.mark.parametrize("name", ["fp8_block32", "fp8_block128", "mxfp8"])
def test_nan_codes(name, seed):
    test_quantized_kernels.test_nan_codes(name, TRITON, seed)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "fp8_block32"])
def test_every_e8m0_scale(name):
    test_quantized_kernels.test_every_e8m0_scale(name, TRITON)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_groups_far_apart(name, seed):
    test_quantized_kernels.test_groups_far_apart(name, TRITON, seed)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_accuracy(name, dtype, seed):
    test_quantized_kernels.test_accuracy(name, dtype, TRITON, seed)


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_experts_is_the_composition_of_the_small_ops(name, mode, seed):
    test_quantized_kernels.test_experts_is_the_composition_of_the_small_ops(name, mode, TRITON, seed)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{"interleaved": True}, {"activation": "relu2"}], ids=str)
def test_experts_mean_code_times_scale(name, options, seed):
    test_quantized.test_experts_mean_code_times_scale(name, options, seed)


@pytest.mark.parametrize("name", NAMES)
def test_grouped_mm_means_code_times_scale(name, seed):
    test_quantized.test_grouped_mm_means_code_times_scale(name, seed)


@pytest.mark.parametrize("name", ["mxfp4", "fp8_block32", "int4_g32"])
def test_gradients(name, seed):
    test_quantized.test_gradients_of_every_backend(name, seed)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_rows(name, seed):
    test_quantized_kernels.test_gradients_of_rows(name, TRITON, seed)


def test_opcheck(seed):
    test_quantized.test_opcheck("int4_g32", seed)


def test_fp8_scales_of_either_kind(seed):
    test_quantized_kernels.test_fp8_scales_of_either_kind(TRITON, seed)


@pytest.mark.parametrize(("name", "mode"), MODES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_same_bits_in_any_batch(name, mode, dtype, seed):
    random = Random(seed)
    T, N, D = 70, 21, 667
    a, weight = test_quantized_kernels.cancelling(name, T, N, D, dtype, random)
    out = multiply(a, weight, TRITON, mode=mode)
    assert (out != 0).double().mean() > 0.2, "the inputs do not show the order of a sum"
    check_batch(lambda tokens: multiply(a[tokens], weight, TRITON, mode=mode), T, random, name)


@pytest.mark.parametrize("name", ["mxfp4", "int4_g64", "fp8_block64"])
def test_strides_chiplets_and_64_bit_offsets_change_no_bit(name, seed, monkeypatch):
    random = Random(seed)
    weight = weight_of(name, random.integers(0, 16, 3, 40, 130), random)
    a, ends = random.normal(35, 130), torch.tensor([12, 12, 30])
    expected = multiply(a, weight, TRITON, ends)
    assert_same_bits(multiply(a.mT.contiguous().mT, weight, TRITON, ends), expected, "rows along the other way")
    with pretend(replace(INTERPRETER, chiplets=8)):
        assert_same_bits(multiply(a, weight, TRITON, ends), expected, "on eight chiplets")
    monkeypatch.setattr(_launch, "LARGEST_INT32", 0)
    assert_same_bits(multiply(a, weight, TRITON, ends), expected, "64-bit offsets")


def test_nothing_to_do(seed):
    random = Random(seed)
    weight = weight_of("mxfp4", random.integers(0, 16, 2, 5, 64), random)
    how = {"weight_format": "mxfp4", "scale": weight.scale, "backend": "triton"}
    for a, ends in ((torch.zeros(0, 64), torch.tensor([0, 0])), (torch.zeros(2, 0, 64), None)):
        out = polymoe.grouped_mm(a, weight.data.mT, ends, **how)
        assert out.shape == (*a.shape[:-1], 5)


def test_the_host_reads_nothing(seed, monkeypatch):
    monkeypatch.setattr(InterpretedFunction, "run", lambda *args, **options: None)
    layer = test_quantized.Layer("mxfp4", seed)
    how = {"weight_format": "mxfp4", "scale": layer.gate_up.scale, "backend": "triton"}
    with NoReads():
        polymoe.experts(**layer.arguments, backend="triton")
        polymoe.grouped_mm(layer.x, layer.gate_up.data.mT, torch.tensor([1, 2, 4, 5]), **how)
        polymoe.grouped_mm(layer.x.expand(4, *layer.x.shape), layer.gate_up.data.mT, **how)


def test_a_narrow_reduction(seed):
    """Shorter than a group, and odd."""
    random = Random(seed)
    for name in NAMES:
        weight = weight_of(name, random.integers(0, 16, 1, 3, 5), random)
        a, numbers = random.normal(4, 5).double(), dequantized(weight)[0].mT
        bound = dot_error(a.abs() @ numbers.abs(), 5 + 3, F32)  # and roundings of a scale, a product and a sum
        assert_within(multiply(a.float(), weight, TRITON), a @ numbers, bound, name)


@pytest.mark.parametrize("name", NAMES)
def test_tf32_rounds_the_rows_alone(name, seed):
    """Codes are tf32 numbers, and scales multiply float32 sums."""
    random, matmul = Random(seed), torch.backends.cuda.matmul
    codes = random.integers(0, min(test_quantized_kernels.CODES[test_quantized_kernels.family(name)], 0x7F), 1, 9, 96)
    weight, a = weight_of(name, codes, random), random.normal(5, 96)
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        out = multiply(a, weight, TRITON)
    finally:
        matmul.fp32_precision = before
    bits = a.view(torch.int32)
    nearest = (bits + 0xFFF + (bits >> 13 & 1) & ~0x1FFF).view(F32)
    assert_same_bits(out, multiply(nearest, weight, TRITON), "tf32")
    assert not torch.equal(out, multiply(a, weight, TRITON))


@pytest.mark.parametrize(("family", "arithmetic"), sorted(RULES))
@pytest.mark.parametrize("group", [32, 64, 128, None])
def test_steps_stay_within_a_group_in_any_batch(family, arithmetic, group):
    device = TARGETS.get(family, replace(INTERPRETER, family=family))
    chosen = [choose_quantized(Product(arithmetic, S, 64, 4096, 2048), device, group) for S in (1, 100, 10**4, 10**6)]
    (step,) = {tiles.block_k for tiles in chosen}
    assert step <= 128
    assert group is None or group % step == 0
    assert {tiles.block_n for tiles in chosen} == {chosen[0].block_n}
    assert not any(tiles.descriptors or tiles.persistent for tiles in chosen)


def test_what_is_served():
    for op in ("experts", "grouped_mm"):
        for name, mode in MODES:
            options = OPS[op].options | {"weight_format": name, "mode": mode}
            assert declined(find("triton"), Problem(op, "cpu", BF16, tuple(options.values()))) is None
        by_128 = OPS[op].options | {"weight_format": "int8", "mode": "int8_g128"}
        assert "in groups of 32" in declined(find("triton"), Problem(op, "cpu", BF16, tuple(by_128.values())))
    for name in NAMES:
        assert declined(find("triton"), Problem("quantized_backward", "cpu", BF16, (name,))) is None
