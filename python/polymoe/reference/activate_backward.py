from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from polymoe.reference._arithmetic import arithmetic_dtype
from polymoe.reference.activate import UNGATED


def activate_backward(
    h: Tensor,
    grad: Tensor,
    kind: str,
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
    row_slot: Tensor | None = None,
    weights: Tensor | None = None,
    need_weights: bool = False,
) -> tuple[Tensor, Tensor]:
    compute = arithmetic_dtype(h.dtype)
    z, g = h.to(compute), grad.to(compute)
    if row_slot is not None:
        g = g.where(row_slot[:, None] >= 0, 0)
    weighted = g
    if weights is not None and row_slot is not None:
        weighted = g * weights.flatten()[row_slot.clamp(min=0).long(), None].to(compute)
    if kind in UNGATED:
        value, slope = _ungated(z, kind)
        d_h = weighted * slope
    else:
        gate, up = (z[:, 0::2], z[:, 1::2]) if interleaved else z.chunk(2, dim=1)
        (left, d_left), (right, d_right) = _factors(gate, up, kind, alpha, limit)
        value = left * right
        halves = [weighted * d_left * right, weighted * left * d_right]
        d_h = torch.stack(halves, dim=2).flatten(1) if interleaved else torch.cat(halves, dim=1)
    if row_slot is not None:  # whatever h holds in padding rows
        d_h = d_h.where(row_slot[:, None] >= 0, 0)
        value = value.where(row_slot[:, None] >= 0, 0)
    d_weights = h.new_empty(0, dtype=compute)
    if need_weights and weights is not None and row_slot is not None:
        slots = row_slot.long().where(row_slot >= 0, row_slot.shape[0])  # padding rows go to one more slot
        dots = (g * value).sum(dim=1)
        d_weights = dots.new_zeros(row_slot.shape[0] + 1).scatter(0, slots, dots)[:-1].view(weights.shape)
        d_weights = d_weights.contiguous()
    return d_h.to(h.dtype), d_weights


def _scaled_silu(z: Tensor, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(alpha * z)
    return z * s, s * (1 + alpha * z * torch.sigmoid(-alpha * z))


def _gelu(z: Tensor) -> tuple[Tensor, Tensor]:
    density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return F.gelu(z), 0.5 * torch.erfc(-z / math.sqrt(2)) + z * density


def _gelu_tanh(z: Tensor) -> tuple[Tensor, Tensor]:
    """z * sigmoid(y), y = 2 sqrt(2 / pi) (z + 0.044715 z^3)."""
    factor = 2 * math.sqrt(2 / math.pi)
    y = factor * (z + 0.044715 * z * z * z)
    s = torch.sigmoid(y)
    slope = factor * (1 + 3 * 0.044715 * z * z)
    return F.gelu(z, approximate="tanh"), s * (1 + z * slope * torch.sigmoid(-y))


def _relu(z: Tensor) -> tuple[Tensor, Tensor]:
    return F.relu(z), torch.where(z > 0, torch.ones_like(z), 0)


def _capped(z: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    t = torch.tanh(z / cap)
    return cap * t, 1 - t * t


def _ungated(z: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    if kind == "relu2":
        return F.relu(z).square(), 2 * F.relu(z)
    functions: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
        "silu": _scaled_silu,
        "gelu": _gelu,
        "gelu_tanh": _gelu_tanh,
        "relu": _relu,
    }
    return functions[kind](z)


def _clamped(z: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The gradient is zero where the clamp acted, and whole at its ends."""
    return z.clamp(low, high), torch.where((z < low) | (z > high), 0, torch.ones_like(z))


def _factors(
    gate: Tensor, up: Tensor, kind: str, alpha: float | None, limit: float | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The two factors of a gated activation, the left one of the gate and the right one of up, with derivatives."""
    plain = (up, torch.ones_like(up))
    if kind == "swiglu":
        return _scaled_silu(gate), plain
    if kind == "geglu":
        return _gelu(gate), plain
    if kind == "geglu_tanh":
        return _gelu_tanh(gate), plain
    if kind == "reglu":
        return _relu(gate), plain
    bound = math.inf if limit is None else limit
    if kind == "softcapped":
        assert alpha is not None
        capped, d_capped = _capped(gate, alpha)
        s = torch.sigmoid(gate)
        return (capped * s, d_capped * s + capped * s * torch.sigmoid(-gate)), _capped(up, bound)
    right, d_right = _clamped(up, -bound, bound)
    if kind == "swiglu_clamped_after":
        value, slope = _scaled_silu(gate)
        left, passes = _clamped(value, -math.inf, bound)
        return (left, slope * passes), (right, d_right)
    z, passes = _clamped(gate, -math.inf, bound)
    factor = (1.702 if alpha is None else alpha) if kind == "swiglu_oai" else 1.0
    left, slope = _scaled_silu(z, factor)
    return (left, slope * passes), (right + 1 if kind == "swiglu_oai" else right, d_right)
