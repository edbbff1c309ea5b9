"""Gates and activations of experts modules that are not what they were: noticed, and computed as they are now."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from experts_modules import INTERMEDIATE, assert_right, batch, config, fill, watch_experts
from torch import Tensor, nn
from transformers.activations import ACT2FN, SiLUActivation
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.inkling2.modeling_inkling2 import Inkling2Experts

import polymoe
from polymoe.integrations.transformers import experts_forward
from polymoe.testing.tolerances import assert_same_bits, relative_frobenius

gate_of_v4 = DeepseekV4Experts._apply_gate


@pytest.fixture(autouse=True)
def seeded(seed: int) -> None:
    torch.manual_seed(seed)


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return watch_experts(monkeypatch)


def halved(self: Any, gate_up: Tensor) -> Tensor:
    return gate_of_v4(self, gate_up) * 0.5


class Doubled:
    """A callable that cannot be hashed; as an attribute of a class it gets no self."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True

    def __call__(self, gate_up: Tensor) -> Tensor:
        return gate_up.chunk(2, dim=-1)[0] * 2


GATES: dict[str, Callable[[], Any]] = {
    "function": lambda: halved,
    "wraps": lambda: functools.wraps(gate_of_v4)(halved),
    "partial": lambda: functools.partial(torch.narrow, dim=1, start=0, length=INTERMEDIATE),
    "staticmethod": lambda: staticmethod(Doubled()),
    "object": lambda: Doubled(),
    "compiled": lambda: torch.compile(halved, backend="eager"),
    "method": lambda: functools.partialmethod(halved),
}


def v4() -> nn.Module:
    return fill(DeepseekV4Experts(config()))


@pytest.mark.parametrize("first", [False, True], ids=["before the first call", "after the first call"])
@pytest.mark.parametrize("where", ["class", "subclass", "instance"])
@pytest.mark.parametrize("name", GATES)
def test_a_gate_of_one_s_own_runs_unfused(
    name: str, where: str, first: bool, fused_calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it claims to be: wraps() gives it the name and the module of the known gate."""
    gate, inputs, module = GATES[name](), batch(37), v4()
    plain_result = experts_forward(module, *inputs) if first else None
    if where == "class":
        monkeypatch.setattr(DeepseekV4Experts, "_apply_gate", gate)
    elif where == "subclass":
        module.__class__ = type("Changed", (DeepseekV4Experts,), {"_apply_gate": gate})
    else:
        bound = gate.__get__(module) if hasattr(gate, "__get__") else gate
        module.__dict__["_apply_gate"] = bound
    changed = assert_right(module, *inputs)
    assert len(fused_calls) == first
    if plain_result is not None:
        assert relative_frobenius(changed, plain_result) > 0.05
    assert polymoe.explain(module).modules[""].notes[0].startswith("un-fused")


def test_an_activation_that_was_changed_is_noticed(fused_calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch(37)
    module = v4()
    before = assert_right(module, *inputs)
    assert len(fused_calls) == 1

    def check() -> None:
        assert relative_frobenius(assert_right(module, *inputs), before) > 0.01
        assert len(fused_calls) == 1

    with monkeypatch.context() as patch:
        patch.setattr(SiLUActivation, "forward", lambda self, x: x.tanh())
        check()
    with monkeypatch.context() as patch:
        patch.setattr(module.act_fn, "forward", torch.tanh, raising=False)
        check()
    del module.act_fn
    module.act_fn = torch.tanh  # no module
    check()
    module.act_fn = functools.partial(torch.clamp, max=0.1)
    check()
    module.act_fn = torch.compile(ACT2FN["tanh"], backend="eager")
    check()
    module.act_fn = ACT2FN["silu"]
    assert_same_bits(experts_forward(module, *inputs), before, "as before")
    assert len(fused_calls) == 2


def test_parts_of_an_activation_are_looked_at(fused_calls: list[int]) -> None:
    inputs = batch(37)
    module = fill(Inkling2Experts(config()))
    before = assert_right(module, *inputs)
    assert len(fused_calls) == 1
    hook = module.act_fn.up_softcap.register_forward_hook(lambda _, args, out: 2 * out)
    assert relative_frobenius(assert_right(module, *inputs), before) > 0.01
    hook.remove()
    module.act_fn.up_softcap = nn.Hardtanh()
    assert relative_frobenius(assert_right(module, *inputs), before) > 0.01
    assert len(fused_calls) == 1


def test_a_known_activation_that_computes_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recognised by every name, but its arithmetic is not that of the kind."""
    monkeypatch.setattr(SiLUActivation, "forward", lambda self, x: x * torch.sigmoid(1.001 * x))
    module = v4()
    assert_right(module, *batch(37))
    assert "does not compute swiglu_clamped" in polymoe.explain(module).modules[""].notes[0]


LIMITS: dict[str, tuple[Any, str]] = {
    "changed": (0.9, "fused: swiglu_clamped"),
    "integer": (1, "fused: swiglu_clamped"),
    "infinite": (math.inf, "fused: swiglu"),
    "zero": (0.0, "un-fused"),
    "negative": (-0.2, "un-fused"),
    "nan": (math.nan, "un-fused"),
    "tensor": (torch.tensor(0.9), "un-fused"),
    "parameter": (nn.Parameter(torch.tensor(0.9), requires_grad=False), "un-fused"),
    "of each column": (torch.linspace(0.1, 0.9, INTERMEDIATE), "un-fused"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits_are_read_where_the_gate_reads_them(name: str) -> None:
    module, inputs = v4(), batch(37)
    before = assert_right(module, *inputs)
    module.config.swiglu_limit = 0.1  # the gate reads its own copy
    assert_same_bits(experts_forward(module, *inputs), before, "config")
    value, expected = LIMITS[name]
    module.limit = value if not isinstance(value, nn.Parameter) else None
    if isinstance(value, nn.Parameter):
        del module.limit
        module.register_parameter("limit", value)
    if name == "nan":
        assert experts_forward(module, *inputs).isnan().all()
    elif name == "zero":
        assert not experts_forward(module, *inputs).any()
    else:
        assert relative_frobenius(assert_right(module, *inputs), before) > 0.01
    note = polymoe.explain(module).modules[""].notes[0]
    assert note == expected or (expected == "un-fused" and note.startswith(expected))


def shifted(self: Any, gate_up: Tensor) -> Tensor:
    return gate_of_v4(self, gate_up + 1)


def test_changes_after_compiling_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but hooks, which torch.compile assumes to be there before it runs (torch._dynamo.config)."""
    torch._dynamo.reset()
    module, inputs = v4(), batch(37)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    before = compiled(*inputs)
    assert_same_bits(before, experts_forward(module, *inputs), "known")

    def check() -> None:
        ours = compiled(*inputs)
        assert relative_frobenius(ours, before) > 0.01
        assert_same_bits(ours, assert_right(module, *inputs), "changed")

    module.limit = 0.9
    check()
    module.limit = math.inf
    check()
    module.limit = 0.5
    module.act_fn.forward = torch.tanh
    check()
    module.act_fn = ACT2FN["gelu"]
    check()
    module.act_fn = ACT2FN["silu"]
    with monkeypatch.context() as patch:
        patch.setattr(DeepseekV4Experts, "_apply_gate", shifted)
        check()
    module._apply_gate = functools.partial(shifted, module)
    check()
    del module._apply_gate
    assert_same_bits(compiled(*inputs), before, "as before")
