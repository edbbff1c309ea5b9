"""A model of any family, small enough to run in a moment: one set of patterns over names, and a few overrides.

A config gives its own defaults; only names that it has are replaced, so what it derives from them (kinds of layers,
widths of heads) follows.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from zoo.families import FAMILIES, modeling

VOCAB, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, LAYERS = 96, 64, 48, 8, 3, 4
HEADS, KV_HEADS, HEAD_DIM, RANK = 4, 2, 16, 16

# The first pattern that matches the whole of a name gives its value. Limits of 0.5 bind on most of these models'
# activations; an initializer range of 0.2 lets every layer change its input by about as much as the input is.
_PATTERNS: dict[str, Any] = {
    r"vocab_size.*": VOCAB,
    r".*_token_id": None,
    r"hidden_size|moe_hidden_size": HIDDEN,
    r".*intermediate_size": INTERMEDIATE,
    r"num_hidden_layers": LAYERS,
    r"num_experts|(moe_num|num_local|n_routed)_experts": EXPERTS,
    r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts": TOP_K,
    r"n_shared_experts": 1,
    r"first_k_dense_replace|num_dense_layers": 1,
    r"(swa_)?num_attention_heads|index_n_heads|linear_num(_value)?_heads|mamba_(num|n)_heads": HEADS,
    r"(swa_)?num_key_value_heads|linear_num_key_heads|n_groups": KV_HEADS,
    r"((swa|linear|linear_key|linear_value|index|v)_)?head_dim": HEAD_DIM,
    r"mamba_(d_head|head_dim)": 2 * HIDDEN // HEADS,
    r"qk_(nope|rope)_head_dim": HEAD_DIM // 2,
    r"[qo]_lora_rank|kv_lora_rank|gated_norm_rank|router_hidden_size|d_rel|hc_lowrank": RANK,
    r"hidden_size_per_layer_input|mamba_d_state|ssm_state_size|(mamba_)?chunk_size": RANK,
    r"max_position_embeddings|model_max_length": 512,
    r"swiglu_limit|mlp_(gate|up)_softcap": 0.5,
    r"initializer_range": 0.2,
}

# Beyond the patterns: what a family's validation or a default of None asks for, and what makes all its parts work.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "deepseek_ocr2": {"mlp_layer_types": ["dense"] + ["sparse"] * (LAYERS - 1)},
    "deepseek_v4": {
        "mlp_layer_types": ["hash_moe"] + ["moe"] * (LAYERS - 1),
        "layer_types": ["sliding_attention"] * (LAYERS - 2)
        + ["heavily_compressed_attention", "compressed_sparse_attention"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "o_groups": 2,
    },
    # Its sliding layers have widths of their own, under names that the config does not keep.
    "dots3_note": {
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": RANK,
        "swa_kv_lora_rank": RANK,
        "swa_head_dim": HEAD_DIM,
        "swa_qk_nope_head_dim": HEAD_DIM // 2,
        "swa_v_head_dim": HEAD_DIM,
    },
    "ernie4_5_vl_moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}},
    "gemma4": {"enable_moe_block": True},
    "glm4v_moe": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 2],
        }
    },
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp"]},
    "qwen3_omni_moe": {"shared_expert_intermediate_size": INTERMEDIATE},
    "qwen4_exp": {
        "indexer_n_heads": HEADS,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "step3p7": {"pad_token_id": 0, "sliding_window": 16, "swiglu_limits": [0.5, 0.0] * (LAYERS // 2)},
    "zaya": {"num_experts_per_tok": 1},  # it refuses more
}

# Families whose parts have experts classes of their own.
_PARTS = {"qwen3_omni_moe": ("Qwen3OmniMoeThinkerTextModel", "Qwen3OmniMoeTalkerModel")}


def model_classes(family: str) -> tuple[type[PreTrainedModel], ...]:
    """The language models that hold a family's experts: one, unless parts have experts classes of their own."""
    module = modeling(family)
    if family in _PARTS:
        return tuple(getattr(module, name) for name in _PARTS[family])
    names = [
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, PreTrainedModel) and value.__module__ == module.__name__
    ]
    for ending in ("ForCausalLM", "TextModel", "Model"):
        for name in names:
            if name.endswith(ending) and not name.endswith("PreTrainedModel"):
                return (getattr(module, name),)
    raise LookupError(f"{family} has no language model")


PARTS = [(family, model_class) for family in FAMILIES for model_class in model_classes(family)]


def name_of(part: object) -> str:
    """Of a family, or of a class."""
    return getattr(part, "__name__", str(part))


def _shrunk(name: str, defaults: dict[str, Any]) -> Any:
    default = defaults[name]
    if name == "num_key_value_heads" and default == defaults["num_attention_heads"]:
        name = "num_attention_heads"  # latent attention insists on as many
    if name == "head_dim" and default == defaults.get("qk_rope_head_dim"):
        name = "qk_rope_head_dim"  # another word for it
    if name in ("n_group", "num_expert_group", "topk_group") and (default or 1) > 1:
        return EXPERTS // 4 if name == "topk_group" else EXPERTS // 2
    if name == "mlp_layer_types" and default:
        return ["dense" if "dense" in default else "sparse"] + ["sparse"] * (LAYERS - 1)
    for pattern, value in _PATTERNS.items():
        if re.fullmatch(pattern, name):
            return [value] * len(default) if isinstance(default, list) else 0 if default == 0 else value
    return default


def tiny_config(family: str, model_class: type[PreTrainedModel] | None = None) -> PreTrainedConfig:
    """The config of that model class, or of the family's first one."""
    config_class = (model_class or model_classes(family)[0]).config_class
    defaults = config_class().to_dict()
    changes = {name: _shrunk(name, defaults) for name in defaults}
    changes = {name: value for name, value in changes.items() if value != defaults[name]}
    return config_class(**(changes | _OVERRIDES.get(family, {})))


def experts_modules(model: nn.Module) -> list[nn.Module]:
    """The modules behind the interface, in the order of the model's layers."""
    return [module for module in model.modules() if hasattr(module, "_is_expert_parallel")]


def _draw(model: nn.Module) -> None:
    """Draws what a fresh model leaves unset (the experts of Qwen3-Omni's talker), and gives a part to play to what it
    sets to one constant, such as biases, norms, the corrections of routers and tables of experts by token."""
    for module in experts_modules(model):
        for parameter in module.parameters(recurse=False):
            parameter.normal_(std=_PATTERNS["initializer_range"])
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.numel() > 1 and (tensor == tensor.flatten()[0]).all():
            tensor.add_(torch.randn_like(tensor), alpha=0.1)
        if name.endswith("tid2eid"):
            tensor.copy_(torch.rand(tensor.shape[0], EXPERTS).argsort(-1)[:, : tensor.shape[1]])


def tiny_model(family: str, model_class: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """A model of that class, or of the family's first one, from torch's random state; in float32, for inference."""
    model_class = model_class or model_classes(family)[0]
    model = model_class(tiny_config(family, model_class)).float().eval().requires_grad_(False)
    _draw(model)
    return model
