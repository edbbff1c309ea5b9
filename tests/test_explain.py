"""explain() says which backend and level serve a call, and why not another."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import zoo
from torch import nn

import polymoe.integrations.explain
import polymoe.integrations.transformers
from polymoe.backends._extension import extension
from polymoe.hal import explain as explain_module
from polymoe.hal.explain import (
    Explanation,
    ModuleExplanation,
    by_layer,
    explain,
    register_model_hook,
    register_module_hook,
)
from polymoe.integrations.routers import use_polymoe_routers

T, H, I, E, K = 3, 8, 4, 5, 2


def dense(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    ids = torch.arange(T * K, dtype=torch.int32).reshape(T, K) % E
    x, gate_up, down = torch.ones(T, H), torch.ones(E, 2 * I, H), torch.ones(E, H, I)
    return x.to(dtype), gate_up.to(dtype), down.to(dtype), torch.ones(T, K), ids


def test_cpu_call() -> None:
    assert extension is not None
    found = explain(polymoe.experts, *dense(torch.bfloat16))
    assert (found.op, found.device, found.dtype) == ("experts", "cpu", torch.bfloat16)
    assert (found.backend, found.chosen_by) == ("cpu", "the best that serves this call")
    assert found.properties == ("deterministic", "batch-invariant")
    assert found.isa_level == polymoe.isa_level()
    assert set(found.isa_flags) == set(extension.isa_flags(polymoe.isa_level()))
    assert found.threads == torch.get_num_threads()
    assert found.notes == ()
    assert set(found.not_chosen) == {"triton", "reference"}
    assert found.not_chosen["triton"] == "it serves cuda, xpu tensors, not cpu"
    assert found.not_chosen["reference"] == "it could serve this, but cpu comes first"


def test_text_holds_everything() -> None:
    found = explain("experts", *dense())
    text = str(found)
    assert text.startswith("polymoe.experts on cpu, float32\n  backend: cpu (the best that serves this call)")
    for piece in (*found.isa_flags, *found.notes, *found.not_chosen.values(), *found.higher_levels.values()):
        assert piece in text
    assert f"ISA level: {found.isa_level}" in text
    assert f"up to {found.threads}" in text


@pytest.mark.parametrize("level", polymoe.isa_supported())
def test_higher_levels_have_a_reason(level: str) -> None:
    assert extension is not None
    with polymoe.force_isa_level(level):
        found = explain("experts", *dense())
    levels = polymoe.isa_levels()
    assert found.isa_level == level
    assert list(found.higher_levels) == levels[levels.index(level) + 1 :]
    for higher, reason in found.higher_levels.items():
        missing = extension.isa_missing(higher)
        assert reason == (f"this machine lacks {', '.join(missing)}" if missing else f"{level} is forced")


def test_float64_is_portable() -> None:
    found = explain("experts", *dense(torch.float64))
    assert found.isa_level == "portable"
    assert "float64 is served at the portable level" in found.notes
    assert set(found.higher_levels.values()) == {"float64 is served at the portable level"}


def test_layouts_that_cost_extra() -> None:
    x, gate_up, down, weights, ids = dense()
    note = "{}: not contiguous along the reduction, so tiles of it are copied before they are multiplied"
    found = explain("experts", x, gate_up.mT.contiguous(), down.mT.contiguous(), weights, ids, transposed=True)
    assert found.notes == (note.format("gate_up"), note.format("down"))
    found = explain("experts", x, gate_up.mT, down.mT.contiguous(), weights, ids, transposed=True)
    assert found.notes == (note.format("down"),)
    assert explain("grouped_mm", x, gate_up.mT).notes == ()
    assert explain("grouped_mm", x, gate_up.mT.contiguous()).notes == (note.format("b"),)


def test_skipped_slots() -> None:
    *others, ids = dense()
    ids[0, 0], ids[2, 1] = -1, E
    note = f"ids: 2 of {T * K} slots are outside [0, {E}) and are skipped"
    assert explain("experts", *others, ids).notes == (note,)
    assert explain("plan", ids, E, backend="reference").notes == (note,)


def test_requests() -> None:
    found = explain("gate", torch.ones(T, E), K, backend="reference")
    assert (found.backend, found.chosen_by) == ("reference", "explicit argument")
    assert (found.isa_level, found.threads, found.properties) == (None, None, ())
    assert found.not_chosen["cpu"] == "reference was asked for"
    assert "neither deterministic nor batch-invariant" in str(found)
    with polymoe.use_backend("reference"):
        assert explain("plan", torch.zeros(T, K, dtype=torch.int32), E).chosen_by == "use_backend"
    with pytest.raises(ValueError, match=r"polymoe\.gate: backend: expected .*, got 'triton'"):
        explain("gate", torch.ones(T, E), K, backend="triton")


def test_another_device() -> None:
    found = explain("activate", torch.ones(T, 2 * I, device="meta"), "swiglu")
    assert (found.backend, found.device) == ("reference", "meta")
    assert found.not_chosen["cpu"] == "it serves cpu tensors, not meta"


def test_bad_targets() -> None:
    for wrong in ("expert", torch.matmul, 3):
        with pytest.raises(ValueError, match=r"polymoe\.explain: target: expected a module or one of .*experts"):
            explain(wrong)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"polymoe\.explain: expected the arguments of plan, got others: .*'expert'"):
        explain("plan", expert=3)
    with pytest.raises(ValueError, match=r"polymoe\.explain: ids: expected a tensor, got None"):
        explain("plan")


class Layer(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.ones(E, 2 * I, H, dtype=dtype))


def test_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain_module, "_module_hooks", [])

    @register_module_hook
    def layer(module: nn.Module) -> Explanation | None:
        return explain("experts", module.gate_up, module.gate_up) if isinstance(module, Layer) else None

    model = nn.Sequential(Layer(torch.float32), nn.Linear(2, 2), Layer(torch.float32), Layer(torch.bfloat16))
    found = explain(model)
    assert isinstance(found, ModuleExplanation)
    assert list(found.modules) == ["0", "2", "3"]
    assert found.modules["3"].dtype == torch.bfloat16
    texts = [str(found.modules[name]).replace("\n", "\n  ") for name in ("0", "3")]
    assert str(found) == f"0,2:\n  {texts[0]}\n3:\n  {texts[1]}"
    assert str(explain(model[0])).startswith("the module itself:\n  polymoe.experts on cpu, float32\n")
    assert str(explain(nn.Linear(2, 2))) == "no module that polymoe runs"


def test_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain_module, "_module_hooks", [])
    monkeypatch.setattr(explain_module, "_model_hooks", [])

    @register_model_hook
    def routers(model: nn.Module) -> dict[str, Explanation | str]:
        gate = explain("gate", torch.ones(T, E), K)
        return {f"layers.{i}.{part}": "left alone\nfor a reason" for i in (10, 2, 1) for part in ("gate", "mlp")} | {
            "layers.9.gate": gate
        }

    found = explain(nn.Linear(2, 2))
    assert list(found.modules) == ["layers.9.gate"]
    assert found.others["layers.10.mlp"] == "left alone\nfor a reason"
    alone = "left alone\n  for a reason"
    assert str(found).startswith(
        f"layers.1-2,10:\n  gate: {alone}\n  mlp: {alone}\nlayers.9:\n  gate: polymoe.gate on cpu"
    )


def test_layers_alike_are_one_line() -> None:
    texts = {f"a.layers.{i}.mlp": "x" for i in (0, 1, 2, 5, 7, 8)} | {"a.layers.3.mlp": "y", "b.layers.4.mlp": "x"}
    texts |= {"a.layers.6.moe": "x", "whole": "x", "layers.0.1": "x", "layers.0.2": "x"}
    assert by_layer(texts) == [
        ("a.layers.0-2,5,7-8.mlp", "x"),
        ("a.layers.3.mlp", "y"),
        ("b.layers.4.mlp", "x"),
        ("a.layers.6.moe", "x"),
        ("whole", "x"),
        ("layers.0.1-2", "x"),
    ]


# --- models of Transformers -------------------------------------------------------------------------------------------


def test_a_model_whose_experts_are_transformers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user need not have imported an integration for its advice."""
    monkeypatch.setattr(explain_module, "_model_hooks", [])
    monkeypatch.delitem(sys.modules, "polymoe.integrations.explain")
    assert str(explain(zoo.tiny_model("mixtral"))) == (
        "model.layers.0-3.mlp:\n"
        '  experts: Transformers\' "grouped_mm"; import polymoe.integrations.transformers, then '
        'model.set_experts_implementation("polymoe"), to run them in polymoe\n'
        "  gate: the model's own; polymoe.integrations.routers.use_polymoe_routers(model) makes it one call of "
        "polymoe.gate: softmax, top 3, renormalised"
    )


def ready(family: str) -> Any:

    model = zoo.tiny_model(family)
    model.set_experts_implementation("polymoe")
    return model


def test_layer_by_layer() -> None:
    model = ready("deepseek_v4")
    text = str(explain(model))
    assert text.count("polymoe.experts on cpu, float32") == 2  # the hash-routed layer, and all others
    assert text.count("note: fused: swiglu_clamped") == 2
    assert f"ISA level: {polymoe.isa_level()}" in text
    use_polymoe_routers(model)
    model.model.layers[2].mlp.gate.score_fn = nn.Softplus()
    found = explain(model)
    text = str(found)
    assert [line for line in text.splitlines() if not line.startswith(" ")] == [
        "model.layers.0.mlp:",
        "model.layers.1,3.mlp:",
        "model.layers.2.mlp:",
    ]
    assert found.others == {"model.layers.2.mlp.gate": "the model's own, its score_fn is Softplus"}
    gate = found.modules["model.layers.0.mlp.gate"]
    assert (gate.op, gate.backend) == ("gate", "cpu")
    assert gate.notes == (
        "sqrtsoftplus, top 3, chosen by token id, renormalised, times 1.5",
        "the model's own forward where a gradient is needed, and under autocast",
    )


def test_layouts_that_cost_extra_in_a_model() -> None:
    notes = explain(ready("gpt_oss")).modules["model.layers.0.mlp.experts"].notes
    assert notes[0] == "fused: swiglu_oai"
    assert [note.partition(":")[0] for note in notes[1:]] == ["gate_up", "down"]
    assert all("not contiguous along the reduction" in note for note in notes[1:])
    assert explain(ready("mixtral")).modules["model.layers.0.mlp.experts"].notes == ("fused: swiglu",)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_family_without_any_weights(family: str) -> None:

    model_class = zoo.model_classes(family)[0]
    with torch.device("meta"):
        model = model_class(zoo.tiny_config(family))
    model.set_experts_implementation("polymoe")
    experts = {name for name, module in model.named_modules() if hasattr(module, "_is_expert_parallel")}
    found = explain(model)
    assert set(found.modules) == experts
    assert {explanation.device for explanation in found.modules.values()} == {"meta"}
    assert len(found.others) == len(experts)
    assert {name.rpartition(".")[0] for name in found.others} == {name.rpartition(".")[0] for name in experts}
    use_polymoe_routers(model)
    replaced = {name for name, how in explain(model).modules.items() if how.op == "gate"}
    assert replaced == set() if family in ("phimoe", "zaya") else len(replaced) == len(experts)
