"""Quantised operands as float64 numbers."""

from __future__ import annotations

import torch
from torch import Tensor

INT8_GROUPS = {"int8": 32, "int8_g128": 128}  # elements of a row that share a scale, by mode


def expert(data: Tensor, scale: Tensor, zero: Tensor | None, weight_format: str, D: int, g: int) -> Tensor:
    """The weight [N, D] of one group: code times scale, exactly."""
    from polymoe.formats import Weight, parse  # its checks import the ops, and these the backends

    zeros = None if zero is None else zero[g]
    weight = Weight(data[g], scale[g], zeros, weight_format, data.shape[1], D)
    return parse(weight_format).dequantize(weight, torch.float64)


def in_int8(rows: Tensor, group: int) -> Tensor:
    """The rows [..., D] as the int8 modes multiply them: every group has the float32 scale largest magnitude / 127, and
    an element becomes the integer nearest to element * (127 / largest), ties to even, times the scale. A group of zeros
    stays zero, and one that holds infinity or NaN becomes NaN."""
    D = rows.shape[-1]
    groups = torch.nn.functional.pad(rows.float(), (0, -D % group)).unflatten(-1, (-1, group))
    largest = groups.abs().amax(-1, keepdim=True)
    usable = largest.clamp(min=2.0**-119)  # 127 / it is finite
    most = usable.new_tensor(127)  # quotients of a number and a tensor may be products with a reciprocal: two roundings
    codes = (groups * (most / usable)).round()
    scale = (usable / most).where(largest.isfinite(), torch.nan)
    return (codes.double() * scale.double()).flatten(-2)[..., :D]


def in_fp8(rows: Tensor) -> Tensor:
    """The rows [..., D] as the mode "fp8" multiplies them: as polymoe.formats.Mxfp8 rounds them; a group that holds
    infinity or NaN becomes NaN."""
    from polymoe.formats import Mxfp8, Weight  # see `expert`

    rows = rows.float()
    finite = rows.isfinite()
    format, D = Mxfp8(), rows.shape[-1]
    encoded = format.encode(rows.where(finite, 0).reshape(-1, D))
    weight = Weight(*encoded, format.name, encoded[0].shape[0], D)
    spoilt = format.spread(format.largest((~finite).float().reshape(-1, D)), *weight.shape) > 0
    return format.dequantize(weight, torch.float64).masked_fill(spoilt, torch.nan).view(rows.shape)
