"""torch.compile(fullgraph=True) with a dynamic number of tokens: one graph, and the bits of the eager call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import polymoe
from polymoe.testing.targets import servers

H, I, E, K = 16, 12, 6, 3
TOKENS = (5, 9, 33, 2)

BACKENDS = servers("experts")


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(autouse=True)
def seeded(seed: int) -> None:
    torch.manual_seed(seed)


@contextmanager
def expect_compilation(counter: CompileCounterWithBackend, expected: bool) -> Iterator[None]:
    """Dynamo may call the backend more than once for one compilation, but not at all for a cached one."""
    before = counter.frame_count
    yield
    assert (counter.frame_count > before) == expected


class Weights:
    def __init__(self) -> None:
        self.gate_up = torch.randn(E, 2 * I, H)
        self.down = torch.randn(E, H, I)
        self.gate_up_bias = torch.randn(E, 2 * I)
        self.down_bias = torch.randn(E, H)
        self.router_bias = torch.randn(E)


def gate(x: Tensor, logits: Tensor, w: Weights) -> Any:
    return polymoe.gate(logits, K, "sigmoid", w.router_bias, 2, 2, 2, renormalize=True, scale=2.5)


def route(logits: Tensor) -> tuple[Tensor, polymoe.Plan]:
    weights, ids = polymoe.gate(logits, K, "softmax_topk")
    return weights, polymoe.plan(ids, E)


def plan(x: Tensor, logits: Tensor, w: Weights) -> Any:
    return tuple(route(logits)[1])


def dispatch(x: Tensor, logits: Tensor, w: Weights) -> Any:
    weights, p = route(logits)
    return polymoe.dispatch(x, p), polymoe.dispatch(x, p, weights)


def grouped_mm(x: Tensor, logits: Tensor, w: Weights) -> Any:
    ends = route(logits)[1].offsets[1:]
    rows = x.repeat_interleave(K, 0)
    by_rows = polymoe.grouped_mm(rows, w.gate_up.mT, ends, w.gate_up_bias, out_dtype=torch.bfloat16)
    return by_rows, polymoe.grouped_mm(rows.t(), rows, ends), polymoe.grouped_mm(w.gate_up, rows.t(), ends)


def activate(x: Tensor, logits: Tensor, w: Weights) -> Any:
    weights, p = route(logits)
    rows = x.repeat_interleave(K, 0)
    gated = polymoe.activate(rows, "swiglu_oai", limit=1.0, interleaved=True, plan=p, weights=weights)
    return gated, polymoe.activate(x, "relu2", out_dtype=torch.float16)


def combine(x: Tensor, logits: Tensor, w: Weights) -> Any:
    weights, p = route(logits)
    rows = x.repeat_interleave(K, 0)
    return polymoe.combine(rows, p), polymoe.combine(rows, p, weights, torch.bfloat16)


def experts(x: Tensor, logits: Tensor, w: Weights) -> Any:
    weights, ids = polymoe.gate(logits, K)
    return polymoe.experts(x, w.gate_up, w.down, weights, ids, "swiglu_clamped", limit=2.0)


def composition(x: Tensor, logits: Tensor, w: Weights) -> Any:
    weights, p = route(logits)
    h = polymoe.grouped_mm(polymoe.dispatch(x, p), w.gate_up.mT, p.offsets[1:], w.gate_up_bias, torch.float32)
    a = polymoe.activate(h, "swiglu", plan=p, out_dtype=x.dtype)
    y = polymoe.grouped_mm(a, w.down.mT, p.offsets[1:], w.down_bias, torch.float32)
    return polymoe.combine(y, p, weights, x.dtype)


FUNCTIONS = [gate, plan, dispatch, grouped_mm, activate, combine, experts, composition]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS, ids=[f.__name__ for f in FUNCTIONS])
def test_one_graph_for_every_length(function: Callable[..., Any], backend: str) -> None:
    w, counter = Weights(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    with polymoe.use_backend(backend):
        for T in TOKENS:
            x, logits = torch.randn(T, H), torch.randn(T, E)
            with expect_compilation(counter, expected=not counter.frame_count):
                result = compiled(x, logits, w)
            torch.testing.assert_close(result, function(x, logits, w), rtol=0, atol=0)


def test_lengths_become_dynamic_by_themselves() -> None:
    w, counter = Weights(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(experts, fullgraph=True, backend=counter)
    for T in TOKENS:
        with expect_compilation(counter, T in TOKENS[:2]):  # for the first length, and once for all others
            compiled(torch.randn(T, H), torch.randn(T, E), w)


def test_inductor() -> None:
    w = Weights()
    compiled = torch.compile(composition, fullgraph=True, dynamic=True)
    for T in TOKENS[:2]:
        x, logits = torch.randn(T, H), torch.randn(T, E)
        torch.testing.assert_close(compiled(x, logits, w), composition(x, logits, w), rtol=0, atol=0)


def test_export() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, logits: Tensor) -> Tensor:
            return experts(x, logits, w)

    w = Weights()
    tokens = torch.export.Dim("tokens", min=2)
    example = (torch.randn(8, H), torch.randn(8, E))
    program = torch.export.export(Layer(), example, dynamic_shapes=({0: tokens}, {0: tokens}))
    for T in TOKENS:
        x, logits = torch.randn(T, H), torch.randn(T, E)
        assert torch.equal(program.module()(x, logits), experts(x, logits, w))


def test_bad_arguments_are_named_while_compiling() -> None:
    compiled = torch.compile(polymoe.plan, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"polymoe\.plan: num_experts: expected at least 1, got 0"):
        compiled(torch.zeros(3, 2, dtype=torch.int32), 0)
