"""Adapters of experts: against merged weights, gradients against finite differences, what they cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.library import opcheck

import polymoe
from polymoe import formats, lora
from polymoe.testing.cases import Random, routing
from polymoe.testing.conformance._run import serial
from polymoe.testing.tolerances import (
    FUNCTION_ERRORS,
    assert_same_bits,
    frobenius_error,
    relative_frobenius,
    unit_roundoff,
)

T, H, I, E, K, R, SCALE = 6, 7, 4, 4, 2, 3, 0.7


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Layer:
    def __init__(self, seed: int, dtype: torch.dtype, transposed: bool, gated: bool = True) -> None:
        random = Random(seed)
        self.P = 2 * I if gated else I
        shapes = ((E, H, self.P), (E, I, H)) if transposed else ((E, self.P, H), (E, H, I))
        self.x, self.weights = random.normal(T, H, dtype=dtype), random.weights(T, K)
        if dtype == torch.float64:
            self.weights = self.weights.double()
        self.gate_up, self.down = (random.normal(*shape, dtype=dtype, scale=0.3) for shape in shapes)
        self.ids = routing(random, "skipping", T, K, E)
        self.biases = {
            "gate_up_bias": random.normal(E, self.P, dtype=dtype),
            "down_bias": random.normal(E, H, dtype=dtype),
        }
        sizes = ((E, R, H), (E, self.P, R), (E, R, I), (E, H, R))
        self.adapters = [random.normal(*size, dtype=dtype, scale=0.5) for size in sizes]
        self.random = random


NAMES = ("gate_up_lora_a", "gate_up_lora_b", "down_lora_a", "down_lora_b")


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("only", ["both", "gate_up", "down"])
def test_merged_and_unmerged_agree(only: str, transposed: bool, backend: str, seed: int) -> None:
    made = Layer(seed, torch.float32, transposed)
    adapters = {name: t for name, t in zip(NAMES, made.adapters, strict=True) if only in ("both", name[: len(only)])}
    options: dict[str, Any] = made.biases | {"transposed": transposed, "backend": backend}
    got = polymoe.experts(
        made.x, made.gate_up, made.down, made.weights, made.ids, **options, **adapters, lora_scale=SCALE
    )
    merged = {"gate_up": made.gate_up, "down": made.down}
    for name in merged:
        if f"{name}_lora_a" in adapters:
            pair = adapters[f"{name}_lora_a"], adapters[f"{name}_lora_b"]
            merged[name] = lora.merged(merged[name], *pair, SCALE, transposed)
    expected = polymoe.experts(made.x, merged["gate_up"], merged["down"], made.weights, made.ids, **options)
    assert relative_frobenius(got, expected) < 1e-5
    bare = polymoe.experts(made.x, made.gate_up, made.down, made.weights, made.ids, **options)
    assert relative_frobenius(bare, expected) > 1e-2


@pytest.mark.parametrize(
    ("placement", "activation"), [("output", "swiglu"), ("activation", "relu2"), ("input", "swiglu")]
)
@serial
def test_gradients(placement: str, activation: str, backend: str, seed: int) -> None:
    made = Layer(seed, torch.float64, transposed=placement == "activation", gated=activation == "swiglu")
    tensors = [t.requires_grad_() for t in (made.x, made.weights, *made.adapters)]
    options = {"transposed": placement == "activation", "weight_placement": placement, "backend": backend}

    def call(x: Tensor, weights: Tensor, *adapters: Tensor, **more: Any) -> Tensor:
        named = dict(zip(NAMES, adapters, strict=True))
        frozen = (made.gate_up, made.down, weights, made.ids, activation)
        return polymoe.experts(x, *frozen, **made.biases, **named, lora_scale=SCALE, **options, **more)

    assert gradcheck(call, tensors)
    every = torch.autograd.grad(call(*tensors).square().sum(), tensors)
    again = torch.autograd.grad(call(*tensors, recompute=True).square().sum(), tensors)
    for wanted, (got, expected) in enumerate(zip(again, every, strict=True)):
        assert_same_bits(got, expected, "recomputed")
        alone = [t if i == wanted else t.detach() for i, t in enumerate(tensors)]
        (one,) = torch.autograd.grad(call(*alone).square().sum(), alone[wanted])
        assert_same_bits(one, expected, f"gradient {wanted} alone")


@pytest.mark.parametrize("name", list(formats.FORMATS))
def test_quantised_base(name: str, backend: str, seed: int) -> None:
    """QLoRA: adapters beside frozen weights in every format, against the same numbers in float64."""
    random, hidden, inner, format = Random(seed), 64, 32, formats.parse(name)
    made = [random.normal(T, hidden), random.weights(T, K)]
    made += [
        random.normal(*shape, scale=0.2) for shape in ((E, R, hidden), (E, 2 * inner, R), (E, R, inner), (E, hidden, R))
    ]
    gate_up, down = (format.quantize(random.normal(E, *s, scale=0.2)) for s in ((2 * inner, hidden), (hidden, inner)))
    ids = routing(random, "skipping", T, K, E)
    scales = {"gate_up_scale": gate_up.scale, "down_scale": down.scale, "weight_format": name}

    def gradients(dtype: torch.dtype, pair: list[Tensor], backend: str, **how: Any) -> list[Tensor]:
        x, weights, *adapters = leaves = [tensor.to(dtype).requires_grad_() for tensor in made]
        named = dict(zip(NAMES, adapters, strict=True)) | {"lora_scale": SCALE}
        out = polymoe.experts(x, *pair, weights, ids, **named, **how, backend=backend)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    dense = [format.dequantize(weight, torch.float64) for weight in (gate_up, down)]
    truth = gradients(torch.float64, dense, "reference")
    found = gradients(torch.float32, [gate_up.data, down.data], backend, **scales)
    # On the way of a gradient are sums over both widths and the rank forward, and over all of them backward.
    sums = 2 * sum(map(frobenius_error, (hidden, R, 2 * inner, inner, R, hidden, T * K)))
    for got, expected in zip(found, truth, strict=True):
        assert relative_frobenius(got, expected) <= sums + FUNCTION_ERRORS * unit_roundoff(torch.float32)


def test_float32_gradients_of_bfloat16_adapters(seed: int) -> None:
    """torch's grad_dtype reaches their sums, too."""
    made, found = Layer(seed, torch.bfloat16, transposed=False), []
    for dtype in (torch.float32, torch.bfloat16):
        leaves = [adapter.clone().requires_grad_() for adapter in made.adapters]
        for leaf in leaves:
            leaf.grad_dtype = dtype
        named = dict(zip(NAMES, leaves, strict=True)) | {"lora_scale": SCALE}
        polymoe.experts(made.x, made.gate_up, made.down, made.weights, made.ids, **named).square().sum().backward()
        found.append([leaf.grad for leaf in leaves if leaf.grad is not None])
        assert len(found[-1]) == len(leaves)
    for wide, narrow in zip(*found, strict=True):
        assert wide.dtype == torch.float32
        assert_same_bits(wide.bfloat16(), narrow, "rounded once")
        assert not torch.equal(wide, narrow.float())


def test_what_is_saved_and_refused(seed: int) -> None:
    made = Layer(seed, torch.bfloat16, transposed=False)
    adapters = [t.requires_grad_() for t in made.adapters]
    known = {t.data_ptr() for t in (made.gate_up, made.down, made.weights, *adapters)}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        named = dict(zip(NAMES, adapters, strict=True))
        polymoe.experts(made.x, made.gate_up, made.down, made.weights, made.ids, **named)
    S = T * K
    plan = 4 * (E + 1 + S + S)
    assert sum(sizes.values()) == made.x.nbytes + 2 * S * (made.P + R) + plan

    trained = made.gate_up.clone().requires_grad_()
    with pytest.raises(ValueError, match="gate_up: expected a tensor that does not require grad beside an adapter"):
        polymoe.experts(made.x, trained, made.down, made.weights, made.ids, **named)
    with pytest.raises(ValueError, match=r"gate_up_lora_b: expected an adapter's two parts or neither, got None"):
        polymoe.experts(made.x, made.gate_up, made.down, made.weights, made.ids, gate_up_lora_a=adapters[0])
    with pytest.raises(ValueError, match="down_lora_b: expected"):
        polymoe.experts(
            made.x, made.gate_up, made.down, made.weights, made.ids, down_lora_a=adapters[2], down_lora_b=adapters[1]
        )


@serial
def test_grouped_mm(backend: str, seed: int) -> None:
    random = Random(seed)
    a = random.normal(12, H, dtype=torch.float64).requires_grad_()
    weight = random.normal(E, I, H, dtype=torch.float64)
    pair = [random.normal(*s, dtype=torch.float64).requires_grad_() for s in ((E, R, H), (E, I, R))]
    ends = torch.tensor([3, 3, 8, 11])

    def call(a: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        return polymoe.grouped_mm(a, weight.mT, ends, None, None, "plain", None, None, "weight_only", lora_a, lora_b,
                                  SCALE, backend=backend)  # fmt: skip

    assert gradcheck(call, (a, *pair))
    merged = lora.merged(weight, *pair, SCALE)
    torch.testing.assert_close(call(a, *pair), polymoe.grouped_mm(a, merged.mT, ends, backend=backend))


def test_peft_layout(seed: int) -> None:
    """PEFT's own sum of the two factors, expert by expert."""
    random = Random(seed)
    A, B = random.normal(E * R, H), random.normal(I, R * E)
    delta = torch.einsum("ore,eri->eoi", B.reshape(I, R, E), A.reshape(E, R, H))
    a, b = lora.from_peft(A, B, E)
    torch.testing.assert_close(b @ a, delta)
    a, b = lora.from_peft(A, B, E, first_is_output=True)
    torch.testing.assert_close(b @ a, delta.mT)
    with pytest.raises(ValueError, match="lora_A: expected 2 dimensions, the first a multiple of 4"):
        lora.from_peft(A[1:], B, E)


def test_opcheck_and_compile(backend: str, seed: int) -> None:
    made = Layer(seed, torch.float32, transposed=False)
    x = made.x.requires_grad_()
    adapters = [t.requires_grad_() for t in made.adapters]
    fixed = (x, made.gate_up, made.down, made.weights, made.ids)
    for save in (False, True):
        kwargs = dict(zip(NAMES, adapters, strict=True)) | {"save": save, "backend": backend}
        opcheck(torch.ops.polymoe.experts_lora.default, fixed, kwargs)

    def layer(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        named = dict(zip(NAMES, adapters, strict=True))
        return polymoe.experts(x, made.gate_up, made.down, weights, ids, **named, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    expected = torch.autograd.grad(layer(x, made.weights, made.ids).sum(), adapters)
    for got, wanted in zip(
        torch.autograd.grad(compiled(x, made.weights, made.ids).sum(), adapters), expected, strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
