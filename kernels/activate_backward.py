"""activate_backward: one program takes whole rows, since the gradient of a routing weight is a sum over its row."""

import torch
import triton
import triton.language as tl

from polymoe.kernels._launch import OPTIONS, cdiv, extent, index_type, tile
from polymoe.kernels._math import (
    _normal_tail,
    at_least,
    at_most,
    exp,
    gelu,
    gelu_tanh,
    product_with_sigmoid,
    scaled_silu,
    sigmoid,
    silu,
    tanh,
)
from polymoe.kernels.activate import UNGATED, activation, parameters

COLUMNS = 512  # at most, of a tile
ELEMENTS = 1024  # of a tile
WARPS = 4

SIGMOID_BOUND = tl.constexpr(174.0)  # beyond it a sigmoid is 0 or 1 whatever it is multiplied with here
INV_SQRT_2PI = tl.constexpr(0.3989423)
TANH_FACTOR = tl.constexpr(1.5957692)  # 2 sqrt(2 / pi)
TANH_CUBIC = tl.constexpr(0.071354814)  # 0.044715 times that


@triton.jit
def silu_slope(x, alpha):
    """Of x * sigmoid(alpha * x): s (1 + alpha x (1 - s)), whose 1 - s is sigmoid(-alpha x)."""
    y = at_most(at_least(x * alpha, -SIGMOID_BOUND), SIGMOID_BOUND)
    return sigmoid(y) * tl.fma(y, sigmoid(-y), 1.0)


@triton.jit
def gelu_slope(x):
    """Phi(x) + x phi(x)"""
    bounded = at_most(at_least(x, -15.0), 15.0)
    bell = exp(bounded * bounded * -0.5)
    tail = _normal_tail(tl.abs(bounded)) * bell
    return tl.fma(bounded, bell * INV_SQRT_2PI, tl.where(bounded < 0, tail, 1.0 - tail))


@triton.jit
def gelu_tanh_slope(x):
    """Of x * sigmoid(y), y = A x + B x^3: s (1 + x y' (1 - s))"""
    bounded = at_most(at_least(x, -12.0), 12.0)
    square = bounded * bounded
    y = bounded * tl.fma(square, TANH_CUBIC, TANH_FACTOR)
    slope = tl.fma(square, 3.0 * TANH_CUBIC, TANH_FACTOR)
    return sigmoid(y) * tl.fma(bounded * slope, sigmoid(-y), 1.0)


@triton.jit
def relu_slope(x):
    return tl.where(x > 0, 1.0, tl.where(x <= 0, 0.0, x))  # NaN stays


@triton.jit
def _not_above(x, limit):
    """1 where a clamp to `limit` from above does not act, else 0."""
    return tl.where(x > limit, 0.0, 1.0)


@triton.jit
def slopes(gate, up, alpha, limit, KIND: tl.constexpr):
    """The derivatives of activation(gate, up) with respect to both; of ungated kinds the second is none. Zero where a
    clamp acted, whole at its ends."""
    by_up = gate
    if KIND == "swiglu":
        by_gate = silu_slope(gate, 1.0) * up
        by_up = silu(gate)
    elif KIND == "geglu":
        by_gate = gelu_slope(gate) * up
        by_up = gelu(gate)
    elif KIND == "geglu_tanh":
        by_gate = gelu_tanh_slope(gate) * up
        by_up = gelu_tanh(gate)
    elif KIND == "reglu":
        by_gate = relu_slope(gate) * up
        by_up = at_least(gate, 0.0)
    elif KIND == "softcapped":
        t = tanh(tl.div_rn(gate, alpha))
        s = sigmoid(gate)
        v = tanh(tl.div_rn(up, limit))
        capped = tl.fma(t * alpha * s, sigmoid(-gate), tl.fma(-t, t, 1.0) * s)
        by_gate = capped * (v * limit)
        by_up = product_with_sigmoid(t * alpha, gate) * tl.fma(-v, v, 1.0)
    elif KIND == "swiglu_clamped" or KIND == "swiglu_oai" or KIND == "swiglu_clamped_after":
        right = at_least(at_most(up, limit), -limit)
        if KIND == "swiglu_oai":
            right += 1.0
        up_passes = _not_above(tl.abs(up), limit)
        if KIND == "swiglu_clamped_after":
            left = silu(gate)
            by_gate = silu_slope(gate, 1.0) * _not_above(left, limit) * right
            left = at_most(left, limit)
        else:
            bounded = at_most(gate, limit)
            passes = _not_above(gate, limit)
            if KIND == "swiglu_oai":
                by_gate = silu_slope(bounded, alpha) * passes * right
                left = scaled_silu(bounded, alpha)
            else:
                by_gate = silu_slope(bounded, 1.0) * passes * right
                left = silu(bounded)
        by_up = left * up_passes
    elif KIND == "silu":
        by_gate = silu_slope(gate, 1.0)
    elif KIND == "gelu":
        by_gate = gelu_slope(gate)
    elif KIND == "gelu_tanh":
        by_gate = gelu_tanh_slope(gate)
    elif KIND == "relu":
        by_gate = relu_slope(gate)
    else:
        tl.static_assert(KIND == "relu2")
        by_gate = at_least(gate, 0.0) * 2.0
    return by_gate, by_up


@triton.jit(do_not_specialize=["S"])
def _activate_backward(
    h,
    h_row,
    h_column,
    grad,
    grad_row,
    grad_column,
    d_h,
    d_weights,
    row_slot,
    weights,
    weights_token,
    weights_slot,
    S,
    I,
    K,
    alpha,
    limit,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS)
    in_rows = row < S
    used = in_rows
    weight = tl.full((ROWS,), 1.0, tl.float32)
    if row_slot is not None:
        slot = tl.load(row_slot + row, mask=in_rows, other=-1)
        used = slot >= 0
        if weights is not None:
            at = (slot // K).to(INDEX) * weights_token + (slot % K).to(INDEX) * weights_slot
            weight = tl.load(weights + at, mask=used, other=0.0).to(tl.float32)
    dots = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    step: tl.constexpr = 2 if GATED and INTERLEAVED else 1
    up_half = tl.cast(I, INDEX)
    if INTERLEAVED:
        up_half = tl.cast(1, INDEX)
    width = 2 * I if GATED else I
    for first in range(0, I, COLUMNS):
        column = (first + tl.arange(0, COLUMNS)).to(INDEX)
        stored = in_rows[:, None] & (column < I)[None, :]
        read = used[:, None] & (column < I)[None, :]
        place = h + row[:, None] * h_row + (column * step)[None, :] * h_column
        gate = tl.load(place, mask=read, other=0.0).to(tl.float32)
        up = gate
        if GATED:
            up = tl.load(place + up_half * h_column, mask=read, other=0.0).to(tl.float32)
        g = tl.load(grad + row[:, None] * grad_row + column[None, :] * grad_column, mask=read, other=0.0)
        g = g.to(tl.float32)
        if d_weights is not None:
            dots = tl.where(read, tl.fma(g, activation(gate, up, alpha, limit, KIND), dots), dots)
        by_gate, by_up = slopes(gate, up, alpha, limit, KIND)
        g *= weight[:, None]
        place = d_h + row[:, None] * width + (column * step)[None, :]
        result = tl.where(used[:, None], g * by_gate, 0.0)
        tl.store(place, result.to(d_h.dtype.element_ty), mask=stored)
        if GATED:
            result = tl.where(used[:, None], g * by_up, 0.0)
            tl.store(place + up_half, result.to(d_h.dtype.element_ty), mask=stored)
    if d_weights is not None:
        tl.store(d_weights + slot, tl.sum(dots, axis=1), mask=used)


def activate_backward(
    h: torch.Tensor,
    grad: torch.Tensor,
    kind: str,
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
    row_slot: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    need_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    S, I = grad.shape
    d_h = h.new_empty(h.shape)
    wanted = need_weights and weights is not None
    # Zeros for the slots that are skipped, which have no row.
    d_weights = h.new_zeros(weights.shape if wanted else (0,), dtype=torch.float32)  # type: ignore[union-attr]
    if d_h.numel() == 0:
        return d_h, d_weights
    rows, columns = tile(I, COLUMNS, ELEMENTS)
    _activate_backward[(cdiv(S, rows),)](
        h,
        h.stride(0),
        h.stride(1),
        grad,
        grad.stride(0),
        grad.stride(1),
        d_h,
        d_weights if wanted else None,
        None if row_slot is None else row_slot.contiguous(),
        weights,
        0 if weights is None else weights.stride(0),
        0 if weights is None else weights.stride(1),
        S,
        I,
        1 if weights is None else weights.shape[1],
        *parameters(kind, alpha, limit),
        KIND=kind,
        GATED=kind not in UNGATED,
        INTERLEAVED=interleaved,
        INDEX=index_type(extent(h, grad, d_h, weights)),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=WARPS,
        **OPTIONS,
    )
    return d_h, d_weights
