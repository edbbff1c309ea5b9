"""Training through the experts implementation "polymoe": the gradients of eager, model by model."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import Tensor
from transformers import PreTrainedModel
from zoo.runs import random_inputs

import polymoe.integrations.transformers  # noqa: F401 (registers "polymoe")
from polymoe.testing.tolerances import relative_frobenius

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")


def gradients(model: PreTrainedModel, inputs: dict[str, Tensor], implementation: str) -> dict[str, Tensor]:
    model.zero_grad()
    model.set_experts_implementation(implementation)
    out = model(**inputs)
    (out.logits if hasattr(out, "logits") else out[0]).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_eager(family: str, checkpointed: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model = zoo.tiny_model(family, zoo.model_classes(family)[0]).requires_grad_(True)
    inputs = random_inputs(model)
    expected = {name: grad.clone() for name, grad in gradients(model, inputs, "eager").items()}
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    found = gradients(model, inputs, "polymoe")
    assert found.keys() == expected.keys()
    assert any("experts" in name for name in found)
    for name, grad in expected.items():
        assert relative_frobenius(found[name], grad) <= 1e-4, name
