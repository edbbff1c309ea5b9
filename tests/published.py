"""Small checkpoints in exactly the layouts in which models are published: names, dtypes, shards, index and config.json.

Names come from what Transformers writes for a tiny model, renamed where the published ones differ; which matrices are
quantised, and how, is written here by hand. Codes and scales are random, so that nothing depends on a quantiser.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV4Config,
    GptOssConfig,
    KimiLinearConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from polymoe.checkpoint.shards import NAMES, Planned, read_header, write_shard

VOCAB, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, LAYERS = 96, 256, 128, 4, 2, 2
BLOCK = 128
SHARD_BYTES = 1 << 19

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "dtype": "bfloat16",
}
_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


def fp8(shape: tuple[int, int], scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [N, D] and multipliers per 128 x 128 block, together of variance about 1 / D."""
    codes = (64 * torch.randn(shape)).clamp(-448, 448).to(torch.float8_e4m3fn)
    blocks = [-(-size // BLOCK) for size in shape]
    scales = (torch.rand(blocks) + 0.5) / (64 * math.sqrt(shape[1]))
    return codes, power_of_two(scales) if scale_dtype == torch.float8_e8m0fnu else scales


def power_of_two(scales: Tensor) -> Tensor:
    """Rounded down."""
    return (torch.frexp(scales).exponent + 126).to(torch.uint8).view(torch.float8_e8m0fnu)


def mxfp4(*shape: int) -> tuple[Tensor, Tensor]:
    """Two random e2m1 codes a byte [..., D / 2], and an exponent per 32 of them, of variance about 1 / D."""
    packed = torch.randint(256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8)
    scales = (torch.rand(*shape[:-1], shape[-1] // 32) + 0.5) / (3 * math.sqrt(shape[-1]))
    return packed, power_of_two(scales)


Converted = Iterator[tuple[str, Tensor]]


def _deepseek_v3(name: str, weight: Tensor) -> Converted:
    if re.search(r"\.(self_attn|mlp)\..*_proj\w*\.weight$", name):
        codes, scales = fp8((weight.shape[0], weight.shape[1]), torch.float32)
        yield name, codes
        yield f"{name}_scale_inv", scales
    else:
        yield name, weight


_V4_FP8 = r"\.attn\.(wq_a|wq_b|wkv|wo_a|wo_b|indexer\.wq_b)\.weight$|\.shared_experts\.w[123]\.weight$"


def _deepseek_v4(name: str, weight: Tensor) -> Converted:
    name = name.removeprefix("model.").replace("embed_tokens.", "embed.").replace("hc_head.hc_", "hc_head_")
    scale = re.sub(r"\.weight$", ".scale", name)
    if re.search(r"\.experts\.\d+\.w[123]\.weight$", name):
        packed, scales = mxfp4(*weight.shape)
        yield name, packed.view(torch.int8)
        yield scale, scales
    elif re.search(_V4_FP8, name):
        codes, scales = fp8((weight.shape[0], weight.shape[1]), torch.float8_e8m0fnu)
        yield name, codes
        yield scale, scales
    else:
        yield name, weight


def _deepseek_v4_renamed(name: str, weight: Tensor) -> Converted:
    """Its experts under the names that DeepSeek's own converter takes as well."""
    names = {".ffn.": ".mlp.", ".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}
    for published, tensor in _deepseek_v4(name, weight):
        renamed = published
        if ".experts." in published:
            for old, new in names.items():
                renamed = renamed.replace(old, new)
            renamed = "model." + re.sub(r"\.scale$", ".weight_scale_inv", renamed)
        yield renamed, tensor


def _gpt_oss(name: str, weight: Tensor) -> Converted:
    if re.search(r"\.experts\.(gate_up|down)_proj$", name):
        experts, columns, rows = weight.shape
        packed, scales = mxfp4(experts, rows, columns)
        yield f"{name}_blocks", packed.unflatten(-1, (-1, 16))
        yield f"{name}_scales", scales.view(torch.uint8)
    else:
        yield name, weight


def _kimi_k3(name: str, weight: Tensor) -> Converted:
    """compressed-tensors' "mxfp4-pack-quantized". The experts' width is theirs, not the model's."""
    name = f"language_model.{name}"
    if re.search(r"\.experts\.\d+\.w[123]\.weight$", name):
        rows, columns = (HIDDEN, INTERMEDIATE) if ".w2." in name else (INTERMEDIATE, HIDDEN)
        packed, scales = mxfp4(rows, columns)
        yield f"{name}_packed", packed
        yield f"{name}_scale", scales.view(torch.uint8)
    else:
        yield name, weight


def _plain(name: str, weight: Tensor) -> Converted:
    yield name, weight


@dataclass(frozen=True)
class Family:
    config: Callable[[], PreTrainedConfig]
    convert: Callable[[str, Tensor], Converted]
    entries: dict[str, Any]  # of config.json, beside those of the model


_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}


def _v3_config() -> PreTrainedConfig:
    return DeepseekV3Config(
        **_COMMON,
        intermediate_size=2 * INTERMEDIATE,
        moe_intermediate_size=INTERMEDIATE,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        **_LATENT_ATTENTION,
        q_lora_rank=64,
    )


def _v4_config() -> PreTrainedConfig:
    return DeepseekV4Config(
        **_COMMON,
        moe_intermediate_size=INTERMEDIATE,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        head_dim=64,
        q_lora_rank=64,
        o_groups=2,
        o_lora_rank=BLOCK,
        index_n_heads=4,
        index_head_dim=32,
        index_topk=8,
        layer_types=["sliding_attention", "compressed_sparse_attention"],
        mlp_layer_types=["hash_moe", "moe"],
    )


def _oss_config() -> PreTrainedConfig:
    return GptOssConfig(
        **_COMMON,
        intermediate_size=INTERMEDIATE,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        head_dim=64,
        num_key_value_heads=2,
    )


_K3_TEXT = {
    "num_experts": EXPERTS,
    "hidden_size": 2 * HIDDEN,
    "routed_expert_hidden_size": HIDDEN,
    "intermediate_size": 4 * HIDDEN,
    "moe_intermediate_size": INTERMEDIATE,
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "mxfp4-pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 32}}},
    },
}


def _kimi_config() -> PreTrainedConfig:
    return KimiLinearConfig(
        **_COMMON | {"hidden_size": 2 * HIDDEN},
        intermediate_size=4 * HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        **_LATENT_ATTENTION,
        linear_head_dim=32,
        linear_num_heads=4,
    )


def _qwen_config() -> PreTrainedConfig:
    return Qwen3MoeConfig(
        **_COMMON,
        moe_intermediate_size=INTERMEDIATE,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        head_dim=64,
        num_key_value_heads=2,
    )


def _mixtral_config() -> PreTrainedConfig:
    return MixtralConfig(
        **_COMMON,
        intermediate_size=INTERMEDIATE,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        num_key_value_heads=2,
    )


_V4_ENTRIES = {"quantization_config": {**_FP8, "scale_fmt": "ue8m0"}, "expert_dtype": "fp4"}
FAMILIES = {
    "deepseek_v3": Family(_v3_config, _deepseek_v3, {"quantization_config": _FP8}),
    "deepseek_v4": Family(_v4_config, _deepseek_v4, _V4_ENTRIES),
    "deepseek_v4_renamed": Family(_v4_config, _deepseek_v4_renamed, _V4_ENTRIES),
    "gpt_oss": Family(
        _oss_config,
        _gpt_oss,
        {
            "quantization_config": {
                "quant_method": "mxfp4",
                "modules_to_not_convert": [
                    "model.layers.*.self_attn",
                    "model.layers.*.mlp.router",
                    "model.embed_tokens",
                    "lm_head",
                ],
            }
        },
    ),
    "gpt_oss_bf16": Family(_oss_config, _plain, {}),
    "kimi_k3": Family(_kimi_config, _kimi_k3, {"text_config": _K3_TEXT}),
    "qwen3_moe": Family(_qwen_config, _plain, {}),
    "mixtral": Family(_mixtral_config, _plain, {}),
}


def write(folder: Path, family: str) -> dict[str, Tensor]:
    """Writes a checkpoint of several shards and returns its tensors by name."""
    kind = FAMILIES[family]
    tensors = {
        name: tensor for source, weight in _own_tensors(kind.config()) for name, tensor in kind.convert(source, weight)
    }
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(kind.config().to_json_string(use_diff=False))
    architecture = AutoModelForCausalLM._model_mapping[type(kind.config())].__name__
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture], **kind.entries}))
    write_shards(folder, tensors)
    return tensors


def _own_tensors(config: PreTrainedConfig) -> list[tuple[str, Tensor]]:
    """What Transformers writes of a random model in bf16, by name."""
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        strict = model._keep_in_fp32_modules_strict or ()
        for name, parameter in model.named_parameters():
            parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.1)
            if any(part in name.split(".") for part in strict):
                parameter.data = parameter.data.float()
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.data = torch.randn(EXPERTS) / 10
            elif name.endswith("tid2eid"):
                buffer.copy_(torch.rand(VOCAB, EXPERTS).argsort(-1)[:, :TOP_K])
        model.save_pretrained(folder)
        entries, _ = read_header(Path(folder) / "model.safetensors")
        return [(name, entry.read().clone()) for name, entry in entries.items()]


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tensor
    where = {}
    for number, shard in enumerate(shards, 1):
        file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        plan = {name: Planned(tensor.dtype, tuple(tensor.shape)) for name, tensor in shard.items()}
        write_shard(file, plan, shard.items(), {"format": "pt"})
        where.update(dict.fromkeys(shard, file.name))
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def described(tensor: Tensor) -> str:
    return f"{NAMES[tensor.dtype]} {list(tensor.shape)}"
