"""The routed experts with dense weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polymoe import ops
from polymoe.hal.explain import Explanation, explain, register_module_hook
from polymoe.nn.linear import expect, uniform_by_fan_in
from polymoe.ops import _check as check_that
from polymoe.ops.activate import KINDS, check_kind
from polymoe.ops.experts import WEIGHT_PLACEMENTS
from polymoe.packing import Packable, PackedWeight, register_packable


class Experts(nn.Module):
    """E gated (or ungated) MLPs and the weighted sum of the K that each token was sent to: `polymoe.experts`.

    Arguments:
        num_experts, hidden_size, intermediate_size: E, H, I.
        activation, alpha, limit: see `polymoe.activate`; an ungated kind makes gate_up [E,I,H].
        bias: biases on both projections (gpt-oss).
        transposed: gate_up [E,H,2I] and down [E,I,H] instead of [E,2I,H] and [E,H,I].
        interleaved: gate and up rows alternate in gate_up (gpt-oss) instead of all gate rows first.
        weight_placement: what the routing weight multiplies: "output", "activation" (DeepSeek's own code) or "input"
            (Llama-4).

    Parameters: gate_up, down; gate_up_bias [E,2I], down_bias [E,H] (None without bias).
    Raises ValueError for sizes below 1 and for an activation, alpha or limit that `polymoe.activate` does not take.
    """

    gate_up_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "swiglu",
        alpha: float | None = None,
        limit: float | None = None,
        bias: bool = False,
        transposed: bool = False,
        interleaved: bool = False,
        weight_placement: str = "output",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"num_experts": num_experts, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
        for name, size in sizes.items():
            expect(size >= 1, "Experts", name, "at least 1", size)
        check_kind("nn.Experts", "activation", activation, alpha, limit, interleaved)
        check_that.choice("nn.Experts", "weight_placement", weight_placement, WEIGHT_PLACEMENTS)
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.activation = activation
        self.alpha = alpha
        self.limit = limit
        self.transposed = transposed
        self.interleaved = interleaved
        self.weight_placement = weight_placement
        up_size = 2 * intermediate_size if KINDS[activation].gated else intermediate_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        def matrices(out_size: int, in_size: int) -> nn.Parameter:
            return parameter(num_experts, *((in_size, out_size) if transposed else (out_size, in_size)))

        self.gate_up = matrices(up_size, hidden_size)
        self.down = matrices(hidden_size, intermediate_size)
        self.register_parameter("gate_up_bias", parameter(num_experts, up_size) if bias else None)
        self.register_parameter("down_bias", parameter(num_experts, hidden_size) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """gate_up uniform in +-1/sqrt(H), down in +-1/sqrt(I), biases zero."""
        uniform_by_fan_in(self.gate_up, self.hidden_size)
        uniform_by_fan_in(self.down, self.intermediate_size)
        for bias in (self.gate_up_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """x [T,H] of the parameters' dtype, weights [T,K] (f32 or x's dtype), ids [T,K] (i32 or i64) -> [T,H].

        Ids outside [0, E) skip their slot. Raises ValueError as `polymoe.experts` does.
        """
        gate_up, down, weight_format = self._weights()
        return ops.experts(
            x,
            gate_up,
            down,
            weights,
            ids,
            activation=self.activation,
            alpha=self.alpha,
            limit=self.limit,
            gate_up_bias=self.gate_up_bias,
            down_bias=self.down_bias,
            transposed=self.transposed,
            interleaved=self.interleaved,
            weight_placement=self.weight_placement,
            weight_format=weight_format,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters, which x has too."""
        return self.gate_up.dtype

    def _weights(self) -> tuple[Tensor, Tensor, str]:
        """gate_up, down and their weight_format: "packed" after polymoe.optimize."""
        gate_up: Tensor | PackedWeight = self.gate_up
        down: Tensor | PackedWeight = self.down
        if isinstance(gate_up, PackedWeight) and isinstance(down, PackedWeight):
            return gate_up.tensor(self), down.tensor(self), "packed"
        return self.gate_up, self.down, "plain"

    def extra_repr(self) -> str:
        parts = [f"num_experts={self.num_experts}, hidden_size={self.hidden_size}"]
        parts.append(f"intermediate_size={self.intermediate_size}, activation={self.activation!r}")
        parts += [f"{name}={value}" for name in ("alpha", "limit") if (value := getattr(self, name)) is not None]
        parts += [f"{name}=True" for name in ("transposed", "interleaved") if getattr(self, name)]
        if self.gate_up_bias is not None:
            parts.append("bias=True")
        if self.weight_placement != "output":
            parts.append(f"weight_placement={self.weight_placement!r}")
        return ", ".join(parts)


@register_module_hook
def _explain(module: nn.Module) -> Explanation | None:
    if not isinstance(module, Experts):
        return None
    gate_up, _, weight_format = module._weights()
    x = gate_up.new_empty(0, module.hidden_size)
    return explain(
        "experts",
        x,
        activation=module.activation,
        weight_placement=module.weight_placement,
        weight_format=weight_format,
    )


@register_packable
def _packable(module: nn.Module) -> list[Packable]:
    if not isinstance(module, Experts):
        return []
    gated = KINDS[module.activation].gated
    return [
        Packable("gate_up", gated, gated and module.interleaved, module.transposed),
        Packable("down", transposed=module.transposed),
    ]
