"""torch.library.opcheck of every op, on every backend that serves CPU tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import polymoe
from polymoe import formats
from polymoe.hal.problem import GRADIENT_OPS, OPS
from polymoe.testing.targets import servers

H, I, E, K = 8, 6, 5, 2
TOKENS = (0, 1, 7)
Sample = tuple[str, tuple[Any, ...], dict[str, Any]]  # op, args, kwargs
Make = Callable[..., Tensor]


def ids_with_skips(T: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.randint(-1, E + 1, (T, K), dtype=dtype)


def gate_samples(T: int, make: Make) -> list[Sample]:
    logits = make(T, 2 * E)
    return [
        ("gate", (logits, K), {}),
        ("gate", (logits, K, "sigmoid", torch.randn(2 * E), 2, 1, 2, "max", 1e-20, 2.5), {}),
        ("gate", (logits, K, "softmax_topk"), {"token_mask": torch.rand(T) < 0.5}),
        ("gate", (logits, K, "sqrtsoftplus"), {"indices": ids_with_skips(T, torch.int64), "renormalize": "add"}),
        ("gate", (make(2 * E, T).t(), K), {}),
    ]


def row_samples(T: int, make: Make) -> list[Sample]:
    """The ops between tokens and rows."""
    p = polymoe.plan(ids_with_skips(T), E)
    weights = make(T, K)
    h = make(T * K, 2 * I)
    return [
        ("plan", (ids_with_skips(T), E), {}),
        ("plan", (ids_with_skips(T, torch.int64)[:, :1].expand(T, K), E), {}),
        ("dispatch", (make(T, H), p.row_slot, p.slot_row), {}),
        ("dispatch", (make(T, H), p.row_slot, p.slot_row, weights), {}),
        ("activate", (h, "swiglu"), {}),
        ("activate", (h, "swiglu_oai", None, 7.0, True, p.row_slot, weights, torch.bfloat16), {}),
        ("activate", (h, "relu2"), {}),
        ("combine", (make(T * K, H), p.slot_row), {}),
        ("combine", (make(T * K, H), p.slot_row, weights, torch.float16), {}),
    ]


def matmul_samples(T: int, make: Make) -> list[Sample]:
    S = T * K
    ends = polymoe.plan(ids_with_skips(T), E).offsets[1:]
    return [
        ("grouped_mm", (make(S, H), make(E, H, I), ends), {}),
        ("grouped_mm", (make(S, H), make(E, I, H).mT, ends.long(), make(E, I)), {}),
        ("grouped_mm", (make(E, 3, H), make(H, S), ends, make(S)), {}),
        ("grouped_mm", (make(3, S), make(S, I), ends, make(E, I)), {}),
        ("grouped_mm", (make(E, T, H), make(E, H, I), None, None, torch.bfloat16), {}),
    ]


def experts_samples(T: int, make: Make) -> list[Sample]:
    ids, weights, x = ids_with_skips(T), make(T, K), make(T, H)
    biases = {"gate_up_bias": make(E, 2 * I), "down_bias": make(E, H)}
    dense = (x, make(E, 2 * I, H), make(E, H, I), weights, ids)
    flipped = (x, make(E, H, 2 * I), make(E, I, H), weights, ids.long())
    return [
        ("experts", dense, {}),
        ("experts", dense, {"save": True, "weight_placement": "input"}),
        ("experts", dense, biases | {"activation": "swiglu_clamped", "limit": 7.0, "save": True, "interleaved": True}),
        ("experts", flipped, {"transposed": True, "weight_placement": "activation"}),
        ("experts", (x, make(E, I, H), make(E, H, I), weights, ids), {"activation": "relu2", "save": True}),
    ]


def samples(T: int, requires_grad: bool) -> list[Sample]:
    def make(*shape: int) -> Tensor:
        return torch.randn(shape, requires_grad=requires_grad)

    return [
        sample
        for samples_of in (gate_samples, row_samples, matmul_samples, experts_samples)
        for sample in samples_of(T, make)
    ]


@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("T", TOKENS)
def test_opcheck(op: str, T: int) -> None:
    for backend in ["", *servers(op)]:
        for name, args, kwargs in samples(T, requires_grad=False):
            if name == op:
                opcheck(getattr(torch.ops.polymoe, op).default, args, kwargs | {"backend": backend})


@pytest.mark.parametrize("op", list(OPS))
def test_opcheck_with_gradients(op: str) -> None:
    for backend in servers(op):
        for name, args, kwargs in samples(7, requires_grad=True):
            if name == op:
                opcheck(getattr(torch.ops.polymoe, op).default, args, kwargs | {"backend": backend})


def gradient_samples() -> list[Sample]:
    T, p = 7, polymoe.plan(ids_with_skips(7), E)
    weights, h, logits = torch.rand(T, K), torch.randn(T * K, 2 * I), torch.randn(T, E)
    rows = torch.randn(T * K, H).bfloat16()
    weight = formats.Mxfp4().quantize(torch.randn(3, I, H))
    return [
        ("row_dot", (torch.randn(T, H), rows, p.slot_row), {}),
        ("grouped_mm_dx", (torch.randn(T * K, I), torch.randn(E, I, H).mT, p.offsets[1:], torch.bfloat16), {}),
        ("activate_backward", (h, torch.randn(T * K, I), "swiglu"), {}),
        (
            "down_backward",
            (
                rows.float(),
                torch.randn(E, H, I),
                h,
                p.offsets[1:],
                p.row_slot,
                p.slot_row,
                "swiglu",
                None,
                None,
                False,
                weights,
                True,
                True,
            ),
            {},
        ),
        ("activate_backward", (h, torch.randn(T * K, I), "geglu", None, None, True, p.row_slot, weights, True), {}),
        ("gate_backward", (logits, torch.randn(T, K), ids_with_skips(T).clamp(max=E - 1), "softmax"), {}),
        (
            "quantized_backward",
            (
                torch.randn(5, I),
                weight.data,
                weight.scale.view(torch.uint8),
                None,
                torch.tensor([1, 2, 5]),
                H,
                "mxfp4",
                torch.bfloat16,
            ),
            {},
        ),
    ]


def test_opcheck_of_gradients() -> None:
    assert {name for name, _, _ in gradient_samples()} == set(GRADIENT_OPS)
    for name, args, kwargs in gradient_samples():
        opcheck(getattr(torch.ops.polymoe, name).default, args, kwargs)


@pytest.mark.parametrize("op", list(OPS))
def test_opcheck_of_the_routed_overload(op: str) -> None:
    for name, args, kwargs in samples(7, requires_grad=False):
        if name == op:
            opcheck(getattr(torch.ops.polymoe, op).routed, args, kwargs | {"backend": "reference"})


def test_wrappers_record_only_where_a_gradient_is_needed() -> None:
    T = 7
    p = polymoe.plan(ids_with_skips(T), E)
    x = torch.randn(T, H, requires_grad=True)
    for backend in servers("dispatch"):
        with torch.no_grad():
            unrecorded = polymoe.dispatch(x, p, backend=backend)
        assert not unrecorded.requires_grad
        assert not polymoe.dispatch(x.detach(), p, backend=backend).requires_grad
        recorded = polymoe.dispatch(x, p, backend=backend)
        assert recorded.requires_grad
        assert torch.equal(recorded, unrecorded)


@pytest.mark.parametrize("op", [*OPS, *GRADIENT_OPS])
def test_calls_without_gradient_stay_out_of_python(op: str) -> None:
    """Every op with a CPU kernel has its autograd kernel in C++ too, which costs it no microseconds."""
    have = {
        key: torch._C._dispatch_has_kernel_for_dispatch_key(f"polymoe::{op}", key) for key in ("CPU", "AutogradCPU")
    }
    assert have["CPU"] == have["AutogradCPU"]
