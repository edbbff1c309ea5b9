"""Transformers' routers replaced by polymoe.gate: the same experts with the same weights, or not replaced at all."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zoo
from experts_modules import float32_bound
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from zoo.routers import describe
from zoo.runs import random_inputs, run, same_experts
from zoo.shrink import EXPERTS, HIDDEN, VOCAB

import polymoe.integrations.transformers  # noqa: F401  (registers the experts)
from polymoe import ops
from polymoe.integrations.routers import (
    _families,
    polymoe_routers,
    replacement,
    restore_routers,
    routers,
    use_polymoe_routers,
)
from polymoe.testing.tolerances import FUNCTION_ERRORS, assert_same_bits, growth, relative_frobenius, unit_roundoff

pytestmark = pytest.mark.usefixtures("one_thread")

OWN = {"phimoe": "a softmax of its own", "zaya": "a state that goes from layer to layer"}
# These round their scores to the dtype of the logits before they choose; Inkling 2's projection takes float32 only.
ROUNDING = {"deepseek_v4", "inkling2", "lfm2_moe", "mistral4"}
TOKENS = 192


@pytest.fixture(autouse=True)
def seeded(seed: int) -> None:
    torch.manual_seed(seed)


@pytest.fixture
def gate_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The scoring of each call of gate."""
    calls: list[str] = []
    gate = ops.gate

    def counted(logits: Tensor, k: int, scoring: str = "softmax", *rest: Any, **options: Any) -> Any:
        calls.append(scoring)
        return gate(logits, k, scoring, *rest, **options)

    monkeypatch.setattr(ops, "gate", counted)
    return calls


def of_each_kind(model: nn.Module) -> list[Any]:
    """One router of each class, filled with numbers that matter: logits of a spread near 2, biases that change the
    choice, scales that are not 1."""
    found: dict[type, Any] = {}
    for router in routers(model).values():
        found.setdefault(type(router), router)
    for router in found.values():
        fill(router)
    return list(found.values())


def fill(router: nn.Module) -> None:
    with torch.no_grad():
        for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
            if name == "tid2eid":
                tensor.copy_(torch.rand(VOCAB, EXPERTS).argsort(-1)[:, : tensor.shape[1]])
            elif tensor.dim() == 2 and "statics" not in name:
                tensor.normal_(std=2 / HIDDEN**0.5)
            else:
                tensor.uniform_(0.3, 0.9)


def inputs_of(router: Any, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """Hidden states and whatever else the router's forward takes."""
    x = torch.randn(1, tokens, HIDDEN, dtype=dtype)
    name = type(router).__name__
    if name == "DeepseekV4HashRouter":
        return [x, torch.randint(VOCAB, (1, tokens))]
    if name in ("HYV3TopKRouter", "Dots3NoteVisionTopKRouter", "AfmoeTokenChoiceRouter", "MiniMaxM2TopKRouter"):
        return [x, 0.6 * torch.rand(EXPERTS)]
    if name == "Lfm2MoeTopKRouter":
        return [x[0], 0.6 * torch.rand(EXPERTS)]
    return [x[0]]


def weight_error(weights: Tensor) -> Tensor:
    """By how much two weights may differ that are each computed in float32 from the same logits, then rounded to their
    dtype: a score, a sum of scores and the quotient; softmaxes sum over all experts."""
    each = 2 * FUNCTION_ERRORS + growth(EXPERTS) + growth(zoo.shrink.TOP_K)
    u32 = unit_roundoff(torch.float32)
    return (2 * each * u32 + 2 * unit_roundoff(weights.dtype) * (1 + each * u32)) * weights.abs()


def assert_equal_routing(own: tuple[Tensor, ...], ours: tuple[Tensor, ...], weight_at: tuple[int, ...] = (1,)) -> bool:
    """Everything but the choice must hold; the result says whether all tokens have the same experts, too.

    Tokens with two equal logits, which bfloat16 has many of, are left out: nothing says which of the two wins."""
    assert isinstance(ours, tuple)
    assert [(x.shape, x.dtype) for x in ours] == [(x.shape, x.dtype) for x in own]
    logits, ids = own[0], own[2]
    torch.testing.assert_close(ours[0], logits, rtol=0, atol=0)
    decided = logits.sort(-1).values.diff(dim=-1).ne(0).all(-1)
    assert decided.float().mean() >= 0.5
    order, our_order = ids.argsort(-1), ours[2].argsort(-1)
    same = (ids.gather(-1, order) == ours[2].gather(-1, our_order)).all(-1)
    weights, our_weights = own[1].gather(-1, order)[same], ours[1].gather(-1, our_order)[same]
    assert ((weights - our_weights).abs() <= weight_error(weights)).all()
    if len(own) == 4:
        assert ((own[3] - ours[3])[same].abs() <= weight_error(own[3])[same]).all()
    return bool(same[decided].all())


def assert_replaced_equally(router: Any, dtype: torch.dtype) -> None:
    assert not use_polymoe_routers(router).kept
    for _ in range(3):  # a token whose next best expert is within rounding of its last one shows nothing: draw again
        inputs = inputs_of(router, TOKENS, dtype)
        with torch.no_grad():
            own, ours = type(router).forward(router, *inputs), router(*inputs)
        if assert_equal_routing(own, ours):
            break
    else:
        raise AssertionError("other experts than the router's own")
    assert torch.unique(own[2]).numel() > own[2].shape[1]
    with torch.no_grad():
        assert router(*inputs_of(router, 0, dtype))[2].shape == (0, own[2].shape[1])
    restore_routers(router)


def variants(router: Any) -> Iterator[str]:
    """Sets the router, one after the other, to every setting of its flags."""
    yield "as it is"
    if hasattr(router, "norm_topk_prob"):
        router.norm_topk_prob = not router.norm_topk_prob
        yield "renormalisation"
    if getattr(router, "num_group", None) == 1 and _families.entry(router) is not _families._axk2:
        router.num_group, router.topk_group = 4, 2
        yield "groups"
    if hasattr(router, "topk_method"):
        router.topk_method, router.num_group, router.topk_group = "group_limited_greedy", 4, 2
        yield "groups"
    if hasattr(router, "expert_selection_fn"):
        router.expert_selection_fn = "sigmoid"
        yield "sigmoid"
        router.norm_topk_prob = not router.norm_topk_prob
        yield "sigmoid, renormalisation"
    if hasattr(router, "use_expert_bias"):
        router.use_expert_bias = not router.use_expert_bias
        yield "bias"


@pytest.mark.parametrize(("family", "model_class"), zoo.PARTS, ids=zoo.name_of)
def test_family(family: str, model_class: type[PreTrainedModel], gate_calls: list[str]) -> None:
    model = zoo.tiny_model(family, model_class)
    assert len(routers(model)) == len(zoo.experts_modules(model))
    if family in OWN:
        assert OWN[family] in describe(family)
        return
    assert "own" not in describe(family)
    for router in of_each_kind(model):
        for _ in variants(router):
            gate_calls.clear()
            assert_replaced_equally(router, torch.float32)
            assert gate_calls
        how = _families.recipe(_families.entry(router), router.bfloat16())
        if family in ROUNDING or getattr(router, "expert_selection_fn", "") == "sigmoid":
            assert how == "it rounds its scores to bfloat16, which polymoe.gate keeps in float32"
        else:
            assert_replaced_equally(router, torch.bfloat16)


@pytest.mark.parametrize(("family", "model_class"), zoo.PARTS, ids=zoo.name_of)
def test_whole_model(family: str, model_class: type[PreTrainedModel], gate_calls: list[str]) -> None:
    if family in OWN:
        return
    model = zoo.tiny_model(family, model_class)
    layers = len(zoo.experts_modules(model))
    for _ in range(5):
        restore_routers(model)
        inputs = random_inputs(model)
        truth, truth_routed = run(model, "float64", inputs)
        eager, eager_routed = run(model, "eager", inputs)
        assert not gate_calls
        assert not use_polymoe_routers(model).kept
        gate_calls.clear()
        ours, ours_routed = run(model, "polymoe", inputs)
        if same_experts([truth_routed, eager_routed, ours_routed]):
            break
        gate_calls.clear()
    else:
        raise AssertionError("the layers' inputs differ so much that the tokens go to other experts")
    twice = 2 if family in ("inkling", "kolibri1") else 1
    assert len(gate_calls) == layers * twice
    assert relative_frobenius(eager, truth) <= float32_bound(layers)
    assert relative_frobenius(ours, truth) <= float32_bound(layers)


@pytest.mark.parametrize("family", ["afmoe", "beam", "deepseek_v3", "hy_v3", "inkling2", "lfm2_moe", "muse_spark"])
def test_scores_as_small_as_the_guard_of_their_sum(family: str) -> None:
    (router,) = of_each_kind(zoo.tiny_model(family))
    use_polymoe_routers(router)
    recipe: Any = replacement(router)
    settings = recipe.settings(router)
    inputs = inputs_of(router, TOKENS, torch.float32)
    inputs[0][..., 0] = 1
    recipe.matrix(router)[:, 0] = math.log(settings["eps"]) / getattr(router, "output_multiplier", 1.0)
    with torch.no_grad():
        own, ours = type(router).forward(router, *inputs), router(*inputs)
    assert_equal_routing(own, ours)
    sums = own[1].sum(-1) / settings.get("scale", 1.0)
    assert ((0.05 < sums) & (sums < 0.999)).float().mean() > 0.9


# --- when not ---------------------------------------------------------------------------------------------------------


def mixtral() -> PreTrainedModel:
    return zoo.tiny_model("mixtral")


def deepseek_v3() -> Any:
    return of_each_kind(zoo.tiny_model("deepseek_v3"))[0]


def test_training_takes_the_routers_own_forward(gate_calls: list[str]) -> None:
    model = mixtral().requires_grad_(True)
    inputs = random_inputs(model)
    loss = model(**inputs, labels=inputs["input_ids"], output_router_logits=True).loss
    expected = torch.autograd.grad(loss, list(model.parameters()))
    use_polymoe_routers(model)
    gate_calls.clear()
    loss = model(**inputs, labels=inputs["input_ids"], output_router_logits=True).loss
    for got, wanted in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
        assert_same_bits(got, wanted, "gradient")
    assert not gate_calls
    with torch.no_grad():
        model(**inputs)
    assert len(gate_calls) == len(routers(model))
    x = torch.randn(5, HIDDEN, requires_grad=True)
    router = next(iter(routers(model.requires_grad_(False)).values()))
    assert router(x)[1].requires_grad


def test_autocast_takes_the_routers_own_forward(gate_calls: list[str]) -> None:
    router = deepseek_v3()
    (x,) = inputs_of(router, TOKENS, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        own = router(x)
        use_polymoe_routers(router)
        gate_calls.clear()
        for got, wanted in zip(router(x), own, strict=True):
            assert_same_bits(got, wanted, "under autocast")
    assert not gate_calls


class Changed(MixtralTopKRouter):
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        logits, weights, ids = super().forward(hidden_states)
        return logits, weights.square(), ids


class Unchanged(MixtralTopKRouter):
    pass


def with_router(router: type[nn.Module]) -> PreTrainedModel:
    model = mixtral()
    for layer in model.model.layers:
        layer.mlp.gate = router(model.config).requires_grad_(False)
        fill(layer.mlp.gate)
    return model


def kept(model: nn.Module) -> set[str]:
    before = [router.forward for router in routers(model).values()]
    report = use_polymoe_routers(model)
    assert not report.replaced
    assert [router.forward for router in routers(model).values()] == before
    return set(report.kept.values())


def test_a_subclass_is_known_by_its_forward() -> None:
    (reason,) = kept(with_router(Changed))
    assert reason == f"{__name__}.Changed.forward is not Transformers' own"
    assert len(use_polymoe_routers(with_router(Unchanged)).replaced) == zoo.shrink.LAYERS


def test_a_class_that_was_patched_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shipped = mixtral(), MixtralTopKRouter.forward
    monkeypatch.setattr(MixtralTopKRouter, "forward", lambda self, x: shipped(self, 2 * x))
    (reason,) = kept(model)
    assert reason.endswith("is not Transformers' own")
    wrapper = functools.wraps(shipped)(lambda self, x: shipped(self, x))  # under the name of what it wraps
    monkeypatch.setattr(MixtralTopKRouter, "forward", wrapper)
    assert kept(model) == {f"{shipped.__module__}.MixtralTopKRouter.forward is not Transformers' own"}
    monkeypatch.setattr(MixtralTopKRouter, "forward", Changed.forward)
    assert kept(model) == {f"{__name__}.Changed.forward is not Transformers' own"}


def test_a_forward_on_the_instance_stays() -> None:
    model = mixtral()
    for router in routers(model).values():
        router.forward = router.forward
    assert kept(model) == {"its forward is set on the instance"}
    assert restore_routers(model) == []


class Gate(nn.Linear):
    """No class of Transformers; known as a router by its place beside experts."""


def test_a_router_of_another_make_is_reported() -> None:
    model = mixtral()
    model.model.layers[2].mlp.gate = Gate(HIDDEN, EXPERTS)
    report = use_polymoe_routers(model)
    assert report.kept == {"model.layers.2.mlp.gate": "torch.nn.modules.linear.Linear.forward is not Transformers' own"}
    assert str(report).splitlines() == [
        "model.layers.0-1,3.mlp.gate: polymoe.gate: softmax, top 3, renormalised",
        "model.layers.2.mlp.gate: the model's own: torch.nn.modules.linear.Linear.forward is not Transformers' own",
    ]
    assert str(use_polymoe_routers(nn.Linear(2, 2))) == "no routers"


WRONG = {
    "never renormalised": _families._JAMBA,
    "sigmoid": _families._SIGMOID,
    "other dtype": _families._QWEN_VL,
    "other attributes": _families._LAGUNA,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_recipe_that_does_not_fit_is_found_on_trial(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if another version of Transformers had changed the code of the class."""
    monkeypatch.setitem(_families._ROUTERS, ("mixtral", "MixtralTopKRouter"), WRONG[name])
    assert all("trial" in reason for reason in kept(mixtral().bfloat16()))


def test_parts_that_gate_stands_in_for_must_be_unaltered() -> None:
    hashed, router = of_each_kind(zoo.tiny_model("deepseek_v4"))
    hashed.score_fn.register_forward_hook(lambda module, args, out: 2 * out)
    router.score_fn = nn.Softplus()
    assert kept(hashed) == {"its score_fn has hooks or a forward of its own"}
    assert kept(router) == {"its score_fn is Softplus"}
    (ernie,) = of_each_kind(zoo.tiny_model("ernie4_5_moe"))
    ernie.moe_statics.register_forward_pre_hook(lambda module, args: None)
    assert kept(ernie) == {"its moe_statics has hooks or a forward of its own"}


def test_settings_that_gate_does_not_know() -> None:
    (axk2,) = of_each_kind(zoo.tiny_model("axk2"))
    axk2.num_group, axk2.topk_group = 4, 2
    assert "compete with a score of zero" in kept(axk2).pop()
    (router,) = of_each_kind(zoo.tiny_model("deepseek_v2"))
    router.topk_method = "noaux_tc"
    assert kept(router) == {"its topk_method is noaux_tc"}
    router = deepseek_v3()
    router.num_group, router.topk_group = 4, 1
    assert kept(router) == {"it chooses 3 experts of the 2 that its groups leave"}


def test_settings_are_read_at_every_call(gate_calls: list[str]) -> None:
    router = deepseek_v3()
    use_polymoe_routers(router)
    router.top_k, router.routed_scaling_factor, router.norm_topk_prob = 2, 0.7, False
    inputs = inputs_of(router, TOKENS, torch.float32)
    with torch.no_grad():
        assert_equal_routing(type(router).forward(router, *inputs), router(*inputs))
        router.topk_group = 1
        router.top_k = 3  # of the two experts of one group: the third is any
        gate_calls.clear()
        own = type(router).forward(router, *inputs)
        assert_same_bits(router(*inputs)[1], own[1], "weights")
    assert not gate_calls


# --- on and off ---------------------------------------------------------------------------------------------------


def test_replaced_on_this_instance_only_and_undone_without_trace() -> None:
    model, other = mixtral(), mixtral()
    before = [dict(vars(router)) for router in model.modules()]
    report = use_polymoe_routers(model)
    assert report == use_polymoe_routers(model)
    assert len(report.replaced) == zoo.shrink.LAYERS
    assert not any("forward" in vars(module) for module in other.modules())
    twin = copy.deepcopy(model)
    assert restore_routers(model) == list(report.replaced)
    assert [dict(vars(router)) for router in model.modules()] == before
    assert restore_routers(model) == []
    assert all(router.forward.__self__ is router for router in routers(twin).values())
    assert restore_routers(twin) == list(report.replaced)


def test_context_manager() -> None:
    model = mixtral()
    first = model.model.layers[0]
    use_polymoe_routers(first)
    with polymoe_routers(model) as report:
        assert len(report.replaced) == zoo.shrink.LAYERS
    assert restore_routers(model) == ["model.layers.0.mlp.gate"]


def test_hooks_on_routers_still_see_their_outputs() -> None:
    """Transformers itself reads the logits this way."""
    model = mixtral()
    inputs = random_inputs(model)
    with torch.no_grad():
        expected = model(**inputs, output_router_logits=True).router_logits
        use_polymoe_routers(model)
        got = model(**inputs, output_router_logits=True).router_logits
    assert len(got) == len(expected) == zoo.shrink.LAYERS
    assert_same_bits(got[0], expected[0], "logits of the first layer")


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe", "deepseek_v4", "inkling", "cohere2_moe"])
def test_compiles_as_one_graph(family: str) -> None:
    for router in of_each_kind(zoo.tiny_model(family)):
        for _ in variants(router):
            use_polymoe_routers(router)
            torch._dynamo.reset()
            counter, frames = CompileCounterWithBackend("aot_eager"), []
            compiled = torch.compile(router, fullgraph=True, dynamic=True, backend=counter)
            with torch.no_grad():
                for tokens in (TOKENS, 7):
                    inputs = inputs_of(router, tokens, torch.float32)
                    for got, wanted in zip(compiled(*inputs), router(*inputs), strict=True):
                        assert_same_bits(got, wanted, "compiled")
                    frames.append(counter.frame_count)
            assert frames[0] == frames[1] > 0
            restore_routers(router)


def test_weights_that_are_not_there_yet() -> None:
    with torch.device("meta"):
        model = zoo.model_classes("deepseek_v3")[0](zoo.tiny_config("deepseek_v3"))
    assert not use_polymoe_routers(model).kept
    model = zoo.tiny_model("deepseek_v3")
    for router in routers(model).values():
        router.weight.zero_()
    assert not use_polymoe_routers(model).kept
