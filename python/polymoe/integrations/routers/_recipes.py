"""Routers of Transformers' models in the terms of `polymoe.gate`: projection, settings, and what the tuple holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from polymoe import ops

RouterModule: TypeAlias = Any  # an nn.Module with the attributes of its family's routers
Routed: TypeAlias = tuple[Tensor, ...]
Projection: TypeAlias = Callable[[RouterModule, Tensor], Tensor]


# --- projections, in the model's own dtypes; each gives logits [T,E] -------------------------------------------------


def as_it_is(router: RouterModule, x: Tensor) -> Tensor:
    """x: [T,H]."""
    return F.linear(x, router.weight)


def flat(router: RouterModule, x: Tensor) -> Tensor:
    return F.linear(x.reshape(-1, router.hidden_dim), router.weight)


def flat_in_weight_dtype(router: RouterModule, x: Tensor) -> Tensor:
    return F.linear(x.reshape(-1, router.hidden_dim).to(router.weight.dtype), router.weight)


def in_float32(router: RouterModule, x: Tensor) -> Tensor:
    return F.linear(x.reshape(-1, x.shape[-1]).float(), router.weight.float())


def then_float32(router: RouterModule, x: Tensor) -> Tensor:
    """x: [T,H]."""
    return F.linear(x, router.weight).float()


def with_bias(router: RouterModule, x: Tensor) -> Tensor:
    """x: [T,H]."""
    return F.linear(x, router.weight, router.bias)


def with_bias_in_float32(router: RouterModule, x: Tensor) -> Tensor:
    """x: [T,H]."""
    return F.linear(x.float(), router.weight.float(), router.bias.float())


def multiplied(router: RouterModule, x: Tensor) -> Tensor:
    return in_float32(router, x) * router.output_multiplier


def softcapped(router: RouterModule, x: Tensor) -> Tensor:
    logits, cap = flat(router, x).float(), router.router_logit_softcapping
    return torch.tanh(logits / cap) * cap if cap > 0.0 else logits


def float32_hidden(router: RouterModule, x: Tensor) -> Tensor:
    return flat(router, x.float())


def by_gate_module(router: RouterModule, x: Tensor) -> Tensor:
    return router.gate(x.view(-1, x.shape[-1])).to(torch.float32)


def by_wg_module(router: RouterModule, x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1])
    return router.wg(x.float() if router.wg.weight.dtype == torch.float32 else x)


def by_normed_proj_module(router: RouterModule, x: Tensor) -> Tensor:
    """x: [T,H]."""
    return router.proj(router.norm(x) * router.scale * router.scalar_root_size)


# --- recipes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A router as one call of `polymoe.gate`. Names are those of attributes of the router, and may be paths.

    project      gives the logits
    scoring      of gate
    top_k        name
    bias         name; "" for none; "*" for an argument of forward
    groups       how many experts score a group (gate's group_top); 0 where there are no groups
    renormalize  name of a flag; or True or False
    eps          number, or name, of the renormalisation
    clamped      whether the sum is kept above eps, rather than increased by it
    scale        name; "" for 1; "1/k"
    hashed       whether the experts are `tid2eid[input_ids]`, input_ids being an argument of forward
    by_logit     whether logit + bias chooses the experts, and `scoring` only gives their weights
    weights      the dtype that the weights are returned in: "float32", or that of the "logits" or of the "input"
    rounds       whether the model rounds its scores to the dtype of the logits. Then only float32 gives equal results.
    weight       name of the projection's matrix [E,H]
    typed        whether the logits have its dtype; they are float32 otherwise
    batched      whether hidden states come as [B,T,H] only
    """

    project: Projection
    scoring: str
    top_k: str = "top_k"
    bias: str = ""
    groups: int = 0
    renormalize: str | bool = False
    eps: float | str = 0.0
    clamped: bool = False
    scale: str = ""
    hashed: bool = False
    by_logit: bool = False
    weights: str = "float32"
    rounds: bool = False
    weight: str = "weight"
    typed: bool = False
    batched: bool = False

    def why_not(self, router: RouterModule) -> str | None:
        """Why gate would not compute what this router, as it is set now, computes."""
        if self.typed:
            dtype = self.matrix(router).dtype
            if self.rounds and dtype != torch.float32:
                return f"it rounds its scores to {_name(dtype)}, which polymoe.gate keeps in float32"
            if dtype not in (torch.float32, torch.bfloat16, torch.float16):
                return f"its weights are {_name(dtype)}"
        if self.groups and router.num_group > 1:
            left, k = router.topk_group * (router.num_experts // router.num_group), _value(router, self.top_k)
            if left < k:
                return f"it chooses {k} experts of the {left} that its groups leave"
        return None

    def matrix(self, router: RouterModule) -> Tensor:
        found: Tensor = _value(router, self.weight)
        return found

    def settings(self, router: RouterModule) -> dict[str, Any]:
        """gate's arguments, but for the tensors."""
        found: dict[str, Any] = {"k": _value(router, self.top_k), "scoring": self.scoring}
        if self.groups and router.num_group > 1:
            found |= {"n_group": router.num_group, "topk_group": router.topk_group, "group_top": self.groups}
        if _value(router, self.renormalize):
            found |= {"renormalize": "max" if self.clamped else "add", "eps": _value(router, self.eps)}
        if self.scale:
            found["scale"] = 1.0 / found["k"] if self.scale == "1/k" else float(_value(router, self.scale))
        return found

    def describe(self, router: RouterModule) -> str:
        settings = self.settings(router)
        parts = [f"{self.scoring}, top {settings['k']}"]
        if self.hashed:
            parts.append("chosen by token id")
        if self.by_logit:
            parts.append("chosen by logit")
        if "n_group" in settings:
            parts.append("best {topk_group} of {n_group} groups by their top {group_top}".format_map(settings))
        if self.bias:
            parts.append("selection bias")
        if "renormalize" in settings:
            parts.append("renormalised")
        if settings.get("scale", 1.0) != 1.0:
            parts.append(f"times {settings['scale']:.4g}")
        return ", ".join(parts)

    def route(self, router: RouterModule, hidden_states: Tensor, *rest: Any) -> Routed:
        """What the router's own forward returns: logits [T,E], weights [T,K], ids [T,K] int64."""
        logits = self.project(router, hidden_states)
        settings = self.settings(router)
        if self.hashed:
            ids = router.tid2eid[rest[0].reshape(-1)].long()
            weights, _ = ops.gate(logits, **settings, indices=ids)
        elif self.by_logit:
            _, ids = ops.gate(logits, settings["k"], "softmax_topk", self._bias(router, rest))
            weights, _ = ops.gate(logits, **settings, indices=ids)
        else:
            weights, ids = ops.gate(logits, **settings, bias=self._bias(router, rest))
        dtype = {"float32": torch.float32, "logits": logits.dtype, "input": hidden_states.dtype}[self.weights]
        return logits, weights.to(dtype), ids.long()

    def _bias(self, router: RouterModule, rest: tuple[Any, ...]) -> Tensor | None:
        if not self.bias:
            return None
        bias: Tensor = rest[0] if self.bias == "*" else _value(router, self.bias)
        return bias.reshape(-1).float()


class Gemma(Recipe):
    """Scales the weights per expert, and returns probabilities in the place of logits."""

    def describe(self, router: RouterModule) -> str:
        return f"{super().describe(router)}, times a scale per expert"

    def route(self, router: RouterModule, hidden_states: Tensor, *rest: Any) -> Routed:
        scores, weights, ids = super().route(router, hidden_states, *rest)
        return F.softmax(scores, dim=-1, dtype=torch.float32), weights * router.per_expert_scale[ids], ids


class Inkling(Recipe):
    """Its last logits belong to shared experts, which always run: they take part in the renormalisation only."""

    def describe(self, router: RouterModule) -> str:
        return f"{super().describe(router)}, the shared experts being part of the sum"

    def route(self, router: RouterModule, hidden_states: Tensor, *rest: Any) -> Routed:
        logits, k = self.project(router, hidden_states), router.top_k
        routed = logits[:, : router.num_experts]
        _, ids = ops.gate(routed, k, self.scoring, self._bias(router, rest))
        shared = torch.arange(router.num_experts, logits.shape[1], dtype=ids.dtype, device=ids.device)
        everyone = torch.cat([ids, shared.expand(ids.shape[0], -1)], dim=1)
        settings = self.settings(router) | {"k": everyone.shape[1]}
        weights, _ = ops.gate(logits, **settings, indices=everyone)
        weights = (weights * router.global_scale.float()).to(hidden_states.dtype)
        return routed, weights[:, :k].contiguous(), ids.long(), weights[:, k:].contiguous()


def _value(router: RouterModule, what: Any) -> Any:
    """An attribute by its path; anything but a string is a value already."""
    return attrgetter(what)(router) if isinstance(what, str) else what


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
