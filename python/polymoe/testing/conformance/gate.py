"""Checks of polymoe.gate.

The selection of a row is checked to the letter unless two scores that it depends on are closer than their rounding
errors: there any order is right that these errors allow. Equal inputs are no such case: ties have a rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from polymoe.testing.cases import Random, laid_out
from polymoe.testing.conformance._run import run, serial
from polymoe.testing.targets import Target
from polymoe.testing.tolerances import (
    FUNCTION_ERRORS,
    arithmetic_dtype,
    arithmetic_roundoff,
    assert_within,
    growth,
    smallest,
)


@dataclass(frozen=True)
class Case:
    """logits: "normal"; "ties" (few different values, so that many are equal); "wild" (NaN, infinities, huge and tiny
    values among the normal ones, whole rows of NaN or -inf). indices: "" or how they are given."""

    T: int
    E: int
    k: int
    scoring: str = "softmax"
    bias: bool = False
    n_group: int = 1
    topk_group: int = 1
    group_top: int = 2
    renormalize: str = "none"
    eps: float = 1e-20
    scale: float = 1.0
    indices: str = ""
    mask: bool = False
    dtype: torch.dtype = torch.float32
    logits: str = "normal"
    layout: str = "contiguous"


CASES = [
    Case(T=0, E=8, k=2),
    Case(T=1, E=1, k=1, renormalize="max"),
    Case(T=33, E=8, k=2, renormalize="max"),  # Mixtral
    Case(T=1500, E=12, k=2),  # enough for several threads
    Case(T=20, E=128, k=8, renormalize="max", dtype=torch.bfloat16),  # Qwen3: bfloat16 logits tie often
    Case(T=20, E=32, k=4, scoring="softmax_topk", dtype=torch.bfloat16),  # gpt-oss
    Case(T=20, E=256, k=8, scoring="sigmoid", bias=True, n_group=8, topk_group=4, renormalize="add", scale=2.5),  # V3
    Case(T=20, E=160, k=6, n_group=8, topk_group=3, group_top=1, scale=16.0),  # DeepSeek-V2
    Case(T=20, E=256, k=6, scoring="sqrtsoftplus", bias=True, renormalize="add", scale=1.5),  # DeepSeek-V4
    Case(T=20, E=256, k=6, scoring="sqrtsoftplus", indices="int64", renormalize="add", scale=1.5),  # V4, hash routing
    Case(T=9, E=16, k=1, scoring="sigmoid"),  # Llama-4
    Case(T=7, E=1024, k=8, scoring="softmax_topk", bias=True),
    Case(T=5, E=1024, k=1024, logits="ties"),
    Case(T=9, E=33, k=33, scoring="sigmoid", bias=True, renormalize="max", dtype=torch.float16),
    Case(T=17, E=64, k=6, bias=True, renormalize="add", eps=0.5, dtype=torch.float64),
    Case(T=17, E=24, k=5, scoring="sqrtsoftplus", dtype=torch.float64, logits="wild"),
    Case(T=40, E=40, k=7, logits="ties"),
    Case(T=40, E=40, k=7, scoring="softmax_topk", bias=True, logits="ties"),
    Case(T=40, E=48, k=5, scoring="sigmoid", n_group=6, topk_group=3, group_top=2, logits="ties"),
    Case(T=60, E=20, k=4, logits="wild", renormalize="max"),
    Case(T=60, E=20, k=4, scoring="softmax_topk", logits="wild", mask=True),
    Case(T=60, E=20, k=4, scoring="sigmoid", bias=True, logits="wild", renormalize="add"),
    Case(T=60, E=24, k=4, scoring="sqrtsoftplus", bias=True, n_group=4, topk_group=2, logits="wild", mask=True),
    Case(T=60, E=20, k=4, indices="int32", logits="wild", renormalize="max", mask=True),
    Case(T=60, E=20, k=4, scoring="softmax_topk", indices="int32", logits="wild"),
    Case(T=13, E=40, k=4, layout="transposed", dtype=torch.bfloat16),
    Case(T=13, E=40, k=4, scoring="sigmoid", layout="sliced", mask=True, renormalize="max"),
    Case(T=13, E=40, k=4, scoring="sqrtsoftplus", layout="strided", dtype=torch.float16, bias=True),
    Case(T=13, E=40, k=4, scoring="softmax_topk", layout="expanded", bias=True),
]


class Inputs(NamedTuple):
    logits: Tensor
    bias: Tensor | None
    indices: Tensor | None
    token_mask: Tensor | None


def make_inputs(case: Case, random: Random) -> Inputs:
    T, E, k = case.T, case.E, case.k
    logits = random.normal(T, E, scale=3.0)
    if case.logits == "ties":
        logits = logits.div(3.0).round()
    elif case.logits == "wild":
        values = [math.nan, -math.inf, math.inf, 3e38, -3e38, 1e-40, 0.0, -90.0, 120.0]
        chosen = torch.tensor(values)[random.integers(0, len(values), T, E).cpu()].to(random.device)
        logits = torch.where(random.normal(T, E) > 1.0, chosen, logits)
        kind = random.integers(0, 10, T, 1)
        logits = logits.masked_fill(kind == 0, math.nan).masked_fill(kind == 1, -math.inf)
    logits = laid_out(logits.to(case.dtype), case.layout)
    bias = None
    if case.bias:
        bias = random.normal(E, scale=0.3)
        if case.logits == "ties":
            bias = bias.mul(3).round().div(4)
        elif case.logits == "wild":
            bias[random.integer(0, E)] = -math.inf
            bias[random.integer(0, E)] = math.nan
        bias = laid_out(bias, "strided" if case.layout == "strided" else "contiguous")
    indices = None
    if case.indices:
        low, high = (-2, E + 3) if case.logits == "wild" else (0, E)
        indices = random.integers(low, high, T, k, dtype=getattr(torch, case.indices))
    mask = random.normal(T) > -0.5 if case.mask else None
    return Inputs(logits, bias, indices, mask)


class _Row:
    """One token in float64: scores, selection keys, and how far float32 may be off them."""

    def __init__(self, case: Case, logits: list[float], bias: list[float]) -> None:
        arithmetic = arithmetic_dtype(case.dtype)
        self.u = arithmetic_roundoff(case.dtype)
        self.tiny = smallest(arithmetic)
        self.case = case
        self.inputs = list(zip(logits, bias, strict=True))
        self.logit = [min(z, float(torch.finfo(arithmetic).max)) for z in logits]
        # Comparisons with NaN are false.
        self.usable = [z > -math.inf and b > -math.inf for z, b in self.inputs]
        self.top = max((z for z, use in zip(self.logit, self.usable, strict=True) if use), default=0.0)
        self.score = self._scores()
        self.key = [s + b if use else -math.inf for s, b, use in zip(self.score, bias, self.usable, strict=True)]
        self.key_error = [
            0.0
            if case.scoring == "softmax_topk" and not case.bias
            else self.relative(e) * abs(self.score[e]) + self.u * abs(self.key[e]) + self.tiny
            for e in range(case.E)
        ]

    def relative(self, e: int) -> float:
        """Bound of the relative error of score e."""
        if self.case.scoring == "softmax_topk":
            return 0.0  # the score is the logit
        if self.case.scoring == "softmax":
            return self.u * (FUNCTION_ERRORS + growth(self.case.E) + self.distance(e, self.top))
        return self.u * FUNCTION_ERRORS

    def distance(self, e: int, top: float) -> float:
        """The relative error of exp(logit - top) in u, from the rounding of the difference. Where the difference is so
        large that exp is below the smallest normal number, `tiny` covers the rest."""
        return min(abs(self.logit[e] - top), -math.log(self.tiny))

    def _scores(self) -> list[float]:
        scoring = self.case.scoring
        pairs = list(zip(self.logit, self.usable, strict=True))
        if scoring == "softmax":
            powers = [math.exp(z - self.top) if use else 0.0 for z, use in pairs]
            return [p / (sum(powers) or 1.0) for p in powers]
        if scoring == "sigmoid":
            return [_sigmoid(z) if use else 0.0 for z, use in pairs]
        if scoring == "sqrtsoftplus":
            return [math.sqrt(max(z, 0.0) + math.log1p(math.exp(-abs(z)))) if use else 0.0 for z, use in pairs]
        return [z if use else 0.0 for z, use in pairs]

    def clear(self, better: int, worse: int) -> bool:
        """Whether it is certain in float32 too that `better` comes before `worse`."""
        if self.inputs[better] == self.inputs[worse]:
            return better < worse
        return self.key[better] - self.key[worse] > self.key_error[better] + self.key_error[worse]

    def select(self) -> tuple[list[int], bool]:
        """The k best experts, -1 where there are too few; and whether rounding could change them."""
        case, certain = self.case, True
        experts = [e for e in range(case.E) if self.key[e] > -math.inf]
        if case.n_group > 1:
            kept, certain = self._kept_groups()
            experts = [e for e in experts if e // (case.E // case.n_group) in kept]
        order = sorted(experts, key=lambda e: (-self.key[e], e))
        certain = certain and all(self.clear(a, b) for a, b in pairwise(order[: case.k + 1]))
        return (order + [-1] * case.k)[: case.k], certain

    def _kept_groups(self) -> tuple[set[int], bool]:
        case, size = self.case, self.case.E // self.case.n_group
        best = []
        for g in range(case.n_group):
            members = [e for e in range(g * size, (g + 1) * size) if self.key[e] > -math.inf]
            best.append(sorted(members, key=lambda e: (-self.key[e], e))[: case.group_top])
        score = [sum(self.key[e] for e in group) if group else -math.inf for group in best]
        error = [sum(self.key_error[e] + case.group_top * self.u * abs(self.key[e]) for e in group) for group in best]
        overflow = torch.finfo(arithmetic_dtype(case.dtype)).max
        error = [
            math.inf if sum(abs(self.key[e]) for e in best[g]) > overflow else error[g] for g in range(case.n_group)
        ]
        order = sorted(range(case.n_group), key=lambda g: (-score[g], g))
        last, next_ = order[: case.topk_group], order[case.topk_group :]

        def clear(g: int, h: int) -> bool:
            same = [self.inputs[e] for e in best[g]] == [self.inputs[e] for e in best[h]]
            return same or score[g] - score[h] > error[g] + error[h] or score[h] == -math.inf

        return set(last), all(clear(g, h) for g in last for h in next_)

    def weigh(self, ids: list[int]) -> tuple[list[float], list[float]]:
        """The weights of these experts (id -1: none), and a bound of their error."""
        case = self.case
        raw = [self.score[e] if e >= 0 else 0.0 for e in ids]
        relative = max((self.relative(e) for e in ids if e >= 0), default=0.0)
        if case.scoring == "softmax_topk":
            top = max((self.logit[e] for e in ids if e >= 0), default=0.0)
            powers = [math.exp(self.logit[e] - top) if e >= 0 else 0.0 for e in ids]
            raw = [p / (sum(powers) or 1.0) for p in powers]
            spread = [self.u * self.distance(e, top) if e >= 0 else 0.0 for e in ids]
        else:
            spread = [0.0] * len(ids)
        total = {"none": 1.0, "max": max(sum(raw), case.eps), "add": sum(raw) + case.eps}[case.renormalize]
        rounding = 2 * relative + self.u * (FUNCTION_ERRORS + 2 * growth(case.k))
        weights = [w / total * case.scale for w in raw]
        flushed = self.tiny * (1.0 + case.scale / min(total, 1.0))
        return weights, [abs(w) * (rounding + s) + flushed for w, s in zip(weights, spread, strict=True)]


def _sigmoid(z: float) -> float:
    return 1.0 / (1.0 + math.exp(-z)) if z >= 0 else math.exp(z) / (1.0 + math.exp(z))


@serial
def check(case: Case, target: Target, seed: int) -> None:
    inputs = make_inputs(case, Random(seed, target.device))
    weights, ids = run(
        target,
        "gate",
        inputs.logits,
        case.k,
        case.scoring,
        inputs.bias,
        case.n_group,
        case.topk_group,
        case.group_top,
        case.renormalize,
        case.eps,
        case.scale,
        inputs.indices,
        inputs.token_mask,
    )
    assert ids.dtype == torch.int32
    assert weights.dtype == arithmetic_dtype(case.dtype)
    assert ids.shape == weights.shape == (case.T, case.k)
    rows = inputs.logits.cpu().double().tolist()
    bias = [0.0] * case.E if inputs.bias is None else inputs.bias.cpu().double().tolist()
    uncertain = 0
    truth, bound = torch.zeros(2, case.T, case.k, dtype=torch.float64)
    for t, got in enumerate(ids.tolist()):
        row = _Row(case, rows[t], bias)
        if inputs.token_mask is not None and not inputs.token_mask[t]:
            expected, certain = [-1] * case.k, True
        elif inputs.indices is not None:
            given = inputs.indices[t].tolist()
            expected, certain = [e if 0 <= e < case.E and row.usable[e] else -1 for e in given], True
        else:
            expected, certain = row.select()
        assert got == expected or not certain, f"token {t}: ids {got}, expected {expected}, logits {rows[t]}"
        _check_ids(got, expected, row, token=t)
        uncertain += not certain
        values, errors = row.weigh(got)
        truth[t], bound[t] = torch.tensor([values, errors], dtype=torch.float64)
    assert_within(weights, truth, bound, "weights")
    # The check of the selection must not be empty. (Wild logits saturate and are equal in float32 alone; ties make sums
    # of groups that are equal for other reasons than equal terms.)
    if case.logits == "normal":
        assert uncertain <= 0.2 * case.T + 1, f"{uncertain} of {case.T} selections are too close to call"


def _check_ids(got: list[int], expected: list[int], row: _Row, token: int) -> None:
    """What holds for a selection however close the scores are."""
    case = row.case
    chosen = [e for e in got if e >= 0]
    if case.n_group == 1:  # kept groups may differ in how many usable experts they have
        assert [e < 0 for e in got] == [e < 0 for e in expected], f"token {token}: ids {got}, expected {expected}"
    assert all(e < case.E and row.usable[e] for e in chosen), f"token {token}: unusable expert in {got}"
    if case.indices:
        return
    assert len(set(chosen)) == len(chosen), f"token {token}: an expert is chosen twice: {got}"
    for better, worse in pairwise(chosen):
        assert not row.clear(worse, better), f"token {token}: {better} comes before {worse} in {got}"
    if chosen and case.n_group == 1:
        for e in set(range(case.E)) - set(chosen):
            beaten = row.key[e] == -math.inf or not row.clear(e, chosen[-1])
            assert beaten, f"token {token}: {e} is missing in {got}"
