"""Which recipe each router class of Transformers follows, or why none. Written against Transformers 5.23."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType
from typing import Any, TypeAlias

from torch import nn
from transformers import activations

from polymoe.integrations.routers import _recipes as recipes
from polymoe.integrations.routers._recipes import Gemma, Inkling, Recipe, RouterModule

# What is known of a class: its recipe, why it has none, or how the settings of a router decide between the two.
Entry: TypeAlias = Recipe | str | Callable[[RouterModule], Recipe | str]

_BIAS = "e_score_correction_bias"
_SCORE_FUNCTIONS = {nn.Sigmoid: "sigmoid", activations.SqrtSoftplusActivation: "sqrtsoftplus"}

_QWEN = Recipe(recipes.flat, "softmax", renormalize="norm_topk_prob", weights="logits", typed=True)
_QWEN_VL = replace(_QWEN, renormalize=True)
_MIXTRAL = replace(_QWEN_VL, weights="float32")
_JAMBA = Recipe(recipes.as_it_is, "softmax", weights="input", typed=True)
_HUNYUAN = replace(_QWEN_VL, project=recipes.by_wg_module, weight="wg.weight")
_GRANITE = Recipe(recipes.then_float32, "softmax_topk", weights="input")
_ARIA = Recipe(recipes.as_it_is, "softmax_topk", weights="logits", typed=True)
_GPT_OSS = replace(_ARIA, project=recipes.with_bias)
_PRIVACY_FILTER = Recipe(recipes.with_bias_in_float32, "softmax_topk", scale="1/k")
_GEMMA = Gemma(
    recipes.by_normed_proj_module,
    "softmax",
    top_k="config.top_k_experts",
    renormalize=True,
    weight="proj.weight",
    typed=True,
)
_SIGMOID = Recipe(recipes.in_float32, "sigmoid", bias=_BIAS, renormalize=True, eps=1e-20)
_DEEPSEEK_V3 = replace(_SIGMOID, groups=2, renormalize="norm_topk_prob", scale="routed_scaling_factor")
_BEAM = replace(_DEEPSEEK_V3, scale="")
_HY_V3 = replace(_SIGMOID, bias="*", scale="router_scaling_factor")
_AFMOE = replace(
    _SIGMOID, project=recipes.by_gate_module, bias="*", scale="route_scale", weight="gate.weight", batched=True
)
_FLINT = replace(_SIGMOID, bias="", renormalize="norm_topk_prob", eps=0.0)
_LAGUNA = replace(_SIGMOID, project=recipes.softcapped, eps=0.0, weights="input")
_MINIMAX_M3 = replace(_SIGMOID, project=recipes.flat_in_weight_dtype, eps=0.0, typed=True)
_MINIMAX_M2 = replace(_MINIMAX_M3, bias="*")
_MUSE_SPARK = replace(_SIGMOID, project=recipes.multiplied, eps="norm_topk_prob_eps", scale="routed_scaling_factor")
_MISTRAL_LARGE4 = Recipe(
    recipes.in_float32, "softmax", groups=2, renormalize=True, eps=1e-20, scale="routed_scaling_factor"
)
_MISTRAL4 = replace(_MISTRAL_LARGE4, project=recipes.flat, renormalize="norm_topk_prob", rounds=True, typed=True)
_LFM2 = replace(
    _DEEPSEEK_V3, project=recipes.as_it_is, bias="", groups=0, eps=1e-6, weights="logits", rounds=True, typed=True
)
_DEEPSEEK_V4 = replace(
    _SIGMOID, project=recipes.flat, scale="routed_scaling_factor", weights="logits", rounds=True, typed=True
)
_INKLING = Inkling(recipes.in_float32, "sigmoid", bias=_BIAS, renormalize=True, scale="route_scale", weights="input")


def _scored_by(name: str, recipe: Recipe) -> Callable[[RouterModule], Recipe | str]:
    """The recipe with the scoring of that submodule."""
    by_class = {kind: replace(recipe, scoring=scoring) for kind, scoring in _SCORE_FUNCTIONS.items()}

    def choose(router: RouterModule) -> Recipe | str:
        score_fn = getattr(router, name)
        if _altered(score_fn):
            return f"its {name} has hooks or a forward of its own"
        return by_class.get(type(score_fn), f"its {name} is {type(score_fn).__name__}")

    return choose


_ERNIE = Recipe(
    recipes.in_float32,
    "softmax",
    bias=f"moe_statics.{_BIAS}",
    renormalize=True,
    eps="norm_min",
    clamped=True,
    weights="input",
)


def _ernie(router: RouterModule) -> Recipe | str:
    statics = router.moe_statics
    if _altered(statics) or not _shipped(type(statics).forward):
        return "its moe_statics has hooks or a forward of its own"
    return _ERNIE


_DEEPSEEK_V2 = {
    "greedy": Recipe(recipes.in_float32, "softmax", scale="routed_scaling_factor"),
    # Experts of groups left out compete with a score of zero, but every softmax is above that.
    "group_limited_greedy": Recipe(recipes.in_float32, "softmax", groups=1, scale="routed_scaling_factor"),
}


def _deepseek_v2(router: RouterModule) -> Recipe | str:
    return _DEEPSEEK_V2.get(router.topk_method, f"its topk_method is {router.topk_method}")


_UNGROUPED = replace(_DEEPSEEK_V3, groups=0)


def _axk2(router: RouterModule) -> Recipe | str:
    if (router.num_group or 1) > 1:
        return "experts of groups left out compete with a score of zero, above kept ones with a negative bias"
    return _UNGROUPED


_COHERE2 = {
    "softmax": replace(_ARIA, weights="input"),
    "sigmoid": replace(
        _ARIA, scoring="sigmoid", by_logit=True, renormalize="norm_topk_prob", weights="input", rounds=True
    ),
}


def _cohere2(router: RouterModule) -> Recipe | str:
    return _COHERE2.get(router.expert_selection_fn, f"its expert_selection_fn is {router.expert_selection_fn}")


_KOLIBRI = replace(_SIGMOID, by_logit=True, renormalize="norm_topk_prob", eps=0.0)


def _kolibri(router: RouterModule) -> Recipe | str:
    return "on CUDA it has a projection of its own" if router.weight.is_cuda else _KOLIBRI


_LFM2_BIASED = replace(_LFM2, bias="*")


def _lfm2(router: RouterModule) -> Recipe | str:
    return _LFM2_BIASED if router.use_expert_bias else _LFM2


# Keyed by the model's folder and the class.
_ROUTERS: dict[tuple[str, str], Entry] = {
    ("afmoe", "AfmoeTokenChoiceRouter"): _AFMOE,
    ("aria", "AriaTextTopKRouter"): _ARIA,
    ("axk1", "AXK1TopkRouter"): _DEEPSEEK_V3,
    ("axk2", "AXK2TopkRouter"): _axk2,
    ("bailing_hybrid", "BailingHybridTopkRouter"): _DEEPSEEK_V3,
    ("beam", "BeamTopKRouter"): _BEAM,
    ("cohere2_moe", "Cohere2MoeTopKRouter"): _cohere2,
    ("deepseek_ocr2", "DeepseekOcr2TextTopkRouter"): _deepseek_v2,
    ("deepseek_v2", "DeepseekV2TopkRouter"): _deepseek_v2,
    ("deepseek_v3", "DeepseekV3TopkRouter"): _DEEPSEEK_V3,
    ("deepseek_v32", "DeepseekV32TopkRouter"): _DEEPSEEK_V3,
    ("deepseek_v4", "DeepseekV4HashRouter"): _scored_by("score_fn", replace(_DEEPSEEK_V4, bias="", hashed=True)),
    ("deepseek_v4", "DeepseekV4TopKRouter"): _scored_by("score_fn", _DEEPSEEK_V4),
    ("diffusion_gemma", "DiffusionGemmaTextRouter"): _GEMMA,
    ("dots1", "Dots1TopkRouter"): _DEEPSEEK_V3,
    ("dots3_note", "Dots3NoteTextTopkRouter"): _DEEPSEEK_V3,
    ("dots3_note", "Dots3NoteVisionTopKRouter"): _HY_V3,
    ("ernie4_5_moe", "Ernie4_5_MoeTopKRouter"): _ernie,
    ("ernie4_5_vl_moe", "Ernie4_5_VLMoeMoeTopKRouter"): _ernie,
    ("exaone_moe", "ExaoneMoeTopkRouter"): _DEEPSEEK_V3,
    ("flex_olmo", "FlexOlmoTopKRouter"): _QWEN,
    ("flint", "FlintTopKRouter"): _FLINT,
    ("gemma4", "Gemma4TextRouter"): _GEMMA,
    ("glm4_moe", "Glm4MoeTopkRouter"): _DEEPSEEK_V3,
    ("glm4_moe_lite", "Glm4MoeLiteTopkRouter"): _DEEPSEEK_V3,
    ("glm4v_moe", "Glm4vMoeTextTopkRouter"): _DEEPSEEK_V3,
    ("glm5_next", "Glm5NextTextTopkRouter"): _DEEPSEEK_V3,
    ("glm_moe_dsa", "GlmMoeDsaTopkRouter"): _DEEPSEEK_V3,
    ("gpt_oss", "GptOssTopKRouter"): _GPT_OSS,
    ("granitemoe", "GraniteMoeTopKRouter"): _GRANITE,
    ("granitemoe_swa", "GraniteMoeSWATopKRouter"): _GRANITE,
    ("granitemoehybrid", "GraniteMoeHybridTopKRouter"): _GRANITE,
    ("granitemoeshared", "GraniteMoeSharedTopKRouter"): _GRANITE,
    ("hunyuan_v1_moe", "HunYuanMoEV1Gate"): _HUNYUAN,
    ("hy_v3", "HYV3TopKRouter"): _HY_V3,
    ("hy_v4", "HYV4TopkRouter"): _DEEPSEEK_V3,
    ("inkling", "InklingTopkRouter"): _INKLING,
    ("inkling2", "Inkling2TopKRouter"): _scored_by("score_fn", replace(_DEEPSEEK_V4, project=recipes.float32_hidden)),
    ("jamba", "JambaTopKRouter"): _JAMBA,
    ("kimi_linear", "KimiLinearTopkRouter"): _DEEPSEEK_V3,
    ("kolibri1", "Kolibri1TopKRouter"): _kolibri,
    ("laguna", "LagunaTopKRouter"): _LAGUNA,
    ("lfm2_moe", "Lfm2MoeTopKRouter"): _lfm2,
    ("mellum", "MellumTopKRouter"): _QWEN,
    ("mimo_v2_flash", "MiMoV2FlashTopkRouter"): _DEEPSEEK_V3,
    ("minimax", "MiniMaxTopKRouter"): _MIXTRAL,
    ("minimax_m2", "MiniMaxM2TopKRouter"): _MINIMAX_M2,
    ("minimax_m3_vl", "MiniMaxM3VLTopKRouter"): _MINIMAX_M3,
    ("mistral4", "Mistral4TopkRouter"): _MISTRAL4,
    ("mistral_large4", "MistralLarge4TextTopkRouter"): _MISTRAL_LARGE4,
    ("mixtral", "MixtralTopKRouter"): _MIXTRAL,
    ("muse_spark", "MuseSparkTopkRouter"): _scored_by("scoring_function", _MUSE_SPARK),
    ("nemotron_h", "NemotronHTopkRouter"): _DEEPSEEK_V3,
    ("olmoe", "OlmoeTopKRouter"): _QWEN,
    ("openai_privacy_filter", "OpenAIPrivacyFilterTopKRouter"): _PRIVACY_FILTER,
    ("phimoe", "PhimoeTopKRouter"): "it gives each chosen expert a softmax of its own, over those near its logit",
    ("qwen2_moe", "Qwen2MoeTopKRouter"): _QWEN,
    ("qwen3_5_moe", "Qwen3_5MoeTopKRouter"): _QWEN_VL,
    ("qwen3_moe", "Qwen3MoeTopKRouter"): _QWEN,
    ("qwen3_next", "Qwen3NextTopKRouter"): _QWEN,
    ("qwen3_omni_moe", "Qwen3OmniMoeTalkerTextTopKRouter"): _QWEN,
    ("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextTopKRouter"): _QWEN,
    ("qwen3_vl_moe", "Qwen3VLMoeTextTopKRouter"): _QWEN_VL,
    ("qwen4_exp", "Qwen4ExpTextTopKRouter"): _QWEN,
    ("solar_open", "SolarOpenTopkRouter"): _DEEPSEEK_V3,
    ("unlimited_ocr", "UnlimitedOcrTextTopkRouter"): _deepseek_v2,
    ("zaya", "ZayaRouter"): "it is a small network with a state that goes from layer to layer",
}


def entry(router: nn.Module) -> Entry:
    """What is known of the router's forward, by the identity of that function. Hooks on the router do not matter."""
    forward = type(router).forward
    name = f"{getattr(forward, '__module__', '?')}.{getattr(forward, '__qualname__', '?')}"
    if not _shipped(forward):
        return f"{name} is not Transformers' own"
    folder, owner = forward.__module__.split(".")[-2], forward.__qualname__.removesuffix(".forward")
    return _ROUTERS.get((folder, owner), f"{name} is not known")


def is_listed(module: nn.Module) -> bool:
    """Whether the module is of a class in the table, or of one derived from it."""
    return any(
        owner.__module__.startswith("transformers.models.")
        and (owner.__module__.split(".")[-2], owner.__name__) in _ROUTERS
        for owner in type(module).__mro__
    )


def recipe(entry: Entry, router: nn.Module) -> Recipe | str:
    """The recipe of the router as it is set now, or why it has none."""
    found = entry(router) if callable(entry) else entry
    return (found.why_not(router) or found) if isinstance(found, Recipe) else found


def _shipped(forward: Any) -> bool:
    """Whether the function was written in a model's own file, as forward of a class, and is there still."""
    if not isinstance(forward, FunctionType) or not forward.__module__.startswith("transformers.models."):
        return False
    home = sys.modules.get(forward.__module__)
    owner = getattr(home, forward.__qualname__.removesuffix(".forward"), None)
    return (
        home is not None
        and owner is not None
        and owner.__dict__.get("forward") is forward
        and forward.__code__.co_filename == home.__file__
        and forward.__code__.co_name == "forward"
    )


def _altered(part: nn.Module) -> bool:
    """Whether something stands between the class of a part and what a call of the part computes."""
    part.forward  # noqa: B018  (torch.compile guards on this, not on what __dict__ holds)
    return bool(part._forward_hooks or part._forward_pre_hooks or "forward" in part.__dict__)
