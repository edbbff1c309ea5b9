from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from polymoe.reference._arithmetic import arithmetic_dtype


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
    compute = arithmetic_dtype(h.dtype)
    z = h.to(compute)
    if kind in UNGATED:
        out = UNGATED[kind](z)
    else:
        gate, up = (z[:, 0::2], z[:, 1::2]) if interleaved else z.chunk(2, dim=1)
        out = _gated(gate, up, kind, alpha, limit)
    if row_slot is not None:
        if weights is not None:
            out = out * weights.flatten()[row_slot.clamp(min=0).long(), None].to(compute)
        out = out.where(row_slot[:, None] >= 0, 0)
    return out.to(out_dtype or h.dtype)


UNGATED: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda z: F.relu(z).square(),
}


def _gated(gate: Tensor, up: Tensor, kind: str, alpha: float | None, limit: float | None) -> Tensor:
    if kind == "swiglu":
        return F.silu(gate) * up
    if kind == "swiglu_clamped":
        assert limit is not None
        return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    if kind == "swiglu_clamped_after":
        assert limit is not None
        return F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)
    if kind == "swiglu_oai":
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid((1.702 if alpha is None else alpha) * gate) * (up + 1)
    if kind == "geglu":
        return F.gelu(gate) * up
    if kind == "geglu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    if kind == "reglu":
        return F.relu(gate) * up
    assert alpha is not None
    assert limit is not None
    return alpha * torch.tanh(gate / alpha) * torch.sigmoid(gate) * limit * torch.tanh(up / limit)
