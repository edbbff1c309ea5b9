"""The packed layout of dense weights: what `pack_weight_` and `unpack_weight_` mean.

A matrix [N, D] becomes N // 32 panels of 32 rows and one panel of the N % 32 rows left, one after the other, without
padding. A panel of c rows holds step after step of the reduction: `step` elements of its first row, the same of its
second, and so on; bfloat16 has steps of 2 elements, the other dtypes of 1. Where D is odd, the last element of each row
of a bfloat16 panel follows. The gate and up halves of `gate_up` are two such matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 32


def pack(weight: Tensor, gate_up: bool = False, interleaved: bool = False, transposed: bool = False) -> Tensor:
    """The packed copy of a plain weight, of the same shape."""
    order = _order(weight, gate_up, interleaved, transposed)
    return weight.reshape(weight.shape[0], -1)[:, order].reshape(weight.shape)


def unpack(weight: Tensor, gate_up: bool = False, interleaved: bool = False, transposed: bool = False) -> Tensor:
    """The plain copy of a packed weight, of the same shape."""
    order = _order(weight, gate_up, interleaved, transposed)
    plain = torch.empty_like(weight).reshape(weight.shape[0], -1)
    plain[:, order] = weight.reshape(weight.shape[0], -1)
    return plain.reshape(weight.shape)


def _order(weight: Tensor, gate_up: bool, interleaved: bool, transposed: bool) -> Tensor:
    """For each element of a packed expert, its place in the plain one."""
    step = 2 if weight.dtype == torch.bfloat16 else 1
    places = torch.arange(weight[0].numel(), device=weight.device).view(weight.shape[1:])
    if transposed:
        places = places.mT
    if not gate_up:
        halves = [places]
    elif interleaved:
        halves = [places[0::2], places[1::2]]
    else:
        halves = list(places.chunk(2))
    pieces = []
    for half in halves:
        whole = half.shape[1] // step * step
        for panel in half.split(PANEL):
            steps = panel[:, :whole].reshape(panel.shape[0], -1, step).transpose(0, 1)
            pieces += [steps.reshape(-1), panel[:, whole:].reshape(-1)]
    return torch.cat(pieces)
