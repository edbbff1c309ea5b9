"""Running a model of the zoo with one implementation of its experts or another."""

from __future__ import annotations

from typing import Any

import torch
from experts_modules import float64_experts
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface

from zoo.shrink import VOCAB, experts_modules


def no_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return torch.zeros_like(hidden_states)


ExpertsInterface.register("float64", float64_experts)
ExpertsInterface.register("none", no_experts)


def random_inputs(model: PreTrainedModel, batch: int = 2, length: int = 24) -> dict[str, Tensor]:
    tokens = torch.randint(VOCAB, (batch, length))
    kind = type(model).__name__
    if kind == "Qwen3OmniMoeTalkerModel":  # takes another model's output in place of tokens
        return {"inputs_embeds": model.get_input_embeddings()(tokens)}
    if kind == "Ernie4_5_VLMoeTextModel":  # images have experts of their own
        return {"input_ids": tokens, "moe_mm_token_type_ids": torch.randint(2, (batch, length))}
    return {"input_ids": tokens}


def run(model: PreTrainedModel, implementation: str, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Logits, or the last hidden state of a model without a head; and each layer's tokens' experts, sorted."""
    routed: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: routed.append(args[1].sort(-1).values))
        for module in experts_modules(model)
    ]
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        out = model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state), routed


def same_experts(runs: list[list[Tensor]]) -> bool:
    return all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))
