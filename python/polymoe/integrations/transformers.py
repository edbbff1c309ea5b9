"""The experts implementation "polymoe" for Hugging Face Transformers.

Importing this module registers it; then any model whose experts class carries `@use_experts_implementation` takes it:

    import polymoe.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="polymoe")  # or
    model.set_experts_implementation("polymoe")

A model may put code of its own between its two projections, in `_apply_gate`. A gate that is known, by the identity of
that function and of the activation it calls, runs fused in `polymoe.experts`. Every other one, and a norm behind the
experts, runs un-fused: polymoe's plan, dispatch, grouped_mm and combine around the model's own code.
`polymoe.explain(model)` tells which and why. Written against Transformers 5.23.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import activations
from transformers.integrations.moe import ExpertsInterface, _default_apply_gate

from polymoe import ops
from polymoe.hal.explain import Explanation, explain, register_module_hook

__all__ = ["experts_forward"]

ExpertsModule: TypeAlias = Any  # an nn.Module with the attributes that Transformers gives experts, see experts_forward


@dataclass(frozen=True)
class _Gate:
    """A model's `_apply_gate` in polymoe's terms.

    kind: an activation kind; "" where the model's act_fn decides among the plain gated kinds.
    alpha, limit: attribute paths on the experts module. act: the class of act_fn that the kind presumes, if the gate
    calls it: "silu", or the name of a class in the model's own file.
    """

    kind: str
    alpha: str | None = None
    limit: str | None = None
    act: str | None = None
    interleaved: bool = False


_CLAMPED = _Gate("swiglu_clamped", limit="swiglu_limit")
_OAI = _Gate("swiglu_oai", alpha="alpha", limit="limit")

# Keyed by the model's folder and the class whose `_apply_gate` is meant.
_GATES: dict[tuple[str, str], _Gate] = {
    ("deepseek_v4", "DeepseekV4Experts"): _Gate("swiglu_clamped", limit="limit", act="silu"),
    ("glm5_next", "Glm5NextTextExperts"): _CLAMPED,
    ("hy_v4", "HYV4Experts"): _CLAMPED,
    ("step3p7", "Step3p7Experts"): _Gate("swiglu_clamped_after", limit="limit", act="silu"),
    ("gpt_oss", "GptOssExperts"): _Gate("swiglu_oai", alpha="alpha", limit="limit", interleaved=True),
    ("openai_privacy_filter", "OpenAIPrivacyFilterExperts"): _OAI,
    ("minimax_m3_vl", "MiniMaxM3VLExperts"): _Gate("swiglu_oai", alpha="swiglu_alpha", limit="swiglu_limit"),
    ("inkling2", "Inkling2Experts"): _Gate(
        "softcapped",
        alpha="act_fn.gate_softcap.softcap",
        limit="act_fn.up_softcap.softcap",
        act="Inkling2SoftcappedSwiGLU",
    ),
    ("beam", "BeamExperts"): _Gate(""),  # the default gate, with its product in f32, as polymoe's is
}

# act_fn -> (kind of the gated product, ungated kind). Both GELU approximations by tanh are one function.
_ACTIVATIONS: dict[Hashable, tuple[str, str]] = {
    activations.SiLUActivation: ("swiglu", "silu"),
    nn.SiLU: ("swiglu", "silu"),
    nn.functional.silu: ("swiglu", "silu"),
    activations.GELUActivation: ("geglu", "gelu"),
    activations.GELUTanh: ("geglu_tanh", "gelu_tanh"),
    activations.NewGELUActivation: ("geglu_tanh", "gelu_tanh"),
    nn.ReLU: ("reglu", "relu"),
    nn.functional.relu: ("reglu", "relu"),
    activations.ReLUSquaredActivation: ("", "relu2"),
}

_UNCLAMPED = {"swiglu_clamped": "swiglu", "swiglu_clamped_after": "swiglu"}


def _known_gate(gate: Callable[..., Tensor]) -> tuple[_Gate | None, str]:
    """The entry for this very function, and the name of the module that it came from."""
    if gate is _default_apply_gate:
        return _Gate(""), gate.__module__
    for (folder, owner), known in _GATES.items():
        source = f"transformers.models.{folder}.modeling_{folder}"
        # Only a module that is loaded already can be the gate's home.
        candidate = getattr(sys.modules.get(source), owner, None)
        if candidate is not None and candidate.__dict__.get("_apply_gate") is gate:
            return known, source
    return None, ""


def _act_matches(act: Hashable, expected: str, source: str) -> bool:
    if expected == "silu":
        return _ACTIVATIONS.get(act, ("", ""))[1] == "silu"
    return act is getattr(sys.modules[source], expected, None)


_decisions: dict[tuple[Callable[..., Tensor] | None, Hashable, bool], _Gate | str] = {}


@torch._dynamo.assume_constant_result
def _decide(gate: Callable[..., Tensor] | None, act: Hashable, interleaved: bool) -> _Gate | str:
    """How to run experts with this gate function (None: ungated), act_fn class and weight layout, or why not fused."""
    act_name = getattr(act, "__name__", str(act))
    gated_kind, ungated_kind = _ACTIVATIONS.get(act, ("", ""))
    if gate is None:
        return _Gate(ungated_kind) if ungated_kind else f"the activation {act_name} is not known"
    known, source = _known_gate(gate)
    if known is None:
        return f"the gate {gate.__qualname__} of {gate.__module__} is not known"
    if known.interleaved != interleaved:
        return f"the gate {gate.__qualname__} does not read the weights' layout (is_concatenated={not interleaved})"
    if known.act is not None and not _act_matches(act, known.act, source):
        return f"the gate {gate.__qualname__} calls the activation {act_name}, expected {known.act}"
    kind = known.kind or gated_kind
    if not kind:
        return f"the activation {act_name} is not known"
    return replace(known, kind=kind)


def _decision(module: ExpertsModule) -> _Gate | str:
    if getattr(module, "has_post_expert_norm", False):
        return "a norm follows the experts (has_post_expert_norm)"
    if "_apply_gate" in module.__dict__:
        return "_apply_gate is set on the instance"
    act = getattr(module, "act_fn", None)
    act_class: Any = act
    if isinstance(act, nn.Module):
        if act._forward_hooks or act._forward_pre_hooks:
            return "act_fn has hooks"
        act_class = type(act)
    gate = type(module)._apply_gate if getattr(module, "has_gate", True) else None
    key = (gate, act_class, not getattr(module, "is_concatenated", True))
    if torch.compiler.is_compiling():
        return _decide(*key)
    found = _decisions.get(key)
    if found is None:
        found = _decisions[key] = _decide(*key)
    return found


def _projection(module: ExpertsModule, which: str) -> tuple[Tensor, Tensor | None]:
    """Weights and, if the module has them, biases of its "up" (with the gate, if there is one) or "down" projection."""
    name = "gate_up_proj" if which == "up" and getattr(module, "has_gate", True) else f"{which}_proj"
    bias = getattr(module, f"{name}_bias") if getattr(module, "has_bias", False) else None
    return getattr(module, name), bias


@register_module_hook
def _explain(module: nn.Module) -> Explanation | None:
    """For `polymoe.explain`: how an experts module whose model selected "polymoe" runs."""
    config = getattr(module, "config", None)
    if not hasattr(module, "_is_expert_parallel") or getattr(config, "_experts_implementation", None) != "polymoe":
        return None
    up = _projection(module, "up")[0]
    x = up.new_empty(0, up.shape[1 if module.is_transposed else 2])
    decision = _decision(module)
    if isinstance(decision, str):
        found, note = explain("grouped_mm", x), f"un-fused, around the model's own code: {decision}"
    else:
        found, note = explain("experts", x, activation=decision.kind), f"fused: {decision.kind}"
    return replace(found, notes=(note, *found.notes))


def _activation(module: ExpertsModule, gate: _Gate) -> tuple[str, float | None, float | None]:
    """Kind, alpha and limit. A model may say "no clamp" by an infinite limit, which polymoe says by the kind."""
    alpha = attrgetter(gate.alpha)(module) if gate.alpha else None
    limit = attrgetter(gate.limit)(module) if gate.limit else None
    if limit == math.inf:
        return _UNCLAMPED.get(gate.kind, gate.kind), alpha, None
    return gate.kind, alpha, limit


def experts_forward(self: ExpertsModule, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What Transformers calls as an experts module's forward.

    hidden_states: [T,H]; cast to the weights' dtype if it differs. top_k_index: [T,K] i32 or i64; ids outside
    [0, num_experts) are skipped (the sentinels of expert parallelism). top_k_weights: [T,K]; taken as they come in f32
    or the weights' dtype, cast to f32 otherwise. Returns [T,H] in hidden_states' dtype.
    """
    (up, up_bias), (down, down_bias) = _projection(self, "up"), _projection(self, "down")
    x = hidden_states.to(up.dtype)
    if top_k_weights.dtype not in (torch.float32, x.dtype):
        top_k_weights = top_k_weights.float()
    decision = _decision(self)
    if isinstance(decision, str):
        out = _unfused(self, x, top_k_index, top_k_weights, up, down, up_bias, down_bias)
    else:
        out = ops.experts(
            x,
            up,
            down,
            top_k_weights,
            top_k_index,
            *_activation(self, decision),
            gate_up_bias=up_bias,
            down_bias=down_bias,
            transposed=getattr(self, "is_transposed", False),
            interleaved=decision.interleaved,
        )
    return out.to(hidden_states.dtype)


def _unfused(
    self: ExpertsModule,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
) -> Tensor:
    """The model's own code between polymoe's ops. Rows behind the last expert's (skipped slots) stay out of the sum."""
    if not getattr(self, "is_transposed", False):
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    plan = ops.plan(ids, up.shape[0])
    ends = plan.offsets[1:]
    h = ops.grouped_mm(ops.dispatch(x, plan), up, ends, up_bias)
    a = self._apply_gate(h) if getattr(self, "has_gate", True) else self.act_fn(h)
    y = ops.grouped_mm(a.to(x.dtype), down, ends, down_bias)
    if getattr(self, "has_post_expert_norm", False):
        y = self.post_expert_norm(y)
    return ops.combine(y.to(x.dtype), plan, weights)


ExpertsInterface.register("polymoe", experts_forward)
