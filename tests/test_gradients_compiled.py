"""The gradients of layers compiled, as one graph each way for any number of tokens, and checkpointed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor_config
from torch.utils.checkpoint import checkpoint

import polymoe
import polymoe.nn
from polymoe.testing.tolerances import assert_same_bits

H, I, E, K = 5, 4, 4, 2


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_compiles_forward_and_backward_once_for_any_length(backend: str, seed: int) -> None:
    torch.manual_seed(seed)
    gate_up, down = (torch.randn(shape, requires_grad=True) for shape in ((E, 2 * I, H), (E, H, I)))

    def layer(x: Tensor, logits: Tensor) -> Tensor:
        weights, ids = polymoe.gate(logits, K, "sqrtsoftplus", renormalize=True, backend=backend)
        fused = polymoe.experts(x, gate_up, down, weights, ids, "swiglu_clamped", limit=2.0, backend=backend)
        p = polymoe.plan(ids, E, backend=backend)
        rows = polymoe.dispatch(x, p, weights, backend=backend)
        return fused + polymoe.combine(polymoe.activate(rows, "silu", backend=backend), p, backend=backend)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (5, 9):
        x, logits = torch.randn(tokens, H, requires_grad=True), torch.randn(tokens, E, requires_grad=True)
        wanted = (x, logits, gate_up, down)
        expected = torch.autograd.grad(layer(x, logits).square().sum(), wanted)
        for got, one in zip(torch.autograd.grad(compiled(x, logits).square().sum(), wanted), expected, strict=True):
            torch.testing.assert_close(got, one, rtol=0, atol=0)


class Composed(torch.nn.Module):
    """A layer of single ops."""

    def __init__(self) -> None:
        super().__init__()
        shapes = ((E, H), (E, H, 2 * I), (E, 2 * I), (E, I, H), (E, H))
        self.weights = torch.nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        router, gate_up, gate_up_bias, down, down_bias = self.weights
        weights, ids = polymoe.gate(x @ router.t(), K, "sqrtsoftplus", renormalize=True)
        p = polymoe.plan(ids, E)
        h = polymoe.grouped_mm(polymoe.dispatch(x, p), gate_up, p.offsets[1:], gate_up_bias, torch.float32)
        y = polymoe.grouped_mm(polymoe.activate(h, "swiglu", plan=p), down, p.offsets[1:], down_bias)
        return polymoe.combine(y, p, weights)


def whole_layer() -> torch.nn.Module:
    router = polymoe.nn.Router(H, E, K, scoring="sigmoid", renormalize=True)
    layer = polymoe.nn.MoE(router, polymoe.nn.Experts(E, H, I, bias=True), shared_intermediate_size=I)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("make", [Composed, whole_layer])
# Its patterns make one addmm of a product and a sum, which BLAS may round once, depending on the machine.
@inductor_config.patch(pattern_matcher=False)
def test_inductor_compiles_forward_and_backward(make: Callable[[], torch.nn.Module], seed: int) -> None:
    """Both whole, once for all lengths, to eager's bits: beside ops and matmuls, which it calls, inductor adds only."""
    torch.manual_seed(seed)
    layer, graphs = make(), CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=graphs)
    counts = []
    for tokens in (7, 11):  # no other size, which would be taken for the same one
        x, grad = torch.randn(tokens, H, requires_grad=True), torch.randn(tokens, H)
        named = {"x": x, **dict(layer.named_parameters())}
        expected = torch.autograd.grad(layer(x), tuple(named.values()), grad)
        found = torch.autograd.grad(compiled(x), tuple(named.values()), grad)
        counts.append(graphs.frame_count)
        for name, got, one in zip(named, found, expected, strict=True):
            assert_same_bits(got, one, name)
    assert counts[0] == counts[1] > 0


def test_a_layer_checkpointed_has_the_same_gradients(seed: int) -> None:
    torch.manual_seed(seed)
    layer = polymoe.nn.MoE(polymoe.nn.Router(16, E, K), polymoe.nn.Experts(E, 16, 8))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(10, 16, requires_grad=True)
    wanted = [x, *layer.parameters()]
    expected = torch.autograd.grad(layer(x).square().sum(), wanted)
    found = torch.autograd.grad(checkpoint(layer, x, use_reentrant=False).square().sum(), wanted)
    for got, one in zip(found, expected, strict=True):
        assert_same_bits(got, one, "checkpointed")
