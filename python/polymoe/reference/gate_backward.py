from __future__ import annotations

import torch
from torch import Tensor

from polymoe.reference._arithmetic import arithmetic_dtype
from polymoe.reference.gate import NEVER, _score, _sum_in_order


def gate_backward(
    logits: Tensor,
    grad: Tensor,
    ids: Tensor,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    renormalize: str = "none",
    eps: float = 1e-20,
    scale: float = 1.0,
) -> Tensor:
    compute = arithmetic_dtype(logits.dtype)
    z = logits.to(compute)  # [T, E]
    finite = z.abs() < torch.inf  # a bounded +inf has no slope
    usable = z > NEVER
    if bias is not None:
        usable = usable & (bias > NEVER)
    z = z.clamp(max=torch.finfo(compute).max).where(usable, 0)

    taken = ids >= 0
    chosen = ids.clamp(min=0).long()
    score = _score(z, usable, scoring)
    value = score.gather(1, chosen)  # [T, K]
    if scoring == "softmax_topk":
        value = value.masked_fill(~taken, NEVER).softmax(dim=-1)
    value = value.where(taken, 0)

    g = (grad.to(compute) * scale).where(taken, 0)
    if renormalize != "none":
        total = _sum_in_order(value)[:, None]
        divisor = total.clamp(min=eps) if renormalize == "max" else total + eps
        share = (g * value).sum(dim=1, keepdim=True) / divisor
        if renormalize == "max":
            share = share.where(total >= eps, 0)
        g = ((g - share) / divisor).where(taken, 0)

    if scoring == "softmax":
        inner = (g * value).sum(dim=1, keepdim=True)
        d_score = torch.zeros_like(z).scatter_add(1, chosen, g)
        return (score * (d_score - inner)).where(finite & taken.any(dim=1, keepdim=True), 0).to(logits.dtype)
    if scoring == "softmax_topk":
        g = value * (g - (g * value).sum(dim=1, keepdim=True))
    elif scoring == "sigmoid":
        g = g * value * torch.sigmoid(-z.gather(1, chosen))
    else:
        z_k = z.gather(1, chosen)
        slope = torch.sigmoid(z_k) / (2 * value)
        g = g * slope.where(z_k > -40, value / 2)
    d_logits = torch.zeros_like(z).scatter_add(1, chosen, g.where(taken, 0))
    return d_logits.where(finite, 0).to(logits.dtype)
