"""Training through the experts implementation "polymoe": the gradients of eager, model by model, plain, with gradient
checkpointing and compiled. Autocast and several processes have files of their own."""

from __future__ import annotations

import copy

import pytest
import torch
import zoo
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from zoo.kinks import Kinks
from zoo.training import assert_gradients_agree, collected, gradients, loss, rounding_of, trainable

import polymoe.integrations.transformers  # noqa: F401 (registers "polymoe")
from polymoe.testing.tolerances import assert_same_bits

# Families that Transformers does not checkpoint, and what it says to that.
NOT_CHECKPOINTED = {"diffusion_gemma": "is not compatible with gradient checkpointing"}

# Families that do not compile as one graph, whatever their experts, and what torch says to that.
NOT_ONE_GRAPH = {
    "ernie4_5_vl_moe": "Data-dependent branching",  # on whether there is an image at all
    "qwen3_5_moe": "view size is not compatible",  # in the backward of the gated delta rule
    "qwen3_next": "view size is not compatible",  # likewise
    "qwen4_exp": "Could not guard on data-dependent expression",  # how many blocks a token sees
}

# The compiled families of every run: plain experts; biases, a clamp, transposed and interleaved weights; un-fused ones.
COMPILED = ("qwen3_moe", "gpt_oss", "muse_spark")

pytestmark = pytest.mark.usefixtures("one_thread")

_TO_COMPILE = [pytest.param(*part, marks=() if part[0] in COMPILED else pytest.mark.slow) for part in zoo.PARTS]


def checkpointed(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that keeps only its layers' inputs for the backward. Layers checkpoint in training alone; what they hold
    stays as it is, for dropout and jitter would draw other numbers."""
    model = copy.deepcopy(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
    return model


def assert_checkpointing_changes_nothing(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    wanted, model = gradients(model, inputs, "polymoe"), checkpointed(model)
    modules, calls = zoo.experts_modules(model), []
    for module in modules:
        module.register_forward_pre_hook(lambda module, _: calls.append(module))
    found = gradients(model, inputs, "polymoe")
    assert all(calls.count(module) == 2 for module in modules)
    assert found.keys() == wanted.keys()
    for key, grad in wanted.items():
        assert_same_bits(found[key], grad, key)


def test_elements_near_a_kink_are_seen() -> None:
    x = torch.tensor([0.0, 1e-7, 0.5, 0.5 + 1e-7, 1.0, -0.5], dtype=torch.float64)
    for act, near in (
        (torch.relu, 2),
        (lambda x: x.clamp(max=0.5), 2),
        (lambda x: x.clamp(-0.5, 0.5), 3),
        (lambda x: x.clamp(min=-0.5), 1),
        (torch.neg, 0),
    ):
        with Kinks() as kinks:
            act(x)
        assert kinks.near == near


@pytest.mark.parametrize(("family", "model_class"), zoo.PARTS, ids=zoo.name_of)
def test_every_family(family: str, model_class: type[PreTrainedModel], seed: int) -> None:
    torch.manual_seed(seed)
    model, inputs = trainable(family, model_class)
    truth = gradients(model, inputs, "float64")
    rounding = rounding_of(model, inputs, truth)
    assert_gradients_agree(gradients(model, inputs, "polymoe"), truth, rounding)
    if family not in NOT_CHECKPOINTED:
        assert_checkpointing_changes_nothing(model, inputs)
        return
    with pytest.raises(ValueError, match=NOT_CHECKPOINTED[family]):
        checkpointed(model)


@pytest.mark.parametrize(("family", "model_class"), _TO_COMPILE, ids=zoo.name_of)
def test_compiled(family: str, model_class: type[PreTrainedModel], seed: int) -> None:
    """Forward and backward as one graph each; of models that have none, the experts alone."""
    torch.manual_seed(seed)
    model, inputs = trainable(family, model_class)
    truth = gradients(model, inputs, "float64")
    rounding = rounding_of(model, inputs, truth)
    model.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    if family in NOT_ONE_GRAPH:
        model.set_experts_implementation("none")
        with pytest.raises(Exception, match=NOT_ONE_GRAPH[family]):
            compiled(model, inputs).backward()
        for module in zoo.experts_modules(model):
            module.compile(fullgraph=True, backend="aot_eager")
        found = gradients(model, inputs, "polymoe")
    else:
        model.set_experts_implementation("polymoe")
        compiled(model, inputs).backward()
        found = collected(model)
    assert_gradients_agree(found, truth, rounding)
