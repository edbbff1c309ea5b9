"""What the tests of the Transformers adapter share: the truth in float64, its bound, and which ops ran."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from polymoe import ops
from polymoe.integrations.transformers import experts_forward
from polymoe.testing.tolerances import FUNCTION_ERRORS, relative_frobenius, unit_roundoff

HIDDEN, INTERMEDIATE, EXPERTS = 64, 48, 8


def float64_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Truth: every product in float64, with the model's own gate and norm."""
    name = "gate_up_proj" if getattr(self, "has_gate", True) else "up_proj"

    def linear(x: Tensor, projection: str, e: int) -> Tensor:
        weight = getattr(self, projection)[e].double()
        y = x @ weight if getattr(self, "is_transposed", False) else x @ weight.t()
        return y + getattr(self, f"{projection}_bias")[e].double() if getattr(self, "has_bias", False) else y

    out = torch.zeros_like(hidden_states, dtype=torch.float64)
    for e in range(self.num_experts):
        token, slot = torch.where(top_k_index == e)
        if token.numel() == 0:
            continue
        h = linear(hidden_states[token].double(), name, e)
        a = self._apply_gate(h) if getattr(self, "has_gate", True) else self.act_fn(h)
        y = linear(a.double(), "down_proj", e)
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        out.index_add_(0, token, top_k_weights[token, slot, None].double() * y)
    return out.to(hidden_states.dtype)


def float32_bound(layers: int = 1) -> float:
    """Of the relative Frobenius error: n u is far above the sqrt(n) u that independent roundings in n terms leave."""
    return layers * (HIDDEN + INTERMEDIATE + EXPERTS + 2 * FUNCTION_ERRORS) * unit_roundoff(torch.float32)


def assert_right(module: nn.Module, *inputs: Tensor) -> Tensor:
    """The result, close to the module's own code in float64."""
    ours = experts_forward(module, *inputs)
    assert relative_frobenius(ours, float64_experts(module, *inputs)) <= float32_bound()
    return ours


def watch_experts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every call of polymoe.experts, by the number of different experts it hit."""
    calls: list[int] = []
    experts = ops.experts

    def watched(
        x: Tensor, up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, *rest: Any, **options: Any
    ) -> Tensor:
        calls.append(int(ids[(ids >= 0) & (ids < up.shape[0])].unique().numel()))
        return experts(x, up, down, weights, ids, *rest, **options)

    monkeypatch.setattr(ops, "experts", watched)
    return calls


def config(implementation: str = "polymoe") -> SimpleNamespace:
    """What experts classes of Transformers read from their model's config."""
    return SimpleNamespace(
        num_local_experts=EXPERTS,
        n_routed_experts=EXPERTS,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        moe_intermediate_size=INTERMEDIATE,
        hidden_act="silu",
        swiglu_limit=0.5,
        mlp_gate_softcap=1.5,
        mlp_up_softcap=0.8,
        _experts_implementation=implementation,
    )


def fill(module: nn.Module) -> nn.Module:
    """Weights with pre-activations of standard deviation 1.5, so that limits of 0.5 bind."""
    for key, parameter in module.named_parameters():
        nn.init.normal_(parameter, std=0.5 if "bias" in key or "norm" in key else 1.5 * HIDDEN**-0.5)
    return module.requires_grad_(False)


def batch(tokens: int, dtype: torch.dtype = torch.float32, top_k: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """hidden_states, top_k_index and top_k_weights as a router gives them: no expert twice for a token."""
    ids = torch.rand(tokens, EXPERTS).argsort(-1)[:, :top_k]
    return torch.randn(tokens, HIDDEN).to(dtype), ids, torch.rand(tokens, top_k).to(dtype)
