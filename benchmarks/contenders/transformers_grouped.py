"""Transformers' experts implementation "grouped_mm", on its own experts classes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders.base import Plugin, Prepared, Problem, not_installed
from benchmarks.layer import Layer

TRANSPOSED = ("swiglu_oai",)  # gpt-oss holds its weights as [E, in, out]


class TransformersGrouped(Plugin):
    name = "transformers"
    devices = ("cpu", "cuda", "xpu")
    reads = True

    def declined(self, problem: Problem) -> str | None:
        return not_installed("transformers")

    def prepare(self, layer: Layer) -> Prepared:
        module = experts_module(layer)
        return Prepared(lambda inputs: module(inputs[0], inputs[2], inputs[1]))


def experts_module(layer: Layer) -> torch.nn.Module:
    """The experts module of a model with that activation, on the layer's own weights."""
    with torch.device("meta"):
        module = _empty_module(layer)
    transposed = layer.shape.activation in TRANSPOSED
    parameters: dict[str, Tensor | None] = {
        "gate_up_proj": layer.gate_up.mT if transposed else layer.gate_up,
        "down_proj": layer.down.mT if transposed else layer.down,
        "gate_up_proj_bias": layer.gate_up_bias,
        "down_proj_bias": layer.down_bias,
    }
    for name, tensor in parameters.items():
        if tensor is not None:
            setattr(module, name, torch.nn.Parameter(tensor, requires_grad=False))
    return module.eval()


def _empty_module(layer: Layer) -> torch.nn.Module:
    shape = layer.shape
    limit: dict[str, Any] = {"swiglu_limit": shape.limit}
    sizes: dict[str, Any] = {"hidden_size": shape.H, "num_local_experts": shape.E}
    module: torch.nn.Module
    if shape.activation == "swiglu_oai":
        from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

        module = GptOssExperts(_chosen(GptOssConfig(**sizes, intermediate_size=shape.I, **limit)))
    elif shape.activation == "swiglu_clamped":
        from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
        from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

        config = DeepseekV4Config(**sizes, moe_intermediate_size=shape.I, **limit)
        module = DeepseekV4Experts(_chosen(config))
    else:
        from transformers.models.mixtral.configuration_mixtral import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        module = MixtralExperts(_chosen(MixtralConfig(**sizes, intermediate_size=shape.I)))
    return module


def _chosen(config: Any) -> Any:
    config._experts_implementation = "grouped_mm"
    return config
