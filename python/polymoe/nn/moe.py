"""The whole layer: router, routed experts, shared and identity experts, a latent space."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from polymoe.nn.experts import Experts
from polymoe.nn.linear import Linear, expect
from polymoe.nn.quantized import QuantizedExperts
from polymoe.nn.router import Router


class SharedExpert(nn.Module):
    """An MLP that every token goes through: `Experts` with one expert and weight 1.

    With `gate=True` the weight is sigmoid(x @ gate.weight[0]) instead (Qwen2-MoE, Qwen3-Next). Several shared experts
    are one of the summed width. activation, alpha and limit as in `Experts`.
    """

    gate: Router | None

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str = "swiglu",
        alpha: float | None = None,
        limit: float | None = None,
        gate: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.experts = Experts(
            1,
            hidden_size,
            intermediate_size,
            activation=activation,
            alpha=alpha,
            limit=limit,
            device=device,
            dtype=dtype,
        )
        self.gate = Router(hidden_size, 1, 1, scoring="sigmoid", device=device, dtype=dtype) if gate else None

    def forward(self, x: Tensor) -> Tensor:
        """x [T,H] -> [T,H]."""
        if self.gate is not None:
            weights, ids = self.gate(x)
        else:
            weights = torch.ones(x.shape[0], 1, device=x.device, dtype=torch.float32)
            ids = torch.zeros(x.shape[0], 1, device=x.device, dtype=torch.int32)
        return self.experts(x, weights, ids)


class MoE(nn.Module):
    """A whole MoE layer: router, routed experts and what some models add to them.

    Arguments:
        router, experts: their sizes must fit: router.num_experts = experts.num_experts + identity_experts.
        shared_intermediate_size: adds a shared expert of this width on the model's width. It has the routed experts'
            activation, alpha and limit (DeepSeek-V4 clamps both), unless shared_limit or shared_activation, which then
            takes shared_limit alone, says otherwise. shared_gate: its own sigmoid gate (Qwen3-Next).
        identity_experts: the router's last so many experts return their input (LongCat): ids >= experts.num_experts
            skip the routed experts, and x times the sum of their weights is added in f32, at one extra rounding.
        latent: the routed experts work at another width than the model (Kimi-K3, Nemotron-H): `latent_down` projects
            from router.hidden_size to experts.hidden_size, `latent_up` back. Identity experts act on the latent.

    Modules built here take the device of experts.gate_up and experts.dtype.
    Raises ValueError for sizes that do not fit together.
    """

    shared: SharedExpert | None
    latent_down: Linear | None
    latent_up: Linear | None

    def __init__(
        self,
        router: Router,
        experts: Experts | QuantizedExperts,
        *,
        shared_intermediate_size: int | None = None,
        shared_activation: str | None = None,
        shared_limit: float | None = None,
        shared_gate: bool = False,
        identity_experts: int = 0,
        latent: bool = False,
    ) -> None:
        super().__init__()
        expect(identity_experts >= 0, "MoE", "identity_experts", "at least 0", identity_experts)
        expect(
            router.num_experts == experts.num_experts + identity_experts,
            "MoE",
            "router",
            f"num_experts {experts.num_experts} + {identity_experts} (experts and identity experts)",
            router.num_experts,
        )
        expect(
            latent or router.hidden_size == experts.hidden_size,
            "MoE",
            "experts",
            f"hidden_size {router.hidden_size}, the router's (or latent=True)",
            experts.hidden_size,
        )
        expect(
            shared_intermediate_size is not None or not (shared_activation or shared_limit or shared_gate),
            "MoE",
            "shared_intermediate_size",
            "a width with shared_activation, shared_limit or shared_gate",
            None,
        )
        self.router = router
        self.experts = experts
        self.identity_experts = identity_experts
        device, dtype = experts.gate_up.device, experts.dtype
        width, inner = router.hidden_size, experts.hidden_size
        self.latent_down = Linear(width, inner, bias=False, device=device, dtype=dtype) if latent else None
        self.latent_up = Linear(inner, width, bias=False, device=device, dtype=dtype) if latent else None
        self.shared = None
        if shared_intermediate_size is not None:
            own = shared_activation is not None
            self.shared = SharedExpert(
                width,
                shared_intermediate_size,
                activation=shared_activation or experts.activation,
                alpha=None if own else experts.alpha,
                limit=shared_limit if own or shared_limit is not None else experts.limit,
                gate=shared_gate,
                device=device,
                dtype=dtype,
            )

    def reset_parameters(self) -> None:
        """Starts every part anew."""
        for module in self.modules():
            if isinstance(module, Router | Experts | Linear):
                module.reset_parameters()

    def forward(self, x: Tensor, token_ids: Tensor | None = None, token_mask: Tensor | None = None) -> Tensor:
        """x [..., H] of the experts' dtype -> [..., H]; token_ids and token_mask [...] as in `Router.forward`.

        A masked token gets nothing from the routed and identity experts; the shared expert sees every token.
        """
        expect(x.dim() > 0, "MoE", "x", "a tensor [..., H]", "one without dimensions")
        tokens = x.reshape(-1, x.shape[-1])
        flat_ids = None if token_ids is None else token_ids.reshape(-1)
        flat_mask = None if token_mask is None else token_mask.reshape(-1)
        weights, ids = self.router(tokens, flat_ids, flat_mask)
        out = self._routed(tokens, weights, ids)
        if self.shared is not None:
            out = out + self.shared(tokens)
        return out.view(x.shape)

    def _routed(self, tokens: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        inner = tokens if self.latent_down is None else self.latent_down(tokens)
        out = self.experts(inner, weights, ids)
        if self.identity_experts:
            share = weights.masked_fill(ids < self.experts.num_experts, 0.0).sum(-1, keepdim=True)
            # Multiply and add apart: a fused addcmul may round vector lanes and scalar tails differently.
            out = (out.to(share.dtype) + inner.to(share.dtype) * share).to(out.dtype)
        return out if self.latent_up is None else self.latent_up(out)

    def extra_repr(self) -> str:
        return f"identity_experts={self.identity_experts}" if self.identity_experts else ""
