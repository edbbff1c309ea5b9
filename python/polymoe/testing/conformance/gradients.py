"""Checks of the ops that gradients are made of: activate_backward, row_dot, gate_backward. The truth is what autograd
makes of the formulas in float64, or, for gate, of the reference in float64, which finite differences vouch for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from polymoe import reference
from polymoe.ops import Plan
from polymoe.testing.cases import Random, laid_out, routing
from polymoe.testing.conformance import activate
from polymoe.testing.conformance import plan as plan_checks
from polymoe.testing.conformance._run import op_threads, serial
from polymoe.testing.poison import poisoned
from polymoe.testing.targets import Target
from polymoe.testing.tolerances import (
    FUNCTION_ERRORS,
    arithmetic_dtype,
    arithmetic_roundoff,
    assert_within,
    dot_error,
    rounding_error,
    smallest,
)

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64


def run(target: Target, op: str, *args: Any) -> Any:
    with torch.no_grad(), poisoned(), op_threads(target):
        return getattr(torch.ops.polymoe, op)(*args, backend=target.backend)


# --- activate_backward: the cases of activate, whose out_dtype is that of the gradient -------------------------------

ACTIVATE_CASES = [case for case in activate.CASES if case.layout != "expanded"]


def slope_errors(h: Tensor, case: activate.Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For float64 h: bounds of |left|, |right| and of the magnitudes that errors of their slopes are relative to, where
    the activation is left(gate) * right(up). The slopes of silu and gelu are sums of terms below 1.2, and an argument z
    of their exponential, which is off by |z| roundings, counts less than exp(-|z|) |z|^3 < 1.4."""
    g, u = (h, torch.ones_like(h)) if case.kind in activate.UNGATED else activate.halves(h, case.interleaved)
    slope = torch.full_like(g, 3.0)
    if case.kind == "relu2":
        return g * g, u, 2 * g.abs(), torch.ones_like(g)
    if case.kind == "softcapped":
        assert case.alpha is not None
        slope = slope * (1 + case.alpha)
    return g.abs(), u.abs() + 1, slope, torch.ones_like(g)


def kinks(h: Tensor, case: activate.Case) -> Tensor:
    """[S, I]: where rounding decides on which side of a kink an element lies."""
    g, _ = (h, h) if case.kind in activate.UNGATED else activate.halves(h, case.interleaved)
    if case.kind == "swiglu_clamped_after":
        assert case.limit is not None
        return (g * activate.sigmoid(g) - case.limit).abs() < 1e-5
    return (g == 0) if "relu" in case.kind or case.kind == "reglu" else torch.zeros_like(g, dtype=torch.bool)


@serial
def check_activate(case: activate.Case, target: Target, seed: int) -> None:
    random = Random(seed, target.device)
    plan: Plan | None = None
    if case.pattern:
        plan = plan_checks.truth(routing(random, case.pattern, case.T, case.K, case.E), case.E)
    S = case.T * case.K if plan else case.T
    h = activate.make_h(case, random, S)
    grad = random.normal(S, case.I, dtype=case.out_dtype or case.dtype)
    padding = torch.zeros(S, dtype=torch.bool, device=h.device) if plan is None else plan.row_slot < 0
    h[padding], grad[padding] = torch.nan, torch.nan
    h, grad = laid_out(h, case.layout), laid_out(grad, case.layout)
    weights = None if case.weights is None else laid_out(random.weights(case.T, case.K, case.weights), case.layout)
    options = (case.kind, case.alpha, case.limit, case.interleaved)
    row_slot = None if plan is None else plan.row_slot
    wanted = weights is not None
    d_h, d_weights = run(target, "activate_backward", h, grad, *options, row_slot, weights, wanted)
    assert d_h.dtype == h.dtype
    assert not d_h[padding].any(), "padding rows must be zero"

    exact = h.cpu().double().where(~padding.cpu()[:, None], 0).requires_grad_()
    g = grad.cpu().double().where(~padding.cpu()[:, None], 0)
    value = activate.truth(exact, case)
    w = torch.ones(S, 1, dtype=F64)
    if weights is not None and row_slot is not None:
        w = weights.cpu().double().flatten()[row_slot.clamp(min=0).long().cpu(), None]
    (truth,) = torch.autograd.grad(value, exact, g * w)

    u, tiny = FUNCTION_ERRORS * arithmetic_roundoff(case.dtype), smallest(arithmetic_dtype(case.dtype))
    left, right, d_left, d_right = slope_errors(exact.detach(), case)
    halves = [d_left * right, left * d_right][: 1 if case.kind in activate.UNGATED else 2]
    bounds = [((g * w).abs() * magnitude * u + tiny * 256).masked_fill(kinks(exact.detach(), case), torch.inf)
              for magnitude in halves]  # fmt: skip
    bound = torch.stack(bounds, dim=2).flatten(1) if case.interleaved else torch.cat(bounds, dim=1)
    assert_within(d_h.cpu(), truth, rounding_error(truth, case.dtype, bound), f"gradient of {case.kind}")
    if not wanted:
        assert d_weights.numel() == 0
        return
    assert plan is not None
    assert weights is not None
    assert d_weights.shape == weights.shape
    dots = (g * value.detach()).sum(dim=1)
    error = (g.abs() * left * right).sum(dim=1) * u + dot_error(
        (g * value.detach()).abs().sum(dim=1), case.I, case.dtype
    )
    slot = row_slot_or_nowhere(plan)
    by_slot = torch.zeros(2, S + 1, dtype=F64).scatter(1, slot.expand(2, -1), torch.stack([dots, error]))[:, :S]
    truth, error = by_slot.view(2, *weights.shape)
    assert_within(d_weights.cpu(), truth, error + S * tiny, "gradient of the weights")


def row_slot_or_nowhere(plan: Plan) -> Tensor:
    """The slots of the rows, padding rows in one more slot."""
    slots = plan.row_slot.long().cpu()
    return slots.where(slots >= 0, slots.shape[0])


# --- row_dot ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DotCase:
    T: int
    H: int
    K: int = 2
    pattern: str = "skipping"
    dtype: torch.dtype = F32
    rows_dtype: torch.dtype = F32
    layout: str = "contiguous"


DOT_CASES = [
    DotCase(T=0, H=8),
    DotCase(T=4, H=0),
    DotCase(T=7, H=1),
    *(DotCase(T=9, H=69, dtype=a, rows_dtype=b) for a in (F32, BF16, F16) for b in (F32, BF16, F16)),
    DotCase(T=9, H=67, dtype=F64, rows_dtype=F64),
    DotCase(T=60, H=4999, K=3, dtype=BF16),
    DotCase(T=9, H=67, layout="transposed", dtype=BF16),
    DotCase(T=9, H=67, layout="strided", rows_dtype=F16, pattern="all_skipped"),
    DotCase(T=9, H=67, layout="strided", rows_dtype=F16),
]


@serial
def check_row_dot(case: DotCase, target: Target, seed: int) -> None:
    random = Random(seed, target.device)
    plan = plan_checks.truth(routing(random, case.pattern, case.T, case.K, 8), 8)
    x = laid_out(random.normal(case.T, case.H, dtype=case.dtype), case.layout)
    rows = laid_out(random.normal(case.T * case.K, case.H, dtype=case.rows_dtype), case.layout)
    got = run(target, "row_dot", x, rows, plan.slot_row)
    assert got.dtype == arithmetic_dtype(case.dtype)
    slot_row = plan.slot_row.cpu().long()
    products = x.cpu().double()[:, None] * rows.cpu().double()[slot_row.clamp(min=0)]
    products = products.where(slot_row[..., None] >= 0, 0)
    magnitude = products.abs().sum(dim=2)
    assert_within(got.cpu(), products.sum(dim=2), dot_error(magnitude, case.H, case.dtype), "row_dot")
    assert not got.cpu()[slot_row < 0].any()


# --- gate_backward ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GateCase:
    T: int
    E: int
    k: int
    scoring: str = "softmax"
    renormalize: str = "none"
    bias: bool = False
    dtype: torch.dtype = F32
    layout: str = "contiguous"


GATE_CASES = [
    *(
        GateCase(T=17, E=19, k=3, scoring=scoring, renormalize=renormalize, bias=renormalize == "max", dtype=dtype)
        for scoring in ("softmax", "softmax_topk", "sigmoid", "sqrtsoftplus")
        for renormalize in ("none", "max", "add")
        for dtype in (F32, BF16, F64)
    ),
    GateCase(T=0, E=4, k=2),
    GateCase(T=300, E=256, k=8, scoring="sigmoid", renormalize="add", dtype=BF16),
    GateCase(T=3, E=5, k=5, dtype=F16, layout="strided", scoring="softmax_topk"),
]


@serial
def check_gate(case: GateCase, target: Target, seed: int) -> None:
    """Experts are chosen at random, so that small weights occur; some slots are empty and some logits infinite."""
    random = Random(seed, target.device)
    logits = random.normal(case.T, case.E, scale=3.0)
    logits[random.normal(case.T, case.E) > 2.2] = -torch.inf
    logits[random.normal(case.T, case.E) > 2.2] = torch.nan
    logits = laid_out(logits.to(case.dtype), case.layout)
    bias = random.normal(case.E) if case.bias else None
    ids = torch.rand(case.T, case.E, generator=random.generator).argsort(dim=1)[:, : case.k].to(target.device)
    usable = logits.gather(1, ids) > -torch.inf
    ids = ids.where(usable & (random.normal(case.T, case.k) < 1.5), -1).int()
    grad = random.normal(case.T, case.k, dtype=arithmetic_dtype(case.dtype))
    normaliser = (case.renormalize, 1e-20, 2.5)
    got = run(target, "gate_backward", logits, grad, ids, case.scoring, bias, *normaliser)
    assert got.dtype == case.dtype

    z, chosen = logits.cpu().double(), ids.cpu()
    b = None if bias is None else bias.cpu().double()
    truth = reference.gate_backward(z, grad.cpu().double(), chosen, case.scoring, b, *normaliser)
    shares = reference.gate(z, case.k, case.scoring, indices=chosen)[0]  # softmax of all experts: bias only excludes
    divisor = shares.sum(dim=1, keepdim=True).clamp(min=1e-20) if case.renormalize != "none" else 1.0
    # A gradient is a sum of at most 2 + k terms, each at most the largest share times what comes through the divisor;
    # the exponential of a logit is off by as many roundings as the logit is large.
    size = 2.5 * grad.cpu().double().abs().amax(dim=1, keepdim=True) / divisor if case.T else torch.zeros(0, 1)
    largest = z.nan_to_num(0, 0, 0).abs().amax(dim=1, keepdim=True) if case.T else torch.zeros(0, 1)
    terms = (2 + case.k) * size * shares.amax(dim=1, keepdim=True) * (1 + largest) if case.T else torch.zeros(0, 1)
    bound = (terms * FUNCTION_ERRORS * arithmetic_roundoff(case.dtype)).expand_as(truth)
    assert_within(got.cpu(), truth, rounding_error(truth, case.dtype, bound), f"gate_backward {case.scoring}")
    used = torch.zeros(case.T, case.E + 1, dtype=torch.bool).scatter(1, chosen.long().where(chosen >= 0, case.E), True)
    if case.scoring != "softmax":
        assert not got.cpu()[~used[:, : case.E]].any(), "experts not chosen get no gradient"
