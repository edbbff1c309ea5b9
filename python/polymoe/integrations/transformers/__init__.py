"""The experts implementation "polymoe" for Hugging Face Transformers.

Importing this module registers it; then any model whose experts class carries `@use_experts_implementation` takes it:

    import polymoe.integrations.transformers
    model = AutoModelForCausalLM.from_pretrained(name, experts_implementation="polymoe")  # or
    model.set_experts_implementation("polymoe")

A model may put code of its own between its two projections, in `_apply_gate`. A gate that is known, by the identity of
that function and of the activation it calls, runs fused in `polymoe.experts`. Every other one, and a norm behind the
experts, runs un-fused: polymoe's plan, dispatch, grouped_mm and combine around the model's own code.
`polymoe.explain(model)` tells which and why. The dtype of the weights decides what is computed, or where autocast is on
its dtype, as in the eager loop: hidden states, weights and biases are cast then, routing weights and packed weights are
not. Written against Transformers 5.23.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import FP8Experts
from transformers.integrations.moe import ExpertsInterface

from polymoe import ops
from polymoe.hal.explain import Explanation, explain, register_module_hook
from polymoe.integrations.transformers._gates import ExpertsModule, Fused, fused
from polymoe.packing import Packable, PackedWeight, register_packable

__all__ = ["experts_forward"]

_SHARDED: tuple[type, ...] = ()
if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor

    _SHARDED = (DTensor,)


class Projection(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    packed: PackedWeight | None


def _name(module: ExpertsModule, which: str) -> str:
    """Of the "up" (with the gate, if there is one) or "down" projection."""
    return "gate_up_proj" if which == "up" and getattr(module, "has_gate", True) else f"{which}_proj"


def _projection(module: ExpertsModule, which: str) -> Projection:
    name = _name(module, which)
    bias = getattr(module, f"{name}_bias") if getattr(module, "has_bias", False) else None
    weight: Tensor | PackedWeight = getattr(module, name)
    packed = weight if isinstance(weight, PackedWeight) else None
    if isinstance(weight, PackedWeight):
        weight = weight.tensor(module)
    if isinstance(weight, _SHARDED):
        _fail(name, "a plain tensor, such as FSDP2 and Transformers' parallel plans leave inside forward", type(weight))
    if weight.shape[0] != module.num_experts:
        _fail(name, f"the weights of num_experts = {module.num_experts} experts", tuple(weight.shape))
    return Projection(weight, bias, packed)


def _how(module: ExpertsModule, up: Tensor, down: Tensor) -> Fused | str:
    return fused(module) if up.dtype == down.dtype else f"the projections are {up.dtype} and {down.dtype}"


def _weight_format(module: ExpertsModule, how: Fused | str, up: Projection, down: Projection) -> str:
    """Of both projections. Weights were packed for the way in which the module ran then: fused, gate and up apart."""
    if up.packed is None and down.packed is None:
        return "plain"
    if up.packed is None or down.packed is None:
        _fail(_name(module, "down" if down.packed is None else "up"), "a packed weight, as the other is", "a plain one")
    if up.packed.gate_up != (isinstance(how, Fused) and getattr(module, "has_gate", True)):
        ran = "fused" if up.packed.gate_up else "un-fused"
        _fail(up.packed.name, f"to run {ran}, as when it was packed; call polymoe.unoptimize(model) first", how)
    return "packed"


@register_packable
def _packable(module: nn.Module) -> list[Packable]:
    """For `polymoe.optimize`: the projections of experts whose model selected "polymoe"."""
    if not _selected(module):
        return []
    experts: ExpertsModule = module
    up, down = _projection(experts, "up").weight, _projection(experts, "down").weight
    how, transposed = _how(experts, up, down), getattr(experts, "is_transposed", False)
    halves = isinstance(how, Fused) and getattr(experts, "has_gate", True)
    interleaved = isinstance(how, Fused) and how.interleaved
    return [
        Packable(_name(experts, "up"), halves, halves and interleaved, transposed),
        Packable(_name(experts, "down"), transposed=transposed),
    ]


def _selected(module: nn.Module) -> bool:
    config = getattr(module, "config", None)
    if isinstance(module, FP8Experts):  # see polymoe.integrations.transformers.quantized
        return False
    return hasattr(module, "_is_expert_parallel") and getattr(config, "_experts_implementation", None) == "polymoe"


def _fail(argument: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"polymoe for Transformers: {argument}: expected {expected}, got {got}")


@register_module_hook
def _explain(module: nn.Module) -> Explanation | None:
    """For `polymoe.explain`: how an experts module whose model selected "polymoe" runs."""
    if not _selected(module):
        return None
    projections = _projection(module, "up"), _projection(module, "down")
    up, down = (projection.weight for projection in projections)
    transposed = module.is_transposed
    x = up.new_empty(0, up.shape[1 if transposed else 2])
    how = _how(module, up, down)
    weight_format = _weight_format(module, how, *projections)
    if isinstance(how, str):
        found = explain("grouped_mm", x, up if transposed else up.mT, weight_format=weight_format)
        note = f"un-fused, around the model's own code: {how}"
    else:
        found = explain("experts", x, up, down, activation=how.kind, transposed=transposed, weight_format=weight_format)
        note = f"fused: {how.kind}"
    return replace(found, notes=(note, *found.notes))


def experts_forward(self: ExpertsModule, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What Transformers calls as an experts module's forward.

    Args:
        hidden_states: [T, H]; cast to the weights' dtype, or under autocast to its dtype, if it differs.
        top_k_index: [T, K] int32 or int64. Ids outside [0, num_experts) are skipped: the sentinels of expert
            parallelism, whatever their weights.
        top_k_weights: [T, K]; taken as they come in float32 or the weights' dtype, cast to float32 otherwise.

    Returns:
        [T, H] of hidden_states' dtype.

    Raises:
        ValueError: the module's weights are DTensors or not those of its num_experts; any other shape, dtype or device.
    """
    projections = _autocast(_projection(self, "up")), _autocast(_projection(self, "down"))
    (up, up_bias, _), (down, down_bias, _) = projections
    x = _cast(hidden_states, up.dtype)
    how = _how(self, up, down)
    weight_format = _weight_format(self, how, *projections)
    if isinstance(how, str):
        out = _unfused(self, x, top_k_index, top_k_weights, up, down, up_bias, down_bias, weight_format)
    else:
        out = ops.experts(
            x,
            up,
            down,
            _routing_weights(top_k_weights, x.dtype),
            top_k_index,
            how.kind,
            how.alpha,
            how.limit,
            up_bias,
            down_bias,
            getattr(self, "is_transposed", False),
            how.interleaved,
            weight_format=weight_format,
        )
    return _cast(out, hidden_states.dtype)


def _autocast(projection: Projection) -> Projection:
    """The projection in the dtype of autocast, where that is on."""
    weight, bias, packed = projection
    dtype = None if packed is not None else _autocast_dtype(weight)
    if dtype is None:
        return projection
    return Projection(_cast(weight, dtype), None if bias is None else _cast(bias, dtype), None)


def _autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast casts the tensor to; None where it is off, and for float64, which it leaves alone."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # a microsecond less than to() that does nothing


def _routing_weights(weights: Tensor, dtype: torch.dtype) -> Tensor:
    return weights if weights.dtype in (torch.float32, dtype) else weights.float()


def _unfused(
    self: ExpertsModule,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None,
    down_bias: Tensor | None,
    weight_format: str,
) -> Tensor:
    """The model's own code between polymoe's ops. Rows behind the last expert's (skipped slots) stay out of the sum."""
    if not getattr(self, "is_transposed", False):
        up, down = up.mT, down.mT
    plan = ops.plan(ids, up.shape[0])
    ends = plan.offsets[1:]
    h = ops.grouped_mm(ops.dispatch(x, plan), up, ends, up_bias, weight_format=weight_format)
    a = self._apply_gate(h) if getattr(self, "has_gate", True) else self.act_fn(h)
    y = ops.grouped_mm(_cast(a, down.dtype), down, ends, down_bias, weight_format=weight_format)
    if getattr(self, "has_post_expert_norm", False):
        y = self.post_expert_norm(y)
    return ops.combine(y, plan, _routing_weights(weights, y.dtype))


ExpertsInterface.register("polymoe", experts_forward)
