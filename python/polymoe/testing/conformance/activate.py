"""Checks of polymoe.activate."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from polymoe.ops import Plan
from polymoe.testing.cases import Random, laid_out, routing
from polymoe.testing.conformance import plan as plan_checks
from polymoe.testing.conformance._run import run, serial
from polymoe.testing.targets import Target
from polymoe.testing.tolerances import (
    FUNCTION_ERRORS,
    arithmetic_dtype,
    arithmetic_roundoff,
    assert_within,
    rounding_error,
    smallest,
)

# (kind, alpha, limit): every kind with every combination of the numbers it takes.
KINDS: list[tuple[str, float | None, float | None]] = [
    ("swiglu", None, None),
    ("swiglu_clamped", None, 2.5),
    ("swiglu_clamped_after", None, 1.3),
    ("swiglu_oai", None, None),
    ("swiglu_oai", 1.3, 2.7),
    ("geglu", None, None),
    ("geglu_tanh", None, None),
    ("reglu", None, None),
    ("softcapped", 3.1, 2.3),
    ("silu", None, None),
    ("gelu", None, None),
    ("gelu_tanh", None, None),
    ("relu", None, None),
    ("relu2", None, None),
]
UNGATED = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


@dataclass(frozen=True)
class Case:
    """T, K, E: with a plan, S = T*K; without one (pattern ""), S = T. weights: None, or their dtype."""

    T: int
    I: int
    kind: str = "swiglu"
    alpha: float | None = None
    limit: float | None = None
    interleaved: bool = False
    K: int = 1
    E: int = 8
    pattern: str = ""
    weights: torch.dtype | None = None
    dtype: torch.dtype = torch.float32
    out_dtype: torch.dtype | None = None
    layout: str = "contiguous"


BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

CASES = [
    # Every kind, from every dtype; 4 tokens of 2 slots and an odd width, so that every vector tail occurs.
    *(
        Case(T=4, I=67, kind=kind, alpha=alpha, limit=limit, K=2, pattern="skipping", dtype=dtype, weights=F32)
        for kind, alpha, limit in KINDS
        for dtype in (F32, BF16, F16, F64)
    ),
    # What experts does: float32 in, another dtype out; the halves side by side or in turns.
    *(
        Case(T=9, I=33, kind=kind, alpha=alpha, limit=limit, interleaved=kind not in UNGATED, out_dtype=BF16)
        for kind, alpha, limit in KINDS
    ),
    Case(T=0, I=8),
    Case(T=4, I=0),
    Case(T=1, I=1),
    Case(T=40, I=704, K=3, pattern="skipping", weights=F32, dtype=BF16),
    Case(T=40, I=704, K=3, pattern="repeated", weights=BF16, out_dtype=BF16, interleaved=True),
    Case(T=8, I=2880, kind="swiglu_oai", limit=7.0, out_dtype=F16, interleaved=True),
    Case(T=8, I=2880, K=2, pattern="all_skipped"),
    Case(T=8, I=40, K=2, pattern="skipping", weights=F64, dtype=F64, interleaved=True),
    Case(T=8, I=41, dtype=BF16, out_dtype=F32, layout="transposed"),
    Case(T=8, I=41, dtype=F16, layout="sliced", interleaved=True),
    Case(T=8, I=41, K=2, pattern="skipping", weights=F32, layout="strided"),
    Case(T=8, I=41, kind="geglu", layout="expanded", dtype=BF16, out_dtype=F16),
]


def halves(h: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """gate and up half."""
    if interleaved:
        return h[:, 0::2], h[:, 1::2]
    return h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2 :]


def sigmoid(z: Tensor) -> Tensor:
    return torch.sigmoid(z)  # whose derivative exists where exp(-z) would overflow


def gelu(z: Tensor) -> Tensor:
    return 0.5 * z * torch.special.erfc(-z / math.sqrt(2))


def gelu_tanh(z: Tensor) -> Tensor:
    """0.5 z (1 + tanh y) = z sigmoid(2 y)."""
    return z * sigmoid(2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))


def truth(h: Tensor, case: Case) -> Tensor:
    """The formula of case.kind for float64 h."""
    ungated = {"silu": lambda: h * sigmoid(h), "gelu": lambda: gelu(h), "gelu_tanh": lambda: gelu_tanh(h)}
    if case.kind in ungated:
        return ungated[case.kind]()
    if case.kind in ("relu", "relu2"):
        positive = torch.where(h < 0, 0.0, h)
        return positive if case.kind == "relu" else positive * positive
    g, u = halves(h, case.interleaved)
    limit = math.inf if case.limit is None else case.limit
    bounded_g, bounded_u = g.clamp(max=limit), u.clamp(-limit, limit)
    if case.kind == "swiglu_oai":
        alpha = 1.702 if case.alpha is None else case.alpha
        return bounded_g * sigmoid(alpha * bounded_g) * (bounded_u + 1)
    if case.kind == "softcapped":
        assert case.alpha is not None
        return case.alpha * torch.tanh(g / case.alpha) * sigmoid(g) * limit * torch.tanh(u / limit)
    if case.kind == "swiglu_clamped_after":
        return (g * sigmoid(g)).clamp(max=limit) * bounded_u
    gate = {
        "swiglu": lambda: g * sigmoid(g),
        "swiglu_clamped": lambda: bounded_g * sigmoid(bounded_g),
        "geglu": lambda: gelu(g),
        "geglu_tanh": lambda: gelu_tanh(g),
        "reglu": lambda: torch.where(g < 0, 0.0, g),
    }[case.kind]()
    return gate * (bounded_u if case.kind == "swiglu_clamped" else u)


def error(h: Tensor, value: Tensor, case: Case, dtype: torch.dtype) -> Tensor:
    """Bound of the error of float32 arithmetic before the rounding of the result, for float64 h; `value` is the truth.

    The formulas are products of factors with a small relative error, except that
    - 1 + erf and 1 + tanh cancel for negative arguments: gelu(z) is only within u32 * |z|;
    - in sigmoid(alpha * g) the rounding of the argument z counts |z| fold;
    - sigmoid may underflow, which loses at most the smallest normal number times the other factors.
    """
    u32, tiny = arithmetic_roundoff(dtype), smallest(arithmetic_dtype(dtype))
    g, up = (h, torch.ones_like(h)) if case.kind in UNGATED else halves(h, case.interleaved)
    relative = torch.full_like(g, FUNCTION_ERRORS * u32)
    if case.kind == "swiglu_oai":
        limit = math.inf if case.limit is None else case.limit
        argument = (1.702 if case.alpha is None else case.alpha) * g.clamp(max=limit).abs()
        relative += 2 * u32 * argument.clamp(max=-math.log(tiny))  # further out the sigmoid underflows
    scale = value.abs()
    if "gelu" in case.kind or "geglu" in case.kind:
        scale = torch.maximum(scale, g.abs() * up.abs())
    return scale * relative + tiny * (1 + g.abs()) * (1 + up.abs())


def make_h(case: Case, random: Random, S: int) -> Tensor:
    """Mostly of size 3, with a few values where exp overflows, where everything rounds to 0 or 1, and zeros."""
    width = case.I if case.kind in UNGATED else 2 * case.I
    h = random.normal(S, width, scale=3.0)
    far = torch.tensor([0.0, -0.0, 1e-5, -1e-6, 20.0, -20.0, 87.0, -87.5, 89.0, -89.5, 110.0, -110.0])
    chosen = far[random.integers(0, len(far), S, width).cpu()].to(random.device)
    return torch.where(random.normal(S, width) > 1.6, chosen, h).to(case.dtype)


@serial
def check(case: Case, target: Target, seed: int) -> None:
    random = Random(seed, target.device)
    plan: Plan | None = None
    if case.pattern:
        plan = plan_checks.truth(routing(random, case.pattern, case.T, case.K, case.E), case.E)
    S = case.T * case.K if plan else case.T
    h = make_h(case, random, S)
    padding = torch.zeros(S, dtype=torch.bool, device=h.device)
    if plan:
        padding = plan.row_slot < 0
        h[padding] = torch.nan  # whatever the padding rows hold, the result is zero
    h = laid_out(h, case.layout)
    weights = None if case.weights is None else laid_out(random.weights(case.T, case.K, case.weights), case.layout)
    got = run(target, "activate", h, case.kind, case.alpha, case.limit, case.interleaved, plan, weights, case.out_dtype)
    out_dtype = case.out_dtype or case.dtype
    assert got.dtype == out_dtype

    exact = h.cpu().double()
    value = truth(exact, case)
    bound = error(exact, value, case, case.dtype)
    if weights is not None:
        assert plan is not None
        w = weights.cpu().double().flatten()[plan.row_slot.clamp(min=0).long().cpu(), None]
        value, bound = value * w, bound * w  # the rounding of this product is among FUNCTION_ERRORS
    assert not got[padding].any(), "padding rows must be zero"
    used = ~padding.cpu()
    assert_within(got.cpu()[used], value[used], rounding_error(value, out_dtype, bound)[used], f"activate {case.kind}")


@serial
def check_nan(case: Case, target: Target, seed: int) -> None:
    """NaN propagates from the gate and from the up half, and to no neighbour."""
    random = Random(seed, target.device)
    h = random.normal(case.T, case.I if case.kind in UNGATED else 2 * case.I, dtype=case.dtype)
    clean = run(target, "activate", h, case.kind, case.alpha, case.limit, case.interleaved)
    h[random.normal(*h.shape) > 1.0] = torch.nan
    got = run(target, "activate", h, case.kind, case.alpha, case.limit, case.interleaved)
    where = h.isnan()
    if case.kind not in UNGATED:
        g, u = halves(where, case.interleaved)
        where = g | u
    assert torch.equal(got.isnan(), where), f"{case.kind}: NaN does not propagate"
    assert torch.equal(got[~where], clean[~where]), f"{case.kind}: NaN reaches a neighbour"


NAN_CASES = [
    replace(Case(T=5, I=37), kind=kind, alpha=alpha, limit=limit, interleaved=interleaved, dtype=dtype)
    for kind, alpha, limit in KINDS
    for interleaved, dtype in (((False, F32),) if kind in UNGATED else ((False, F32), (True, BF16)))
]
