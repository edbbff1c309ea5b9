"""Experts of Transformers' models that are not behind its experts interface, through polymoe, if asked for:

    from polymoe.integrations.undecorated import replace_experts, restore_experts
    print(replace_experts(model))  # the names of the modules that now run in polymoe
    restore_experts(model)

Llama 4: its MoE block multiplies each expert's input by the routing weight, and lets every expert compute every token.
polymoe computes the chosen ones only. Step 3.7: its experts have the interface's arguments, but not its decorator.
Parameters stay where they are. Written against Transformers 5.23.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate

from polymoe import ops
from polymoe.hal.explain import Explanation, explain, register_module_hook
from polymoe.integrations.transformers import experts_forward
from polymoe.integrations.transformers._gates import Fused, fused

__all__ = ["replace_experts", "restore_experts"]


def replace_experts(model: nn.Module) -> list[str]:
    """Lets the experts of Llama 4 and Step 3.7 in `model` run in polymoe, on these instances only.

    Args:
        model: a Transformers model, or any part of one.

    Returns:
        The names of the modules whose forward was replaced.

    Raises:
        ValueError: the model holds no such module.
    """
    found = []
    for name, module in model.named_modules():
        if _is(module, "step3p7", "Step3p7Experts"):
            module.forward = MethodType(experts_forward, module)
        elif _is(module, "llama4", "Llama4TextMoe") and _is(module.experts, "llama4", "Llama4TextExperts"):
            module.forward = MethodType(_llama4_moe_forward, module)
        else:
            continue
        found.append(name)
    if not found:
        raise ValueError(
            f"replace_experts: model: expected one with Llama4TextMoe or Step3p7Experts, got {type(model).__name__}; "
            "experts behind Transformers' interface are set by model.set_experts_implementation"
        )
    return found


def restore_experts(model: nn.Module) -> None:
    """Takes back what `replace_experts` did to any module in `model`."""
    for module in model.modules():
        if _replaced_by(module) in (experts_forward, _llama4_moe_forward):
            del module.forward


def _is(module: Any, folder: str, name: str) -> bool:
    """Whether it is of that very class. Only a model file that is loaded already can be its home."""
    home = sys.modules.get(f"transformers.models.{folder}.modeling_{folder}")
    return type(module) is getattr(home, name, None)


def _replaced_by(module: nn.Module) -> Any:
    return getattr(module.__dict__.get("forward"), "__func__", None)


class _Gated:
    """Llama 4's experts as far as their gate goes, which is the interface's default one."""

    _apply_gate = _default_apply_gate

    def __init__(self, act_fn: Any) -> None:
        self.act_fn = act_fn


def _llama4_moe_forward(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """In place of Llama4TextMoe.forward: hidden_states [..., H] -> ([T, H], router logits [T, E])."""
    experts = self.experts
    how = fused(_Gated(experts.act_fn))
    if isinstance(how, str):
        own: tuple[Tensor, Tensor] = type(self).forward(self, hidden_states)
        return own
    x = hidden_states.reshape(-1, self.hidden_dim)
    scores, logits = self.router(x)
    ids = torch.topk(logits, self.top_k, dim=1).indices
    routed = ops.experts(
        x.to(experts.gate_up_proj.dtype),
        experts.gate_up_proj,
        experts.down_proj,
        scores.gather(1, ids).to(experts.gate_up_proj.dtype),
        ids,
        how.kind,
        transposed=True,
        weight_placement="input",
    )
    out = self.shared_expert(x)
    return out + routed.to(out.dtype), logits


@register_module_hook
def _explain(module: nn.Module) -> Explanation | None:
    """For `polymoe.explain`: how a replaced module runs."""
    by, experts = _replaced_by(module), cast(Any, module)
    if by is experts_forward:
        how, transposed = fused(module), False
    elif by is _llama4_moe_forward:
        experts = experts.experts
        how, transposed = fused(_Gated(experts.act_fn)), True
    else:
        return None
    up, down = experts.gate_up_proj, experts.down_proj
    x = up.new_empty(0, up.shape[1 if transposed else 2])
    if isinstance(how, Fused):
        found = explain("experts", x, up, down, activation=how.kind, transposed=transposed)
        return replace(found, notes=(f"fused: {how.kind}", *found.notes))
    found = explain("grouped_mm", x, up if transposed else up.mT)
    return replace(found, notes=(f"un-fused, around the model's own code: {how}", *found.notes))
