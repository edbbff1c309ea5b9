"""gate: one program routes a few tokens. It scores all experts of a token, keeps the best groups, takes the best expert
k times, and weighs what it took.

A row of the tile holds the groups one after the other, each padded to a power of two, so that columns are in the order
of experts and a group is an axis after a reshape. The tile depends on E and n_group alone, never on T.
"""

import torch
import triton
import triton.language as tl

from polymoe.kernels._launch import OPTIONS, cdiv, extent, index_type, next_power_of_2
from polymoe.kernels._math import at_least, exp, sigmoid, sqrt_softplus

ELEMENTS = 2048  # of a tile, where a row is not longer
WARPS = 4

NEVER = tl.constexpr(float("-inf"))
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def _score(logit, top, total, SCORING: tl.constexpr):
    """`top` and `total` are the softmax's; the score of softmax_topk is the logit."""
    if SCORING == "softmax":
        score = tl.div_rn(exp(logit - top), total)
    elif SCORING == "sigmoid":
        score = sigmoid(logit)
    elif SCORING == "sqrtsoftplus":
        score = sqrt_softplus(logit)
    else:
        tl.static_assert(SCORING == "softmax_topk")
        score = logit
    return score


@triton.jit
def _softmax_sums(logit, usable):
    """What the softmax of each row subtracts, and what it divides by."""
    top = tl.max(tl.where(usable, logit, NEVER), axis=1)
    top = tl.where(top == NEVER, 0.0, top)  # no usable expert
    total = tl.sum(tl.where(usable, exp(logit - top[:, None]), 0.0), axis=1)
    return top, tl.where(total == 0, 1.0, total)


@triton.jit
def _usable(logit):
    """Which logits may be chosen, and these logits made finite, the others zero. Comparisons with NaN are false."""
    usable = logit > NEVER
    return usable, tl.where(usable, tl.where(logit > LARGEST, LARGEST, logit), 0.0)


@triton.jit
def _keep_best_groups(key, topk_group, group_top, TOKENS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Makes the keys of all but the best groups -infinity. key [TOKENS, GROUPS * WIDTH]"""
    keys = tl.reshape(key, (TOKENS, GROUPS, WIDTH))
    member = tl.arange(0, WIDTH)[None, None, :]
    left = keys
    score = tl.zeros((TOKENS, GROUPS), dtype=tl.float32)
    for _ in range(group_top):
        best, at = tl.max(left, axis=2, return_indices=True)
        score += tl.where(best == NEVER, 0.0, best)
        left = tl.where(member == at[:, :, None], NEVER, left)
    score = tl.where(tl.max(keys, axis=2) == NEVER, NEVER, score)

    # Sums may overflow to -infinity, so that a group which is kept needs a mark of its own.
    group = tl.arange(0, GROUPS)[None, :]
    kept = tl.zeros((TOKENS, GROUPS), dtype=tl.int1)
    for _ in range(topk_group):
        best = tl.max(tl.where(kept, NEVER, score), axis=1)
        first = tl.min(tl.where((score == best[:, None]) & ~kept, group, GROUPS), axis=1)
        kept = kept | (group == first[:, None])
    return tl.reshape(tl.where(kept[:, :, None], keys, NEVER), (TOKENS, GROUPS * WIDTH))


@triton.jit
def _select(key, k, group_size, WIDTH: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr):
    """The k best experts of each row in order, of equal keys the smaller; -1 where there are fewer."""
    column = tl.arange(0, key.shape[1])[None, :]
    slot = tl.arange(0, SLOTS)[None, :]
    chosen = tl.full((TOKENS, SLOTS), -1, dtype=tl.int32)
    for i in range(k):
        best, at = tl.max(key, axis=1, return_indices=True)  # of equal ones the leftmost
        expert = tl.where(best == NEVER, -1, at // WIDTH * group_size + at % WIDTH)
        chosen = tl.where(slot == i, expert[:, None], chosen)
        key = tl.where(column == at[:, None], NEVER, key)
    return chosen


@triton.jit
def _sum_in_order(weight, k, TOKENS: tl.constexpr, SLOTS: tl.constexpr):
    slot = tl.arange(0, SLOTS)[None, :]
    total = tl.zeros((TOKENS,), dtype=tl.float32)
    for i in range(k):
        total += tl.sum(tl.where(slot == i, weight, 0.0), axis=1)
    return total


@triton.jit(do_not_specialize=["T"])
def _gate(
    logits,
    logits_token,
    logits_expert,
    bias,
    bias_expert,
    indices,
    indices_token,
    indices_slot,
    token_mask,
    mask_token,
    weights,
    ids,
    T,
    E,
    k,
    group_size,
    topk_group,
    group_top,
    eps,
    scale,
    SCORING: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    N_GROUP: tl.constexpr,
    INDEX: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
):
    token = tl.program_id(0).to(INDEX) * TOKENS + tl.arange(0, TOKENS)
    active = token < T
    if token_mask is not None:
        active &= tl.load(token_mask + token * mask_token, mask=active, other=0) != 0
    row = logits + token[:, None] * logits_token

    top = tl.zeros((TOKENS,), dtype=tl.float32)
    total = top + 1.0
    if indices is None or SCORING == "softmax":
        column = tl.arange(0, GROUPS * WIDTH)
        expert = column // WIDTH * group_size + column % WIDTH
        exists = (column % WIDTH < group_size) & (column < N_GROUP * WIDTH)
        place = row + expert[None, :].to(INDEX) * logits_expert
        logit = tl.load(place, mask=active[:, None] & exists[None, :], other=NEVER)
        usable, logit = _usable(logit.to(tl.float32))
        if bias is not None:
            added = tl.load(bias + expert * bias_expert, mask=exists, other=0.0)[None, :]
            usable &= added > NEVER
        if SCORING == "softmax":
            top, total = _softmax_sums(logit, usable)
    if indices is None:
        key = _score(logit, top[:, None], total[:, None], SCORING)
        if bias is not None:
            key += added
        key = tl.where(usable, key, NEVER)
        if N_GROUP > 1:
            key = _keep_best_groups(key, topk_group, group_top, TOKENS, GROUPS, WIDTH)
        chosen = _select(key, k, group_size, WIDTH, TOKENS, SLOTS)

    slot = tl.arange(0, SLOTS)
    stored = active[:, None] & (slot < k)[None, :]
    if indices is not None:
        place = token[:, None] * indices_token + slot[None, :].to(INDEX) * indices_slot
        given = tl.load(indices + place, mask=stored, other=-1)
        chosen = tl.where((given >= 0) & (given < E), given, -1).to(tl.int32)
    # The logits of the chosen experts are read again, which is cheaper than to gather them from the tile.
    taken = chosen >= 0
    logit = tl.load(row + chosen.to(INDEX) * logits_expert, mask=taken & stored, other=NEVER)
    usable, logit = _usable(logit.to(tl.float32))
    taken &= usable
    if SCORING == "softmax_topk":
        top, total = _softmax_sums(logit, taken)
        weight = _score(logit, top[:, None], total[:, None], "softmax")
    else:
        weight = _score(logit, top[:, None], total[:, None], SCORING)
    weight = tl.where(taken, weight, 0.0)
    if RENORMALIZE == "max":
        weight = tl.div_rn(weight, at_least(_sum_in_order(weight, k, TOKENS, SLOTS), eps)[:, None])
    elif RENORMALIZE == "add":
        weight = tl.div_rn(weight, (_sum_in_order(weight, k, TOKENS, SLOTS) + eps)[:, None])
    weight = tl.where(taken, weight * scale, 0.0)

    place = token[:, None] * k + slot[None, :]
    stored = (token < T)[:, None] & (slot < k)[None, :]
    tl.store(weights + place, weight, mask=stored)
    tl.store(ids + place, tl.where(taken, chosen, -1), mask=stored)


def gate(
    logits: torch.Tensor,
    k: int,
    scoring: str = "softmax",
    bias: torch.Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_top: int = 2,
    renormalize: str = "none",
    eps: float = 1e-20,
    scale: float = 1.0,
    indices: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    T, E = logits.shape
    weights = logits.new_empty((T, k), dtype=torch.float32)
    ids = logits.new_empty((T, k), dtype=torch.int32)
    if T == 0:
        return weights, ids
    groups, width = next_power_of_2(n_group), next_power_of_2(E // n_group)
    tokens = max(ELEMENTS // (groups * width), 1)
    _gate[(cdiv(T, tokens),)](
        logits,
        logits.stride(0),
        logits.stride(1),
        bias,
        0 if bias is None else bias.stride(0),
        indices,
        0 if indices is None else indices.stride(0),
        0 if indices is None else indices.stride(1),
        token_mask,
        0 if token_mask is None else token_mask.stride(0),
        weights,
        ids,
        T,
        E,
        k,
        E // n_group,
        topk_group,
        group_top,
        eps,
        scale,
        SCORING=scoring,
        RENORMALIZE=renormalize,
        N_GROUP=n_group,
        INDEX=index_type(extent(logits, bias, indices, token_mask, weights)),
        TOKENS=tokens,
        GROUPS=groups,
        WIDTH=width,
        SLOTS=next_power_of_2(k),
        num_warps=WARPS,
        **OPTIONS,
    )
    return weights, ids
