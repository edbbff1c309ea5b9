"""Every experts class of the installed Transformers by itself: "polymoe" as its forward against its own eager one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
import zoo
from experts_modules import EXPERTS, batch, fill, float32_bound, watch_experts
from torch import Tensor, nn

from polymoe.integrations.transformers import experts_forward
from polymoe.integrations.transformers._gates import Fused, fused
from polymoe.testing.tolerances import relative_frobenius

CLASSES = {
    experts_class.__name__: (family, experts_class, model_class)
    for family in zoo.FAMILIES
    for experts_class, model_class in zip(zoo.experts_classes(family), zoo.model_classes(family), strict=True)
}
LIMITS = {"swiglu_limit": 0.5, "swiglu_alpha": 1.4, "mlp_gate_softcap": 1.5, "mlp_up_softcap": 0.8}
UNFUSED = {"MuseSparkExperts": "a norm follows the experts (has_post_expert_norm)"}
KINDS = {
    "DeepseekV4Experts": "swiglu_clamped",
    "Glm5NextTextExperts": "swiglu_clamped",
    "HYV4Experts": "swiglu_clamped",
    "GptOssExperts": "swiglu_oai",
    "MiniMaxM3VLExperts": "swiglu_oai",
    "OpenAIPrivacyFilterExperts": "swiglu_oai",
    "Inkling2Experts": "softcapped",
    "NemotronHExperts": "relu2",
    "DiffusionGemmaTextExperts": "geglu_tanh",
    "Gemma4TextExperts": "geglu_tanh",
}


@pytest.fixture(autouse=True)
def seeded(seed: int) -> None:
    torch.manual_seed(seed)


def build(name: str) -> nn.Module:
    """The class as its small model builds it, with limits that bind and random parameters."""
    family, experts_class, model_class = CLASSES[name]
    config = zoo.tiny_config(family, model_class)
    for entry, value in LIMITS.items():
        if hasattr(config, entry):
            setattr(config, entry, value)
    width = getattr(config, "moe_intermediate_size", None)
    by_part = [width[0]] if isinstance(width, list) else []  # text and vision experts in one model
    module = fill(experts_class(config, *by_part))
    module.config._experts_implementation = "eager"
    return module


def test_no_class_is_missing() -> None:
    models = Path(transformers.__file__).parent / "models"
    decorators = [
        line
        for path in models.glob("*/modeling_*.py")
        for line in path.read_text().splitlines()
        if line.startswith("@use_experts_implementation")
    ]
    assert len(CLASSES) == len(decorators) >= 65


def routings() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    x, ids, weights = batch(37)
    few = torch.randperm(EXPERTS)[:4][torch.rand(37, 4).argsort(-1)[:, :3]]
    one = torch.randint(EXPERTS, ()).expand(37, 3)
    return {
        "spread": (x, ids, weights),
        "half of the experts": (x, few, weights),
        "one expert": (x, one, weights),
        "one token": (x[:1], ids[:1], weights[:1]),
        "one slot": (x, ids[:, :1], weights[:, :1]),
    }


@pytest.mark.parametrize("name", CLASSES)
def test_against_the_class_s_own_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = build(name), watch_experts(monkeypatch)
    for what, (x, ids, weights) in routings().items():
        eager = module(x, ids, weights)  # both it and ours are within the bound of the truth
        assert eager.abs().max() > 0, what
        for dtype in (torch.int64, torch.int32):
            ours = experts_forward(module, x, ids.to(dtype), weights)
            assert ours.dtype == eager.dtype
            assert relative_frobenius(ours, eager) <= 2 * float32_bound(), what
    calls_of_all = 2 * len(routings())
    assert len(calls) == (calls_of_all if isinstance(fused(module), Fused) else 0)
    x, ids, weights = batch(0)
    assert experts_forward(module, x, ids, weights).shape == module(x, ids, weights).shape == x.shape


@pytest.mark.parametrize("name", CLASSES)
def test_sentinels_against_transformers_grouped_mm(name: str) -> None:
    module = build(name)
    module._is_expert_parallel = True
    x, ids, weights = batch(37)
    off_rank = torch.rand(ids.shape) < 0.4
    ids, weights = ids.masked_fill(off_rank, EXPERTS), weights.masked_fill(off_rank, 0)
    module.config._experts_implementation = "grouped_mm"
    theirs = module(x, ids, weights)
    module.config._experts_implementation = "polymoe"
    assert relative_frobenius(module(x, ids, weights), theirs) <= 2 * float32_bound()


def test_roads() -> None:
    """Only what must be is un-fused, and every other class computes the formula that its model's card tells."""
    roads = {name: fused(build(name)) for name in CLASSES}
    assert {name: how for name, how in roads.items() if isinstance(how, str)} == UNFUSED
    kinds = {name: how.kind for name, how in roads.items() if isinstance(how, Fused)}
    assert kinds == {name: KINDS.get(name, "swiglu") for name in CLASSES if name not in UNFUSED}


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if "swiglu_" in kind or kind == "softcapped"])
def test_limits_bind_in_these_tests(name: str) -> None:
    """The pre-activations lie on both sides of every bend, so that another clamp gives another result."""
    module, how = build(name), fused(build(name))
    x, ids, weights = batch(37)
    expert, weight = int(ids[0, 0]), module.gate_up_proj
    h = x[(ids == expert).any(-1)] @ (weight[expert] if module.is_transposed else weight[expert].t())
    gate, up = h.chunk(2, dim=-1) if module.is_concatenated else (h[:, ::2], h[:, 1::2])
    bend = how.limit if how.kind != "softcapped" else how.alpha
    for part in (gate > bend, gate < -bend, gate.abs() < bend, up > how.limit, up < -how.limit, up.abs() < how.limit):
        assert part.float().mean() > 0.02
    ours = experts_forward(module, x, ids, weights)
    wider = module.act_fn.up_softcap if how.kind == "softcapped" else module
    entry = next(entry for entry in ("softcap", "swiglu_limit", "limit") if hasattr(wider, entry))
    setattr(wider, entry, 100.0)
    changed = experts_forward(module, x, ids, weights)
    assert relative_frobenius(changed, ours) > 0.05
    assert relative_frobenius(changed, module(x, ids, weights)) <= 2 * float32_bound()
