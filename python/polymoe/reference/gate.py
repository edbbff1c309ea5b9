from __future__ import annotations

import torch
from torch import Tensor

from polymoe.reference._arithmetic import arithmetic_dtype

NEVER = float("-inf")


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
    z = logits.to(arithmetic_dtype(logits.dtype))  # [T, E]
    usable = z > NEVER  # false for NaN
    if bias is not None:
        usable = usable & (bias > NEVER)
    if token_mask is not None:
        usable = usable & token_mask[:, None]
    z = z.clamp(max=torch.finfo(z.dtype).max).where(usable, 0)

    score = _score(z, usable, scoring)
    if indices is None:
        choice = score if bias is None else score + bias.to(z.dtype)
        choice = choice.masked_fill(~usable, NEVER)
        if n_group > 1:
            choice = _keep_best_groups(choice, n_group, topk_group, group_top)
        ids = choice.argsort(dim=-1, descending=True, stable=True)[:, :k]
        usable = choice > NEVER
    else:
        ids = indices.long()
    known = (ids >= 0) & (ids < logits.shape[1])
    taken = known & usable.gather(1, ids.where(known, 0))
    ids = ids.where(taken, 0)  # any expert will do for the slots that are blanked below

    weights = score.gather(1, ids)
    if scoring == "softmax_topk":
        weights = weights.masked_fill(~taken, NEVER).softmax(dim=-1)
    weights = weights.where(taken, 0)
    if renormalize != "none":
        total = _sum_in_order(weights)[:, None]
        weights = weights / (total.clamp(min=eps) if renormalize == "max" else total + eps)
    weights = (weights * scale).where(taken, 0)
    return weights, ids.where(taken, -1).int()


def _score(z: Tensor, usable: Tensor, scoring: str) -> Tensor:
    if scoring == "softmax":
        return z.masked_fill(~usable, NEVER).softmax(dim=-1).where(usable, 0)
    if scoring == "softmax_topk":
        return z
    if scoring == "sigmoid":
        return z.sigmoid()
    root = torch.logaddexp(z, torch.zeros_like(z)).sqrt()  # log(1 + exp(z)) without overflow
    return root.where(z > -40, (z / 2).exp())  # where exp(z) would lose digits and then vanish, its root does not


def _keep_best_groups(choice: Tensor, n_group: int, topk_group: int, group_top: int) -> Tensor:
    groups = choice.unflatten(1, (n_group, -1))  # [T, n_group, E / n_group]
    best = groups.sort(dim=-1, descending=True).values[..., :group_top]
    counted = best > NEVER
    group_score = _sum_in_order(best.where(counted, 0)).masked_fill(~counted.any(dim=-1), NEVER)
    kept = group_score.argsort(dim=-1, descending=True, stable=True)[:, :topk_group]
    keep = torch.zeros_like(group_score, dtype=torch.bool).scatter(1, kept, True)
    return groups.masked_fill(~keep[..., None], NEVER).flatten(1)


def _sum_in_order(values: Tensor) -> Tensor:
    """Sums the last dimension from first to last; torch.sum promises no order."""
    total = torch.zeros_like(values[..., 0])
    for i in range(values.shape[-1]):
        total = total + values[..., i]
    return total
