"""What polymoe is compared with: the same computations in plain torch, as Transformers runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.shapes import Shape


@dataclass(frozen=True)
class Layer:
    """The weights of one routed layer, in the layout of nn.Linear: gate_up [E, 2I, H], down [E, H, I]."""

    shape: Shape
    gate_up: Tensor
    down: Tensor


def gated(h: Tensor, shape: Shape) -> Tensor:
    """[S, 2I] -> [S, I]: the activation between the two matmuls."""
    gate, up = h.chunk(2, dim=-1)
    if shape.activation == "swiglu_clamped":
        assert shape.limit is not None
        gate, up = gate.clamp(max=shape.limit), up.clamp(-shape.limit, shape.limit)
    return F.silu(gate) * up


def eager(layer: Layer, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """One expert after the other: gather its tokens, two F.linear, add to the output."""
    out = torch.zeros_like(x)
    mask = F.one_hot(ids, num_classes=layer.shape.E).permute(2, 1, 0)  # [E, K, T]
    for e in mask.sum(dim=(-1, -2)).nonzero()[:, 0]:
        slot, token = torch.where(mask[e])
        a = gated(F.linear(x[token], layer.gate_up[e]), layer.shape)
        y = F.linear(a, layer.down[e]) * weights[token, slot, None]
        out.index_add_(0, token, y.to(x.dtype))
    return out


def grouped(layer: Layer, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """All experts at once: sort the slots by expert, two F.grouped_mm, undo the sort, sum over the slots."""
    T, K = ids.shape
    sorted_ids, slots = torch.sort(ids.reshape(-1))
    counts = torch.histc(sorted_ids.float(), bins=layer.shape.E, min=0, max=layer.shape.E - 1)
    offs = counts.cumsum(0, dtype=torch.int32)
    a = gated(F.grouped_mm(x[slots // K], layer.gate_up.mT, offs=offs), layer.shape)
    y = F.grouped_mm(a, layer.down.mT, offs=offs) * weights.reshape(-1)[slots, None]
    back = torch.empty_like(slots)
    back[slots] = torch.arange(T * K)
    return y[back].view(T, K, -1).sum(dim=1).to(x.dtype)


EXPERTS: dict[str, Callable[[Layer, Tensor, Tensor, Tensor], Tensor]] = {"eager": eager, "F.grouped_mm": grouped}
