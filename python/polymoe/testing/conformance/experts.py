"""Checks of polymoe.experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

import polymoe
from polymoe.ops import Plan
from polymoe.testing.cases import Random, laid_out, routing
from polymoe.testing.conformance import activate as activate_checks
from polymoe.testing.conformance import combine as combine_checks
from polymoe.testing.conformance import dispatch as dispatch_checks
from polymoe.testing.conformance import grouped_mm as grouped_mm_checks
from polymoe.testing.conformance import plan as plan_checks
from polymoe.testing.conformance._run import op_threads, run, serial
from polymoe.testing.conformance.activate import KINDS, UNGATED
from polymoe.testing.poison import poisoned
from polymoe.testing.targets import Target
from polymoe.testing.tolerances import (
    DEVIATIONS,
    arithmetic_dtype,
    assert_same_bits,
    assert_within,
    rounding_error,
    smallest,
    unit_roundoff,
)

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    """bias, weights: None or dtypes. layout: of x, weights and ids; weight_layout: of gate_up and down."""

    T: int
    H: int
    I: int
    E: int
    K: int
    kind: str = "swiglu"
    alpha: float | None = None
    limit: float | None = None
    bias: torch.dtype | None = None
    transposed: bool = False
    interleaved: bool = False
    placement: str = "output"
    pattern: str = "distinct"
    dtype: torch.dtype = F32
    weights: torch.dtype = F32
    ids_dtype: torch.dtype = torch.int32
    layout: str = "contiguous"
    weight_layout: str = "contiguous"


SMALL = Case(T=9, H=33, I=37, E=6, K=3)

CASES = [
    replace(SMALL, T=0),
    replace(SMALL, K=0),
    replace(SMALL, T=1, E=1, K=1, dtype=BF16),
    replace(SMALL, K=6, dtype=F16),
    replace(SMALL, H=1, I=1),
    replace(SMALL, pattern="all_skipped", bias=F32),
    replace(SMALL, pattern="one_hot", T=64, dtype=BF16),
    replace(SMALL, pattern="repeated", dtype=F16, weights=F16),
    replace(SMALL, pattern="skipping", bias=BF16, dtype=BF16, weights=BF16, ids_dtype=torch.int64),
    replace(SMALL, pattern="few", bias=F32, dtype=F16, E=20),
    replace(SMALL, dtype=F64, bias=F64, weights=F64),
    replace(SMALL, dtype=F64, bias=F32, pattern="skipping", placement="input", transposed=True),
    # Every activation, in turn with the dtypes, the layouts and the placements of the routing weight.
    *(
        replace(
            SMALL,
            kind=kind,
            alpha=alpha,
            limit=limit,
            dtype=(F32, BF16, F16)[i % 3],
            transposed=i % 2 == 1,
            interleaved=kind not in UNGATED and i % 4 > 1,
            placement=("output", "activation", "input")[i // 2 % 3],
            pattern=("distinct", "skipping", "repeated")[i // 3 % 3],
            bias=(None, F32)[i // 4 % 2],
        )
        for i, (kind, alpha, limit) in enumerate(KINDS)
    ),
    # Every placement and layout, with biases, for one activation.
    *(
        replace(
            SMALL,
            T=20,
            H=70,
            I=45,
            dtype=dtype,
            placement=placement,
            transposed=transposed,
            interleaved=not transposed,
            bias=dtype,
            pattern="skipping",
        )
        for dtype in (F32, BF16)
        for placement in ("output", "activation", "input")
        for transposed in (False, True)
    ),
    # Strides.
    replace(SMALL, layout="transposed", weight_layout="sliced", dtype=BF16),
    replace(SMALL, layout="sliced", weight_layout="strided", bias=F32),
    replace(SMALL, layout="strided", weight_layout="outermost", dtype=F16, pattern="skipping"),
    replace(SMALL, layout="expanded", weight_layout="expanded", dtype=BF16),
    replace(SMALL, weight_layout="transposed", transposed=True, interleaved=True, dtype=BF16),
    # Widths and numbers of experts of real models.
    Case(T=5, H=2880, I=704, E=4, K=2, dtype=BF16),
    Case(T=5, H=704, I=2880, E=4, K=2, dtype=F16, kind="swiglu_oai", limit=7.0, interleaved=True, bias=F16),
    Case(T=3, H=2880, I=704, E=2, K=2, dtype=F32, transposed=True),
    Case(T=40, H=40, I=24, E=1024, K=8, dtype=BF16),
    Case(T=150, H=64, I=96, E=8, K=2, dtype=BF16, kind="swiglu_clamped", limit=1.0),
    # Batches that are computed in parts.
    Case(T=700, H=35, I=40, E=2, K=1, dtype=F32, bias=F32),
    Case(T=8500, H=19, I=10, E=5, K=2, dtype=BF16, pattern="skipping", placement="activation", interleaved=True),
    Case(T=17000, H=9, I=8, E=40, K=1, dtype=F16, pattern="sorted", transposed=True),
]


class Inputs(NamedTuple):
    x: Tensor
    gate_up: Tensor
    down: Tensor
    weights: Tensor
    ids: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None


def make_inputs(case: Case, random: Random) -> Inputs:
    T, H, I, E, K = case.T, case.H, case.I, case.E, case.K
    width = I if case.kind in UNGATED else 2 * I
    x = random.normal(T, H, dtype=case.dtype)
    gate_up = random.matrix(E, width, H, dtype=case.dtype)
    down = random.matrix(E, H, I, dtype=case.dtype)
    if case.transposed:
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    weights = random.weights(T, K, case.weights)
    ids = routing(random, case.pattern, T, K, E, case.ids_dtype)
    x, weights, ids = (laid_out(tensor, case.layout) for tensor in (x, weights, ids))
    gate_up, down = laid_out(gate_up, case.weight_layout), laid_out(down, case.weight_layout)
    if case.bias is None:
        return Inputs(x, gate_up, down, weights, ids, None, None)
    bias_layout = "strided" if case.weight_layout == "strided" else "contiguous"
    biases = (random.normal(E, n, dtype=case.bias, scale=0.5) for n in (width, H))
    return Inputs(x, gate_up, down, weights, ids, *(laid_out(bias, bias_layout) for bias in biases))


def options(case: Case, inputs: Inputs) -> dict[str, Any]:
    return {
        "activation": case.kind,
        "alpha": case.alpha,
        "limit": case.limit,
        "gate_up_bias": inputs.gate_up_bias,
        "down_bias": inputs.down_bias,
        "transposed": case.transposed,
        "interleaved": case.interleaved,
        "weight_placement": case.placement,
    }


def _activation_error(h: Tensor, h_error: Tensor, value: Tensor, case: activate_checks.Case) -> Tensor:
    """How far the activation may be off for arguments that are off by h_error: no more than at the corners of the
    interval, as every kind is monotone or flat over intervals as small as these."""
    worst = torch.zeros_like(value)
    for gate_side in (-1.0, 1.0):
        for up_side in (-1.0, 1.0):
            shift = h_error.clone()
            if case.kind in UNGATED:
                shift *= gate_side
            else:
                gate, up = activate_checks.halves(shift, case.interleaved)  # views
                gate *= gate_side
                up *= up_side
            worst = torch.maximum(worst, (activate_checks.truth(h + shift, case) - value).abs())
    return worst


def _per_group(a: Tensor, b: Tensor, ends: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """The rows of a, times of(b[g]) of their group, in float64."""
    out = torch.zeros(a.shape[0], b.shape[2], dtype=F64)
    for g, (start, end) in enumerate(pairwise([0, *ends.tolist()])):
        if start < end:
            out[start:end] = a[start:end] @ of(b[g].cpu().double())
    return out


class Truth(NamedTuple):
    out: Tensor
    bound: Tensor
    pre_activation: Tensor
    pre_activation_error: Tensor
    plan: Plan


def truth(case: Case, inputs: Inputs) -> Truth:
    """In float64, op by op, without rounding between the ops; the bound of the result follows the errors through them.

    Two roundings to x's dtype belong to the definition of the op. That of the weighted input is repeated exactly. That
    of the activation, u * |a| at most for each of the I terms of a dot product, adds up as independent errors do.
    """
    plan = plan_checks.truth(inputs.ids, case.E)
    ends, dtype = plan.offsets[1:], case.dtype
    used = (plan.row_slot >= 0).cpu()[:, None]
    slot = plan.row_slot.clamp(min=0).long()
    gate_up, down = (weight if case.transposed else weight.mT for weight in (inputs.gate_up, inputs.down))
    rows = dispatch_checks.truth(inputs.x, plan, inputs.weights if case.placement == "input" else None)
    h, h_magnitude = grouped_mm_checks.truth(rows, gate_up, ends, inputs.gate_up_bias)
    h_error = grouped_mm_checks.error(h_magnitude, case.H, dtype)

    kind = activate_checks.Case(
        T=0, I=case.I, kind=case.kind, alpha=case.alpha, limit=case.limit, interleaved=case.interleaved
    )
    a = activate_checks.truth(h, kind)
    a_error = activate_checks.error(h, a, kind, dtype) + _activation_error(h, h_error, a, kind)
    if case.placement == "activation":
        w = inputs.weights.flatten()[slot].cpu().double()[:, None]
        a, a_error = a * w, a_error * w
    a, a_error = a.where(used, 0), a_error.where(used, 0)

    y, y_magnitude = grouped_mm_checks.truth(a, down, ends, inputs.down_bias)
    u = 0.0 if dtype == F64 else unit_roundoff(dtype)
    rounding = _per_group((u * a).square(), down, ends, torch.square)
    carried = _per_group(a_error * (1 + u) + smallest(dtype), down, ends, torch.abs)
    y_error = grouped_mm_checks.error(y_magnitude, case.I, dtype) + DEVIATIONS * rounding.sqrt() + carried

    weights = inputs.weights if case.placement == "output" else None
    out, magnitude = combine_checks.truth(y, plan, weights)
    _, carried = combine_checks.truth(y_error, plan, weights)
    bound = rounding_error(out, dtype, combine_checks.error(magnitude, case.K, dtype) + carried)
    return Truth(out, bound, h, h_error, plan)


def composition(case: Case, inputs: Inputs, backend: str) -> Tensor:
    """What experts means: the small ops, one after the other."""
    placed = {place: inputs.weights if case.placement == place else None for place in ("input", "activation", "output")}
    gate_up, down = (weight if case.transposed else weight.mT for weight in (inputs.gate_up, inputs.down))
    compute = arithmetic_dtype(case.dtype)
    p = polymoe.plan(inputs.ids, case.E, backend=backend)
    rows = polymoe.dispatch(inputs.x, p, placed["input"], backend=backend)
    h = polymoe.grouped_mm(rows, gate_up, p.offsets[1:], inputs.gate_up_bias, compute, backend=backend)
    a = polymoe.activate(
        h, case.kind, case.alpha, case.limit, case.interleaved, p, placed["activation"], case.dtype, backend=backend
    )
    y = polymoe.grouped_mm(a, down, p.offsets[1:], inputs.down_bias, compute, backend=backend)
    return polymoe.combine(y, p, placed["output"], case.dtype, backend=backend)


def declined_part(case: Case, target: Target) -> str | None:
    """Why there is no composition of small ops to compare with, or None."""
    compute = arithmetic_dtype(case.dtype)
    for op, dtype, options in (
        ("plan", case.ids_dtype, ()),
        ("dispatch", case.dtype, ()),
        ("grouped_mm", case.dtype, ()),
        ("activate", compute, (case.kind,)),
        ("combine", compute, ()),
    ):
        reason = target.declines(op, dtype, options)
        if reason is not None:
            return f"no {op} to compose experts of: {reason}"
    return None


@serial
def check(case: Case, target: Target, seed: int) -> None:
    """The result against float64 and, to the bit, against the composition of the small ops where the backend has them;
    then what the low-level op saves for a backward."""
    inputs = make_inputs(case, Random(seed, target.device))
    got = run(target, "experts", *inputs[:5], **options(case, inputs))
    assert got.dtype == case.dtype
    expected = truth(case, inputs)
    assert_within(got, expected.out, expected.bound, f"experts {case.kind}")
    if declined_part(case, target) is None:
        with torch.no_grad(), op_threads(target):
            composed = composition(case, inputs, target.backend)
        assert_same_bits(got, composed, "experts and the composition of the small ops")
    _check_save(case, inputs, target, got, expected)


def _check_save(case: Case, inputs: Inputs, target: Target, out: Tensor, expected: Truth) -> None:
    op, kwargs = torch.ops.polymoe.experts, options(case, inputs) | {"backend": target.backend}
    with torch.no_grad(), poisoned(), op_threads(target):
        not_saved = op(*inputs[:5], **kwargs)[1:]
        saved_out, pre_activation, *plan = op(*inputs[:5], **kwargs, save=True)
    for tensor, dtype in zip(not_saved, (case.dtype, *[torch.int32] * 3), strict=True):
        assert tensor.shape == (0,)
        assert tensor.dtype == dtype
    assert_same_bits(saved_out, out, "out, with and without save")
    for name, value, correct in zip(Plan._fields, plan, expected.plan, strict=True):
        assert torch.equal(value, correct), f"saved {name}"
    bound = rounding_error(expected.pre_activation, case.dtype, expected.pre_activation_error)
    assert_within(pre_activation, expected.pre_activation, bound, "saved pre-activation")
    assert not pre_activation[int(expected.plan.offsets[-1]) :].any(), "padding rows must be zero"
