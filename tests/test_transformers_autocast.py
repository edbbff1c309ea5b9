"""Training under autocast to bfloat16 with the experts implementation "polymoe": as close to the truth as eager's."""

from __future__ import annotations

import math

import pytest
import torch
import zoo
from torch import Tensor, nn
from transformers import PreTrainedModel
from zoo.runs import random_inputs, run, same_experts
from zoo.training import gradients, trainable

import polymoe.integrations.transformers  # noqa: F401 (registers "polymoe")
from polymoe.testing.tolerances import relative_frobenius, unit_roundoff

DTYPE = torch.bfloat16
Inputs = tuple[Tensor, Tensor, Tensor]

pytestmark = pytest.mark.usefixtures("one_thread")


def experts_and_inputs(family: str, model_class: type[PreTrainedModel]) -> tuple[nn.Module, Inputs]:
    """The last experts module of a model and what all of them get under autocast. Casts lose nothing, for all that is
    cast is representable. No limit binds, for rounding would decide whether elements near it have a gradient at all."""
    model = zoo.tiny_model(family, model_class)
    modules, seen = zoo.experts_modules(model), []
    for module in modules:
        module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    model.set_experts_implementation("eager")
    with torch.no_grad(), torch.autocast("cpu", DTYPE):
        model(**random_inputs(model, batch=4, length=32), use_cache=False)
    x, ids, weights = (torch.cat(parts) for parts in zip(*seen, strict=True))
    module = modules[-1].requires_grad_(True)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(DTYPE).to(parameter.dtype)
    for limit in ("limit", "swiglu_limit"):
        if getattr(module, limit, None) is not None:
            setattr(module, limit, 1e4)
    return module, (x.to(DTYPE).to(x.dtype), ids, weights)


def differentiated(module: nn.Module, implementation: str, inputs: Inputs, grad: Tensor) -> dict[str, Tensor]:
    """What comes out, and the gradient of everything that has one."""
    module.config._experts_implementation = implementation
    x, ids, weights = inputs
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    parameters = dict(module.named_parameters())
    with torch.autocast("cpu", DTYPE, enabled=implementation != "float64"):
        out = module(x, ids, weights)
    grads = torch.autograd.grad(out, [x, weights, *parameters.values()], grad.to(out.dtype))
    return dict(zip(["out", "x", "weights", *parameters], [out.detach(), *grads], strict=True))


@pytest.mark.parametrize(("family", "model_class"), zoo.PARTS, ids=zoo.name_of)
def test_experts_of_every_family(family: str, model_class: type[PreTrainedModel], seed: int) -> None:
    """One by one, in the dtype of eager's, and at most 1.05 times as far off. polymoe casts biases with the weights, so
    their gradients are rounded to bfloat16, where some models keep them in float32."""
    torch.manual_seed(seed)
    module, (x, ids, weights) = experts_and_inputs(family, model_class)
    grad = torch.randn(x.shape).to(DTYPE)
    truth = differentiated(module, "float64", (x.double(), ids, weights.double()), grad)
    eager, ours = (differentiated(module, how, (x, ids, weights), grad) for how in ("eager", "polymoe"))
    for name, value in truth.items():
        assert ours[name].dtype == eager[name].dtype, name
        allowed = 1.05 * relative_frobenius(eager[name], value)
        if name.endswith("_bias"):
            allowed = math.hypot(allowed, unit_roundoff(DTYPE))
        assert relative_frobenius(ours[name], value) <= allowed, name


def stable(family: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A model and inputs for which rounding to bfloat16 moves no token to another expert."""
    for _ in range(60):
        model, _ = trainable(family)
        inputs = random_inputs(model, batch=1, length=6)
        routed = [run(model, "eager", inputs)[1]]
        with torch.autocast("cpu", DTYPE):
            routed += [run(model, implementation, inputs)[1] for implementation in ("eager", "polymoe")]
        if same_experts(routed):
            return model, inputs
    raise AssertionError("rounding to bfloat16 changes the choice of experts in every draw")


def test_a_whole_model(seed: int) -> None:
    """As far from float32 as eager's own, in the mean of a few draws: here the rest of the model rounds, too, and makes
    single draws differ by a third."""
    torch.manual_seed(seed)
    ratios = []
    for _ in range(8):
        model, inputs = stable("qwen3_moe")
        truth = gradients(model, inputs, "eager")
        names = [name for name in truth if "experts" in name]
        errors = {}
        for implementation in ("eager", "polymoe"):
            with torch.autocast("cpu", DTYPE):
                found = gradients(model, inputs, implementation)
            assert all(found[name].dtype == torch.float32 for name in names)  # that of the parameters
            both = (torch.cat([part[name].flatten() for name in names]) for part in (found, truth))
            errors[implementation] = relative_frobenius(*both)
        ratios.append(errors["polymoe"] / errors["eager"])
    assert torch.tensor(ratios).log().mean().exp() <= 1.2
