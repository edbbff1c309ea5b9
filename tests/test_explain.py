"""explain() says which backend and level serve a call, and why not another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polymoe
from polymoe.backends._extension import extension
from polymoe.hal import explain as explain_module
from polymoe.hal.explain import Explanation, ModuleExplanation, explain, register_module_hook

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
    assert str(found) == f"0 and 1 alike, to 2:\n{found.modules['0']}\n3:\n{found.modules['3']}"
    assert str(explain(nn.Linear(2, 2))) == "no module that polymoe runs"
