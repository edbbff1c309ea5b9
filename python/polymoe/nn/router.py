"""The router: logits, and the choice of experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from polymoe import ops
from polymoe.nn.linear import expect, linear, uniform_by_fan_in
from polymoe.ops import _check as check_that
from polymoe.ops.gate import RENORMALIZE, SCORINGS, check_groups


def _in_backward() -> bool:
    """Whether autograd calls: a checkpointed part of a model is being computed once more."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


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
        expect(hidden_size >= 1, "Router", "hidden_size", "at least 1", hidden_size)
        expect(num_experts >= 1, "Router", "num_experts", "at least 1", num_experts)
        expect(1 <= top_k <= num_experts, "Router", "top_k", f"1 to {num_experts} (the number of experts)", top_k)
        check_that.choice("nn.Router", "scoring", scoring, SCORINGS)
        if not isinstance(renormalize, bool):
            check_that.choice("nn.Router", "renormalize", renormalize, RENORMALIZE)
        if vocab_size is not None:
            expect(vocab_size >= 1, "Router", "vocab_size", "at least 1", vocab_size)
            expect(not selection_bias, "Router", "selection_bias", "False with a vocab_size (hash routing)", True)
            expect(n_group == 1, "Router", "n_group", "1 with a vocab_size (hash routing)", n_group)
        check_groups("nn.Router", "top_k", top_k, num_experts, n_group, topk_group, group_top)
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
        uniform_by_fan_in(self.weight, self.hidden_size)
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
        check_that.dtype("nn.Router", "x", x, check_that.FLOATS)
        check_that.shape("nn.Router", "x", x, {"T": None, "H": self.hidden_size})
        dtype = torch.promote_types(x.dtype, self.weight.dtype)
        out_dtype = torch.promote_types(dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(out_dtype)
        return linear(x.to(dtype), self.weight.to(dtype), bias, out_dtype)

    def forward(
        self,
        x: Tensor,
        token_ids: Tensor | None = None,
        token_mask: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Routes T tokens.

        x: [T,H], any float dtype. token_ids: [T] i32 or i64, in [0, V): needed by hash routing, not looked at by a
        router without a table, so that a model can hand it to every layer. token_mask: [T] bool; False gives a row of
        ids -1 and weights 0, whatever its token id. indices: [T,K] i32 or i64, experts chosen by the caller (replay of
        a rollout); only the weights are computed then.

        Returns (weights [T,K] f32, or f64 with f64 logits; ids [T,K] i32).
        Raises ValueError if hash routing lacks token_ids, or a shape or dtype does not fit.
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
        check_that.dtype("nn.Router", "token_ids", token_ids, check_that.IDS)
        check_that.shape("nn.Router", "token_ids", token_ids, {"T": x.shape[0]})
        if token_mask is not None:
            check_that.dtype("nn.Router", "token_mask", token_mask, (torch.bool,))
            check_that.shape("nn.Router", "token_mask", token_mask, {"T": x.shape[0]})
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
