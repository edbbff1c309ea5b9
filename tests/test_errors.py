"""Every bad argument of every op gets one ValueError: which op, which argument, what is accepted, what came. The words
may differ between backends, the form may not. Fakes (meta tensors) refuse the same."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import polymoe
from polymoe.testing.targets import servers

T, H, I, E, K, G = 6, 8, 4, 8, 2, 3
S = T * K
Case = tuple[str, dict[str, Any]]  # the argument that is wrong, and what to pass instead of good arguments


def f32(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


def i32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def good_plan(device: str = "cpu") -> polymoe.Plan:
    ids = torch.arange(S).reshape(T, K) % E
    return polymoe.Plan(*(tensor.to(device) for tensor in polymoe.plan(ids, E)))


OFFS = torch.tensor([2, 2, 5], dtype=torch.int32)

GOOD: dict[str, dict[str, Any]] = {
    "gate": {"logits": f32(T, E), "k": K},
    "plan": {"ids": i32(T, K), "num_experts": E},
    "dispatch": {"x": f32(T, H), "plan": good_plan()},
    "grouped_mm": {"a": f32(5, H), "b": f32(G, H, I), "offs": OFFS},
    "activate": {"h": f32(S, 2 * I), "kind": "swiglu", "plan": good_plan()},
    "combine": {"y": f32(S, H), "plan": good_plan()},
    "experts": {
        "x": f32(T, H),
        "gate_up": f32(E, 2 * I, H),
        "down": f32(E, H, I),
        "weights": f32(T, K),
        "ids": i32(T, K),
    },
}

BAD: dict[str, list[Case]] = {
    "gate": [
        ("logits", {"logits": torch.ones(T, E, dtype=torch.int64)}),
        ("logits", {"logits": f32(T)}),
        ("k", {"k": 0}),
        ("k", {"k": E + 1}),
        ("scoring", {"scoring": "argmax"}),
        ("renormalize", {"renormalize": "sum"}),
        ("bias", {"bias": f32(E + 1)}),
        ("bias", {"bias": f32(1, E)}),
        ("bias", {"bias": f32(E).half()}),
        ("n_group", {"n_group": 3}),
        ("n_group", {"n_group": 0}),
        ("topk_group", {"n_group": 4, "topk_group": 5}),
        ("topk_group", {"n_group": 4, "topk_group": 0}),
        ("topk_group", {"n_group": 1, "topk_group": 2}),
        ("group_top", {"n_group": 4, "topk_group": 4, "group_top": 3}),
        ("group_top", {"n_group": 4, "topk_group": 4, "group_top": 0}),
        ("k", {"n_group": 4, "topk_group": 1, "k": 3}),
        ("indices", {"indices": i32(T, K + 1)}),
        ("indices", {"indices": f32(T, K)}),
        ("indices", {"indices": i32(T, K), "n_group": 2}),
        ("indices", {"indices": i32(T, K), "bias": f32(E)}),
        ("token_mask", {"token_mask": torch.ones(T + 1, dtype=torch.bool)}),
        ("token_mask", {"token_mask": i32(T)}),
    ],
    "plan": [
        ("ids", {"ids": f32(T, K)}),
        ("ids", {"ids": i32(T)}),
        ("num_experts", {"num_experts": 0}),
    ],
    "dispatch": [
        ("x", {"x": i32(T, H)}),
        ("x", {"x": f32(T)}),
        ("plan", {"plan": tuple(good_plan())}),
        ("slot_row", {"x": f32(T + 1, H)}),
        ("slot_row", {"plan": good_plan()._replace(slot_row=torch.zeros(T, K, dtype=torch.int64))}),
        ("slot_row", {"plan": good_plan()._replace(slot_row=i32(S))}),
        ("row_slot", {"plan": good_plan()._replace(row_slot=i32(S + 1))}),
        ("row_slot", {"plan": good_plan()._replace(row_slot=torch.zeros(S, dtype=torch.int64))}),
        ("weights", {"weights": f32(T, K + 1)}),
        ("weights", {"weights": f32(T, K).half()}),
    ],
    "grouped_mm": [
        ("a", {"a": i32(5, H)}),
        ("a", {"a": f32(H)}),
        ("b", {"b": f32(G, H, I).double()}),
        ("b", {"b": f32(H)}),
        ("b", {"b": f32(G, H + 1, I)}),
        ("b", {"a": f32(G, 5, H), "b": f32(G + 1, H, I), "offs": None}),
        ("offs", {"offs": None}),
        ("offs", {"offs": OFFS.float()}),
        ("offs", {"offs": OFFS[:, None]}),
        ("offs", {"offs": OFFS[:2]}),
        ("offs", {"a": f32(G, 5, H)}),
        ("offs", {"a": f32(G, 5, H), "b": f32(H, I), "offs": OFFS[:2]}),
        ("bias", {"bias": f32(G, I + 1)}),
        ("bias", {"bias": f32(I)}),
        ("bias", {"bias": f32(G, I).half()}),
        ("bias", {"a": f32(G, 5, H), "b": f32(H, 5), "bias": f32(G, 5)}),
        ("weight_format", {"weight_format": "mxfp5"}),
        ("mode", {"mode": "int8"}),
        ("scale", {"scale": f32(G, I)}),
        ("out_dtype", {"out_dtype": torch.float64}),
        ("out_dtype", {"out_dtype": torch.int32}),
        ("out_dtype", {"a": f32(5, H).double(), "b": f32(G, H, I).double(), "out_dtype": torch.float32}),
    ],
    "activate": [
        ("h", {"h": i32(S, 2 * I)}),
        ("h", {"h": f32(S)}),
        ("h", {"h": f32(S, 2 * I + 1)}),
        ("kind", {"kind": "swish"}),
        ("alpha", {"alpha": 1.0}),
        ("limit", {"limit": 7.0}),
        ("limit", {"kind": "swiglu_clamped"}),
        ("limit", {"kind": "swiglu_clamped", "limit": 0.0}),
        ("limit", {"kind": "swiglu_oai", "limit": float("nan")}),
        ("limit", {"kind": "swiglu_oai", "limit": float("inf")}),
        ("alpha", {"kind": "swiglu_oai", "alpha": -1.0}),
        ("alpha", {"kind": "softcapped", "limit": 1.0}),
        ("interleaved", {"kind": "silu", "interleaved": True}),
        ("plan", {"plan": good_plan().row_slot}),
        ("row_slot", {"plan": good_plan()._replace(row_slot=i32(S - 1))}),
        ("row_slot", {"plan": good_plan()._replace(row_slot=torch.zeros(S, dtype=torch.int64))}),
        ("weights", {"weights": f32(T, K), "plan": None}),
        ("weights", {"weights": f32(T, K + 1)}),
        ("weights", {"weights": f32(S)}),
        ("weights", {"weights": f32(T, K).half()}),
        ("out_dtype", {"out_dtype": torch.float64}),
    ],
    "combine": [
        ("y", {"y": i32(S, H)}),
        ("y", {"y": f32(S)}),
        ("y", {"y": f32(S + 1, H)}),
        ("plan", {"plan": None}),
        ("slot_row", {"plan": good_plan()._replace(slot_row=i32(S))}),
        ("slot_row", {"plan": good_plan()._replace(slot_row=torch.zeros(T, K, dtype=torch.int64))}),
        ("weights", {"weights": f32(T + 1, K)}),
        ("weights", {"weights": f32(T, K).half()}),
        ("out_dtype", {"out_dtype": torch.float64}),
    ],
    "experts": [
        ("x", {"x": i32(T, H)}),
        ("x", {"x": f32(T, 1, H)}),
        ("gate_up", {"gate_up": f32(E, 2 * I, H).bfloat16()}),
        ("gate_up", {"gate_up": f32(E, 2 * I, H + 1)}),
        ("gate_up", {"gate_up": f32(E, 2 * I + 1, H)}),
        ("gate_up", {"gate_up": f32(2 * I, H)}),
        ("gate_up", {"gate_up": f32(0, 2 * I, H), "down": f32(0, H, I)}),
        ("gate_up", {"transposed": True, "gate_up": f32(E, 2 * I, H + 1), "down": f32(E, I, H)}),
        ("down", {"down": f32(E, H, I).half()}),
        ("down", {"down": f32(E, H, I + 1)}),
        ("down", {"down": f32(E, H + 1, I)}),
        ("down", {"down": f32(E + 1, H, I)}),
        ("down", {"activation": "relu2"}),
        ("weights", {"weights": f32(T, K + 1)}),
        ("weights", {"weights": f32(T, K).half()}),
        ("ids", {"ids": f32(T, K)}),
        ("ids", {"ids": i32(T + 1, K)}),
        ("ids", {"ids": i32(T)}),
        ("activation", {"activation": "swish"}),
        ("alpha", {"alpha": 1.0}),
        ("limit", {"activation": "swiglu_clamped"}),
        ("interleaved", {"activation": "silu", "interleaved": True, "gate_up": f32(E, I, H)}),
        ("gate_up_bias", {"gate_up_bias": f32(E, I)}),
        ("gate_up_bias", {"gate_up_bias": f32(E, 2 * I).half()}),
        ("down_bias", {"down_bias": f32(E, H + 1)}),
        ("down_bias", {"down_bias": i32(E, H)}),
        ("weight_placement", {"weight_placement": "gate"}),
        ("weight_format", {"weight_format": "packed_gate_up"}),
        ("mode", {"mode": "int4"}),
        ("mode", {"mode": "int8"}),
        ("down_zero", {"down_zero": i32(E, H)}),
    ],
}

# Refused by what the values are, so not by a fake.
BAD_VALUES: dict[str, list[Case]] = {
    "grouped_mm": [
        ("offs", {"offs": torch.tensor([3, 2, 5], dtype=torch.int32)}),
        ("offs", {"offs": torch.tensor([-1, 2, 5], dtype=torch.int32)}),
        ("offs", {"offs": torch.tensor([2, 2, 6], dtype=torch.int32)}),
    ]
}


def cases(table: dict[str, list[Case]]) -> list[Any]:
    return [
        pytest.param(op, argument, change, id=f"{op}-{argument}-{number}")
        for op, bad in table.items()
        for number, (argument, change) in enumerate(bad)
    ]


def to_meta(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    return polymoe.Plan(*map(to_meta, value)) if isinstance(value, polymoe.Plan) else value


def check_message(op: str, argument: str, error: ValueError) -> None:
    message = str(error)
    assert re.fullmatch(rf"polymoe\.{op}: {argument}: expected .+, got .+", message), message
    assert "\n" not in message


@pytest.mark.parametrize("op", list(GOOD))
def test_good_arguments_are_good(op: str) -> None:
    for backend in servers(op):
        getattr(polymoe, op)(**GOOD[op], backend=backend)
    getattr(polymoe, op)(**{name: to_meta(value) for name, value in GOOD[op].items()})


@pytest.mark.parametrize(("op", "argument", "change"), [*cases(BAD), *cases(BAD_VALUES)])
def test_bad_argument(op: str, argument: str, change: dict[str, Any]) -> None:
    for backend in servers(op):
        with pytest.raises(ValueError, match="polymoe") as caught:
            getattr(polymoe, op)(**GOOD[op] | change, backend=backend)
        check_message(op, argument, caught.value)


@pytest.mark.parametrize(("op", "argument", "change"), cases(BAD))
def test_bad_argument_of_a_fake(op: str, argument: str, change: dict[str, Any]) -> None:
    arguments = {name: to_meta(value) for name, value in (GOOD[op] | change).items()}
    with pytest.raises(ValueError, match="polymoe") as caught:
        getattr(polymoe, op)(**arguments)
    check_message(op, argument, caught.value)


@pytest.mark.parametrize(
    ("op", "argument", "change"),
    [
        ("gate", "bias", {"bias": f32(E).to("meta")}),
        ("dispatch", "weights", {"weights": f32(T, K).to("meta")}),
        ("grouped_mm", "b", {"b": f32(G, H, I).to("meta")}),
        ("activate", "weights", {"weights": f32(T, K).to("meta")}),
        ("combine", "weights", {"weights": f32(T, K).to("meta")}),
        ("experts", "down", {"down": f32(E, H, I).to("meta")}),
    ],
)
def test_mixed_devices(op: str, argument: str, change: dict[str, Any]) -> None:
    for backend in servers(op):
        with pytest.raises(ValueError, match="polymoe") as caught:
            getattr(polymoe, op)(**GOOD[op] | change, backend=backend)
        check_message(op, argument, caught.value)


SUBJECTS = {op: next(iter(arguments)) for op, arguments in GOOD.items()}


@pytest.mark.parametrize("op", SUBJECTS)
def test_what_is_no_strided_tensor(op: str) -> None:
    subject = SUBJECTS[op]
    for value in (GOOD[op][subject].to_sparse(), GOOD[op][subject].numpy(), None):
        for backend in (*servers(op), None):
            with pytest.raises(ValueError, match="polymoe") as caught:
                getattr(polymoe, op)(**GOOD[op] | {subject: value}, backend=backend)
            check_message(op, subject, caught.value)


@pytest.mark.parametrize("op", [op for op in SUBJECTS if op != "plan"])
def test_forward_mode_derivatives_are_refused(op: str) -> None:
    """Torch would leave the tangent out, which reads as a derivative of zero."""
    subject = SUBJECTS[op]
    arguments = {name: value for name, value in GOOD[op].items() if name != subject}

    def call(value: torch.Tensor) -> Any:
        return getattr(polymoe, op)(value, **arguments)

    value = GOOD[op][subject]
    with torch.autograd.forward_ad.dual_level():
        call(value)  # without a tangent
        with pytest.raises(ValueError, match="polymoe") as caught:
            call(torch.autograd.forward_ad.make_dual(value, torch.ones_like(value)))
    check_message(op, subject, caught.value)
    with pytest.raises(ValueError, match=f"{subject}: expected a tensor without a tangent"):
        torch.func.jvp(call, (value,), (torch.ones_like(value),))


def test_adapters_of_grouped_mm() -> None:
    adapter = {"lora_a": f32(G, 2, H), "lora_b": f32(G, I, 2)}
    polymoe.grouped_mm(**GOOD["grouped_mm"], **adapter)
    for argument, change in (
        ("out_dtype", {"out_dtype": torch.int32}),
        ("out_dtype", {"out_dtype": torch.float64}),
        ("lora_a", {"lora_a": None}),
        ("lora_b", {"lora_b": f32(G, I, 3)}),
    ):
        with pytest.raises(ValueError, match="polymoe") as caught:
            polymoe.grouped_mm(**GOOD["grouped_mm"], **adapter | change)
        check_message("grouped_mm", argument, caught.value)


def test_too_many_slots() -> None:
    ids = torch.empty(2**30, 2, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match=r"polymoe\.plan: ids: expected fewer than 2\^31 slots"):
        polymoe.plan(ids, E)
    x = torch.empty(2**30, H, device="meta")
    with pytest.raises(ValueError, match=r"polymoe\.experts: ids: expected fewer than 2\^31 slots"):
        polymoe.experts(
            x, f32(E, 2 * I, H).to("meta"), f32(E, H, I).to("meta"), ids.to(torch.float32), ids, backend="reference"
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: polymoe.balance_loss(i32(T, E), i32(T, K)), "polymoe.balance_loss: scores: expected"),
        (lambda: polymoe.balance_loss(f32(E), i32(T, K)), "polymoe.balance_loss: scores: expected"),
        (lambda: polymoe.balance_loss(f32(T, 0), i32(T, K)), "polymoe.balance_loss: scores: expected"),
        (lambda: polymoe.balance_loss(f32(T, E), i32(T + 1, K)), "polymoe.balance_loss: ids: expected"),
        (lambda: polymoe.balance_loss(f32(T, E), i32(T, 0)), "polymoe.balance_loss: ids: expected"),
        (lambda: polymoe.balance_loss(f32(2, T, E), i32(T, K)), "polymoe.balance_loss: ids: expected"),
        (
            lambda: polymoe.balance_loss(f32(T, E), i32(T, K), token_mask=f32(T)),
            "polymoe.balance_loss: token_mask: expected",
        ),
        (lambda: polymoe.z_loss(f32(T, 0)), "polymoe.z_loss: logits: expected at least 1 expert"),
        (lambda: polymoe.update_bias(f32(E), f32(E)), "polymoe.update_bias: counts: expected"),
        (lambda: polymoe.update_bias(f32(E), i32(E + 1)), "polymoe.update_bias: counts: expected"),
        (lambda: polymoe.update_bias(i32(E), i32(E)), "polymoe.update_bias: bias: expected"),
        (lambda: polymoe.expert_counts(i32(T), E), "polymoe.expert_counts: ids: expected"),
    ],
)
def test_balance(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
