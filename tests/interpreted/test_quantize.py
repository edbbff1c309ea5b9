"""Quantising by Triton kernels: the bits that polymoe.formats defines in plain PyTorch, and no access out of bounds."""

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

import polymoe
from polymoe import formats
from polymoe.formats import Fp8Block, Int4
from polymoe.kernels import _launch
from polymoe.testing.cases import Random
from polymoe.testing.poison import poisoned
from polymoe.testing.triton_checker import checked

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FORMATS = [
    *formats.FORMATS.values(),
    *(Fp8Block(size, torch.float8_e8m0fnu) for size in (32, 64, 128)),
    *(Int4(group, zero_points=True) for group in (32, 64, 128)),
]


def describe(format):
    powers = isinstance(format, Fp8Block) and format.scale_dtype != F32
    return f"{format.name}{'-e8m0' if powers else ''}{'-zero_points' if format.zero_points else ''}"


def test_the_backend_of_the_device_quantises(monkeypatch):
    """The one that is asked for, or the one that would multiply; plain PyTorch where it has no kernel."""
    launched = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda *args, **options: launched.append(args))
    for backend, count in ((None, 0), ("cpu", 0), ("reference", 0), ("triton", 1)):
        launched.clear()
        with polymoe.use_backend(backend):
            formats.Mxfp8().quantize(torch.ones(2, 40))
        assert len(launched) == count, backend


@pytest.fixture(params=FORMATS, ids=describe)
def format(request):
    return request.param


def assert_as_defined(format, weight):
    """Through the public call, in poisoned memory."""
    with checked() as found, poisoned(), polymoe.use_backend("triton"):
        quantized = format.quantize(weight)
    assert found == []
    assert quantized.shape == weight.shape
    right = format.encode(weight.float())
    for got, expected in zip((quantized.data, quantized.scale, quantized.zero), right, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
            assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


def numbers(random, *shape, dtype):
    """Of every size along the reduction, with ties, groups of zeros of either sign, and subnormal ones."""
    weight = random.normal(*shape) * 2.0 ** random.integers(-20, 10, shape[-1])
    weight[..., 32:64] = random.integers(-64, 65, *shape[:-1], weight[..., 32:64].shape[-1]) / 16
    weight[..., 1:2, 64:] = 0.0 * (2 * random.integers(0, 2, *weight[..., 1:2, 64:].shape) - 1)
    weight[..., 2:4, :] *= 2.0 ** (-130 if dtype != F16 else -12)
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_bits(format, dtype, seed):
    random = Random(seed)
    N, D = random.integer(33, 140), random.integer(130, 200)
    assert_as_defined(format, numbers(random, N, D, dtype=dtype))


def test_edges(format, seed):
    random = Random(seed)
    for shape in ((1, 1), (3, 1, 31), (2, 2, 1, 33), (32, 64), (129, 1)):
        assert_as_defined(format, numbers(random, *shape, dtype=F32))


def test_strides(format, seed):
    random = Random(seed)
    weight = numbers(random, 2, 70, 2, 101, dtype=BF16)
    assert_as_defined(format, weight[:, :, 1])
    assert_as_defined(format, weight[1, :, 0].mT)
    assert_as_defined(format, weight.permute(0, 2, 3, 1)[:, :, :9, ::2])  # one stride for two leading dimensions
    assert_as_defined(format, weight.permute(2, 0, 3, 1)[:, :, :9])  # none
    assert_as_defined(format, weight[:, :1, 1, :1].expand(2, 20, 80))


def ties(format):
    """Rows of one group, whose quotients by the scale are the numbers halfway between codes, and those next to them."""
    integer = 15.0 if format.zero_points else {"int8": 127.0}.get(format.name, 7.0)
    if "fp8" in format.name:
        largest, steps = 448.0, [torch.arange(1024) / 1024, torch.arange(16, 256) / 16, torch.arange(16, 449.0)]
    else:
        largest = 6.0 if format.name == "mxfp4" else integer
        steps = [torch.arange(4 * largest + 1) / 4]
    middle = torch.cat(steps)
    around = torch.cat([middle, middle.nextafter(middle + 1), middle.nextafter(middle - 1)])
    rows = torch.nn.functional.pad(around, (0, -len(around) % 31)).view(-1, 31)
    rows = torch.cat([torch.full((len(rows), 1), largest), rows], 1)  # so the scale is 1
    return torch.cat([rows, -rows])


def test_ties(format, seed):
    """Under scales of every size. As many rows as a block has share one."""
    rows, B = ties(format), format.block[0]
    sizes = 2.0 ** Random(seed).integers(-100, 100, len(rows) // B + 1, 1)
    assert_as_defined(format, rows * sizes.repeat_interleave(B, 0)[: len(rows)])


def test_largest_numbers_of_groups(format, seed):
    """Where scales are rounded: next to powers of two times the largest code, from subnormal numbers to the largest."""
    random = Random(seed)
    largest = torch.cat([2.0 ** torch.arange(-149, 127) * factor for factor in (1.0, 1.5, 1.75, 127 / 64, 15 / 8)])
    largest = torch.cat([largest, largest.nextafter(largest * 2), largest.nextafter(largest / 2)])
    largest = largest[random.permutation(len(largest))[: 40 if format.block[0] > 1 else 100]]
    others = random.normal(len(largest), (format.block[1] or 32) - 1).clamp(-1, 1)
    signs = random.integers(0, 2, len(largest), 1) * 2 - 1
    groups = torch.cat([signs, others], 1) * largest[:, None]
    assert_as_defined(format, groups if format.block[1] is None else groups.view(1, -1))
    limits = torch.finfo(F32)
    assert_as_defined(format, torch.tensor([[limits.max, -limits.max, 1e30, -0.0, limits.tiny]]))


def test_64_bit_offsets_change_no_bit(format, seed, monkeypatch):
    monkeypatch.setattr(_launch, "LARGEST_INT32", 0)
    assert_as_defined(format, numbers(Random(seed), 2, 40, 130, dtype=F32))


def test_refused_as_everywhere(format):
    with polymoe.use_backend("triton"):
        for bad in (torch.inf, -torch.inf, torch.nan):
            with pytest.raises(ValueError, match="weight: expected finite elements, got infinity or NaN"):
                format.quantize(torch.tensor([[1.0, bad]]))
        with pytest.raises(ValueError, match="weight: expected float32, bfloat16 or float16"):
            format.quantize(torch.ones(2, 2, dtype=torch.float64))
        assert format.quantize(torch.ones(0, 3, 5)).shape == (0, 3, 5)
