"""Modules around the ops: `Router` picks experts, `Experts` holds and applies them, `MoE` is the whole layer.

Letters in shapes: T tokens, H hidden width, I expert intermediate width, E experts, K experts per token, V vocabulary.

Every matrix product here goes through polymoe's ops, projections of the model's width included: on a backend that
declares it, a token's output does not depend on the other tokens of its batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from polymoe import ops
from polymoe.hal.explain import Explanation, explain, register_module_hook
from polymoe.ops import _check as check_that
from polymoe.ops.activate import KINDS, check_kind
from polymoe.ops.experts import WEIGHT_PLACEMENTS
from polymoe.ops.gate import RENORMALIZE, SCORINGS
from polymoe.packing import Packable, PackedWeight, register_packable

__all__ = ["Experts", "Linear", "MoE", "Router", "SharedExpert"]


def _expect(condition: bool, where: str, argument: str, accepted: str, got: object) -> None:
    if not condition:
        check_that.fail(f"nn.{where}", argument, accepted, got)


def _uniform_by_fan_in(weight: Tensor, fan_in: int) -> None:
    """Uniform in +-1/sqrt(fan_in), as nn.Linear starts."""
    bound = 1.0 / math.sqrt(fan_in) if fan_in else 0.0
    nn.init.uniform_(weight, -bound, bound)


def _in_backward() -> bool:
    """Whether autograd calls: a checkpointed part of a model is being computed once more."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """x [T,H] @ weight [N,H]^T + bias [N] -> [T,N], as a grouped matmul of one group."""
    group_bias = None if bias is None else bias.unsqueeze(0)
    return ops.grouped_mm(x.unsqueeze(0), weight.t().unsqueeze(0), bias=group_bias, out_dtype=out_dtype).squeeze(0)


class Linear(nn.Linear):
    """nn.Linear for x [T, in_features] that multiplies with polymoe.grouped_mm, which is batch-invariant."""

    def forward(self, input: Tensor) -> Tensor:
        return _linear(input, self.weight, self.bias)


class Router(nn.Module):
    """Scores every expert for every token and picks K of them: a linear map, then `polymoe.gate`.

    The products are exact and summed in f32 whatever the weight's dtype (DeepSeek-V4 asks for it), the logits stay f32.

    Arguments, beside those that go to `polymoe.gate` as they are (scoring, renormalize, n_group, topk_group, group_top,
    eps, scale):
        hidden_size, num_experts, top_k: H, E, K. Identity experts count in E (see `MoE`).
        bias: a learned bias [E] on the logits (gpt-oss).
        selection_bias: a buffer [E] added for the selection only and not trained by gradients (DeepSeek's
            e_score_correction_bias; see `polymoe.update_bias`). It stays f32 when the module is cast to bf16 or f16.
        track_load: keep a buffer `load` [E] i64 of the slots that went to each expert in training, for
            `polymoe.training.balance`, which starts it anew. What checkpointing computes twice is counted once.
        vocab_size: V for hash routing (DeepSeek-V4's first layers): a frozen table `tid2eid` [V,K] i32 names the
            experts of each token id and only the weights are learned. Excludes selection_bias and groups.

    Parameters: weight [E,H]; bias [E]. Buffers: selection_bias [E] f32; tid2eid [V,K] i32; load, which is not saved.
    Raises ValueError for sizes that do not fit together.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    selection_bias: Tensor | None
    tid2eid: Tensor | None
    load: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        scoring: str = "softmax",
        renormalize: str | bool = "none",
        n_group: int = 1,
        topk_group: int = 1,
        group_top: int = 2,
        eps: float = 1e-20,
        scale: float = 1.0,
        bias: bool = False,
        selection_bias: bool = False,
        track_load: bool = False,
        vocab_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _expect(hidden_size >= 1, "Router", "hidden_size", "at least 1", hidden_size)
        _expect(num_experts >= 1, "Router", "num_experts", "at least 1", num_experts)
        _expect(1 <= top_k <= num_experts, "Router", "top_k", f"1 to {num_experts} (the number of experts)", top_k)
        check_that.choice("nn.Router", "scoring", scoring, SCORINGS)
        if not isinstance(renormalize, bool):
            check_that.choice("nn.Router", "renormalize", renormalize, RENORMALIZE)
        if vocab_size is not None:
            _expect(vocab_size >= 1, "Router", "vocab_size", "at least 1", vocab_size)
            _expect(not selection_bias, "Router", "selection_bias", "False with a vocab_size (hash routing)", True)
            _expect(n_group == 1, "Router", "n_group", "1 with a vocab_size (hash routing)", n_group)
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.scoring = scoring
        self.renormalize = renormalize
        self.n_group = n_group
        self.topk_group = topk_group
        self.group_top = group_top
        self.eps = eps
        self.scale = scale
        self.vocab_size = vocab_size
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, device=device, dtype=dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        )
        self.register_buffer(
            "selection_bias",
            torch.empty(num_experts, device=device, dtype=torch.float32) if selection_bias else None,
        )
        counts = torch.zeros(num_experts, device=device, dtype=torch.int64) if track_load else None
        self.register_buffer("load", counts, persistent=False)
        self.register_buffer(
            "tid2eid",
            None if vocab_size is None else torch.empty(vocab_size, top_k, device=device, dtype=torch.int32),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """weight uniform in +-1/sqrt(H), biases zero, tid2eid round robin (distinct experts for every token id)."""
        _uniform_by_fan_in(self.weight, self.hidden_size)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.selection_bias is not None:
            self.selection_bias.zero_()
        if self.load is not None:
            self.load.zero_()
        if self.tid2eid is not None:
            turn = torch.arange(self.tid2eid.numel(), device=self.tid2eid.device) % self.num_experts
            self.tid2eid.copy_(turn.view_as(self.tid2eid))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        # `module.bfloat16()` would round the selection bias, whose steps (1e-3 and less) vanish in bf16.
        before = self.selection_bias
        super()._apply(fn, recurse)
        after = self.selection_bias
        if before is not None and after is not None and after.dtype in (torch.bfloat16, torch.float16):
            self.selection_bias = before.to(after.device)
        return self

    def logits(self, x: Tensor) -> Tensor:
        """x [T,H] -> logits [T,E], f32 (f64 if x or the weight is f64)."""
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        out_dtype = torch.promote_types(dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(out_dtype)
        return _linear(x.to(dtype), self.weight.to(dtype), bias, out_dtype)

    def forward(
        self,
        x: Tensor,
        token_ids: Tensor | None = None,
        token_mask: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Routes T tokens.

        x: [T,H], any float dtype. token_ids: [T] integer, in [0, V): needed by hash routing, not looked at by a router
        without a table, so that a model can hand it to every layer. token_mask: [T] bool; False gives a row of ids -1
        and weights 0, whatever its token id. indices: [T,K] integer, experts chosen by the caller (replay of a
        rollout); only the weights are computed then.

        Returns (weights [T,K] f32, or f64 with f64 logits; ids [T,K] i32).
        Raises ValueError if hash routing lacks token_ids or a shape does not fit.
        """
        given = indices is not None
        if self.tid2eid is not None and indices is None:
            indices = self._hashed(x, token_ids, token_mask)
        chosen = indices is not None
        weights, ids = ops.gate(
            self.logits(x),
            self.top_k,
            scoring=self.scoring,
            bias=None if chosen else self.selection_bias,
            n_group=1 if given else self.n_group,
            topk_group=1 if given else self.topk_group,
            group_top=self.group_top,
            renormalize=self.renormalize,
            eps=self.eps,
            scale=self.scale,
            indices=indices,
            token_mask=token_mask,
        )
        if self.load is not None and self.training and not _in_backward():
            self.load += ops.expert_counts(ids, self.num_experts)
        return weights, ids

    def _hashed(self, x: Tensor, token_ids: Tensor | None, token_mask: Tensor | None) -> Tensor:
        """token_ids [T] -> the table's rows [T,K]."""
        assert self.tid2eid is not None
        if token_ids is None:
            check_that.fail("nn.Router", "token_ids", "token ids [T] for hash routing", None)
        check_that.shape("nn.Router", "token_ids", token_ids, {"T": x.shape[0]})
        if token_mask is not None:
            token_ids = token_ids.masked_fill(~token_mask, 0)  # masked tokens may carry any id, such as -100
        return self.tid2eid.index_select(0, token_ids)

    def extra_repr(self) -> str:
        parts = [f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}"]
        parts.append(f"scoring={self.scoring!r}, renormalize={self.renormalize!r}")
        if self.n_group != 1:
            parts.append(f"n_group={self.n_group}, topk_group={self.topk_group}, group_top={self.group_top}")
        if self.scale != 1.0:
            parts.append(f"scale={self.scale}")
        parts.append(f"bias={self.bias is not None}, selection_bias={self.selection_bias is not None}")
        if self.vocab_size is not None:
            parts.append(f"vocab_size={self.vocab_size}")
        return ", ".join(parts)


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
            _expect(size >= 1, "Experts", name, "at least 1", size)
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
        _uniform_by_fan_in(self.gate_up, self.hidden_size)
        _uniform_by_fan_in(self.down, self.intermediate_size)
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

    Modules built here take the device and dtype of experts.gate_up.
    Raises ValueError for sizes that do not fit together.
    """

    shared: SharedExpert | None
    latent_down: Linear | None
    latent_up: Linear | None

    def __init__(
        self,
        router: Router,
        experts: Experts,
        *,
        shared_intermediate_size: int | None = None,
        shared_activation: str | None = None,
        shared_limit: float | None = None,
        shared_gate: bool = False,
        identity_experts: int = 0,
        latent: bool = False,
    ) -> None:
        super().__init__()
        _expect(identity_experts >= 0, "MoE", "identity_experts", "at least 0", identity_experts)
        _expect(
            router.num_experts == experts.num_experts + identity_experts,
            "MoE",
            "router",
            f"num_experts {experts.num_experts} + {identity_experts} (experts and identity experts)",
            router.num_experts,
        )
        _expect(
            latent or router.hidden_size == experts.hidden_size,
            "MoE",
            "experts",
            f"hidden_size {router.hidden_size}, the router's (or latent=True)",
            experts.hidden_size,
        )
        _expect(
            shared_intermediate_size is not None or not (shared_activation or shared_limit or shared_gate),
            "MoE",
            "shared_intermediate_size",
            "a width with shared_activation, shared_limit or shared_gate",
            None,
        )
        self.router = router
        self.experts = experts
        self.identity_experts = identity_experts
        device, dtype = experts.gate_up.device, experts.gate_up.dtype
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
