"""torch.nn.functional.grouped_mm, with as little around it as plain torch allows."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.contenders.base import Plugin, Prepared, Problem
from benchmarks.layer import Layer, gated


class TorchGrouped(Plugin):
    name = "F.grouped_mm"
    devices = ("cpu", "cuda", "xpu")

    def declined(self, problem: Problem) -> str | None:
        return None if hasattr(F, "grouped_mm") else f"torch {torch.__version__} has no F.grouped_mm"

    def prepare(self, layer: Layer) -> Prepared:
        return Prepared(lambda inputs: grouped(layer, *inputs))


def grouped(layer: Layer, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """All experts at once: sort the slots by expert, two F.grouped_mm, undo the sort, sum over the slots."""
    T, K = ids.shape
    sorted_ids, slots = torch.sort(ids.reshape(-1))
    experts = torch.arange(layer.shape.E, device=ids.device)
    offs = torch.searchsorted(sorted_ids, experts, right=True, out_int32=True)
    h = F.grouped_mm(x[slots // K], layer.gate_up.mT, offs=offs)
    if layer.gate_up_bias is not None:
        h += layer.gate_up_bias[sorted_ids]
    y = F.grouped_mm(gated(h, layer.shape), layer.down.mT, offs=offs)
    if layer.down_bias is not None:
        y += layer.down_bias[sorted_ids]
    y *= weights.reshape(-1)[slots, None]
    back = torch.empty_like(slots)
    back[slots] = torch.arange(T * K, device=ids.device)
    return y[back].view(T, K, -1).sum(dim=1)
