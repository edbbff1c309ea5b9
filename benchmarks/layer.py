"""One routed layer: its weights, its inputs, and what it computes in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import bounds, inputs
from benchmarks.models import Shape

OAI_ALPHA = 1.702  # gpt-oss's slope of the sigmoid

InputSet = tuple[Tensor, Tensor, Tensor]  # x [T, H]; weights [T, K]; ids [T, K] int64


@dataclass(frozen=True)
class Layer:
    """The weights in the layout of nn.Linear: gate_up [E, 2I, H], down [E, H, I], and biases [E, 2I] and [E, H]."""

    shape: Shape
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None


def make_layer(shape: Shape, dtype: torch.dtype, source: torch.Generator) -> Layer:
    E, H, I = shape.E, shape.H, shape.I
    biases = [inputs.normal((E, width), dtype, source, scale=0.1) if shape.bias else None for width in (2 * I, H)]
    return Layer(
        shape,
        inputs.weight((E, 2 * I, H), dtype, source),
        inputs.weight((E, H, I), dtype, source),
        *biases,
    )


def make_set(shape: Shape, T: int, dtype: torch.dtype, source: torch.Generator) -> InputSet:
    return inputs.normal((T, shape.H), dtype, source), *inputs.routing(T, shape.E, shape.K, dtype, source)


def make_sets(
    shape: Shape, T: int, dtype: torch.dtype, source: torch.Generator, nbytes: float
) -> tuple[list[InputSet], bool]:
    """Input sets that take turns, and whether no two hit the same expert: then there are so many that what they read of
    weights, `nbytes` all in all, comes from memory in every call, as in a model of many layers."""
    most = shape.E // (T * shape.K)
    for count in range(inputs.SETS, most + 1):
        if bounds.streams(nbytes * count * T * shape.K / shape.E):
            routes = inputs.routing_apart(T, shape.E, shape.K, dtype, source, count)
            return [(inputs.normal((T, shape.H), dtype, source), *route) for route in routes], True
    return [make_set(shape, T, dtype, source) for _ in range(inputs.SETS)], False


def gated(h: Tensor, shape: Shape) -> Tensor:
    """[S, 2I] -> [S, I]: the activation between the two matmuls."""
    gate, up = (h[..., ::2], h[..., 1::2]) if shape.interleaved else h.chunk(2, dim=-1)
    if shape.limit is not None:
        gate, up = gate.clamp(max=shape.limit), up.clamp(-shape.limit, shape.limit)
    if shape.activation == "swiglu_oai":
        return (up + 1) * (gate * torch.sigmoid(gate * OAI_ALPHA))
    return F.silu(gate) * up


def exact(layer: Layer, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """[T, H] in float64, one expert at a time."""
    out = x.new_zeros(x.shape, dtype=torch.float64)
    for e in ids.unique().tolist():
        token, slot = (ids == e).nonzero(as_tuple=True)
        h = x[token].double() @ layer.gate_up[e].double().mT
        if layer.gate_up_bias is not None:
            h += layer.gate_up_bias[e].double()
        y = gated(h, layer.shape) @ layer.down[e].double().mT
        if layer.down_bias is not None:
            y += layer.down_bias[e].double()
        out.index_add_(0, token, y * weights[token, slot, None].double())
    return out
