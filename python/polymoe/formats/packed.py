"""Dense weights, prepacked: the same elements in the order in which the CPU kernels read them."""

from __future__ import annotations

import torch
from torch import Tensor

from polymoe.ops import pack_weight as _ops  # noqa: F401  defines the ops


def pack_(weight: Tensor, *, gate_up: bool = False, interleaved: bool = False, transposed: bool = False) -> Tensor:
    """Repacks an expert weight in place, for `weight_format="packed"` of polymoe.experts and polymoe.grouped_mm.

    Shape, dtype and byte count stay; the elements are permuted, so nothing but polymoe can read the tensor until
    `unpack_` is called with the same options. It takes the memory of one expert besides. The layout is that of
    polymoe.reference.pack_weight, on every instruction set level.

    Args:
        weight: [E, N, D], or [E, D, N] if `transposed`; contiguous; float32, bfloat16, float16 or float64; on any
            device. It must not require grad.
        gate_up: the N rows are a gate and an up half; needed for gate_up of polymoe.experts.
        interleaved: gate and up rows alternate. Packed, they no longer do.
        transposed: as in polymoe.experts.

    Returns:
        `weight`.

    Raises:
        ValueError: any other shape, dtype or option, or a weight that requires grad.
    """
    return _convert("pack_weight_", weight, gate_up, interleaved, transposed)


def unpack_(weight: Tensor, *, gate_up: bool = False, interleaved: bool = False, transposed: bool = False) -> Tensor:
    """Undoes `pack_` with the same options."""
    return _convert("unpack_weight_", weight, gate_up, interleaved, transposed)


def _convert(op: str, weight: Tensor, gate_up: bool, interleaved: bool, transposed: bool) -> Tensor:
    if weight.requires_grad:
        raise ValueError(f"polymoe.{op}: weight: expected a tensor that does not require grad, got one that does")
    getattr(torch.ops.polymoe, op)(weight, gate_up, interleaved, transposed)
    return weight
