"""Training through the experts implementation "polymoe": the gradients of eager, model by model, in every way that
models are trained."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import zoo
from torch import Tensor
from transformers import PreTrainedModel
from zoo.runs import random_inputs, run, same_experts
from zoo.shrink import HIDDEN, INTERMEDIATE, LAYERS

import polymoe.integrations.transformers  # noqa: F401 (registers "polymoe")
from polymoe.testing.tolerances import FUNCTION_ERRORS, frobenius_error, relative_frobenius, unit_roundoff

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "deepseek_v4", "gpt_oss", "llama4", "jetmoe")
PARTS = [(family, model_class) for family in zoo.FAMILIES for model_class in zoo.model_classes(family)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads would only wait for one another here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def loss(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    out = model(**inputs, use_cache=False)
    return (out.logits if hasattr(out, "logits") else out[0]).float().square().mean()


def gradients(model: PreTrainedModel, inputs: dict[str, Tensor], implementation: str) -> dict[str, Tensor]:
    model.zero_grad()
    model.set_experts_implementation(implementation)
    loss(model, inputs).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: grad.clone() for name, grad in found.items()}


def trainable(
    family: str, model_class: type[PreTrainedModel] | None = None
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A model and inputs for which rounding does not change the choice of experts."""
    for _ in range(8):
        model = zoo.tiny_model(family, model_class)
        inputs = random_inputs(model)
        routed = [run(model, implementation, inputs)[1] for implementation in ("float64", "eager", "polymoe")]
        if same_experts(routed):
            return model.requires_grad_(True), inputs
    raise AssertionError("the choice of experts is within rounding in every draw")


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


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("family", FAMILIES[:5])
def test_gradients_are_those_of_eager(family: str, checkpointed: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model, inputs = trainable(family)
    truth = gradients(model, inputs, "float64")
    rounding = rounding_of(model, inputs, truth)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    assert_gradients_agree(gradients(model, inputs, "polymoe"), truth, rounding)


@pytest.mark.parametrize(("family", "model_class"), PARTS, ids=lambda value: getattr(value, "__name__", value))
def test_every_family(family: str, model_class: type[PreTrainedModel], seed: int) -> None:
    torch.manual_seed(seed)
    model, inputs = trainable(family, model_class)
    truth = gradients(model, inputs, "float64")
    assert_gradients_agree(gradients(model, inputs, "polymoe"), truth, rounding_of(model, inputs, truth))


def stable_in_bfloat16(family: str) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """A model and inputs for which rounding to bfloat16 moves no token to another expert."""
    for _ in range(60):
        model, _ = trainable(family)
        inputs = random_inputs(model, batch=1, length=6)
        routed = [run(model, "eager", inputs)[1]]
        with torch.autocast("cpu", torch.bfloat16):
            routed += [run(model, implementation, inputs)[1] for implementation in ("eager", "polymoe")]
        if same_experts(routed):
            return model, inputs
    raise AssertionError("rounding to bfloat16 changes the choice of experts in every draw")


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_autocast(family: str, seed: int) -> None:
    """bfloat16 experts and float32 routing weights: as far from float32 as eager's own, at most, in the mean of many
    draws: where a model clamps, rounding now and then decides whether an element has a gradient at all, and a single
    draw may be twice as far off."""
    torch.manual_seed(seed)
    ratios = []
    for _ in range(30):
        model, inputs = stable_in_bfloat16(family)
        truth = gradients(model, inputs, "eager")
        names = [name for name in truth if "experts" in name]
        errors = {}
        for implementation in ("eager", "polymoe"):
            with torch.autocast("cpu", torch.bfloat16):
                found = gradients(model, inputs, implementation)
            assert all(found[name].dtype == torch.float32 for name in names)  # that of the parameters
            both = (torch.cat([part[name].flatten() for name in names]) for part in (found, truth))
            errors[implementation] = relative_frobenius(*both)
        ratios.append(errors["polymoe"] / errors["eager"])
    assert torch.tensor(ratios).log().mean().exp() <= 1.2


def test_compiled(seed: int) -> None:
    torch.manual_seed(seed)
    model, inputs = trainable("qwen3_moe")
    truth = gradients(model, inputs, "float64")
    rounding = rounding_of(model, inputs, truth)
    model.zero_grad()
    model.set_experts_implementation("polymoe")
    torch._dynamo.reset()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(model, inputs).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert_gradients_agree(found, truth, rounding)
