"""Routed experts whose weights are stored quantised."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from polymoe import ops
from polymoe.formats import Weight, parse
from polymoe.hal.explain import Explanation, explain, register_module_hook
from polymoe.nn.experts import Experts
from polymoe.nn.linear import expect
from polymoe.ops import _check as check_that
from polymoe.ops._weights import check_options
from polymoe.ops.activate import KINDS, check_kind
from polymoe.ops.experts import WEIGHT_PLACEMENTS


class QuantizedExperts(nn.Module):
    """`Experts` with frozen quantised weights, which `polymoe.experts` multiplies as they are stored.

    Arguments:
        gate_up, down: weights [E,2I,H] ([E,I,H] with an ungated activation) and [E,H,I] of one format of
            polymoe.formats; their tensors are kept, not copied.
        gate_up_bias [E,2I], down_bias [E,H]: None, or parameters.
        mode: "weight_only", "int8", "int8_g128" or "fp8", see `polymoe.experts`.
        activation, alpha, limit, interleaved, weight_placement: as in `Experts`.
        dtype: of the modules that `MoE` builds beside these experts; x may be of any that `polymoe.experts` takes.

    Buffers: gate_up, gate_up_scale, down, down_scale; gate_up_zero and down_zero, if the format has zero points.
    Casting the module (`.bfloat16()`) leaves them as they are stored. Gradients flow to x, the routing weights and the
    biases.

    Raises ValueError for weights that are not of one format or do not fit together, and for options as `Experts` does.
    """

    gate_up: Tensor
    gate_up_scale: Tensor
    gate_up_zero: Tensor | None
    down: Tensor
    down_scale: Tensor
    down_zero: Tensor | None
    gate_up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(
        self,
        gate_up: Weight,
        down: Weight,
        *,
        gate_up_bias: nn.Parameter | None = None,
        down_bias: nn.Parameter | None = None,
        mode: str = "weight_only",
        activation: str = "swiglu",
        alpha: float | None = None,
        limit: float | None = None,
        interleaved: bool = False,
        weight_placement: str = "output",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        where = "QuantizedExperts"
        check_kind(f"nn.{where}", "activation", activation, alpha, limit, interleaved)
        check_that.choice(f"nn.{where}", "weight_placement", weight_placement, WEIGHT_PLACEMENTS)
        check_options(f"nn.{where}", gate_up.format, (), mode, {})
        expect(down.format == gate_up.format, where, "down", f"of gate_up's format {gate_up.format}", down.format)
        for name, weight in (("gate_up", gate_up), ("down", down)):
            parse(weight.format).check(f"nn.{where}", name, weight)
            expect(len(weight.shape) == 3, where, name, "a weight [E, N, D]", list(weight.shape))
        E, H, I = down.shape
        up_size = 2 * I if KINDS[activation].gated else I
        expect(
            list(gate_up.shape) == [E, up_size, H], where, "gate_up", f"a weight {[E, up_size, H]}", [*gate_up.shape]
        )
        for name, bias, shape in (("gate_up_bias", gate_up_bias, (E, up_size)), ("down_bias", down_bias, (E, H))):
            if bias is not None:
                expect(bias.shape == shape, where, name, f"None or a parameter {list(shape)}", list(bias.shape))
            self.register_parameter(name, bias)
        for name, weight in (("gate_up", gate_up), ("down", down)):
            self.register_buffer(name, weight.data)
            self.register_buffer(f"{name}_scale", weight.scale)
            self.register_buffer(f"{name}_zero", weight.zero)
        self.num_experts, self.hidden_size, self.intermediate_size = E, H, I
        self.weight_format = gate_up.format
        self.mode = mode
        self.activation = activation
        self.alpha = alpha
        self.limit = limit
        self.interleaved = interleaved
        self.weight_placement = weight_placement
        self.dtype = dtype

    @staticmethod
    def quantize(experts: Experts, weight_format: str, mode: str = "weight_only") -> QuantizedExperts:
        """The same experts with their weights in the format of that name; biases are shared with `experts`.

        Raises:
            ValueError: an unknown format or mode, a mode that the format does not have, or weights that are packed or
                not finite.
        """
        form = parse(weight_format)
        gate_up, down, stored = experts._weights()
        expect(stored == "plain", "QuantizedExperts", "experts", "plain weights (polymoe.unoptimize)", stored)
        weights = (w.detach().transpose(-2, -1) if experts.transposed else w.detach() for w in (gate_up, down))
        quantized = [form.quantize(weight.contiguous()) for weight in weights]
        return QuantizedExperts(
            *quantized,
            gate_up_bias=experts.gate_up_bias,
            down_bias=experts.down_bias,
            mode=mode,
            activation=experts.activation,
            alpha=experts.alpha,
            limit=experts.limit,
            interleaved=experts.interleaved,
            weight_placement=experts.weight_placement,
            dtype=experts.dtype,
        )

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """x [T,H], weights [T,K] (f32 or x's dtype), ids [T,K] (i32 or i64) -> [T,H], as `Experts.forward`."""
        return ops.experts(
            x,
            self.gate_up,
            self.down,
            weights,
            ids,
            activation=self.activation,
            alpha=self.alpha,
            limit=self.limit,
            gate_up_bias=self.gate_up_bias,
            down_bias=self.down_bias,
            interleaved=self.interleaved,
            weight_placement=self.weight_placement,
            weight_format=self.weight_format,
            gate_up_scale=self.gate_up_scale,
            down_scale=self.down_scale,
            gate_up_zero=self.gate_up_zero,
            down_zero=self.down_zero,
            mode=self.mode,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedExperts:
        # As bytes, since casts would change codes and scales of 8-bit floats like any other numbers.
        stored = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        self._buffers.update({name: buffer.view(torch.uint8) for name, buffer in stored.items()})
        try:
            super()._apply(fn, recurse)
        finally:
            for name, buffer in stored.items():
                self._buffers[name] = self.get_buffer(name).view(buffer.dtype)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Copying would convert, and dense weights of the same shape would silently become codes.
        for name, buffer in self._buffers.items():
            given = state_dict.get(prefix + name)
            if buffer is not None and given is not None:
                expect(given.dtype == buffer.dtype, "QuantizedExperts", prefix + name, str(buffer.dtype), given.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        parts = [f"num_experts={self.num_experts}, hidden_size={self.hidden_size}"]
        parts.append(f"intermediate_size={self.intermediate_size}, activation={self.activation!r}")
        parts.append(f"weight_format={self.weight_format!r}, mode={self.mode!r}")
        return ", ".join(parts)


def quantize_(module: nn.Module, weight_format: str, mode: str = "weight_only") -> nn.Module:
    """Puts `QuantizedExperts` in the place of every `Experts` in `module`, shared experts included, layer by layer, so
    that one layer at a time is held in both forms.

    Returns `module`.
    Raises ValueError as `QuantizedExperts.quantize` does, or if there are no `Experts`; layers before the one that
    failed are quantised then.
    """
    found = [
        (parent, name)
        for parent in module.modules()
        for name, child in parent._modules.items()
        if isinstance(child, Experts)
    ]
    expect(bool(found), "quantize_", "module", "a module that holds Experts", type(module).__name__)
    made: dict[int, QuantizedExperts] = {}  # experts that stand in several places stay one
    for parent, name in found:
        key = id(getattr(parent, name))
        if key not in made:
            made[key] = QuantizedExperts.quantize(getattr(parent, name), weight_format, mode)
        setattr(parent, name, made[key])
    return module


@register_module_hook
def _explain(module: nn.Module) -> Explanation | None:
    if not isinstance(module, QuantizedExperts):
        return None
    return explain(
        "experts",
        torch.empty(0, module.hidden_size, dtype=module.dtype, device=module.gate_up.device),
        activation=module.activation,
        weight_placement=module.weight_placement,
        weight_format=module.weight_format,
        mode=module.mode,
    )
