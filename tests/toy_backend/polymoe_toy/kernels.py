"""The ops in NumPy. Arguments and defaults are those of polymoe's schemas, `backend` left out; polymoe has checked
shapes, dtypes and options before it calls. Letters: T tokens, K slots per token, S = T*K, E experts, H and I widths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]


def array(tensor: Tensor) -> Array:
    """The same memory where it holds what NumPy knows: routing weights may also come in the dtype of the result."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor).numpy()


def tensor(values: Array, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor that owns its memory: an op must not return its argument."""
    result = torch.from_numpy(np.ascontiguousarray(values))
    return result if dtype is None else result.to(dtype)


def plan(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """A counting sort: how many slots every expert has says where its rows begin."""
    expert = array(ids).ravel()
    slots = np.flatnonzero((expert >= 0) & (expert < num_experts))
    offsets = np.zeros(num_experts + 1, np.int32)
    np.cumsum(np.bincount(expert[slots], minlength=num_experts), out=offsets[1:])
    row_slot, slot_row = np.full((2, expert.size), -1, np.int32)
    row_slot[: slots.size] = slots[np.argsort(expert[slots], kind="stable")]
    slot_row[row_slot[: slots.size]] = np.arange(slots.size)
    return tensor(offsets), tensor(row_slot), tensor(slot_row.reshape(ids.shape))


def dispatch(x: Tensor, row_slot: Tensor, slot_row: Tensor, weights: Tensor | None = None) -> Tensor:
    used = np.flatnonzero(array(row_slot) >= 0)
    slots = array(row_slot)[used]
    rows = np.zeros((row_slot.shape[0], x.shape[1]), np.float32)
    if used.size:
        rows[used] = array(x)[slots // slot_row.shape[1]]
        if weights is not None:
            rows[used] *= array(weights).ravel()[slots, None]
    return tensor(rows)


def _matmul(a: Array, b: Array) -> Array:
    """One step along the reduction after the other, for all outputs at once."""
    out = np.zeros((a.shape[0], b.shape[1]), np.float32)
    for d in range(a.shape[1]):
        out += a[:, d, None] * b[d]
    return out


def grouped_mm(
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Four forms: 3 dimensions mean one matrix per group; a dimension that groups share is cut into a part for each."""
    left, right = array(a), array(b)
    added = None if bias is None else array(bias)
    if offs is None:
        groups = [slice(None)] * a.shape[0]
    else:
        ends = array(offs).tolist()
        groups = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    stacked = a.dim() == b.dim()  # one matrix per group comes out, else one matrix in parts
    out = np.zeros((*[len(groups)] * stacked, a.shape[-2], b.shape[-1]), np.float32)
    for g, cut in enumerate(groups):
        left_g = left[g] if a.dim() == 3 else left[:, cut] if b.dim() == 2 else left[cut]
        right_g = right[g] if b.dim() == 3 else right[cut] if a.dim() == 2 else right[:, cut]
        product = _matmul(left_g, right_g)
        if added is not None:
            product += added[cut] if added.ndim == 1 else added[g]
        out[g if stacked else (slice(None), cut) if a.dim() == 3 else cut] = product
    return tensor(out, out_dtype)


def _sigmoid(z: Array) -> Array:
    power = np.exp(-np.abs(z))
    return np.where(z >= 0, np.float32(1), power) / (1 + power)


def _clamped(g: Array, u: Array, limit: float) -> Array:
    g, u = np.minimum(g, np.float32(limit)), np.clip(u, np.float32(-limit), np.float32(limit))
    return g * _sigmoid(g) * u


# kind -> f(gate half, up half, limit); ungated kinds are not served
ACTIVATIONS: dict[str, Callable[[Array, Array, Any], Array]] = {
    "swiglu": lambda g, u, limit: g * _sigmoid(g) * u,
    "swiglu_clamped": _clamped,
    "reglu": lambda g, u, limit: np.maximum(g, 0) * u,
}


def activate(
    h: Tensor,
    kind: str,
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
    row_slot: Tensor | None = None,
    weights: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    z, I = array(h), h.shape[1] // 2
    gate, up = (z[:, 0::2], z[:, 1::2]) if interleaved else (z[:, :I], z[:, I:])
    out = np.zeros(gate.shape, np.float32)
    used = slice(None) if row_slot is None else np.flatnonzero(array(row_slot) >= 0)  # padding rows may hold anything
    out[used] = ACTIVATIONS[kind](gate[used], up[used], limit)
    if row_slot is not None and weights is not None:
        out[used] *= array(weights).ravel()[array(row_slot)[used], None]
    return tensor(out, out_dtype)


def combine(y: Tensor, slot_row: Tensor, weights: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    T, K = slot_row.shape
    total = np.zeros((T, y.shape[1]), np.float32)
    for k in range(K):
        row = array(slot_row)[:, k]
        token = np.flatnonzero(row >= 0)
        term = array(y)[row[token]]
        total[token] += term if weights is None else term * array(weights)[token, k, None]
    return tensor(total, out_dtype)


def _softmax(z: Array, usable: Array) -> Array:
    lowest = np.finfo(np.float32).min
    top = np.where(usable, z, lowest).max(axis=1, keepdims=True, initial=lowest)
    with np.errstate(over="ignore"):  # a difference that overflows is a power of zero
        power = np.where(usable, np.exp(np.where(usable, z, top) - top), 0)
    return power / np.maximum(_sum(power), np.finfo(np.float32).tiny)


def _sum(values: Array) -> Array:
    """Of every row, from left to right."""
    return np.cumsum(values, axis=1)[:, -1:]


# scoring -> f(logits, which of them are usable)
SCORES: dict[str, Callable[[Array, Array], Array]] = {
    "softmax": _softmax,
    "sigmoid": lambda z, usable: _sigmoid(z),
}


def _without_lesser_groups(choice: Array, n_group: int, topk_group: int, group_top: int) -> Array:
    groups = choice.reshape(choice.shape[0], n_group, -1)
    best = np.sort(groups, axis=2)[:, :, : -group_top - 1 : -1]
    score = np.where(best > -np.inf, best, 0).cumsum(axis=2)[:, :, -1]
    score[best[:, :, 0] == -np.inf] = -np.inf
    kept = np.argsort(-score, axis=1, kind="stable")[:, :topk_group]
    lesser = np.ones(score.shape, bool)
    np.put_along_axis(lesser, kept, False, axis=1)
    return np.where(lesser[:, :, None], -np.inf, groups).reshape(choice.shape)


def gate(
    logits: Tensor,
    k: int,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_top: int = 2,
    renormalize: str = "none",
    eps: float = 1e-20,
    scale: float = 1.0,
    indices: Tensor | None = None,
    token_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    z = np.minimum(array(logits), np.finfo(np.float32).max)
    usable = z > -np.inf  # false for NaN
    if bias is not None:
        usable = usable & (array(bias) > -np.inf)
    if token_mask is not None:
        usable = usable & array(token_mask)[:, None]
    z = np.where(usable, z, 0)
    score = SCORES[scoring](z, usable)
    if indices is None:
        choice = np.where(usable, score if bias is None else score + array(bias), -np.inf)
        if n_group > 1:
            choice = _without_lesser_groups(choice, n_group, topk_group, group_top)
        ids = np.argsort(-choice, axis=1, kind="stable")[:, :k]  # stable: of equals the smaller index comes first
        usable = choice > -np.inf
    else:
        ids = array(indices).astype(np.int64)
    known = (ids >= 0) & (ids < z.shape[1])
    ids = np.where(known, ids, 0)
    taken = known & np.take_along_axis(usable, ids, axis=1)
    weights = np.where(taken, np.take_along_axis(score, ids, axis=1), 0).astype(np.float32)
    if renormalize != "none":
        total = _sum(weights)
        weights /= np.maximum(total, np.float32(eps)) if renormalize == "max" else total + np.float32(eps)
    return tensor(weights * np.float32(scale)), tensor(np.where(taken, ids, -1).astype(np.int32))


def experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor,
    activation: str = "swiglu",
    alpha: float | None = None,
    limit: float | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    transposed: bool = False,
    interleaved: bool = False,
    weight_placement: str = "output",
    save: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The other ops in a row: a backend that has no fused kernel yet serves whole models by it."""
    weights_at = {weight_placement: weights}
    if not transposed:
        gate_up, down = gate_up.mT, down.mT
    offsets, row_slot, slot_row = plan(ids, gate_up.shape[0])
    rows = dispatch(x, row_slot, slot_row, weights_at.get("input"))
    h = grouped_mm(rows, gate_up, offsets[1:], gate_up_bias)
    a = activate(h, activation, alpha, limit, interleaved, row_slot, weights_at.get("activation"))
    y = grouped_mm(a, down, offsets[1:], down_bias)
    out = combine(y, slot_row, weights_at.get("output"))
    if save:  # for a backward: what it needs, of fixed shapes
        return out, h, offsets, row_slot, slot_row
    none = [ids.new_empty(0, dtype=torch.int32) for _ in range(3)]
    return out, x.new_empty(0), none[0], none[1], none[2]


OPS: dict[str, Callable[..., Any]] = {
    "gate": gate,
    "plan": plan,
    "dispatch": dispatch,
    "grouped_mm": grouped_mm,
    "activate": activate,
    "combine": combine,
    "experts": experts,
}
