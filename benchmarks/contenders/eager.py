"""The loop over experts that Transformers calls eager: the baseline."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.contenders.base import Plugin, Prepared, Problem
from benchmarks.layer import Layer, gated


class Eager(Plugin):
    name = "eager"
    devices = ("cpu", "cuda", "xpu")
    reads = True

    def declined(self, problem: Problem) -> str | None:
        return None

    def prepare(self, layer: Layer) -> Prepared:
        return Prepared(lambda inputs: eager(layer, *inputs))


def eager(layer: Layer, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """One expert after the other: gather its tokens, two F.linear, add to the output."""
    out = torch.zeros_like(x)
    mask = F.one_hot(ids, num_classes=layer.shape.E).permute(2, 1, 0)  # [E, K, T]
    for e in mask.sum(dim=(-1, -2)).nonzero()[:, 0]:
        slot, token = torch.where(mask[e])
        h = F.linear(x[token], layer.gate_up[e], None if layer.gate_up_bias is None else layer.gate_up_bias[e])
        y = F.linear(gated(h, layer.shape), layer.down[e], None if layer.down_bias is None else layer.down_bias[e])
        out.index_add_(0, token, (y * weights[token, slot, None]).to(x.dtype))
    return out
