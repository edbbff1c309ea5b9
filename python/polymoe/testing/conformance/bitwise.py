"""Checks to the bit: results that must not depend on threads, on other tokens, or on fusion.

Ordinary inputs hide differences: most changes in the order of a sum vanish in the rounding of the result. So these
inputs cancel. Along a reduction the terms come in pairs that add to zero, the exact result is zero, and what comes out
is nothing but the rounding errors of the partial sums, which another order changes (`check_experts_sensitive`).

Short sums of exact products have no rounding errors, so only reductions of LONG terms or more are made to cancel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import polymoe
from polymoe.testing.cases import Random, routing
from polymoe.testing.conformance import activate as activate_checks
from polymoe.testing.conformance import experts as experts_checks
from polymoe.testing.conformance import plan as plan_checks
from polymoe.testing.conformance._run import THREADS, op_threads, serial, threads
from polymoe.testing.conformance.experts import Inputs
from polymoe.testing.targets import Target
from polymoe.testing.tolerances import arithmetic_dtype, assert_same_bits, bits

LONG = 500
# Tokens of the largest batch: a backend may choose other tiles for it than for small ones. The cpu backend cuts experts
# with hundreds of rows into blocks, and batches of tens of thousands of slots into chunks.
MANY = 150

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# Reductions of several thousand are summed in several blocks on every ISA level.
EXPERTS = [
    *(experts_checks.Case(T=MANY, H=4301, I=25, E=3, K=2, dtype=dtype) for dtype in (F32, BF16, F16)),
    *(experts_checks.Case(T=MANY, H=25, I=4301, E=3, K=2, dtype=dtype) for dtype in (F32, BF16, F16)),
    *(experts_checks.Case(T=70, H=1111, I=515, E=2, K=1, dtype=dtype) for dtype in (F32, BF16, F16)),
    *(experts_checks.Case(T=1200, H=521, I=40, E=2, K=1, dtype=dtype) for dtype in (F32, BF16, F16)),
    *(experts_checks.Case(T=1200, H=40, I=521, E=2, K=1, dtype=dtype) for dtype in (F32, BF16, F16)),
    experts_checks.Case(T=8500, H=521, I=16, E=4, K=2, dtype=BF16),
    experts_checks.Case(T=70, H=515, I=513, E=2, K=2, dtype=F64),
]
_OTHER = experts_checks.Case(T=MANY, H=4301, I=33, E=3, K=2, transposed=True, interleaved=True, placement="activation")
EXPERTS_OTHER_LAYOUTS = [
    *(replace(_OTHER, dtype=dtype, bias=F32, kind="swiglu_oai", limit=7.0) for dtype in (F32, BF16, F16)),
    *(replace(_OTHER, dtype=dtype, interleaved=False, kind="geglu", placement="input") for dtype in (F32, BF16, F16)),
    *(replace(_OTHER, dtype=dtype, interleaved=False, kind="relu2", transposed=False) for dtype in (F32, BF16, F16)),
    *(replace(_OTHER, dtype=dtype, pattern="skipping", weight_layout="strided") for dtype in (F32, BF16, F16)),
]
ACTIVATE = [
    activate_checks.Case(
        T=MANY, I=77, kind=kind, alpha=alpha, limit=limit, dtype=dtype, out_dtype=arithmetic_dtype(dtype)
    )
    for kind, alpha, limit in activate_checks.KINDS
    for dtype in (F32, BF16, F64)
]
COMBINE = [(6, 701, dtype) for dtype in (F32, BF16, F16, F64)]
GATE = [
    (160, 8, scoring, dtype)
    for scoring in ("softmax", "softmax_topk", "sigmoid", "sqrtsoftplus")
    for dtype in (F32, BF16, F64)
]
GROUPED_MM = [
    (rows, D, N, dtype)
    for rows, D, N in ((MANY, 4301, 37), (MANY, 1111, 130), (1200, 521, 40))
    for dtype in (F32, BF16, F16, F64)
]


@dataclass(frozen=True)
class Pairs:
    """A random pairing of [0, n); where n is odd, `single` is the one left over."""

    first: Tensor
    second: Tensor
    single: Tensor

    @classmethod
    def of(cls, n: int, random: Random) -> Pairs:
        order = random.permutation(n)
        return cls(order[0 : n - n % 2 : 2], order[1::2], order[n - n % 2 :])


def cancel(a: Tensor, b: Tensor, random: Random) -> None:
    """Makes every dot product of a row of a [.., D] and a row of b [.., D] cancel."""
    pairs = Pairs.of(a.shape[-1], random)
    a[..., pairs.second] = a[..., pairs.first]
    b[..., pairs.second] = -b[..., pairs.first]
    a[..., pairs.single] = 0


def cancelling_experts(case: experts_checks.Case, random: Random) -> Inputs:
    """The long ones of both matmuls cancel. Pre-activations that are rounding errors are scaled to about size 1, so
    that they pass through the activation. Pairs of gate rows and of up rows are equal, so that pairs of activations
    are, which down then subtracts."""
    inputs = experts_checks.make_inputs(case, random)
    x, gate_up, down = inputs.x, inputs.gate_up, inputs.down
    if case.transposed:
        gate_up, down = gate_up.mT, down.mT
    if case.H >= LONG:
        cancel(x, gate_up.mul_(2.0**13 * math.sqrt(case.H)), random)
    if case.I >= LONG:
        pairs = Pairs.of(case.I, random)
        rows = gate_up.unflatten(1, (case.I, -1) if case.interleaved else (-1, case.I))
        rows = rows if case.interleaved else rows.transpose(1, 2)
        rows[:, pairs.second] = rows[:, pairs.first]
        down.mul_(2.0**8 * math.sqrt(case.I))
        down[..., pairs.second] = -down[..., pairs.first]
        down[..., pairs.single] = 0
    return inputs


def of_tokens(inputs: Inputs, tokens: Tensor) -> Inputs:
    return inputs._replace(x=inputs.x[tokens], weights=inputs.weights[tokens], ids=inputs.ids[tokens])


def check_threads(call: Callable[[], Tensor], what: str) -> None:
    """`call` gives the same bits on 1 to 4 threads, and again on 1."""
    with threads(1):
        expected = call()
    for n in (2, 3, 4, 1):
        with threads(n):
            assert_same_bits(call(), expected, f"{what} on {n} threads and on 1")


def check_batch(call: Callable[[Tensor], Tensor], T: int, random: Random, what: str) -> None:
    """`call(tokens)` computes the op for these of T tokens. The bits of a token are the same alone, among 7, among 64,
    at another position, and among all."""
    expected = call(torch.arange(T, device=random.device))
    everywhere = random.permutation(T)
    alone = [everywhere[i : i + 1] for i in range(3)]
    for tokens in (*alone, everywhere[:7], everywhere[:64], everywhere[:64].flip(0), everywhere):
        with threads(THREADS):
            got = call(tokens)
        assert_same_bits(got, expected[tokens], f"{what}: a token among {len(tokens)} and among {T}")


def call_experts(case: experts_checks.Case, inputs: Inputs, target: Target) -> Tensor:
    return polymoe.experts(*inputs[:5], **experts_checks.options(case, inputs), backend=target.backend)


@serial
def check_experts_threads(case: experts_checks.Case, target: Target, seed: int) -> None:
    inputs = cancelling_experts(case, Random(seed, target.device))
    check_threads(lambda: call_experts(case, inputs, target), "experts")


@serial
def check_experts_batch(case: experts_checks.Case, target: Target, seed: int) -> None:
    random = Random(seed, target.device)
    inputs = cancelling_experts(case, random)
    check_batch(lambda tokens: call_experts(case, of_tokens(inputs, tokens), target), case.T, random, "experts")


@serial
def check_experts_composition(case: experts_checks.Case, target: Target, seed: int) -> None:
    random = Random(seed, target.device)
    everything = cancelling_experts(case, random)
    for T in (1, 7, 64, case.T):
        inputs = of_tokens(everything, random.permutation(case.T)[:T])
        with op_threads(target):
            got = call_experts(case, inputs, target)
            expected = experts_checks.composition(case, inputs, target.backend)
        assert_same_bits(got, expected, f"experts and the composition of the small ops, {T} tokens")


@serial
def check_experts_sensitive(case: experts_checks.Case, target: Target, seed: int) -> None:
    """Another order of a long reduction changes most bits: the inputs show what they are for. `case` is gated, neither
    transposed nor interleaved."""
    random = Random(seed, target.device)
    inputs = cancelling_experts(case, random)
    expected = call_experts(case, inputs, target)
    others = {}
    if case.H >= LONG:
        order = random.permutation(case.H)
        others["H"] = inputs._replace(x=inputs.x[:, order], gate_up=inputs.gate_up[:, :, order])
    if case.I >= LONG:
        order = random.permutation(case.I)
        rows = torch.cat([order, order + case.I])
        others["I"] = inputs._replace(gate_up=inputs.gate_up[:, rows], down=inputs.down[:, :, order])
    for letter, other in others.items():
        changed = (bits(call_experts(case, other, target)) != bits(expected)).cpu().double().mean()
        assert changed > 0.5, f"another order along {letter} changes only {float(changed):.0%} of the outputs"


def cancelling_rows(
    rows: int, D: int, N: int, G: int, dtype: torch.dtype, random: Random
) -> tuple[Tensor, Tensor, Tensor]:
    """a [rows, D], b [G, D, N] stored along D, and the group of each row of a."""
    a = random.normal(rows, D, dtype=dtype)
    b = random.normal(G, N, D, dtype=dtype)
    cancel(a, b, random)
    return a, b.mT, random.integers(0, G, rows)


def grouped_rows(a: Tensor, b: Tensor, group: Tensor, target: Target) -> Tensor:
    """grouped_mm of rows that are sorted by group for it, float32 out of every dtype but float64."""
    order = group.argsort(stable=True)
    ends = group.bincount(minlength=b.shape[0]).cumsum(0).int()
    sums = polymoe.grouped_mm(a[order], b, ends, out_dtype=arithmetic_dtype(a.dtype), backend=target.backend)
    return sums[order.argsort()]


@serial
def check_grouped_mm(rows: int, D: int, N: int, dtype: torch.dtype, target: Target, seed: int) -> None:
    """Threads, batches, and any range of columns."""
    random = Random(seed, target.device)
    a, b, group = cancelling_rows(rows, D, N, 3, dtype, random)
    check_threads(lambda: grouped_rows(a, b, group, target), "grouped_mm")
    check_batch(lambda chosen: grouped_rows(a[chosen], b, group[chosen], target), rows, random, "grouped_mm")
    expected = grouped_rows(a, b, group, target)
    first = random.integer(0, N)
    last = random.integer(first, N) + 1
    got = grouped_rows(a, b[:, :, first:last], group, target)
    assert_same_bits(got, expected[:, first:last], f"grouped_mm: columns {first}:{last} alone and among {N}")
    order = random.permutation(D)
    changed = bits(grouped_rows(a[:, order], b.mT[:, :, order].contiguous().mT, group, target)) != bits(expected)
    assert changed.cpu().double().mean() > 0.5, "another order of the reduction must change the bits of these inputs"


@serial
def check_combine(K: int, H: int, dtype: torch.dtype, target: Target, seed: int) -> None:
    random = Random(seed, target.device)
    ids = routing(random, "skipping", MANY, K, K)
    y, weights = random.normal(MANY, K, H, dtype=dtype), random.weights(MANY, K)
    pairs = Pairs.of(K, random)
    y[:, pairs.second] = -y[:, pairs.first]
    weights[:, pairs.second] = weights[:, pairs.first]
    out_dtype = arithmetic_dtype(dtype)

    def call(tokens: Tensor) -> Tensor:
        plan = plan_checks.truth(ids[tokens], K)
        slots = plan.row_slot.clamp(min=0).long()
        rows = y[tokens].flatten(0, 1)[slots]
        return polymoe.combine(rows, plan, weights[tokens], out_dtype, backend=target.backend)

    everything = torch.arange(MANY, device=random.device)
    check_threads(lambda: call(everything), "combine")
    check_batch(call, MANY, random, "combine")


@serial
def check_gate(E: int, k: int, scoring: str, dtype: torch.dtype, target: Target, seed: int) -> None:
    random = Random(seed, target.device)
    logits, bias = random.normal(MANY, E, dtype=dtype, scale=3.0), random.normal(E)

    def call(tokens: Tensor) -> Tensor:
        weights, ids = polymoe.gate(logits[tokens], k, scoring, bias, renormalize="add", backend=target.backend)
        return torch.cat([weights, ids.to(weights.dtype)], dim=1)

    check_threads(lambda: call(torch.arange(MANY, device=random.device)), "gate")
    check_batch(call, MANY, random, "gate")


@serial
def check_activate(case: activate_checks.Case, target: Target, seed: int) -> None:
    random = Random(seed, target.device)
    h = activate_checks.make_h(case, random, case.T)

    def call(rows: Tensor) -> Tensor:
        return polymoe.activate(
            h[rows],
            case.kind,
            case.alpha,
            case.limit,
            case.interleaved,
            out_dtype=case.out_dtype,
            backend=target.backend,
        )

    check_threads(lambda: call(torch.arange(case.T, device=random.device)), "activate")
    check_batch(call, case.T, random, "activate")
