"""Products with quantised weights on every backend and ISA level: every code of every format through the matmul, every
scale, and the same bits whatever the batch, the threads or the fusion."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import polymoe
from polymoe import formats
from polymoe.formats import Fp8Block, Int4, Weight
from polymoe.formats.codes import pack_nibbles, round_up_to_e8m0, to_e4m3
from polymoe.reference._quantized import INT8_GROUPS
from polymoe.testing.cases import Random
from polymoe.testing.conformance._run import op_threads, serial
from polymoe.testing.conformance.bitwise import check_batch, check_threads
from polymoe.testing.targets import Target, servers
from polymoe.testing.tolerances import (
    assert_same_bits,
    assert_within,
    dot_error,
    frobenius_error,
    relative_frobenius,
)

NAMES = tuple(formats.FORMATS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODES = {"mxfp4": 16, "int4": 16, "int8": 256, "mxfp8": 256, "fp8": 256}


def family(name: str) -> str:
    return name if name in CODES else name.split("_")[0]


def weight_of(name: str, codes: Tensor, random: Random, same_scales: bool = False) -> Weight:
    """A weight [G, N, D] of these codes, with random scales, and zero points where the format has them."""
    G, N, D = codes.shape
    format = formats.parse(name)
    byte = codes.to(torch.uint8)
    kind = family(name)
    data = pack_nibbles(byte) if kind in ("mxfp4", "int4") else byte
    data = data.view(torch.int8) if kind == "int8" else data.view(torch.float8_e4m3fn) if "fp8" in kind else data
    shape = (G, *format.scale_shape(N, D))
    if kind.startswith("mx"):
        data = pack_nibbles(byte) if kind == "mxfp4" else data
        scale = torch.full(shape, 120, dtype=torch.uint8) if same_scales else random.integers(100, 150, *shape)
        scale = scale.to(torch.uint8)
    else:
        scale = torch.ones(shape) if same_scales else random.weights(shape[0], torch.Size(shape[1:]).numel())
        scale = scale.reshape(shape)
    zero = None
    if kind == "int4" and not same_scales:  # mostly those that are decoded in registers everywhere
        usual, any_ = (random.integers(0, end, *shape, dtype=torch.uint8) for end in (17, 256))
        zero = usual.where(random.integers(0, 200, *shape) > 0, any_)
    return Weight(data, scale, zero, name, N, D)


def multiply(a: Tensor, weight: Weight, target: Target, ends: Tensor | None = None, **options: Any) -> Tensor:
    if ends is None:
        ends = torch.tensor([a.shape[0]])
    how = (weight.format, weight.scale, weight.zero)
    with target.active(), op_threads(target):
        return polymoe.grouped_mm(a, weight.data.mT, ends, None, torch.float32, *how, backend=target.backend, **options)


MODES = [
    (name, mode)
    for mode in formats.MODES
    for name in NAMES
    if mode in formats.FORMATS[name].modes and "cpu" in servers("grouped_mm", weight_format=name, mode=mode)
]
INT8_MODES = [(name, mode) for name, mode in MODES if mode != "weight_only"]


def dequantized(weight: Weight) -> Tensor:
    return formats.parse(weight.format).dequantize(weight, torch.float64)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("D", [70, 545])
@serial
def test_every_code_in_every_place(name: str, D: int, target: Target, seed: int) -> None:
    """The unit matrix times a weight is the weight; with few rows at a time, and with all."""
    random, count = Random(seed), CODES[family(name)]
    codes = (torch.arange(count)[:, None] + torch.arange(D) * 3) % count
    if "fp8" in name:
        codes = codes.where(codes & 0x7F != 0x7F, 0)  # NaN
    weight = weight_of(name, codes[None], random)
    expected = dequantized(weight)[0].mT.float()
    for dtype in DTYPES:
        unit = torch.eye(D, dtype=dtype)
        assert torch.equal(multiply(unit, weight, target), expected), dtype
        for rows in (1, 2, 3, 4):
            some = random.permutation(D)[:rows]
            assert torch.equal(multiply(unit[some], weight, target), expected[some]), (dtype, rows)


@pytest.mark.parametrize(("name", "mode"), INT8_MODES)
@pytest.mark.parametrize("D", [70, 545])
@serial
def test_every_code_in_every_place_with_int8_activations(
    name: str, mode: str, D: int, target: Target, seed: int
) -> None:
    """The same with 127 times the unit matrix, which 8-bit integers hold exactly; any number of columns."""
    random, count = Random(seed), CODES[family(name)]
    codes = (torch.arange(count + 3)[:, None] + torch.arange(D) * 3) % count
    weight = weight_of(name, codes[None], random)
    expected = (127 * dequantized(weight)[0].mT).float()
    for dtype in DTYPES:
        unit = 127 * torch.eye(D, dtype=dtype)
        assert torch.equal(multiply(unit, weight, target, mode=mode), expected), dtype
        for rows in (1, 2, 5, 7):
            some = random.permutation(D)[:rows]
            assert torch.equal(multiply(unit[some], weight, target, mode=mode), expected[some]), (dtype, rows)


@pytest.mark.parametrize(("name", "mode"), INT8_MODES)
def test_int8_activations_round_alike_on_every_backend(name: str, mode: str, target: Target, seed: int) -> None:
    """Elements of few bits are often in the middle between two codes, where the last bit of a quotient decides."""
    random, D = Random(seed), 330
    weight = weight_of(name, random.integers(0, CODES[family(name)], 1, 9, D), random)
    a = random.normal(70, D, dtype=torch.bfloat16)
    groups = torch.nn.functional.pad(a.float(), (0, -D % INT8_GROUPS[mode])).unflatten(-1, (-1, INT8_GROUPS[mode]))
    largest = groups.abs().amax(-1, keepdim=True).numpy()
    product = groups.numpy() * (np.float32(127) / largest)  # float32, every step rounded to nearest
    rounded = torch.from_numpy(np.rint(product).astype(np.float64) * (largest / np.float32(127))).flatten(-2)[:, :D]
    numbers = dequantized(weight)[0].mT
    bound = dot_error(rounded.abs() @ numbers.abs(), D + 3, torch.float32)  # and roundings of a scale and its products
    assert_within(multiply(a, weight, target, mode=mode), rounded @ numbers, bound, f"{name}, {mode}")


@pytest.mark.parametrize("mode", ["int8", "int8_g128"])
def test_int8_activations_that_are_not_finite(mode: str, target: Target, seed: int) -> None:
    """One such element makes its row NaN, and no other; zeros and the largest numbers stay what they are."""
    random = Random(seed)
    weight = weight_of("mxfp4", random.integers(0, 16, 1, 20, 96), random)
    a = random.normal(7, 96)
    a[1, 40], a[2, 95], a[3], a[4] = torch.inf, torch.nan, 0, 1e-44
    out = multiply(a, weight, target, mode=mode)
    assert out[1:3].isnan().all()
    assert out[[0, 3, 4, 5, 6]].isfinite().all()
    assert not out[3].any()
    large = torch.full((1, 96), 3e38)
    weight.scale.fill_(60)  # 2^-67
    truth = large.double() @ dequantized(weight)[0].mT
    assert relative_frobenius(multiply(large, weight, target, mode=mode), truth) <= frobenius_error(96)


def published_activations(x: Tensor, powers_of_two: bool = True) -> Tensor:
    """DeepSeek-V4's own rounding of activations: e4m3 in groups of 128, scale max(largest, 1e-4) / 448 rounded up to a
    power of two."""
    groups = x.unflatten(-1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448
    if powers_of_two:
        scale = round_up_to_e8m0(scale).float()
    return (to_e4m3(groups / scale).float() * scale).flatten(-2)


@pytest.mark.parametrize(("name", "mode"), INT8_MODES)
def test_int8_errs_less_than_the_published_rounding(name: str, mode: str, target: Target, seed: int) -> None:
    """On normal, heavy-tailed and outlier-channel rows. Not always: weights that are small where the rows are large
    lose, and groups of 128 lose to float32 scales there are outliers, as printed."""
    random = Random(seed)
    T, N, D = 384, 64, 1024  # of few tokens the outliers' errors, which are most of it, say little
    normal, dense = random.normal(T, D), random.matrix(1, N, D, dtype=torch.float32)
    heavy = normal / (random.normal(3, T, D).square().mean(0)).sqrt()  # Student's t with 3 degrees of freedom
    channels, outliers = random.permutation(D)[: D // 100], normal.clone()
    outliers[:, channels] *= 30
    shy = dense.clone()
    shy[..., channels] /= 30
    for what, x, weight, holds in (
        ("normal", normal, dense, True),
        ("heavy-tailed", heavy, dense, True),
        ("outlier channels", outliers, dense, True),
        ("outlier channels, small weights there", outliers, shy, False),
    ):
        stored = formats.parse(name).quantize(weight)
        numbers = dequantized(stored)[0].mT
        truth = x.double() @ numbers
        ours = relative_frobenius(multiply(x, stored, target, mode=mode), truth)
        theirs, in_float = (
            relative_frobenius(published_activations(x, exponents).double() @ numbers, truth)
            for exponents in (True, False)
        )
        print(f"{name} {what}: {mode} {ours:.4f}, e4m3 {theirs:.4f}, with float32 scales {in_float:.4f}")
        assert ours <= theirs or not holds, what


@pytest.mark.parametrize("name", ["fp8_block32", "fp8_block128", "mxfp8"])
def test_nan_codes(name: str, target: Target, seed: int) -> None:
    """NaN in the rows that have such a code, wherever, and in no other."""
    random = Random(seed)
    codes = random.integers(0, 0x7F, 1, 20, 131)
    for row, column in ((3, 0), (7, 64), (12, 130)):
        codes[0, row, column] = 0x7F if row != 7 else 0xFF
    weight = weight_of(name, codes, random)
    for dtype in DTYPES:
        for rows in (1, 9):
            out = multiply(random.normal(rows, 131, dtype=dtype), weight, target)
            assert out.isnan().any(0).nonzero().flatten().tolist() == [3, 7, 12]
            assert out[:, [3, 7, 12]].isnan().all()


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "fp8_block32"])
def test_every_e8m0_scale(name: str, target: Target) -> None:
    """Each row of scales the same, from 2^-127 to 2^127; the products of 1 are float32 numbers, also subnormal ones."""
    rows = 255 * formats.parse(name).block[0]
    codes = torch.full((1, rows, 96), 0x38 if "8" in name else 2)  # 1
    scale = torch.arange(255, dtype=torch.uint8)[None, :, None].expand(1, 255, 3).contiguous()
    weight = Weight(weight_of(name, codes, Random(0)).data, scale, None, name, rows, 96)
    expected = dequantized(weight)[0, :, :1].mT.float()
    for dtype in DTYPES:
        for count in (1, 6):
            a = torch.zeros(count, 96, dtype=dtype)
            a[:, 40] = 1
            assert torch.equal(multiply(a, weight, target), expected.expand(count, -1))
    scale[0, 7, 1] = 255
    nan = multiply(torch.ones(2, 96), weight, target).isnan()
    size = formats.parse(name).block[0]
    assert nan[:, 7 * size : 8 * size].all()
    assert nan.sum() == 2 * size


@pytest.mark.parametrize("mode", ["int8", "int8_g128"])
def test_every_e8m0_scale_with_int8_activations(mode: str, target: Target) -> None:
    """The same with rows of 127, which 8-bit integers hold exactly; 18 groups, of which 16 are read at a time."""
    codes = torch.full((1, 256, 576), 2)  # 1
    scale = torch.arange(256, dtype=torch.uint8)[None, :, None].expand(1, 256, 18).contiguous()
    weight = Weight(weight_of("mxfp4", codes, Random(0)).data, scale, None, "mxfp4", 256, 576)
    expected = (127 * dequantized(weight)[0, :, :1].mT).float()
    for count in (1, 7):
        for place in (40, 570):
            a = torch.zeros(count, 576)
            a[:, place] = 127
            out = multiply(a, weight, target, mode=mode)
            assert torch.equal(out[:, :255], expected[:, :255].expand(count, -1))
            assert out[:, 255].isnan().all()


@pytest.mark.declares("batch_invariant")
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
@pytest.mark.parametrize("power", [-125, -100, -60, 0, 60, 100, 120])
def test_same_bits_where_products_by_scales_are_not_exact(name: str, power: int, target: Target, seed: int) -> None:
    """Rows and scales of any size, whose sums become subnormal numbers or infinite: many rows have the bits of one."""
    random = Random(seed)
    N, D, rows = 45, 608, 40
    codes = random.integers(0, 16 if name == "mxfp4" else 0x7F, 1, N, D)
    for scales in (-126, -60, 0, 60, 120):
        weight = weight_of(name, codes, random)
        weight.scale.copy_(random.integers(scales + 127, scales + 131, *weight.scale.shape))
        a = (random.normal(rows, D) * 2.0**power).to(torch.bfloat16)
        a[::3, ::5] = 0
        out = multiply(a, weight, target)
        alone = torch.cat([multiply(a[i : i + 1], weight, target) for i in range(rows)])
        assert_same_bits(out, alone, f"rows of 2^{power}, scales of 2^{scales}")


@pytest.mark.declares("batch_invariant")
@pytest.mark.parametrize("apart", [0, 1, 3, 4, 40])
def test_groups_some_powers_apart_with_int8_activations(apart: int, target: Target, seed: int) -> None:
    """Four groups of 32 that share a scale of A, within a factor of 8 or not: where they are, a panel may hold their
    codes times it. The bits of many rows are those of each row on its own."""
    random = Random(seed)
    N, D, rows = 45, 1312, 17  # 41 groups: the last four share theirs with padding
    weight = weight_of("mxfp4", random.integers(0, 16, 1, N, D), random)
    least = random.integers(90, 160, 1, N, 11).repeat_interleave(4, -1)[..., :41]
    scale = least + random.integers(0, apart + 1, 1, N, 41)
    scale[0, :20, :4] -= 62  # around the smallest and the largest that are summed in integers
    scale[0, 7:12, 20:24] += 62
    weight.scale.copy_(scale.clamp(max=224))
    a = random.normal(rows, D)
    out = multiply(a, weight, target, mode="int8_g128")
    alone = torch.cat([multiply(a[i : i + 1], weight, target, mode="int8_g128") for i in range(rows)])
    assert_same_bits(out, alone, f"scales {apart} powers of two apart")
    numbers = dequantized(weight)[0].mT
    groups = torch.nn.functional.pad(a, (0, -D % 128)).unflatten(-1, (-1, 128))
    half_a_code = (groups.abs().amax(-1, keepdim=True) / 254).expand_as(groups).flatten(-2)[:, :D].double()
    bound = half_a_code @ numbers.abs() + dot_error(a.double().abs() @ numbers.abs(), D, torch.float32)
    assert_within(out, a.double() @ numbers, bound, f"scales {apart} powers of two apart")


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_groups_far_apart(name: str, target: Target, seed: int) -> None:
    """Groups of a row that differ by up to 2^100."""
    random = Random(seed)
    codes = random.integers(0, 16 if name == "mxfp4" else 0x7F, 1, 40, 600)
    weight = weight_of(name, codes, random)
    weight.scale.copy_(random.integers(60, 161, *weight.scale.shape))
    truth = dequantized(weight)[0]
    for dtype in DTYPES:
        a = random.normal(7, 600, dtype=dtype)
        bound = 2.0**-18 * (a.double().abs() @ truth.abs().mT)
        assert ((multiply(a, weight, target).double() - a.double() @ truth.mT).abs() <= bound).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@serial
def test_accuracy(name: str, dtype: torch.dtype, target: Target, seed: int) -> None:
    """Float32 sums of exact products: rounding errors of a random walk over what a lane adds up, and no more."""
    random = Random(seed)
    format = formats.parse(name)
    weight = (Int4(format.group, zero_points=True) if isinstance(format, Int4) else format).quantize(
        random.matrix(2, 97, 2080, dtype=torch.float32)
    )
    a, ends = random.normal(41, 2080, dtype=dtype), torch.tensor([3, 40])
    truth = torch.zeros(41, 97, dtype=torch.float64)
    dense = dequantized(weight)
    truth[:3], truth[3:40] = a[:3].double() @ dense[0].mT, a[3:40].double() @ dense[1].mT
    out = multiply(a, weight, target, ends)
    assert relative_frobenius(out, truth) < frobenius_error(2080)
    assert not out[40].any()


def cancelling(name: str, rows: int, N: int, D: int, dtype: torch.dtype, random: Random) -> tuple[Tensor, Weight]:
    """Rows and a weight whose products are exactly zero, so that what comes out are rounding errors: every element of
    the reduction has a partner with the same weight and the opposite factor."""
    half = D // 2
    codes = random.integers(0, CODES[family(name)], 1, N, half)
    codes = codes.where((codes & 0x7F) != 0x7F, 0)
    order = random.permutation(half)
    weight = weight_of(name, torch.cat([codes, codes[..., order]], -1), random, same_scales=True)
    a = random.normal(rows, half, dtype=dtype) * 2.0 ** random.integers(-6, 6, half).to(dtype)
    return torch.cat([a, -a[:, order]], -1), weight


@pytest.mark.declares("deterministic", "batch_invariant")
@pytest.mark.parametrize(("name", "mode"), MODES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)  # float16 has the kernel of float32
def test_same_bits_in_any_batch_and_on_any_number_of_threads(
    name: str, mode: str, dtype: torch.dtype, target: Target, seed: int
) -> None:
    random = Random(seed)
    T, N, D = 130, 45, 1334
    a, weight = cancelling(name, T, N, D, dtype, random)
    with target.active():
        how = (weight.format, weight.scale, weight.zero, mode)

        def call(tokens: Tensor) -> Tensor:
            ends = torch.tensor([len(tokens)])
            rows = a[tokens]
            return polymoe.grouped_mm(rows, weight.data.mT, ends, None, torch.float32, *how, backend=target.backend)

        out = call(torch.arange(T))
        assert (out != 0).double().mean() > 0.2, "the inputs do not show the order of a sum"
        check_batch(call, T, random, name)
        check_threads(lambda: call(torch.arange(T)), name)


@pytest.mark.declares("deterministic")
@pytest.mark.parametrize(("name", "mode"), MODES)
@serial
def test_experts_is_the_composition_of_the_small_ops(name: str, mode: str, target: Target, seed: int) -> None:
    random = Random(seed)
    options: dict[str, Any] = {"interleaved": True, "weight_placement": "input"} if random.integer(0, 2) else {}
    T, H, I, E, K = 37, 193, 130, 3, 2
    gate_up, down = (
        formats.parse(name).quantize(random.matrix(E, *shape, dtype=torch.float32)) for shape in ((2 * I, H), (H, I))
    )
    ids, weights = random.integers(0, E + 1, T, K, dtype=torch.int32), random.weights(T, K)
    biases = random.normal(E, 2 * I), random.normal(E, H)
    interleaved, at_input = options.get("interleaved", False), options.get("weight_placement") == "input"
    for dtype in DTYPES:
        x = random.normal(T, H, dtype=dtype)
        with target.active(), polymoe.use_backend(target.backend):
            out = polymoe.experts(
                x,
                gate_up.data,
                down.data,
                weights,
                ids,
                "swiglu",
                None,
                None,
                *biases,
                weight_format=name,
                mode=mode,
                gate_up_scale=gate_up.scale,
                down_scale=down.scale,
                **options,
            )
            p = polymoe.plan(ids, E)
            rows, f32, ends = polymoe.dispatch(x, p, weights if at_input else None), torch.float32, p.offsets[1:]
            h = polymoe.grouped_mm(rows, gate_up.data.mT, ends, biases[0], f32, name, gate_up.scale, None, mode)
            act = polymoe.activate(h, "swiglu", interleaved=interleaved, plan=p, out_dtype=dtype)
            y = polymoe.grouped_mm(act, down.data.mT, ends, biases[1], f32, name, down.scale, None, mode)
            composed = polymoe.combine(y, p, None if at_input else weights, dtype)
        assert_same_bits(out, composed, str(dtype))


def test_fp8_scales_of_either_kind(target: Target, seed: int) -> None:
    """Exponents in e8m0 are the same as in float32."""
    random = Random(seed)
    weight = Fp8Block(32, torch.float8_e8m0fnu).quantize(random.normal(1, 70, 100))
    a = random.normal(6, 100)
    same = Weight(weight.data, weight.scale.float(), None, weight.format, 70, 100)
    assert_same_bits(multiply(a, weight, target), multiply(a, same, target), "scales in float32")


def test_decoded_once_for_many_rows() -> None:
    """The closed form that chooses between decoding in registers and into a panel."""
    extension = pytest.importorskip("polymoe._C", reason="the C++ extension is not built")
    assert [extension.decodes_once(rows, 4) for rows in (0, 1, 4, 5, 64)] == [False, False, False, True, True]
    assert extension.decodes_once(3, 2)


@pytest.mark.parametrize("name", NAMES)
@serial
def test_gradients_of_rows(name: str, target: Target, seed: int) -> None:
    """Rows sent back through a weight, accurate, zero past the last group; for backends that promise it the same bits
    in any batch and on any number of threads."""
    random = Random(seed)
    G, M, N, D = 3, 90, 70, 515
    weight = weight_of(name, random.integers(0, CODES[family(name)], G, N, D) & 0x7E, random)
    offs = torch.tensor([3, 3, M - 1])
    stored = (weight.data, weight.scale, weight.zero)
    backend = target.backend
    for dtype in DTYPES:
        grad = random.normal(M, N, dtype=dtype)
        truth = torch.zeros(M, D, dtype=torch.float64)
        dense = dequantized(weight)
        truth[:3], truth[3 : M - 1] = grad[:3].double() @ dense[0], grad[3 : M - 1].double() @ dense[2]
        with target.active():

            def call(tokens: Tensor, grad: Tensor = grad) -> Tensor:
                ends = torch.tensor([0, 0, len(tokens)])
                out: Tensor = torch.ops.polymoe.quantized_backward(
                    grad[tokens], *stored, ends, D, name, torch.float32, backend=backend
                )
                return out

            out = torch.ops.polymoe.quantized_backward(grad, *stored, offs, D, name, torch.float32, backend=backend)
            assert relative_frobenius(out, truth) < frobenius_error(N)
            assert not out[M - 1].any()
            cube = grad[: 3 * 4].unflatten(0, (3, 4))
            together = torch.ops.polymoe.quantized_backward(
                cube, *stored, None, D, name, torch.float32, backend=backend
            )
            assert relative_frobenius(together, cube.double() @ dense) < frobenius_error(N)
            if target.properties.batch_invariant and dtype == torch.bfloat16:
                check_batch(call, M, random, name)
                check_threads(lambda: call(torch.arange(M)), name)
