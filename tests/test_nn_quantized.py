"""Modules that hold quantised experts: what they compute, and that nothing but loading changes what is stored."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import polymoe
from polymoe.formats import FORMATS, Weight, parse
from polymoe.nn import Experts, MoE, QuantizedExperts, Router, quantize_
from polymoe.testing.tolerances import (
    FUNCTION_ERRORS,
    assert_same_bits,
    dot_error,
    frobenius_error,
    relative_frobenius,
    unit_roundoff,
)

H, I, E, K, T = 64, 128, 6, 2, 9
KINDS: dict[str, Callable[[], Experts]] = {
    "swiglu": lambda: Experts(E, H, I),
    "ungated": lambda: Experts(E, H, I, activation="relu2"),
    "gpt_oss": lambda: Experts(
        E, H, I, activation="swiglu_oai", limit=0.5, bias=True, transposed=True, interleaved=True
    ),
    "llama4": lambda: Experts(E, H, I, weight_placement="input"),
}


def routed(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    return torch.randn(T, H).to(dtype), torch.rand(T, K), ids


def dense(experts: Experts, form: str) -> Experts:
    """The same experts with weights that are exactly what the format makes of them, in float64."""
    exact = copy.deepcopy(experts).double()
    for own, exactly in ((experts.gate_up, exact.gate_up), (experts.down, exact.down)):
        weight = own.detach().transpose(-2, -1) if experts.transposed else own.detach()
        back = parse(form).dequantize(parse(form).quantize(weight.contiguous()), torch.float64)
        exactly.data.copy_(back.transpose(-2, -1) if experts.transposed else back)
    return exact


@pytest.mark.parametrize("form", list(FORMATS))
@pytest.mark.parametrize("kind", list(KINDS))
def test_they_compute_with_what_the_format_stores(kind: str, form: str, seed: int) -> None:
    torch.manual_seed(seed)
    experts = KINDS[kind]().requires_grad_(False)
    for bias in (experts.gate_up_bias, experts.down_bias):
        if bias is not None:
            bias.normal_()
    exact, (x, weights, ids) = dense(experts, form), routed()
    truth = exact(x.double(), weights.double(), ids)
    rounded = relative_frobenius(exact.float()(x, weights, ids), truth)
    found = QuantizedExperts.quantize(experts, form)(x, weights, ids)
    assert relative_frobenius(found, truth) <= 1.05 * rounded + unit_roundoff(torch.float32)


@pytest.mark.parametrize("form", ["mxfp4", "int8", "int4_g32"])
def test_the_mode_reaches_the_op(form: str, seed: int) -> None:
    torch.manual_seed(seed)
    experts, (x, weights, ids) = Experts(E, H, I).requires_grad_(False), routed()
    exact, rounded = QuantizedExperts.quantize(experts, form), QuantizedExperts.quantize(experts, form, "int8")
    error = relative_frobenius(rounded(x, weights, ids), exact(x, weights, ids))
    assert 1e-4 < error < 0.05  # 8-bit integers keep two to three digits of x
    assert "mode int8" in str(polymoe.explain(rounded))
    assert form in str(polymoe.explain(rounded))


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone().view(torch.uint8) for name, buffer in module.named_buffers()}


@pytest.mark.parametrize("form", list(FORMATS))
def test_casts_copies_and_files_keep_every_bit(form: str, seed: int) -> None:
    torch.manual_seed(seed)
    first = QuantizedExperts.quantize(KINDS["gpt_oss"](), form)
    other = QuantizedExperts.quantize(KINDS["gpt_oss"](), form)
    kept = bits(first)
    assert set(kept) >= {"gate_up", "gate_up_scale", "down", "down_scale"}
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    for module in (copy.deepcopy(first), first.to(torch.bfloat16).double().float(), other):
        assert bits(module).keys() == kept.keys()
        for name, stored in bits(module).items():
            assert_same_bits(stored, kept[name], name)
    assert first.bfloat16().gate_up_bias.dtype == torch.bfloat16  # what is not quantised is cast


def clear_of_limits(exact: Experts) -> tuple[Tensor, Tensor, Tensor]:
    """As `routed`, with no pre-activation so close to a limit that rounding may change what the clamp's slope is."""
    assert exact.transposed
    assert exact.limit is not None
    for _ in range(20):
        x, weights, ids = routed()
        h = x.double() @ exact.gate_up
        margin = dot_error(x.double().abs() @ exact.gate_up.abs(), H, torch.float32)
        if ((h.abs() - exact.limit).abs() > margin).all():
            return x, weights, ids
    raise AssertionError("a pre-activation is within rounding of a limit in every draw")


def test_gradients_reach_all_but_the_weights(seed: int) -> None:
    torch.manual_seed(seed)
    experts = KINDS["gpt_oss"]()
    exact = dense(experts, "mxfp4")
    module = QuantizedExperts.quantize(experts, "mxfp4")
    x, weights, ids = clear_of_limits(exact)
    grads = []
    for layer, dtype in ((module, torch.float32), (exact, torch.float64)):
        leaves = [x.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_()]
        out = layer(*leaves, ids)
        wanted = [*leaves, layer.gate_up_bias, layer.down_bias]
        grads.append(torch.autograd.grad(out.square().sum(), wanted))
    assert [name for name, _ in module.named_parameters()] == ["gate_up_bias", "down_bias"]
    # On the way of a gradient are sums over H and I forward, and H, 2I and the slots backward.
    sums = sum(frobenius_error(length) for length in (H, I, H, 2 * I, T * K))
    for found, truth in zip(*grads, strict=True):
        assert relative_frobenius(found, truth) <= sums + FUNCTION_ERRORS * unit_roundoff(torch.float32)


def test_whole_layers(seed: int) -> None:
    torch.manual_seed(seed)
    moe = MoE(Router(H, E, K), Experts(E, H, I), shared_intermediate_size=I).requires_grad_(False)
    x, before = torch.randn(T, H), moe.experts
    assert quantize_(moe, "int8") is moe
    assert "weight_format='int8'" in repr(moe)
    explained = str(polymoe.explain(moe))
    assert "int8" in explained
    routing = moe.router(x)
    assert_same_bits(moe(x), QuantizedExperts.quantize(before, "int8")(x, *routing) + moe.shared(x), "the layer")
    assert isinstance(moe.shared.experts, QuantizedExperts)
    built = MoE(Router(H, E, K), QuantizedExperts.quantize(before, "int8", "int8"), shared_intermediate_size=I)
    assert built.shared is not None
    assert built.shared.experts.gate_up.dtype == torch.float32


def test_experts_that_stand_in_two_places_stay_one() -> None:
    experts = Experts(E, H, I)
    module = nn.ModuleDict({"first": experts, "inner": nn.ModuleDict({"second": experts}), "again": experts})
    quantize_(module, "int8")
    assert isinstance(module["first"], QuantizedExperts)
    assert module["first"] is module["again"] is module["inner"]["second"]


def quantized(form: str, *shape: int) -> Weight:
    return parse(form).quantize(torch.randn(shape))


def packed(experts: Experts) -> Experts:
    polymoe.optimize(experts.requires_grad_(False))
    return experts


ERRORS: dict[str, Callable[[], object]] = {
    "down: expected of gate_up's format mxfp4, got int8": lambda: QuantizedExperts(
        quantized("mxfp4", E, 2 * I, H), quantized("int8", E, H, I)
    ),
    "gate_up: expected a weight [6, 256, 64], got [6, 128, 64]": lambda: QuantizedExperts(
        quantized("mxfp4", E, I, H), quantized("mxfp4", E, H, I)
    ),
    "gate_up_bias: expected None or a parameter [6, 256], got [6, 64]": lambda: QuantizedExperts(
        quantized("int8", E, 2 * I, H), quantized("int8", E, H, I), gate_up_bias=nn.Parameter(torch.zeros(E, H))
    ),
    'mode: expected "weight_only" or "fp8" for mxfp8': lambda: QuantizedExperts.quantize(
        Experts(E, H, I), "mxfp8", "int8"
    ),
    "experts: expected plain weights (polymoe.unoptimize), got packed": lambda: QuantizedExperts.quantize(
        packed(Experts(E, H, I)), "mxfp4"
    ),
    "module: expected a module that holds Experts, got Linear": lambda: quantize_(nn.Linear(2, 2), "mxfp4"),
}


def test_dense_weights_do_not_become_codes(seed: int) -> None:
    torch.manual_seed(seed)
    experts = Experts(E, H, I)
    module = QuantizedExperts.quantize(experts, "int8")
    kept = bits(module)
    state = module.state_dict() | {"gate_up": experts.gate_up.detach()}
    with pytest.raises(ValueError, match=re.escape("gate_up: expected torch.int8, got torch.float32")):
        module.load_state_dict(state)
    for name, stored in bits(module).items():
        assert_same_bits(stored, kept[name], name)


@pytest.mark.parametrize("message", list(ERRORS))
def test_errors(message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ERRORS[message]()
