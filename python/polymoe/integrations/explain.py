"""What `polymoe.explain` says of a Transformers model, beside the experts that run in polymoe."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from polymoe.hal.explain import Explanation, explain, register_model_hook
from polymoe.integrations import routers


@register_model_hook
def _explain(model: nn.Module) -> dict[str, Explanation | str]:
    found: dict[str, Explanation | str] = {name: _router(router) for name, router in routers.routers(model).items()}
    for name, module in model.named_modules():
        selected = getattr(getattr(module, "config", None), "_experts_implementation", None)
        if hasattr(module, "_is_expert_parallel") and selected != "polymoe":
            found[name] = (
                f'Transformers\' "{selected or "eager"}"; import polymoe.integrations.transformers, '
                'then model.set_experts_implementation("polymoe"), to run them in polymoe'
            )
    return found


def _router(router: nn.Module) -> Explanation | str:
    how = routers.replacement(router)
    if how is None:
        how = routers.would_be(router)
        if isinstance(how, str):
            return f"the model's own, {how}"
        return (
            "the model's own; polymoe.integrations.routers.use_polymoe_routers(model) makes it one call of "
            f"polymoe.gate: {how.describe(router)}"
        )
    if isinstance(how, str):
        return f"the model's own, {how}"
    matrix = how.matrix(router)
    logits = matrix.new_empty(0, matrix.shape[0], dtype=matrix.dtype if how.typed else torch.float32)
    call = explain("gate", logits, 1, how.scoring)
    notes = (
        how.describe(router),
        "the model's own forward where a gradient is needed, and under autocast",
        *call.notes,
    )
    return replace(call, notes=notes)
