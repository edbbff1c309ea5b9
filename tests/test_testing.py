"""The conformance kit itself: it accepts what is right, and finds what is planted."""

import ctypes
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from polymoe import reference
from polymoe.hal import registry
from polymoe.hal.registry import register_backend, unregister_backend
from polymoe.testing import plugin
from polymoe.testing.cases import LAYOUTS, ROUTINGS, Random, laid_out, name_of, routing
from polymoe.testing.conformance import activate, bitwise, combine, dispatch, experts, gate, grouped_mm, plan, protocol
from polymoe.testing.poison import poisoned
from polymoe.testing.targets import Target, targets
from polymoe.testing.tolerances import assert_same_bits, assert_within, growth, rounding_error

BF16, F32 = torch.bfloat16, torch.float32


def cpu(op):
    return lambda *args: getattr(torch.ops.polymoe, op)(*args, backend="cpu")


def plan_unstable(ids, num_experts):
    offsets, row_slot, slot_row = reference.plan(ids.flip(0, 1), num_experts)
    last = ids.numel() - 1
    return offsets, torch.where(row_slot < 0, -1, last - row_slot), slot_row.flip(0, 1)


def plan_clamps(ids, num_experts):
    return reference.plan(ids.clamp(max=num_experts - 1), num_experts)


def plan_32_bits(ids, num_experts):
    return reference.plan(ids.int(), num_experts)


def plan_padding(ids, num_experts):
    offsets, row_slot, slot_row = reference.plan(ids, num_experts)
    return offsets, row_slot.clamp(min=0), slot_row


def dispatch_padding(x, row_slot, slot_row, weights=None):
    return reference.dispatch(x, row_slot.clamp(min=0), slot_row, weights)


def dispatch_rounds_weights(x, row_slot, slot_row, weights=None):
    return reference.dispatch(x, row_slot, slot_row, None if weights is None else weights.to(x.dtype))


def dispatch_writes_its_input(x, row_slot, slot_row, weights=None):
    out = reference.dispatch(x, row_slot, slot_row, weights)
    x[:1] = 0
    return out


def combine_drops_a_slot(y, slot_row, weights=None, out_dtype=None):
    return reference.combine(y, slot_row[:, :-1], None if weights is None else weights[:, :-1], out_dtype)


def combine_reads_padding(y, slot_row, weights=None, out_dtype=None):
    zero = y[:1] * 0
    return reference.combine(y, torch.where(slot_row < 0, y.shape[0] - 1, slot_row), weights, out_dtype) + zero.sum()


def combine_in_low_precision(y, slot_row, weights=None, out_dtype=None):
    total = y.new_zeros(slot_row.shape[0], y.shape[1])
    for k in range(slot_row.shape[1]):
        row = slot_row[:, k].long()
        term = y[row] if weights is None else (y[row] * weights[:, k, None]).to(y.dtype)
        total += term.where(row[:, None] >= 0, 0)
    return total.to(out_dtype or y.dtype)


def matmul_leaves_rows(a, b, offs=None, bias=None, out_dtype=None):
    """As torch.empty leaves them, which is mostly zero without poison."""
    right = reference.grouped_mm(a, b, offs, bias, out_dtype)
    out = torch.empty_like(right)
    if a.dim() == 2 and b.dim() == 3:
        out[: offs[-1]] = right[: offs[-1]]
        return out
    return right


def matmul_drops_a_term(a, b, offs=None, bias=None, out_dtype=None):
    return reference.grouped_mm(a[..., :-1], b[..., :-1, :], offs, bias, out_dtype)


def matmul_rounds_twice(a, b, offs=None, bias=None, out_dtype=None):
    return reference.grouped_mm(a, b, offs, None, a.dtype).float().add(bias.float()[0]).to(out_dtype or a.dtype)


def activate_low_precision(
    h, kind, alpha=None, limit=None, interleaved=False, row_slot=None, weights=None, out_dtype=None
):
    out = reference.activate(h.bfloat16(), kind, alpha, limit, interleaved, row_slot, weights, F32)
    return out.to(out_dtype or h.dtype)


def activate_one_sided(h, kind, alpha=None, limit=None, interleaved=False, row_slot=None, weights=None, out_dtype=None):
    return reference.activate(h.clamp(max=limit), "swiglu", None, None, interleaved, row_slot, weights, out_dtype)


def activate_padding(h, kind, alpha=None, limit=None, interleaved=False, row_slot=None, weights=None, out_dtype=None):
    rows = None if row_slot is None else row_slot.clamp(min=0)
    return reference.activate(h, kind, alpha, limit, interleaved, rows, weights, out_dtype)


def gate_ties_to_the_larger(logits, k, *options):
    weights, ids = reference.gate(logits.flip(1), k, *options)
    return weights, torch.where(ids < 0, -1, logits.shape[1] - 1 - ids)


def gate_weighs_with_the_bias(logits, k, scoring="softmax", bias=None, *options):
    weights, ids = reference.gate(logits, k, scoring, bias, *options)
    return weights + (0 if bias is None else bias[ids]), ids


def gate_selects_nan(logits, k, *options):
    return reference.gate(logits.nan_to_num(posinf=3e38, neginf=-3e38), k, *options)


def experts_round_the_pre_activation(x, gate_up, down, weights, ids, *rest):
    """Too small a difference for the bounds, not for the comparison with the small ops."""
    offsets, row_slot, slot_row = reference.plan(ids, gate_up.shape[0])
    h = reference.grouped_mm(reference.dispatch(x, row_slot, slot_row), gate_up.mT, offsets[1:])
    a = reference.activate(h, "swiglu", row_slot=row_slot)
    out = reference.combine(reference.grouped_mm(a, down.mT, offsets[1:], None, F32), slot_row, weights, x.dtype)
    return out, *reference.experts(x, gate_up, down, weights, ids, *rest)[1:]


def experts_forget_a_bias(*args):
    return reference.experts(*args[:9], None, *args[10:])


NORMAL = experts.Case(T=9, H=70, I=37, E=6, K=3, dtype=BF16)

PLANTED = [
    (plan_unstable, plan, plan.Case(T=20, K=4, E=3, pattern="repeated")),
    (plan_clamps, plan, plan.Case(T=20, K=4, E=3, pattern="skipping")),
    (plan_32_bits, plan, plan.Case(T=60, K=4, E=3, pattern="skipping", ids_dtype=torch.int64)),
    (plan_padding, plan, plan.Case(T=20, K=4, E=3, pattern="skipping")),
    (dispatch_padding, dispatch, dispatch.Case(T=20, H=5, K=4, E=3, pattern="skipping")),
    (dispatch_rounds_weights, dispatch, dispatch.Case(T=20, H=5, K=4, E=9, weights=F32, dtype=BF16)),
    (dispatch_writes_its_input, dispatch, dispatch.Case(T=20, H=5, K=4, E=9)),
    (combine_drops_a_slot, combine, combine.Case(T=20, H=5, K=4, E=9, dtype=BF16)),
    (combine_reads_padding, combine, combine.Case(T=20, H=5, K=4, E=9, pattern="skipping")),
    (combine_in_low_precision, combine, combine.Case(T=20, H=50, K=4, E=9, dtype=BF16)),
    (matmul_leaves_rows, grouped_mm, grouped_mm.Case("2x3", 0, 9, 8, (3, 2), rest=2)),
    (matmul_drops_a_term, grouped_mm, grouped_mm.Case("2x3", 0, 33, 2881, (3, 2), dtype=BF16, out_dtype=F32)),
    (matmul_rounds_twice, grouped_mm, grouped_mm.Case("2x3", 0, 330, 50, (30,), dtype=BF16, bias=F32)),
    (activate_low_precision, activate, activate.Case(T=9, I=33)),
    (activate_one_sided, activate, activate.Case(T=9, I=33, kind="swiglu_clamped", limit=1.0, dtype=BF16)),
    (activate_padding, activate, activate.Case(T=9, I=33, K=3, pattern="skipping", weights=F32)),
    (gate_ties_to_the_larger, gate, gate.Case(T=9, E=20, k=3, logits="ties")),
    (gate_weighs_with_the_bias, gate, gate.Case(T=9, E=20, k=3, scoring="sigmoid", bias=True)),
    (gate_selects_nan, gate, gate.Case(T=60, E=20, k=4, logits="wild")),
    (experts_round_the_pre_activation, experts, NORMAL),
    (experts_forget_a_bias, experts, experts.Case(T=9, H=70, I=37, E=6, K=3, bias=F32)),
]


class Planted:
    """The reference, or another backend, with one op replaced."""

    name = "planted"
    device_types = ("cpu",)
    deterministic = True
    batch_invariant = True

    def __init__(self, op, function, otherwise):
        self.op, self.function, self.otherwise = op, function, otherwise

    def supports(self, op, problem):
        return None

    def implementation(self, op):
        return self.function if op == self.op else self.otherwise(op)


@pytest.fixture
def plant():
    def register(op, function, otherwise=lambda op: getattr(reference, op)):
        register_backend(Planted(op, function, otherwise))
        return Target("planted")

    yield register
    unregister_backend("planted")


@pytest.mark.parametrize(("function", "checks", "case"), PLANTED, ids=lambda value: getattr(value, "__name__", ""))
def test_planted_bugs_are_found(function, checks, case, plant, seed):
    op = checks.__name__.rpartition(".")[2]
    checks.check(case, Target("reference"), seed)
    with pytest.raises(AssertionError):
        checks.check(case, plant(op, function), seed)


def flip_experts(condition):
    """The cpu backend, with the terms of the first reduction in another order where `condition` holds."""

    def experts_op(x, gate_up, *rest):
        if condition(x):
            x, gate_up = x.flip(1), gate_up.flip(2)
        return cpu("experts")(x, gate_up, *rest)

    return experts_op


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16], ids=str)
def test_another_order_of_a_sum_is_found(dtype, plant, seed):
    case = next(case for case in bitwise.EXPERTS if case.dtype == dtype and case.H > case.I)
    target = plant("experts", flip_experts(lambda x: x.shape[0] == 1 or torch.get_num_threads() == 3), cpu)
    for check in (bitwise.check_experts_batch, bitwise.check_experts_threads, bitwise.check_experts_composition):
        check(case, Target("cpu"), seed)
        with pytest.raises(AssertionError, match="differ in their bits"):
            check(case, target, seed)


def test_a_matmul_that_depends_on_the_batch_is_found(plant, seed):
    def matmul(a, b, *rest):
        return cpu("grouped_mm")(a.flip(1), b.flip(1), *rest) if a.shape[0] == 7 else cpu("grouped_mm")(a, b, *rest)

    with pytest.raises(AssertionError, match="a token among 7 and among"):
        bitwise.check_grouped_mm(150, 4301, 37, BF16, plant("grouped_mm", matmul, cpu), seed)


def test_poison():
    with poisoned():
        for dtype in (F32, BF16, torch.float16, torch.float64):
            assert torch.empty(1000, dtype=dtype).isnan().all()
            assert torch.zeros(3, dtype=dtype).new_empty(50, 7).isnan().all()
        assert (torch.empty(1000, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
        if platform.libc_ver()[0] == "glibc":
            libc = ctypes.CDLL(None)
            libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
            for size in (5000, 2**20, 2**27):
                memory = libc.malloc(size)
                assert ctypes.string_at(memory, size) == b"\x7f" * size
                libc.free(memory)
    assert not torch.are_deterministic_algorithms_enabled()


def test_assert_within():
    truth = torch.tensor([1.0, torch.inf, torch.nan], dtype=torch.float64)
    bound = torch.full((3,), 1e-3, dtype=torch.float64)
    assert_within(torch.tensor([1.0005, torch.inf, torch.nan]), truth, bound, "right")
    for wrong in ([1.002, torch.inf, torch.nan], [torch.nan] * 3, [1.0, -torch.inf, torch.nan], [1.0, torch.inf, 0.0]):
        with pytest.raises(AssertionError, match=r"(1|2) of 3 elements are off"):
            assert_within(torch.tensor(wrong), truth, bound, "wrong")
    with pytest.raises(AssertionError, match="shape"):
        assert_within(torch.ones(2), truth, bound, "wrong")


def test_assert_same_bits():
    a = torch.tensor([0.0, torch.nan])
    assert_same_bits(a, a.clone(), "same")
    with pytest.raises(AssertionError, match="1 of 2"):
        assert_same_bits(a, torch.tensor([-0.0, torch.nan]), "signs")
    with pytest.raises(AssertionError, match="dtype"):
        assert_same_bits(a, a.bfloat16(), "dtype")


def test_bounds_are_as_tight_as_they_claim(seed):
    """One rounding of a random number stays within its bound and reaches half of it; a sum of n terms never may be off
    by more than one unit per term."""
    values = Random(seed).normal(1000, dtype=torch.float64)
    for dtype in (F32, BF16, torch.float16):
        share = (values.to(dtype).double() - values).abs() / rounding_error(values, dtype)
        assert 0.5 < float(share.max()) <= 1
    assert [growth(1), growth(10)] == [2, 11]
    assert growth(10**4) < 10**3


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_layouts_keep_the_values(layout, seed):
    for shape in ((5, 4), (3, 4, 6), (7,), (0, 3)):
        tensor = Random(seed).normal(*shape)
        view = laid_out(tensor, layout)
        expected = tensor[:1].expand_as(tensor) if layout == "expanded" and shape[0] else tensor
        assert torch.equal(view, expected)
        assert layout == "contiguous" or view.numel() == 0 or len(shape) == 1 or not view.is_contiguous()


@pytest.mark.parametrize("pattern", sorted(ROUTINGS))
@pytest.mark.parametrize("E", [1, 2, 3, 50])
def test_routings(pattern, E, seed):
    ids = routing(Random(seed), pattern, 40, 3, E)
    assert ids.shape == (40, 3)
    inside = (ids >= 0) & (ids < E)
    assert bool(inside.all()) == (pattern not in ("skipping", "all_skipped"))
    assert bool(inside.any()) == (pattern != "all_skipped")


def test_names_of_cases():
    assert name_of(plan.Case(T=1, K=2, E=3)) == "T=1-K=2-E=3"
    assert name_of(NORMAL) == "T=9-H=70-I=37-E=6-K=3-dtype=bfloat16"


class Absent(Planted):
    """Of a device that no machine has."""

    name = "absent"
    device_types = ("npu",)

    def __init__(self):
        super().__init__("", None, lambda op: getattr(reference, op))


@pytest.fixture
def session():
    """A pytest session with other options."""

    def with_options(*backends, device=None):
        options = {"--polymoe-backend": list(backends), "--polymoe-device": device}
        return SimpleNamespace(config=SimpleNamespace(getoption=options.get))

    return with_options


def test_a_backend_that_is_not_there_is_an_error(session, monkeypatch):
    plugin.pytest_collection(session("reference", "cpu"))
    with pytest.raises(pytest.UsageError, match=r"expected one of .*reference.*, got 'nobody'"):
        plugin.pytest_collection(session("reference", "nobody"))
    monkeypatch.setitem(registry._outside, "broken", registry.BrokenBackend("broken", OSError("no driver")))
    with pytest.raises(pytest.UsageError, match=r"backend broken: its entry point failed to load: OSError: no driver"):
        plugin.pytest_collection(session("broken"))


PROTOCOL = [
    (lambda op, problem: True, lambda op: None, r"supports\('\w+', .*: expected None or a reason, got True"),
    (lambda op, problem: "no", lambda op: None, r"serves no op on cpu; .*: no"),
    (lambda op, problem: None, lambda op: lambda: None, r"implementation\('\w+'\): lacks the arguments "),
    (
        lambda op, problem: None if op == "plan" else "no",
        lambda op: lambda ids, num_experts, how: None,
        r"implementation\('plan'\): requires how, which plan does not have",
    ),
    (
        lambda op, problem: None if op == "combine" else "no",
        lambda op: lambda y, slot_row, weights, out_dtype=None: None,
        r"implementation\('combine'\): weights: expected the default None",
    ),
]


@pytest.mark.parametrize(("supports", "implementation", "message"), PROTOCOL)
def test_wrong_answers_are_found(supports, implementation, message, plant, monkeypatch):
    target = plant("", None)
    protocol.check(target)
    monkeypatch.setattr(Planted, "supports", lambda self, op, problem: supports(op, problem))
    monkeypatch.setattr(Planted, "implementation", lambda self, op: implementation(op))
    with pytest.raises(AssertionError, match=message):
        protocol.check(target)


def test_an_argument_may_be_absent_where_only_its_default_is_served(plant, monkeypatch):
    """As in a backend that is older than the argument."""

    def older(h):
        return None

    target = plant("", None)
    monkeypatch.setattr(
        Planted, "supports", lambda self, op, problem: None if problem.option == {"kind": "swiglu"} else "no"
    )
    monkeypatch.setattr(Planted, "implementation", lambda self, op: older)
    with pytest.raises(AssertionError, match=r"lacks the arguments alpha, limit"):  # kind is not among them
        protocol.check(target)


def test_devices_of_targets():
    register_backend(Absent())
    try:
        (target,) = targets(["absent"])
        assert target.device == "npu"
        assert target.unavailable == "this machine has no npu device that torch knows"
        assert targets(["reference"])[0].device == "cpu"
        (elsewhere,) = targets(["reference"], "meta")
        assert (elsewhere.device, str(elsewhere)) == ("meta", "reference-meta")
        assert elsewhere.declines("activate", F32) is None
        assert Target("absent", device_type="cpu").declines("plan", torch.int32) == "it serves npu tensors, not cpu"
    finally:
        unregister_backend("absent")


def test_parts_that_a_backend_declines(plant, monkeypatch):
    """experts without the small ops is tested for itself."""
    target = plant("activate", None)
    monkeypatch.setattr(Planted, "supports", lambda self, op, problem: "no" if op == "activate" else None)
    assert experts.declined_part(NORMAL, Target("reference")) is None
    assert experts.declined_part(NORMAL, target) == "no activate to compose experts of: no"
    experts.check(NORMAL, target, seed=1)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_kit_runs_from_the_command_line(backend):
    kit = [sys.executable, "-m", "pytest", "-p", "polymoe.testing.plugin", "--pyargs", "polymoe.testing"]
    options = [
        "--polymoe-backend",
        backend,
        "--polymoe-seed",
        "1",
        "-k",
        "plan or combine_bitwise",
        "-p",
        "no:cacheprovider",
    ]
    result = subprocess.run([*kit, *options], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "--polymoe-seed 1" in result.stdout
