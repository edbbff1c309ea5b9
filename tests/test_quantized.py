"""experts and grouped_mm with quantised weights: arguments, meaning, gradients. What every backend has to compute is in
the conformance kit."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck

import polymoe
from polymoe import formats
from polymoe.formats import Int4, Weight
from polymoe.testing.cases import Random, routing
from polymoe.testing.targets import servers
from polymoe.testing.tolerances import FUNCTION_ERRORS, frobenius_error, relative_frobenius, unit_roundoff

T, H, I, E, K = 6, 40, 36, 4, 2
NAMES = tuple(formats.FORMATS)


def quantized(name: str, dense: Tensor) -> Weight:
    """With zero points where the format has them."""
    format = formats.parse(name)
    return (Int4(format.group, zero_points=True) if isinstance(format, Int4) else format).quantize(dense)


def dequantized(weight: Weight, dtype: torch.dtype = torch.float64) -> Tensor:
    return formats.parse(weight.format).dequantize(weight, dtype)


def layer_error(*after: int) -> float:
    """Of the relative Frobenius error of a layer in float32: sums over H, an activation, then sums of these lengths. No
    activation here more than doubles the error of what it is given."""
    return 2 * frobenius_error(H) + FUNCTION_ERRORS * unit_roundoff(torch.float32) + sum(map(frobenius_error, after))


def int8_error(rows: Tensor, group: int) -> float:
    """Root mean square, relative to the rows, of errors that are even within half a step of each group."""
    groups = rows.double().split(group, dim=-1)
    squares = sum(part.shape[-1] * (part.abs().amax(-1) / 127).square().sum() / 12 for part in groups)
    return float((squares / rows.double().square().sum()).sqrt())


class Layer:
    """A small layer with quantised weights, and its dense twin."""

    def __init__(self, name: str, seed: int, dtype: torch.dtype = torch.float32, T: int = T) -> None:
        random = Random(seed)
        self.gate_up = quantized(name, random.matrix(E, 2 * I, H, dtype=torch.float32))
        self.down = quantized(name, random.matrix(E, H, I, dtype=torch.float32))
        self.x, self.weights = random.normal(T, H, dtype=dtype), random.weights(T, K)
        self.ids = routing(random, "skipping", T, K, E)
        self.biases = {"gate_up_bias": random.normal(E, 2 * I), "down_bias": random.normal(E, H)}
        self.arguments: dict[str, Any] = {
            "x": self.x,
            "gate_up": self.gate_up.data,
            "down": self.down.data,
            "weights": self.weights,
            "ids": self.ids,
            "weight_format": name,
            "gate_up_scale": self.gate_up.scale,
            "down_scale": self.down.scale,
            "gate_up_zero": self.gate_up.zero,
            "down_zero": self.down.zero,
        }

    def dense(self, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
        pair = {"gate_up": dequantized(self.gate_up, dtype), "down": dequantized(self.down, dtype)}
        return {"x": self.x.to(dtype), **pair, "weights": self.weights.to(dtype), "ids": self.ids}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"interleaved": True}, {"activation": "relu2"}], ids=str)
def test_experts_mean_code_times_scale(name: str, options: dict[str, Any], seed: int) -> None:
    layer = Layer(name, seed)
    if options.get("activation"):
        options = options | {"gate_up_bias": None}
        up = quantized(name, Random(seed + 1).matrix(E, I, H, dtype=torch.float32))
        layer.gate_up = up
        layer.arguments |= {"gate_up": up.data, "gate_up_scale": up.scale, "gate_up_zero": up.zero}
    options = layer.biases | options
    wide = {key: value.double() if isinstance(value, Tensor) else value for key, value in options.items()}
    truth = polymoe.experts(**layer.dense(), **wide, backend="reference")
    for backend in servers("experts", weight_format=name):
        out = polymoe.experts(**layer.arguments, **options, backend=backend)
        assert out.dtype == torch.float32
        assert relative_frobenius(out, truth) <= layer_error(I, K), backend


@pytest.mark.parametrize("name", NAMES)
def test_grouped_mm_means_code_times_scale(name: str, seed: int) -> None:
    random = Random(seed)
    weight = quantized(name, random.matrix(E, 33, H, dtype=torch.float32))
    b, bias, offs = dequantized(weight).mT, random.normal(E, 33), torch.tensor([2, 2, 3, 5])
    for a, ends in ((random.normal(T, H), offs), (random.normal(E, 3, H), None)):
        truth = polymoe.grouped_mm(a.double(), b, ends, bias.double(), backend="reference")
        for backend in servers("grouped_mm", weight_format=name):
            how = {"weight_format": name, "scale": weight.scale, "zero": weight.zero, "backend": backend}
            out = polymoe.grouped_mm(a, weight.data.mT, ends, bias, **how)
            assert relative_frobenius(out, truth) <= frobenius_error(H + 1), backend  # and the bias
            assert not out[5:].any() or ends is None


@pytest.mark.parametrize(
    ("name", "mode"),
    [(name, mode) for mode in ("int8", "int8_g128") for name in NAMES if mode in formats.FORMATS[name].modes],
)
def test_int8_rounds_what_is_multiplied(name: str, mode: str, seed: int) -> None:
    """Within half a step of 1/127 of the largest in each group: more than float32 loses, and no more than two roundings
    do, of which the first goes through an activation."""
    T = 64  # so many that their mean error is what is expected
    layer = Layer(name, seed, T=T)
    truth = polymoe.experts(**layer.dense(), backend="reference")
    dense, group = layer.dense(), 128 if mode == "int8_g128" else 32
    h = polymoe.grouped_mm(dense["x"].expand(E, T, H), dense["gate_up"].mT, backend="reference")
    activated = polymoe.activate(h.flatten(0, 1), "swiglu", backend="reference")
    most = 2 * int8_error(layer.x, group) + int8_error(activated, group)
    for backend in servers("experts", weight_format=name, mode=mode):
        out = polymoe.experts(**layer.arguments, mode=mode, backend=backend)
        assert layer_error(I, K) < relative_frobenius(out, truth) < most, backend
    exact = layer.arguments | {"x": Random(seed).integers(-127, 128, T, H).float()}
    exact["x"][:, ::32] = 127  # then every group has scale 1
    exact["x"][:, 32] = 127
    how = {"weight_format": name, "scale": layer.gate_up.scale, "zero": layer.gate_up.zero}
    ends = torch.tensor([1, 2, 4, T])
    for backend in servers("grouped_mm", weight_format=name, mode=mode):
        one, other = (
            polymoe.grouped_mm(exact["x"], layer.gate_up.data.mT, ends, mode=each, backend=backend, **how)
            for each in (mode, "weight_only")
        )
        assert relative_frobenius(one, other.double()) <= 2 * frobenius_error(H), backend  # each has its own


@pytest.mark.parametrize("name", [name for name in NAMES if "fp8" in formats.FORMATS[name].modes])
def test_fp8_rounds_what_is_multiplied_to_mxfp8(name: str, seed: int) -> None:
    layer, mxfp8 = Layer(name, seed), formats.Mxfp8()
    rounded = mxfp8.dequantize(mxfp8.quantize(layer.x))
    assert not torch.equal(rounded, layer.x)
    how = {"weight_format": name, "scale": layer.gate_up.scale, "backend": "reference"}
    one, other = (
        polymoe.grouped_mm(x, layer.gate_up.data.mT, torch.tensor([1, 2, 4, T]), mode=mode, **how)
        for x, mode in ((layer.x, "fp8"), (rounded, "weight_only"))
    )
    assert torch.equal(one, other)
    for op, arguments in (
        (polymoe.experts, layer.arguments),
        (polymoe.grouped_mm, {"a": layer.x, "b": layer.gate_up.data.mT, "offs": torch.tensor([1, 2, 4, T])} | how),
    ):
        with pytest.raises(ValueError, match=r"backend: .* got 'cpu': it has no kernel for the mode .fp8"):
            op(**(arguments | {"backend": "cpu", "mode": "fp8"}))


# What the cpu backend has no kernels for: modes that the format lacks, and others that only other backends serve.
REFUSED = [
    (name, mode)
    for name in NAMES
    for mode in (*formats.MODES, "fp4")
    if mode not in formats.FORMATS[name].modes or "cpu" not in servers("experts", weight_format=name, mode=mode)
]


@pytest.mark.parametrize(("name", "mode"), REFUSED)
def test_bare_ops_refuse_a_mode_in_the_words_of_public_ones(name: str, mode: str) -> None:
    layer, ends = Layer(name, 0), torch.tensor([1, 2, 4, T])
    how = {"weight_format": name, "scale": layer.gate_up.scale, "zero": layer.gate_up.zero, "mode": mode}
    matmul = {"a": layer.x, "b": layer.gate_up.data.mT, "offs": ends, "bias": None} | how
    backend = "cpu" if mode in formats.FORMATS[name].modes else "reference"
    for op, arguments in (("experts", layer.arguments | {"mode": mode}), ("grouped_mm", matmul)):
        with pytest.raises(ValueError, match="polymoe") as public:
            getattr(polymoe, op)(**arguments, backend=backend)
        with pytest.raises(ValueError, match="polymoe") as bare:
            getattr(torch.ops.polymoe, op)(**arguments)
        assert str(bare.value) == str(public.value)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name: str, seed: int) -> None:
    """In float64 against finite differences, where only the weights are as stored; recomputed ones the same."""
    layer = Layer(name, seed)
    wide = layer.arguments | {"backend": "reference"}
    x, weights = layer.x.double().requires_grad_(), layer.weights.double().requires_grad_()
    up_bias, down_bias = (bias.double().requires_grad_() for bias in layer.biases.values())

    def call(x: Tensor, weights: Tensor, up_bias: Tensor, down_bias: Tensor, **options: Any) -> Tensor:
        given = {"x": x, "weights": weights, "gate_up_bias": up_bias, "down_bias": down_bias}
        return polymoe.experts(**wide | given | options)

    inputs = (x, weights, up_bias, down_bias)
    for placement in ("output", "input"):
        options: dict[str, Any] = {"weight_placement": placement}
        assert gradcheck(lambda *given, o=options: call(*given, **o), inputs, nondet_tol=1e-9, fast_mode=True)
    kept, again = (
        torch.autograd.grad(call(*inputs, recompute=recompute).square().sum(), inputs) for recompute in (False, True)
    )
    for one, other in zip(kept, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_every_backend(name: str, seed: int) -> None:
    layer = Layer(name, seed)
    x = layer.x.double().requires_grad_()
    polymoe.experts(**layer.dense() | {"x": x}, backend="reference").sum().backward()
    a = layer.x.clone().requires_grad_()
    for backend in servers("experts", weight_format=name):
        a.grad = None
        polymoe.experts(**layer.arguments | {"x": a}, backend=backend).sum().backward()
        assert relative_frobenius(a.grad, x.grad) <= layer_error(H, 2 * I, K), backend
    how = {"weight_format": name, "scale": layer.gate_up.scale, "zero": layer.gate_up.zero}
    b = dequantized(layer.gate_up, torch.float32).mT
    for rows, ends in ((Random(seed).normal(T, H), torch.tensor([1, 2, 4, 5])), (Random(seed).normal(E, 3, H), None)):
        rows.requires_grad_()
        for backend in servers("grouped_mm", weight_format=name):
            dense, stored = (
                torch.autograd.grad(polymoe.grouped_mm(*given, backend=backend, **options).square().sum(), rows)[0]
                for given, options in (((rows, b, ends), {}), ((rows, layer.gate_up.data.mT, ends), how))
            )
            own = frobenius_error(H) + frobenius_error(2 * I)
            assert relative_frobenius(stored, dense.double()) <= 2 * own, backend


def test_quantised_weights_take_no_gradient() -> None:
    layer = Layer("int8", 0)
    layer.gate_up.scale.requires_grad_()
    with pytest.raises(
        ValueError, match=r"polymoe\.experts: gate_up_scale: expected a tensor that does not require grad"
    ):
        polymoe.experts(**layer.arguments)
    ends = torch.tensor([1, 2, 3, T])
    how = {"weight_format": "int8", "scale": layer.gate_up.scale}
    with pytest.raises(ValueError, match=r"polymoe\.grouped_mm: scale: expected a tensor that does not require grad"):
        polymoe.grouped_mm(layer.x, layer.gate_up.data.mT, ends, **how)


BAD: list[tuple[str, dict[str, Any]]] = [
    ("gate_up", {"gate_up": torch.zeros(E, 2 * I, H // 2)}),
    ("gate_up", {"gate_up": torch.zeros(E, 2 * I, H // 2 + 1, dtype=torch.uint8)}),
    ("gate_up", {"gate_up": torch.zeros(2 * I, H // 2, dtype=torch.uint8)}),
    ("gate_up", {"gate_up": torch.zeros(E, H // 2, 2 * I, dtype=torch.uint8).mT}),
    ("gate_up_scale", {"gate_up_scale": None}),
    ("gate_up_scale", {"gate_up_scale": torch.zeros(E, 2 * I, 1, dtype=torch.uint8)}),
    ("gate_up_scale", {"gate_up_scale": torch.zeros(E, 2 * I, 2)}),
    ("gate_up_zero", {"gate_up_zero": torch.zeros(E, 2 * I, 2, dtype=torch.uint8)}),
    ("down", {"down": torch.zeros(E - 1, H, I // 2, dtype=torch.uint8)}),
    ("down", {"down": torch.zeros(E, H, I, dtype=torch.uint8)}),
    ("down_scale", {"down_scale": torch.zeros(E, H, 1, dtype=torch.uint8)}),
    ("transposed", {"transposed": True}),
    ("mode", {"mode": "fp4"}),
    ("weight_format", {"weight_format": "mxfp6"}),
    ("gate_up", {"weight_format": "mxfp8"}),
]


@pytest.mark.parametrize(("argument", "change"), BAD, ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_bad_arguments(argument: str, change: dict[str, Any], device: str) -> None:
    arguments = Layer("mxfp4", 0).arguments | change
    here = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in arguments.items()}
    with pytest.raises(ValueError, match="polymoe") as caught:
        polymoe.experts(**here)
    assert re.match(rf"polymoe\.experts: {argument}: expected .+, got .+", str(caught.value)), caught.value


def test_bad_arguments_of_grouped_mm() -> None:
    layer = Layer("mxfp4", 0)
    b, ends, scale = layer.gate_up.data.mT, torch.tensor([1, 2, 3, T]), layer.gate_up.scale
    for argument, given in {
        "b": (layer.x, layer.gate_up.data, ends, None, None, "mxfp4", scale),
        "scale": (layer.x, b, ends, None, None, "mxfp4"),
        "offs": (layer.x, b, None, None, None, "mxfp4", scale),
        "mode": (layer.x, layer.gate_up.data.view(torch.int8).mT, ends, None, None, "mxfp8", scale, None, "int8_g128"),
    }.items():
        with pytest.raises(ValueError, match=rf"polymoe\.grouped_mm: {argument}: expected"):
            polymoe.grouped_mm(*given)


# test_schema computes with copies of the arguments, which torch cannot do in 8-bit floats.
UTILS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("name", ["mxfp4", "fp8_block32", "int4_g32"])
def test_opcheck(name: str, seed: int) -> None:
    layer = Layer(name, seed)
    names = [argument.name for argument in torch.ops.polymoe.experts.default._schema.arguments]
    for backend in ("", *servers("experts", weight_format=name)):
        for save in (False, True):
            layer.x.requires_grad_(save)
            kwargs = {key: value for key, value in layer.arguments.items() if key in names}
            opcheck(
                torch.ops.polymoe.experts.default, (), kwargs | {"save": save, "backend": backend}, test_utils=UTILS
            )
    layer.x.requires_grad_()
    how = {"weight_format": name, "scale": layer.gate_up.scale, "zero": layer.gate_up.zero}
    for backend in servers("grouped_mm", weight_format=name):
        args = (layer.x, layer.gate_up.data.mT, torch.tensor([1, 2, 4, 5]))
        opcheck(torch.ops.polymoe.grouped_mm.default, args, how | {"backend": backend}, test_utils=UTILS)


def test_explain_names_format_and_mode() -> None:
    layer = Layer("mxfp4", 0)
    for mode in formats.MODES:
        found = polymoe.explain("experts", **layer.arguments, mode=mode)
        assert found.backend == servers("experts", weight_format="mxfp4", mode=mode)[0]
        assert any("mxfp4" in note and mode in note for note in found.notes), found.notes
