"""Gradients of a model of the zoo with one implementation of its experts or another, and how close they must be."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from polymoe.testing.tolerances import FUNCTION_ERRORS, frobenius_error, unit_roundoff
from zoo.kinks import Kinks
from zoo.runs import random_inputs, run, same_experts
from zoo.shrink import HIDDEN, INTERMEDIATE, LAYERS, tiny_model


def loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    out = model(**inputs, use_cache=False)
    return (out.logits if hasattr(out, "logits") else out[0]).float().square().mean()


def collected(model: nn.Module) -> dict[str, Tensor]:
    """The gradients that the parameters have by now."""
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


def gradients(model: PreTrainedModel, inputs: dict[str, Tensor], implementation: str) -> dict[str, Tensor]:
    model.zero_grad()
    model.set_experts_implementation(implementation)
    loss(model, inputs).backward()
    return collected(model)


def trainable(
    family: str, model_class: type[PreTrainedModel] | None = None
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A model and inputs for which rounding changes neither the choice of experts nor who is clamped."""
    for _ in range(40):
        model = tiny_model(family, model_class)
        inputs = random_inputs(model)
        with Kinks() as kinks:
            routed = [run(model, "float64", inputs)[1]]
        routed += [run(model, implementation, inputs)[1] for implementation in ("eager", "polymoe")]
        if same_experts(routed) and kinks.near == 0:
            return model.requires_grad_(True), inputs
    raise AssertionError("the choice of experts, or a clamp, is within rounding in every draw")


def rounding_of(
    model: PreTrainedModel, inputs: dict[str, Tensor], truth: dict[str, Tensor], draws: int = 3
) -> dict[str, float]:
    """How far float32 moves each gradient: the largest distance of eager's from `truth`, over this model and others
    whose parameters differ from it by at most one ulp."""
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    largest = dict.fromkeys(truth, 0.0)
    for draw in range(1 + draws):
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), kept, strict=True):
                noise = torch.rand_like(value) - 0.5 if draw else torch.zeros_like(value)
                parameter.copy_(value.double() * (1 + torch.finfo(value.dtype).eps * noise.double()))
        found = gradients(model, inputs, "eager")
        largest = {name: max(largest[name], float((found[name] - truth[name]).norm())) for name in truth}
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), kept, strict=True):
            parameter.copy_(value)
    return largest


# What the experts of all layers add up to: each has a product over either width forward, and one backward, and a gate.
OF_EXPERTS = LAYERS * (
    2 * (frobenius_error(HIDDEN) + frobenius_error(INTERMEDIATE)) + FUNCTION_ERRORS * unit_roundoff(torch.float32)
)


def assert_gradients_agree(found: dict[str, Tensor], truth: dict[str, Tensor], rounding: dict[str, float]) -> None:
    """Parameter by parameter, relative to its own gradient. Some gradients are nothing but rounding, and some models
    make much of that of their experts: as far off as `rounding`, threefold, will do."""
    assert found.keys() == truth.keys()
    assert any("experts" in name for name in found)
    for name, grad in truth.items():
        allowed = OF_EXPERTS * float(grad.norm()) + 3 * rounding[name]
        assert float((found[name] - grad).norm()) <= allowed, name
