from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polymoe.hal.problem import GRADIENT_OPS
from polymoe.hal.select import select
from polymoe.ops import _check as check_that
from polymoe.ops._library import Gradient, define_op, public
from polymoe.ops.plan import Plan, check_plan
from polymoe.reference._arithmetic import arithmetic_dtype


class Kind(NamedTuple):
    """gated: h holds a gate and an up half. alpha, limit: "none", "optional" or "required"."""

    gated: bool
    alpha: str = "none"
    limit: str = "none"


KINDS: dict[str, Kind] = {
    "swiglu": Kind(gated=True),
    "swiglu_clamped": Kind(gated=True, limit="required"),
    "swiglu_clamped_after": Kind(gated=True, limit="required"),
    "swiglu_oai": Kind(gated=True, alpha="optional", limit="optional"),
    "geglu": Kind(gated=True),
    "geglu_tanh": Kind(gated=True),
    "reglu": Kind(gated=True),
    "softcapped": Kind(gated=True, alpha="required", limit="required"),
    "silu": Kind(gated=False),
    "gelu": Kind(gated=False),
    "gelu_tanh": Kind(gated=False),
    "relu": Kind(gated=False),
    "relu2": Kind(gated=False),
}


def check_kind(op: str, argument: str, kind: str, alpha: float | None, limit: float | None, interleaved: bool) -> None:
    check_that.choice(op, argument, kind, tuple(KINDS))
    accepts = KINDS[kind]
    for name, value, use in (("alpha", alpha, accepts.alpha), ("limit", limit, accepts.limit)):
        if value is None:
            if use == "required":
                check_that.fail(op, name, f"a number for {kind}", None)
        elif use == "none":
            check_that.fail(op, name, f"nothing for {kind}", value)
        elif not 0 < value < math.inf:
            check_that.fail(op, name, "a positive finite number", value)
    if interleaved and not accepts.gated:
        check_that.fail(op, "interleaved", f"False for {kind}, which has no gate", True)


def check(
    h: Tensor,
    kind: str,
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
    row_slot: Tensor | None = None,
    weights: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> None:
    op = "activate"
    check_that.dtype(op, "h", h, check_that.FLOATS)
    check_kind(op, "kind", kind, alpha, limit, interleaved)
    check_that.shape(op, "h", h, {"S": None, "2I" if KINDS[kind].gated else "I": None})
    if KINDS[kind].gated and h.shape[1] % 2 != 0:
        check_that.fail(op, "h", f"an even number of columns for {kind}", check_that.describe(h))
    out_dtype = check_that.output_dtype(op, out_dtype, h.dtype)
    if row_slot is not None:
        check_that.dtype(op, "row_slot", row_slot, check_that.INT32)
        check_that.shape(op, "row_slot", row_slot, {"S": h.shape[0]})
        check_that.device(op, "row_slot", row_slot, h)
    if weights is not None:
        if row_slot is None:
            check_that.fail(op, "weights", "nothing without a plan", check_that.describe(weights))
        check_that.dtype(op, "weights", weights, (torch.float32, h.dtype, out_dtype))
        check_that.shape(op, "weights", weights, {"T": None, "K": None})
        if weights.shape[0] * weights.shape[1] != h.shape[0]:
            check_that.fail(op, "weights", f"a tensor [T, K] of T*K = S = {h.shape[0]}", check_that.describe(weights))
        check_that.device(op, "weights", weights, h)


def fake(
    h: Tensor,
    kind: str,
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
    row_slot: Tensor | None = None,
    weights: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    S, columns = h.shape
    return h.new_empty((S, columns // 2 if KINDS[kind].gated else columns), dtype=out_dtype or h.dtype)


def check_backward(
    h: Tensor,
    grad: Tensor,
    kind: str,
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
    row_slot: Tensor | None = None,
    weights: Tensor | None = None,
    need_weights: bool = False,
) -> None:
    op = "activate_backward"
    check_that.dtype(op, "grad", grad, check_that.FLOATS)
    check(h, kind, alpha, limit, interleaved, row_slot, weights, grad.dtype)
    S, columns = h.shape
    check_that.shape(op, "grad", grad, {"S": S, "I": columns // 2 if KINDS[kind].gated else columns})
    check_that.device(op, "grad", grad, h)
    if need_weights and weights is None:
        check_that.fail(op, "need_weights", "False without weights", True)


def fake_backward(
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
    wide = arithmetic_dtype(h.dtype)
    d_weights = h.new_empty(weights.shape if need_weights and weights is not None else (0,), dtype=wide)
    return h.new_empty(h.shape), d_weights


# The gradients d_h of h's dtype and d_weights [T, K] float32 (float64 for float64), of size 0 unless asked for. The
# gradient of h is zero where a clamp acted (strictly) and in padding rows.
activate_backward = define_op(
    "activate_backward",
    "(Tensor h, Tensor grad, str kind, float? alpha=None, float? limit=None, bool interleaved=False, "
    'Tensor? row_slot=None, Tensor? weights=None, bool need_weights=False, *, str backend="") '
    "-> (Tensor d_h, Tensor d_weights)",
    check_backward,
    fake_backward,
    options={"kind": "swiglu"},
    specs=GRADIENT_OPS,
)


def setup(ctx: Any, args: Any, out: Tensor) -> None:
    ctx.save_for_backward(args.h, args.row_slot, args.weights)
    ctx.options = (args.kind, args.alpha, args.limit, args.interleaved)


def gradients(ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    h, row_slot, weights = ctx.saved_tensors
    need_weights = ctx.needs["weights"]
    d_h, d_weights = activate_backward(h, grad, *ctx.options, row_slot, weights, need_weights, backend=ctx.backend)
    return {"h": d_h} | ({"weights": d_weights.to(weights.dtype)} if need_weights else {})


_activate = define_op(
    "activate",
    "(Tensor h, str kind, float? alpha=None, float? limit=None, bool interleaved=False, Tensor? row_slot=None, "
    'Tensor? weights=None, ScalarType? out_dtype=None, *, str backend="") -> Tensor',
    check,
    fake,
    options={"kind": "swiglu"},
    gradient=Gradient(setup, gradients),
)


@public
def activate(
    h: Tensor,
    kind: str,
    alpha: float | None = None,
    limit: float | None = None,
    interleaved: bool = False,
    plan: Plan | None = None,
    weights: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Applies the activation between the two expert matmuls, and the routing weight where it belongs there.

    Args:
        h: [S, 2I] for the gated kinds: the gate g and the up half u side by side, or in turns if `interleaved` (g in
            the even columns); [S, I] for the others. float32, bfloat16, float16 or float64.
        kind: gated, with silu(z) = z * sigmoid(z):
            "swiglu": silu(g) * u (arXiv 2002.05202).
            "swiglu_clamped": swiglu of min(g, limit) and clamp(u, -limit, limit) (DeepSeek-V4).
            "swiglu_clamped_after": min(silu(g), limit) * clamp(u, -limit, limit) (Step3p7).
            "swiglu_oai": g * sigmoid(alpha * g) * (u + 1), g and u clamped as in swiglu_clamped if a limit is given;
                alpha is 1.702 by default (gpt-oss).
            "geglu": gelu(g) * u with the error function; "geglu_tanh": with its tanh approximation.
            "reglu": relu(g) * u.
            "softcapped": alpha * tanh(g / alpha) * sigmoid(g) * limit * tanh(u / limit) (Inkling2, SiTU).
            ungated: "silu", "gelu" (error function), "gelu_tanh", "relu", "relu2" (relu squared).
        alpha, limit: positive and finite; only for the kinds whose formula names them.
        plan: makes padding rows zero, whatever h holds there.
        weights: [T, K] float32, h's dtype or out_dtype: multiplies row r by the weight of its slot, before the rounding
            (routing weights on the activation, as in DeepSeek's own code). Needs the plan.
        out_dtype: dtype of the result, by default h's; float64 if and only if h is float64.

    Returns:
        [S, I]. Arithmetic is float32 (float64 for float64), products associate from left to right, and the result is
        rounded once. NaN propagates.

    Raises:
        ValueError: any other shape, dtype, device or option.
    """
    if plan is not None:
        check_plan("activate", plan)
    row_slot = None if plan is None else plan.row_slot
    chosen = select("activate", h, (kind,), backend)
    return _activate(h, kind, alpha, limit, interleaved, row_slot, weights, out_dtype, backend=chosen)
