"""The ops that gradients are made of, by the bodies of the conformance kit, and checked for bounds and races; and the
gradients of experts as a whole."""

import math
from dataclasses import dataclass

import pytest
import torch
from tests import test_gradients as on_every_backend

import polymoe
from polymoe import reference
from polymoe.backends.triton import GRADIENT_KERNELS
from polymoe.hal.problem import GRADIENT_OPS
from polymoe.hal.registry import find
from polymoe.hal.select import declined
from polymoe.kernels import _launch
from polymoe.testing.cases import Random, name_of, routing
from polymoe.testing.conformance import gradients
from polymoe.testing.targets import Target
from polymoe.testing.tolerances import (
    DEVIATIONS,
    FUNCTION_ERRORS,
    assert_same_bits,
    growth,
    relative_frobenius,
    unit_roundoff,
)
from polymoe.testing.triton_checker import checked

TRITON = Target("triton")
F32, BF16 = torch.float32, torch.bfloat16
CHECKS = {
    "activate_backward": (gradients.check_activate, gradients.ACTIVATE_CASES),
    "gate_backward": (gradients.check_gate, gradients.GATE_CASES),
    "row_dot": (gradients.check_row_dot, gradients.DOT_CASES),
}
CASES = [(op, case) for op, (_, cases) in CHECKS.items() for case in cases if case.dtype != torch.float64]


def with_ids(pairs):
    return [pytest.param(op, case, id=f"{op}-{name_of(case)}"[:150]) for op, case in pairs]


def check(op, case, seed):
    with checked() as found:
        CHECKS[op][0](case, TRITON, seed)
    assert found == []


def test_what_is_served():
    assert {*CHECKS, "down_backward", "quantized_backward"} == set(GRADIENT_KERNELS)  # the last in test_quantized.py
    for op in GRADIENT_KERNELS:
        assert declined(find("triton"), GRADIENT_OPS[op].problem("cpu", torch.bfloat16)) is None


@pytest.mark.parametrize(("op", "case"), with_ids(CASES))
def test_cases(op, case, seed):
    check(op, case, seed)


@pytest.mark.parametrize(("op", "case"), with_ids(next(x for x in CASES if x[0] == op) for op in CHECKS))
def test_64_bit_offsets(op, case, seed, monkeypatch):
    monkeypatch.setattr(_launch, "LARGEST_INT32", 0)
    check(op, case, seed)


@pytest.mark.parametrize(("op", "case"), with_ids(CASES[12::25]))
def test_tiles_of_the_size_that_gpus_get(op, case, seed, monkeypatch):
    monkeypatch.setattr(_launch, "INTERPRETED_TILE", 1)
    check(op, case, seed)


# --- down_backward ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Down:
    T: int = 21
    H: int = 70
    I: int = 45
    K: int = 2
    E: int = 4
    kind: str = "swiglu"
    alpha: float | None = None
    limit: float | None = None
    interleaved: bool = False
    transposed: bool = False
    weighted: bool = True
    pattern: str = "skipping"
    dtype: torch.dtype = F32


DOWN_CASES = [
    Down(),
    Down(dtype=BF16, H=64, I=64),  # read through descriptors
    Down(dtype=torch.float16, transposed=True, kind="geglu"),
    Down(dtype=BF16, kind="swiglu_oai", limit=1.1, interleaved=True, transposed=True),
    Down(kind="swiglu_clamped", limit=0.8, I=130),  # several tiles of columns
    Down(kind="softcapped", alpha=3.1, limit=2.3, dtype=BF16),
    Down(kind="relu2", weighted=False),
    Down(kind="gelu_tanh", T=70, K=1, pattern="one_hot", dtype=BF16),
    Down(T=0),
    Down(pattern="all_skipped"),
    Down(H=1, I=1),
]


def made(case, seed):
    """Arguments of down_backward, padding rows NaN."""
    random = Random(seed)
    plan = polymoe.plan(routing(random, case.pattern, case.T, case.K, case.E), case.E)
    S, width = case.T * case.K, case.I if case.kind in ("relu2", "gelu_tanh") else 2 * case.I
    rows, pre = random.normal(S, case.H, dtype=case.dtype), random.normal(S, width, dtype=case.dtype)
    padding = plan.row_slot < 0
    rows[padding], pre[padding] = torch.nan, torch.nan
    down = random.matrix(case.E, case.I, case.H, dtype=case.dtype)
    down = down.mT if case.transposed else down.mT.contiguous()
    weights = random.weights(case.T, case.K) if case.weighted else None
    return [rows, down, pre, plan.offsets[1:], plan.row_slot, plan.slot_row,
            case.kind, case.alpha, case.limit, case.interleaved, weights, True, case.weighted]  # fmt: skip


def wide(argument):
    """float64 for the truth; padding rows hold NaN that must not matter."""
    is_float = isinstance(argument, torch.Tensor) and argument.is_floating_point()
    return argument.double() if is_float else argument


def spread(rows, down, pre, offs, row_slot, slot_row, kind, alpha, limit, interleaved, *rest):
    """The norm of the routing weights' gradients with the magnitudes of all terms added up."""
    sizes = reference.grouped_mm(rows.abs(), down.abs(), offs)
    value = reference.activate(pre, kind, alpha, limit, interleaved, row_slot).abs()
    return (sizes * value).sum(dim=1)[row_slot >= 0].norm().item()


def down_backward(*args):
    with torch.no_grad():
        return torch.ops.polymoe.down_backward(*args, backend="triton")


@pytest.mark.parametrize("case", DOWN_CASES, ids=name_of)
def test_down_backward(case, seed):
    args = made(case, seed)
    with checked() as found:
        results = down_backward(*args)
    assert found == []
    truths = reference.down_backward(*map(wide, args))
    u32, padding = unit_roundoff(F32), args[4] < 0
    # Every term of a routing weight's gradient is off by the rounding of a sum and of an activation.
    bounds = [
        unit_roundoff(case.dtype) + (growth(case.H) + FUNCTION_ERRORS) * u32,
        unit_roundoff(case.dtype) + FUNCTION_ERRORS * u32,
        (growth(case.H) + growth(case.I) + FUNCTION_ERRORS)
        * u32
        * spread(*map(wide, args))
        / (truths[2].norm().item() or 1.0),
    ]
    for name, got, truth, bound in zip(("d_pre", "activated", "d_weights"), results, truths, bounds, strict=True):
        assert got.shape == truth.shape
        if name != "d_weights":
            assert not got[padding].any(), name
        if truth.any():
            assert relative_frobenius(got, truth) <= bound, name
        else:
            assert not got.any(), name


@pytest.mark.parametrize("case", [DOWN_CASES[0], DOWN_CASES[3]], ids=name_of)
def test_down_backward_is_batch_invariant(case, seed):
    """A token's rows do not depend on which others there are: with fewer rows, and so another height of the tiles."""
    args = made(case, seed)
    whole = down_backward(*args)
    tokens = torch.arange(case.T)[3:5]
    slot_row = args[5][tokens]
    kept = slot_row[slot_row >= 0].sort().values.long()  # still sorted by expert
    S = len(tokens) * case.K
    part, slots = list(args), torch.full((S,), -1, dtype=torch.int32)
    few = torch.full((len(tokens), case.K), -1, dtype=torch.int32)
    for new, row in enumerate(kept.tolist()):
        token, k = divmod(int((slot_row == row).flatten().nonzero()), case.K)
        slots[new], few[token, k] = token * case.K + k, new
    rows = torch.cat([kept, kept.new_zeros(S - len(kept))])
    ends = torch.stack([(kept < end).sum() for end in args[3]]).int()
    part[0], part[2], part[3:6], part[10] = args[0][rows], args[2][rows], (ends, slots, few), args[10][tokens]
    alone = down_backward(*part)
    assert_same_bits(alone[0][: len(kept)], whole[0][kept], "d_pre")
    assert_same_bits(alone[1][: len(kept)], whole[1][kept], "activated")
    assert_same_bits(alone[2], whole[2][tokens], "d_weights")


# --- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_experts_are_as_precise_as_eager(dtype, seed):
    """The interpreter is too slow for 10^5 outputs. The norm of n independent errors varies by 1/sqrt(2n) of itself,
    the quotient of two norms by 1/sqrt(n)."""
    made, ids, grad, theirs, truth = on_every_backend.precision_problem(dtype, seed, tokens=96, experts=5, k=3)
    ours = on_every_backend.layer_gradients(lambda *args: polymoe.experts(*args, backend="triton"), made, ids, grad)
    for name, a, b, c in zip(("x", "gate_up", "down", "weights"), ours, theirs, truth, strict=True):
        assert a.dtype == b.dtype
        sampling = 1 + DEVIATIONS / math.sqrt(c.numel())
        assert relative_frobenius(a, c) <= 1.05 * sampling * relative_frobenius(b, c), name


@pytest.mark.parametrize("placement", ["output", "activation", "input"])
def test_gradients_are_those_of_the_reference(placement, seed):
    """With biases, skipped slots and weights the other way round."""
    random, T, H, I, E, K = Random(seed), 17, 24, 20, 4, 2
    tensors = [random.normal(T, H), random.matrix(E, H, 2 * I, dtype=F32, reduction=-2)]
    tensors += [random.matrix(E, I, H, dtype=F32, reduction=-2), random.weights(T, K)]
    tensors += [random.normal(E, 2 * I), random.normal(E, H)]
    ids, grad = routing(random, "skipping", T, K, E), random.normal(T, H)

    def gradients_on(backend, tensors):
        x, gate_up, down, weights, *biases = leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = polymoe.experts(
            x, gate_up, down, weights, ids, "swiglu_oai", None, 1.5, *biases, True, True, placement, backend=backend
        )
        return torch.autograd.grad(out, leaves, grad.to(out.dtype))

    found = gradients_on("triton", tensors)
    for got, truth in zip(found, gradients_on("reference", [t.double() for t in tensors]), strict=True):
        assert relative_frobenius(got, truth) < 3 * growth(2 * I + H) * unit_roundoff(F32)
