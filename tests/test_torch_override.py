"""torch's own grouped_mm on the CPU, served by polymoe: same calls, layouts and refusals, and no trace behind."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from polymoe.integrations import torch as override
from polymoe.testing.cases import LAYOUTS, Random, laid_out
from polymoe.testing.conformance import grouped_mm as conformance
from polymoe.testing.conformance.grouped_mm import Case, make_inputs
from polymoe.testing.poison import poisoned
from polymoe.testing.tolerances import (
    assert_same_bits,
    assert_within,
    bits,
    dot_error,
    relative_frobenius,
    rounding_error,
    unit_roundoff,
)

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
FORMS = ["2x3", "3x2", "2x2", "3x3"]
DTYPES = [BF16, F16, F32]


def dispatch_state() -> tuple[str, str]:
    name = "aten::_grouped_mm"
    return torch._C._dispatch_dump(name), torch._C._dispatch_dump_table(name)


@pytest.fixture(autouse=True)
def without_trace(seed: int) -> Iterator[None]:
    torch.manual_seed(seed)
    before = dispatch_state()
    yield
    assert not override.enabled()
    assert dispatch_state() == before


@contextmanager
def expect_calls(served: int, passed_on: int = 0) -> Iterator[None]:
    before = override.calls()
    yield
    after = override.calls()
    assert (after.served - before.served, after.passed_on - before.passed_on) == (served, passed_on)


# --- one call -------------------------------------------------------------------------------------------------------


def case_of(form: str, dtype: torch.dtype, layouts: tuple[str, str], N: int = 40, rest: int = 0) -> Case:
    """Sizes whose strides are multiples of 16 bytes, for both layouts of both operands."""
    sizes = (3,) if form == "3x3" else (8, 0, 24, 16)
    return Case(form, 24, N, 48, sizes, rest=rest, dtype=dtype, layouts=layouts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_every_layout(form: str, dtype: torch.dtype, seed: int) -> None:
    for layouts in itertools.product(("contiguous", "transposed"), repeat=2):
        case = case_of(form, dtype, layouts, rest=0 if form == "3x3" else 8)
        a, b, offs, _ = make_inputs(case, Random(seed))
        theirs = F.grouped_mm(a, b, offs=offs)
        with override.grouped_mm(), expect_calls(1), poisoned():
            ours = F.grouped_mm(a, b, offs=offs)
        assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
        value, magnitude = conformance.truth(a, b, offs, None)
        bound = rounding_error(value, dtype, dot_error(magnitude, a.shape[-1], dtype))
        assert_within(ours, value, bound, f"{form} {layouts}")  # the truth of what belongs to no group is zero


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_the_result_are_padded_as_torch_pads_them(form: str, seed: int) -> None:
    for dtype, N in itertools.product(DTYPES, (3, 37)):
        case = case_of(form, dtype, ("contiguous", "transposed"), N=N)
        a, b, offs, _ = make_inputs(case, Random(seed))
        theirs = F.grouped_mm(a, b, offs=offs)
        with override.grouped_mm(), expect_calls(1):
            ours = F.grouped_mm(a, b, offs=offs)
        assert (ours.shape, ours.stride()) == (theirs.shape, theirs.stride())
        assert ours.stride(-2) % (16 // dtype.itemsize) == 0


@st.composite
def arguments(draw: st.DrawFn) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments that torch takes, and all kinds that it refuses."""
    form, dtype = draw(st.sampled_from(FORMS)), draw(st.sampled_from(DTYPES))
    often = st.sampled_from  # the first entry repeats, so that most calls are as they should be
    aligned = draw(often([True, True, True, False]))
    size = st.sampled_from([0, 8, 16, 32] if aligned else [1, 3, 8, 20])
    G, M, N, D = draw(st.integers(0, 3)), draw(size), draw(size), draw(size)
    sizes = draw(st.lists(st.sampled_from([0, 8, 16] if aligned else [0, 1, 8]), min_size=G, max_size=G))
    cut = sum(sizes) + draw(often([0, 0, 8]))
    M, N, D = (cut if form == "2x3" else M), (cut if form == "3x2" else N), (cut if form == "2x2" else D)
    random = Random(draw(st.integers(0, 2**31)))
    layout = often(["contiguous", "transposed", "contiguous", "transposed", *LAYOUTS])
    other = draw(often([dtype] * 9 + [F32, F64]))
    a = laid_out(random.normal(*((M, D) if form[0] == "2" else (G, M, D)), dtype=dtype), draw(layout))
    wrong = draw(often([0] * 9 + [8]))
    b_shape = (D + wrong, N) if form[2] == "2" else (G + draw(often([0] * 9 + [1])), D + wrong, N)
    b = laid_out(random.normal(*b_shape, dtype=other), draw(layout))
    ends = torch.tensor(sizes, dtype=torch.int64).cumsum(0)
    ends = ends + draw(often([0] * 9 + [-4, 40]))
    ends = draw(often([ends] * 9 + [ends.flip(0), torch.cat([ends, ends[-1:]])]))
    offs = ends.to(draw(often([torch.int32] * 9 + [torch.int64])))
    given_offs = (form == "3x3") == draw(often([False] * 9 + [True]))
    options = {"offs": offs if given_offs else None}
    options |= draw(
        often([{}] * 9 + [{"bias": random.normal(N, dtype=dtype)}, {"out_dtype": dtype}, {"out_dtype": F32}])
    )
    return (a, b), options


def attempt(call: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor | tuple[type, str]:
    try:
        with poisoned():
            return call(*args, **options)
    except Exception as error:
        return type(error), str(error)


@given(arguments=arguments())
def test_takes_and_refuses_what_torch_does(arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    (a, b), options = arguments
    theirs = attempt(F.grouped_mm, a, b, **options)
    before = override.calls()
    with override.grouped_mm():
        ours = attempt(F.grouped_mm, a, b, **options)
    if isinstance(theirs, tuple):
        assert ours == theirs
        return
    assert isinstance(ours, Tensor)
    assert (ours.dtype, ours.shape, ours.stride()) == (theirs.dtype, theirs.shape, theirs.stride())
    if override.calls().served == before.served:  # torch's own kernel, with ends that it clamps
        assert_same_bits(ours, theirs, "passed on")
        return
    value, magnitude = conformance.truth(a, b, options["offs"], None)
    bound = rounding_error(value, a.dtype, dot_error(magnitude, a.shape[-1], a.dtype))
    assert_within(ours, value, bound, "served")


def test_unusual_ends_are_torchs_affair(seed: int) -> None:
    random = Random(seed)
    a, b = random.matrix(16, 8, dtype=F32), random.normal(3, 8, 8)
    for ends in ([8, 4, 16], [8, 12, 40], [-8, 8, 16]):
        offs = torch.tensor(ends, dtype=torch.int32)
        theirs = attempt(F.grouped_mm, a, b, offs=offs)
        with override.grouped_mm(), expect_calls(0, passed_on=1):
            ours = attempt(F.grouped_mm, a, b, offs=offs)
        assert isinstance(ours, Tensor) == isinstance(theirs, Tensor)
        if isinstance(theirs, Tensor):
            assert_same_bits(ours, theirs, str(ends))
        else:
            assert ours == theirs


# --- in place and gone ----------------------------------------------------------------------------------------------

SMALL = Case("2x3", 0, 16, 32, (3, 5), dtype=BF16)


@pytest.mark.filterwarnings("error")
def test_holds_add_up(seed: int) -> None:
    a, b, offs, _ = make_inputs(SMALL, Random(seed))
    steps = [override.enable, override.enable, override.disable, override.enable, override.disable, override.disable]
    for step, holds in zip(steps, [1, 2, 1, 2, 1, 0], strict=True):
        step()
        assert override.enabled() == (holds > 0)
        with expect_calls(1 if holds else 0):
            F.grouped_mm(a, b, offs=offs)
    with override.grouped_mm(), override.grouped_mm():
        pass
    with pytest.raises(RuntimeError, match=r"disable: expected an enable\(\) before"):
        override.disable()


@pytest.mark.filterwarnings("error")
def test_an_exception_ends_it(seed: int) -> None:
    a, b, offs, _ = make_inputs(SMALL, Random(seed))
    expected = F.grouped_mm(a, b, offs=offs)
    with pytest.raises(RuntimeError, match="Bias not supported"), override.grouped_mm():
        F.grouped_mm(a, b, offs=offs, bias=a)
    with expect_calls(0):
        assert_same_bits(F.grouped_mm(a, b, offs=offs), expected, "torch's own kernel")


@pytest.mark.filterwarnings("error")
def test_tracing_forgets_it_too(seed: int) -> None:
    """Torch remembers which key of an op has a kernel when it traces: a stale entry would name one that is gone."""
    a, b, offs, _ = make_inputs(SMALL, Random(seed))
    for on, calls in ((True, 1), (False, 0), (True, 1), (False, 0)):
        with override.grouped_mm() if on else nullcontext(), enable_python_dispatcher(), expect_calls(calls):
            torch._grouped_mm(a, b, offs)


def test_threads_come_and_go(seed: int) -> None:
    """Some threads switch while others compute: every result is right, and nothing is left."""
    a, b, offs, _ = make_inputs(SMALL, Random(seed))
    allowed = [bits(F.grouped_mm(a, b, offs=offs))]
    with override.grouped_mm():
        allowed.append(bits(F.grouped_mm(a, b, offs=offs)))
    failures: list[str] = []

    def compute() -> None:
        for _ in range(300):
            result = bits(F.grouped_mm(a, b, offs=offs))
            if not any(torch.equal(result, right) for right in allowed):
                failures.append("a wrong result")

    def switch() -> None:
        for _ in range(300):
            with override.grouped_mm():
                if not override.enabled():
                    failures.append("not in place")

    threads = [threading.Thread(target=target) for target in (compute, switch, compute, switch)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# --- gradients ------------------------------------------------------------------------------------------------------


def by_group(a: Tensor, b: Tensor, offs: Tensor | None) -> Tensor:
    """Group by group with ordinary operations, which autograd knows."""
    if offs is None:
        return a @ b
    ends = [0, *offs.tolist()]
    groups = list(itertools.pairwise(ends))
    if a.dim() == 2 and b.dim() == 2:
        return torch.stack([a[:, i:j] @ b[i:j] for i, j in groups])
    if a.dim() == 2:
        return torch.cat([a[i:j] @ b[g] for g, (i, j) in enumerate(groups)])
    return torch.cat([a[g] @ b[:, i:j] for g, (i, j) in enumerate(groups)], dim=1)


def gradients(call: Callable[..., Tensor], a: Tensor, b: Tensor, offs: Tensor | None, grad: Tensor) -> list[Tensor]:
    leaves = [a.detach().requires_grad_(), b.detach().requires_grad_()]
    return list(torch.autograd.grad(call(*leaves, offs=offs), leaves, grad))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_gradients(form: str, dtype: torch.dtype, seed: int) -> None:
    random = Random(seed)
    for layouts in itertools.product(("contiguous", "transposed"), repeat=2):
        a, b, offs, _ = make_inputs(case_of(form, dtype, layouts), random)
        grad = random.normal(*F.grouped_mm(a, b, offs=offs).shape, dtype=dtype)
        exact = gradients(by_group, a.double(), b.double(), offs, grad.double())
        sums = gradients(by_group, a.double().abs(), b.double().abs(), offs, grad.double().abs())
        theirs = gradients(F.grouped_mm, a, b, offs, grad)
        with override.grouped_mm(), poisoned(), expect_calls(3):
            ours = gradients(F.grouped_mm, a, b, offs, grad)
        for name, got, other, value, magnitude in zip("ab", ours, theirs, exact, sums, strict=True):
            assert (got.dtype, got.shape, got.stride()) == (other.dtype, other.shape, other.stride())
            bound = rounding_error(value, dtype, dot_error(magnitude, max(*a.shape, *b.shape), dtype))
            for result in (got, other):
                assert_within(result, value, bound, f"{form} {layouts}: gradient of {name}")


def test_transforms_of_torch_func(seed: int) -> None:
    a, b, offs, _ = make_inputs(case_of("2x3", F32, ("contiguous", "transposed")), Random(seed))
    many = torch.stack([a, 2 * a])

    def loss(a: Tensor) -> Tensor:
        return F.grouped_mm(a, b, offs=offs).square().sum()

    expected = torch.func.grad(loss)(a), torch.vmap(loss)(many)
    with override.grouped_mm():
        got = torch.func.grad(loss)(a), torch.vmap(loss)(many)
    for ours, theirs in zip(got, expected, strict=True):
        assert relative_frobenius(ours, theirs) <= 2 * (a.shape[1] + b.shape[2]) * unit_roundoff(F32)


# --- models ---------------------------------------------------------------------------------------------------------


class MoE(nn.Module):
    """A routed layer as training frameworks write it: rows sorted by expert, three grouped products, scattered back."""

    def __init__(self, dim: int, hidden: int, experts: int, top_k: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.top_k, self.experts = top_k, experts
        self.router = nn.Linear(dim, experts, bias=False, dtype=dtype)
        self.w1 = nn.Parameter(torch.randn(experts, hidden, dim).mul(dim**-0.5).to(dtype))
        self.w2 = nn.Parameter(torch.randn(experts, dim, hidden).mul(hidden**-0.5).to(dtype))
        self.w3 = nn.Parameter(torch.randn(experts, hidden, dim).mul(dim**-0.5).to(dtype))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.topk(torch.sigmoid(self.router(x).float()), self.top_k, dim=1)

    def forward(self, x: Tensor, routing: tuple[Tensor, Tensor]) -> Tensor:
        scores, selected = routing
        counts = torch.histc(selected.view(-1).float(), bins=self.experts, min=0, max=self.experts)
        order = torch.argsort(selected.view(-1), stable=True)
        tokens = order // self.top_k
        rows = (x[tokens].float() * scores.view(-1)[order, None]).to(x.dtype)
        offsets = torch.cumsum(counts, dim=0, dtype=torch.int32)
        hidden = F.silu(F.grouped_mm(rows, self.w1.transpose(-2, -1), offs=offsets))
        hidden = hidden * F.grouped_mm(rows, self.w3.transpose(-2, -1), offs=offsets)
        routed = F.grouped_mm(hidden, self.w2.transpose(-2, -1), offs=offsets)
        return torch.zeros_like(x).scatter_add(0, tokens[:, None].expand_as(routed), routed)


def exact_moe(layer: MoE, x: Tensor, routing: tuple[Tensor, Tensor]) -> Tensor:
    """The layer in the dtype of its arguments, expert by expert."""
    scores, selected = routing
    out = torch.zeros_like(x)
    for e in range(layer.experts):
        token, slot = torch.where(selected == e)
        rows = x[token] * scores[token, slot, None]
        h = F.silu(rows @ layer.w1[e].t()) * (rows @ layer.w3[e].t())
        out = out.index_add(0, token, h @ layer.w2[e].t())
    return out


def forward_and_backward(
    call: Callable[..., Tensor], layer: MoE, x: Tensor, *routing: Any, grad: Tensor
) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out = call(x, *routing)
    return [out.detach(), *torch.autograd.grad(out, [x, layer.w1, layer.w2, layer.w3], grad)]


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_training_code(dtype: torch.dtype) -> None:
    """Forward, dX and all dW are as accurate as with torch's kernel; with its tokens one expert has none."""
    layer, x = MoE(256, 128, 8, 2, dtype), torch.randn(448, 256).to(dtype)
    with torch.no_grad():
        layer.router.weight[5] = 0
        scores, selected = layer.route(x)
        selected[selected == 5] = 2
    routing, grad = (scores, selected), torch.randn_like(x)
    theirs = forward_and_backward(layer, layer, x, routing, grad=grad)
    with override.grouped_mm(), expect_calls(9):
        ours = forward_and_backward(layer, layer, x, routing, grad=grad)
    with expect_calls(0):
        layer(x, routing)
    wide = MoE(256, 128, 8, 2, F64)
    wide.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    truth = forward_and_backward(
        lambda x: exact_moe(wide, x, (scores.double(), selected)), wide, x.double(), grad=grad.double()
    )
    names = ("out", "x", "w1", "w2", "w3")
    for name, got, other, exact in zip(names, ours, theirs, truth, strict=True):
        assert exact.numel() >= 10**5
        error, eager = relative_frobenius(got, exact), relative_frobenius(other, exact)
        assert error <= 1.05 * eager, f"{name}: relative error {error:.4g}, with torch's kernel {eager:.4g}"
    assert not ours[2][5].any()


VOCAB, HIDDEN, INTERMEDIATE, EXPERTS, LAYERS = 96, 64, 48, 8, 2
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "initializer_range": 0.2,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**COMMON, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS)
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**COMMON, head_dim=16, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS)
    ),
}


def logits_and_gradients(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(tokens, use_cache=False).logits
    logits.log_softmax(-1)[..., 0].mean().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


@pytest.mark.parametrize("name", MODELS)
def test_transformers(name: str) -> None:
    """Logits and all gradients of float32 models; every product and every gradient of one goes through polymoe."""
    model, tokens = MODELS[name]().eval(), torch.randint(VOCAB, (3, 24))
    model.set_experts_implementation("grouped_mm")
    theirs = logits_and_gradients(model, tokens)
    with override.grouped_mm(), expect_calls(LAYERS * 2 * 3):
        ours = logits_and_gradients(model, tokens)
    with expect_calls(0):
        model(tokens)
    model.double().set_experts_implementation("eager")
    truth = logits_and_gradients(model, tokens)
    assert ours.keys() == theirs.keys() == truth.keys()
    # n u for a chain of sums of n terms is far above the sqrt(n) u of independent roundings; twice for the way back.
    bound = 2 * LAYERS * (4 * HIDDEN + INTERMEDIATE + tokens.numel()) * unit_roundoff(F32)
    for key, exact in truth.items():
        for result in (ours[key], theirs[key]):
            assert relative_frobenius(result, exact) <= bound, key


# --- compiled -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_dynamo")
def test_compiled_training_code() -> None:
    """A graph traced with or without the override calls what is in place when it runs."""
    layer, x = MoE(64, 32, 4, 2, BF16), torch.randn(24, 64).to(BF16)
    routing, grad = tuple(t.detach() for t in layer.route(x)), torch.randn_like(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    eager = {}
    for on in (True, False):
        with override.grouped_mm() if on else nullcontext():
            eager[on] = forward_and_backward(layer, layer, x, routing, grad=grad)
    for on in (True, False, True):
        with override.grouped_mm() if on else nullcontext(), expect_calls(9 if on else 0):
            got = forward_and_backward(compiled, layer, x, routing, grad=grad)
        for result, expected in zip(got, eager[on], strict=True):
            assert_same_bits(result, expected, f"compiled, override {on}")


@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor(seed: int) -> None:
    """Inductor reads results in torch's layout, padded rows included, without looking at them."""
    a, b, offs, _ = make_inputs(case_of("2x3", BF16, ("contiguous", "transposed"), N=37), Random(seed))

    def function(a: Tensor) -> Tensor:
        return F.grouped_mm(a, b, offs=offs).abs()

    compiled = torch.compile(function, fullgraph=True)
    for on in (True, False):
        with override.grouped_mm() if on else nullcontext():
            expected = function(a)
            with expect_calls(int(on)):
                assert_same_bits(compiled(a), expected, f"override {on}")
