"""gate_backward: one program takes a few tokens. What comes to the chosen experts goes back through the normaliser,
then through the scores; a row of the tile is a row of the logits."""

import torch
import triton
import triton.language as tl

from polymoe.kernels._launch import OPTIONS, cdiv, extent, index_type, next_power_of_2
from polymoe.kernels._math import at_least, exp, sigmoid, sqrt_softplus
from polymoe.kernels.gate import LARGEST, NEVER, _softmax_sums, _sum_in_order

ELEMENTS = 1024  # of a tile, where a row is not longer
WARPS = 4


@triton.jit
def _bounded(logit, usable):
    """Logits as gate uses them: finite, and zero where they may not be chosen."""
    return tl.where(usable, tl.where(logit > LARGEST, LARGEST, logit), 0.0)


@triton.jit
def _softmax(logit, usable):
    top, total = _softmax_sums(logit, usable)
    return tl.div_rn(tl.where(usable, exp(logit - top[:, None]), 0.0), total[:, None])


@triton.jit
def _chosen_of(tile, expert, ids, k, TOKENS: tl.constexpr, SLOTS: tl.constexpr):
    """The numbers of a tile [TOKENS, columns] that belong to the chosen experts, [TOKENS, SLOTS]; 0 for no expert."""
    slot = tl.arange(0, SLOTS)[None, :]
    found = tl.zeros((TOKENS, SLOTS), dtype=tl.float32)
    for i in range(k):
        id = tl.sum(tl.where(slot == i, ids, 0), axis=1)
        one = tl.sum(tl.where(expert == id[:, None], tile, 0.0), axis=1)
        found = tl.where(slot == i, one[:, None], found)
    return found


@triton.jit
def _to_experts(g, expert, ids, k, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, SLOTS: tl.constexpr):
    """[TOKENS, COLUMNS]: what comes to every expert from the slots [TOKENS, SLOTS], in their order."""
    slot = tl.arange(0, SLOTS)[None, :]
    sums = tl.zeros((TOKENS, COLUMNS), dtype=tl.float32)
    for i in range(k):
        id = tl.sum(tl.where(slot == i, ids, 0), axis=1)
        term = tl.sum(tl.where(slot == i, g, 0.0), axis=1)
        sums += tl.where(expert == id[:, None], term[:, None], 0.0)
    return sums


@triton.jit(do_not_specialize=["T"])
def _gate_backward(
    logits,
    logits_token,
    logits_expert,
    grad,
    grad_token,
    grad_slot,
    ids,
    bias,
    bias_expert,
    out,
    T,
    E,
    k,
    eps,
    scale,
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    INDEX: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    token = tl.program_id(0).to(INDEX) * TOKENS + tl.arange(0, TOKENS)
    active = token < T
    slot = tl.arange(0, SLOTS)
    stored = active[:, None] & (slot < k)[None, :]
    chosen = tl.load(ids + token[:, None] * k + slot[None, :], mask=stored, other=-1)
    taken = chosen >= 0
    g = tl.load(grad + token[:, None] * grad_token + slot[None, :].to(INDEX) * grad_slot, mask=taken, other=0.0)
    g *= scale

    expert = tl.arange(0, COLUMNS)[None, :]
    exists = active[:, None] & (expert < E)
    place = token[:, None] * logits_token + expert.to(INDEX) * logits_expert
    raw = tl.load(logits + place, mask=exists, other=NEVER).to(tl.float32)
    usable = raw > NEVER
    if bias is not None:
        usable &= tl.load(bias + expert * bias_expert, mask=expert < E, other=0.0) > NEVER
    logit = _bounded(raw, usable)

    # The weights of the chosen experts before the normaliser.
    if SCORING == "softmax":
        score = _softmax(logit, usable)
        value = _chosen_of(score, expert, chosen, k, TOKENS, SLOTS)
    else:
        z = _chosen_of(logit, expert, chosen, k, TOKENS, SLOTS)
        if SCORING == "softmax_topk":
            value = _softmax(z, taken)
        elif SCORING == "sigmoid":
            value = sigmoid(z)
        else:
            tl.static_assert(SCORING == "sqrtsoftplus")
            value = sqrt_softplus(z)
    value = tl.where(taken, value, 0.0)

    if RENORMALIZE != "none":
        total = _sum_in_order(value, k, TOKENS, SLOTS)
        divisor = total + eps
        if RENORMALIZE == "max":
            divisor = at_least(total, eps)
        share = tl.div_rn(tl.sum(g * value, axis=1), divisor)
        if RENORMALIZE == "max":
            share = tl.where(total >= eps, share, 0.0)
        g = tl.where(taken, tl.div_rn(g - share[:, None], divisor[:, None]), 0.0)

    if SCORING == "softmax":
        inner = tl.sum(g * value, axis=1)
        result = score * (_to_experts(g, expert, chosen, k, TOKENS, COLUMNS, SLOTS) - inner[:, None])
        some = tl.max(chosen, axis=1) >= 0
        result = tl.where(some[:, None], result, 0.0)
    else:
        if SCORING == "softmax_topk":
            g = value * (g - tl.sum(g * value, axis=1)[:, None])
        elif SCORING == "sigmoid":
            g = g * value * sigmoid(-z)
        else:
            # Half of sigmoid(z) / value, which far below zero is half of the value itself.
            slope = tl.div_rn(sigmoid(z), tl.where(value > 0, value + value, 1.0))
            g = g * tl.where(z > -40.0, slope, value * 0.5)
        g = tl.where(taken, g, 0.0)
        result = _to_experts(g, expert, chosen, k, TOKENS, COLUMNS, SLOTS)
    result = tl.where(tl.abs(raw) < float("inf"), result, 0.0)  # a bounded +inf has no slope
    tl.store(out + token[:, None] * E + expert, result.to(out.dtype.element_ty), mask=exists)


def gate_backward(
    logits: torch.Tensor,
    grad: torch.Tensor,
    ids: torch.Tensor,
    scoring: str = "softmax",
    bias: torch.Tensor | None = None,
    renormalize: str = "none",
    eps: float = 1e-20,
    scale: float = 1.0,
) -> torch.Tensor:
    (T, E), k = logits.shape, ids.shape[1]
    out = logits.new_empty((T, E))
    if T == 0:
        return out
    columns = next_power_of_2(E)
    tokens = max(ELEMENTS // columns, 1)
    _gate_backward[(cdiv(T, tokens),)](
        logits,
        logits.stride(0),
        logits.stride(1),
        grad,
        grad.stride(0),
        grad.stride(1),
        ids.contiguous(),
        bias,
        0 if bias is None else bias.stride(0),
        out,
        T,
        E,
        k,
        eps,
        scale,
        SCORING=scoring,
        RENORMALIZE=renormalize,
        INDEX=index_type(extent(logits, grad, ids, bias, out)),
        TOKENS=tokens,
        COLUMNS=columns,
        SLOTS=next_power_of_2(k),
        num_warps=WARPS,
        **OPTIONS,
    )
    return out
