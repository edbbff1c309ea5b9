"""Llama 4 and Step 3.7, whose experts are not behind Transformers' interface, with their experts replaced."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from experts_modules import float32_bound, watch_experts
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from zoo.shrink import LAYERS, VOCAB

import polymoe
from polymoe.integrations.undecorated import replace_experts, restore_experts
from polymoe.testing.tolerances import assert_same_bits, relative_frobenius


@pytest.fixture(autouse=True)
def seeded(seed: int) -> None:
    torch.manual_seed(seed)


def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Or the last hidden state of a model without a head."""
    with torch.no_grad():
        return model(tokens, use_cache=False)[0]


def replaced(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "forward" in module.__dict__]


@pytest.mark.parametrize("family", ["llama4", "step3p7"])
def test_logits_and_undo(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.tiny_model(family)
    tokens = torch.randint(VOCAB, (2, 24))
    before, state = logits(model, tokens), list(model.state_dict())
    calls = watch_experts(monkeypatch)
    names = replace_experts(model)
    assert len(names) >= LAYERS - 1
    ours = logits(model, tokens)
    assert len(calls) == len(names)
    assert min(calls) >= 2
    assert relative_frobenius(ours, before) <= 2 * float32_bound(len(names))
    assert list(model.state_dict()) == state
    explained = polymoe.explain(model).modules
    assert list(explained) == names
    assert all(how.notes[0].startswith("fused: swiglu") for how in explained.values())
    twin = copy.deepcopy(model)
    assert all(module.forward.__self__ is module for module in replaced(twin))
    assert_same_bits(logits(twin, tokens), ours, "a copy")
    restore_experts(model)
    assert not replaced(model)
    assert_same_bits(logits(model, tokens), before, "restored")


def test_an_unknown_activation_stays_with_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.tiny_model("llama4")
    replace_experts(model)
    for module in replaced(model):
        module.experts.act_fn = ACT2FN["mish"]
    calls = watch_experts(monkeypatch)
    tokens = torch.randint(VOCAB, (1, 5))
    own = logits(model, tokens)
    assert not calls
    restore_experts(model)
    assert_same_bits(own, logits(model, tokens), "the model's own forward")


def test_a_model_without_such_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="replace_experts: model: expected one with Llama4TextMoe"):
        replace_experts(nn.Linear(2, 2))
