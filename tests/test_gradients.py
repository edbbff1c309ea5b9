"""The gradients of the ops: against finite differences and eager PyTorch in float64, and what they cost."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import polymoe
import polymoe.nn
from polymoe.testing.cases import Random, routing
from polymoe.testing.conformance import activate as activate_checks
from polymoe.testing.conformance._run import threads
from polymoe.testing.targets import Target
from polymoe.testing.tolerances import assert_same_bits, relative_frobenius

T, H, I, E, K = 6, 5, 4, 4, 2
S = T * K


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Inputs:
    """Float64 inputs that want gradients, slots that skip, and an expert without rows."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        ids = routing(self.random, "skipping", T, K, E)
        self.ids = ids.masked_fill(ids == 1, 2)
        self.plan = polymoe.plan(self.ids, E)

    def normal(self, *shape: int) -> Tensor:
        return self.random.normal(*shape, dtype=torch.float64).requires_grad_()


def has_slopes(h: Tensor, limit: float | None) -> Tensor:
    """Which pre-activations are far enough from where an activation has no slope for finite differences."""
    kinks = (h, torch.nn.functional.silu(h)) if limit is not None else (h,)
    return torch.stack([((part.abs() - at).abs() > 1e-4) for part in kinks for at in {0.0, limit or 0.0}]).all(0)


# --- against finite differences -------------------------------------------------------------------------------------


def test_rows(backend: str, seed: int) -> None:
    made = Inputs(seed)
    x, y, weights = made.normal(T, H), made.normal(S, H), made.normal(T, K)
    with polymoe.use_backend(backend):
        assert gradcheck(lambda x, w: polymoe.dispatch(x, made.plan, w), (x, weights))
        assert gradcheck(lambda x: polymoe.dispatch(x, made.plan), (x,))
        assert gradcheck(lambda y, w: polymoe.combine(y, made.plan, w), (y, weights))
        assert gradcheck(lambda y: polymoe.combine(y, made.plan), (y,))


@pytest.mark.parametrize("form", ["2x3", "3x2", "2x2", "3x3"])
def test_grouped_mm(form: str, backend: str, seed: int) -> None:
    made, G, M, N, D = Inputs(seed), 3, 6, 7, 8
    a = made.normal(M, D) if form[0] == "2" else made.normal(G, M, D)
    b = made.normal(D, N) if form[2] == "2" else made.normal(G, D, N)
    bias = made.normal(N) if form == "3x2" else made.normal(G, N)
    offs = None if form == "3x3" else torch.tensor([2, 2, 5])  # an empty group, and something past the last
    assert gradcheck(lambda *args: polymoe.grouped_mm(args[0], args[1], offs, args[2], backend=backend), (a, b, bias))


def kinds_by(*layouts: str) -> list[Any]:
    """Every kind of activation in every layout that it has: without a gate nothing is interleaved."""
    return [
        pytest.param(kind, layout, id="-".join(map(str, (*kind, layout))))
        for kind in activate_checks.KINDS
        for layout in layouts
        if "interleaved" not in layout or kind[0] not in activate_checks.UNGATED
    ]


@pytest.mark.parametrize(("kind", "layout"), kinds_by("halves", "interleaved"))
def test_activate(kind: tuple[str, Any, Any], layout: str, backend: str, seed: int) -> None:
    name, alpha, limit = kind
    ungated, interleaved = name in activate_checks.UNGATED, layout == "interleaved"
    made = Inputs(seed)
    h, weights = made.normal(S, I if ungated else 2 * I), made.normal(T, K)
    with torch.no_grad():
        h += 1e-3 * ~has_slopes(h, limit)

    def call(h: Tensor, weights: Tensor) -> Tensor:
        return polymoe.activate(h, name, alpha, limit, interleaved, made.plan, weights, backend=backend)

    assert gradcheck(call, (h, weights))
    assert gradcheck(lambda h: polymoe.activate(h, name, alpha, limit, interleaved, backend=backend), (h,))


@pytest.mark.parametrize("kind", ["swiglu_clamped", "swiglu_oai"])
def test_a_clamp_has_no_slope_where_it_acted_and_all_of_it_at_its_ends(kind: str, target: Target) -> None:
    h = torch.tensor([[2.0, 3.0, 2.0, -2.0, 2.5, -3.0]], requires_grad=True)  # gate 2, 3, 2; up -2, 2.5, -3
    polymoe.activate(h, kind, limit=2.0, backend=target.backend).sum().backward()
    assert h.grad is not None
    assert ((h.grad != 0) == torch.tensor([[True, False, True, True, False, False]])).all()


@pytest.mark.parametrize("scoring", ["softmax", "softmax_topk", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("renormalize", ["none", "max", "add"])
@pytest.mark.parametrize("given", [False, True], ids=["selected", "given"])
def test_gate(scoring: str, renormalize: str, given: bool, backend: str, seed: int) -> None:
    made = Inputs(seed)
    logits, bias = made.normal(T, 8), made.normal(8).detach()
    mask = torch.arange(T) != 1
    options: dict[str, Any] = {"renormalize": renormalize, "scale": 2.5, "token_mask": mask, "backend": backend}
    chosen = polymoe.gate(logits.detach(), K, scoring, bias, 4, 2, 2)[1]
    chosen[2, 0] = -1

    def call(logits: Tensor) -> Tensor:
        if given:
            return polymoe.gate(logits, K, scoring, indices=chosen, **options)[0]
        return polymoe.gate(logits, K, scoring, bias, 4, 2, 2, **options)[0]

    assert gradcheck(call, (logits,))


ACTIVATIONS = {
    "swiglu": {},
    "swiglu_clamped": {"limit": 0.7, "interleaved": True},
    "swiglu_oai": {"limit": 0.9},
    "relu2": {},
}


@pytest.mark.parametrize("placement", ["output", "activation", "input"])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_experts(placement: str, activation: str, transposed: bool, backend: str, seed: int) -> None:
    made = Inputs(seed)
    P = I if activation == "relu2" else 2 * I
    for _ in range(20):
        x, weights = made.normal(T, H), made.normal(T, K)
        gate_up = made.normal(*((E, H, P) if transposed else (E, P, H)))
        down = made.normal(*((E, I, H) if transposed else (E, H, I)))
        biases = made.normal(E, P), made.normal(E, H)
        rows = x[:, None] * weights[..., None] if placement == "input" else x[:, None]
        h = rows.flatten(0, 1) @ (gate_up if transposed else gate_up.mT)
        limit = ACTIVATIONS[activation].get("limit")
        if has_slopes(torch.cat([h, h + biases[0][:, None]]), limit).all() or limit is None:
            break
    else:
        raise AssertionError("a pre-activation is at a limit in every draw")
    options = {"transposed": transposed, "weight_placement": placement, "backend": backend} | ACTIVATIONS[activation]

    def call(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, *biases: Tensor, **more: bool) -> Tensor:
        named = dict(zip(("gate_up_bias", "down_bias"), biases, strict=False))
        return polymoe.experts(x, gate_up, down, weights, made.ids, activation, **named, **options, **more)

    tensors = (x, gate_up, down, weights)
    assert gradcheck(call, tensors)
    assert gradcheck(call, (*tensors, *biases))

    every = torch.autograd.grad(call(*tensors, *biases).square().sum(), (*tensors, *biases))
    again = torch.autograd.grad(call(*tensors, *biases, recompute=True).square().sum(), (*tensors, *biases))
    for got, expected in zip(again, every, strict=True):
        assert_same_bits(got, expected, "recompute")
    for wanted, expected in enumerate(every):  # each gradient alone: nothing it needs is left out
        frozen = [t if i == wanted else t.detach() for i, t in enumerate((*tensors, *biases))]
        (alone,) = torch.autograd.grad(call(*frozen).square().sum(), frozen[wanted])
        assert_same_bits(alone, expected, f"gradient {wanted} alone")


@pytest.mark.parametrize("placement", ["output", "activation", "input"])
@pytest.mark.parametrize(("kind", "layout"), kinds_by("plain", "transposed", "interleaved", "transposed interleaved"))
def test_experts_of_every_kind(
    kind: tuple[str, Any, Any], layout: str, placement: str, backend: str, seed: int
) -> None:
    """All gradients at once, in one random direction of each."""
    name, _, limit = kind
    ungated, transposed, interleaved = name in activate_checks.UNGATED, "transposed" in layout, "interleaved" in layout
    made, P = Inputs(seed), I if ungated else 2 * I
    for _ in range(100):
        x, weights = made.normal(T, H), made.normal(T, K)
        gate_up, down = made.normal(E, P, H), made.normal(E, H, I)
        biases = made.normal(E, P), made.normal(E, H)
        rows = (x[:, None] * weights[..., None] if placement == "input" else x[:, None]).expand(T, K, H)
        h = torch.einsum("tkh,eph->tkep", rows, gate_up) + biases[0]
        if has_slopes(h, limit).all():
            break
    else:
        raise AssertionError("a pre-activation has no slope in every draw")
    if transposed:
        gate_up, down = (weight.detach().mT.contiguous().requires_grad_() for weight in (gate_up, down))
    how = (transposed, interleaved, placement)

    def call(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, *biases: Tensor) -> Tensor:
        return polymoe.experts(x, gate_up, down, weights, made.ids, *kind, *biases, *how, backend=backend)

    assert gradcheck(call, (x, gate_up, down, weights, *biases), fast_mode=True)


# --- precision ------------------------------------------------------------------------------------------------------


def eager(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """The loop over experts of Transformers."""
    out = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        token, slot = torch.where(ids == e)
        gate, up = (x[token] @ gate_up[e].T).chunk(2, dim=-1)
        y = (torch.nn.functional.silu(gate) * up) @ down[e].T
        out = out.index_add(0, token, (y * weights[token, slot, None]).to(x.dtype))
    return out


def layer_gradients(function: Callable[..., Tensor], made: list[Tensor], ids: Tensor, grad: Tensor) -> list[Tensor]:
    tensors = [tensor.detach().requires_grad_() for tensor in made]
    return list(torch.autograd.grad(function(*tensors, ids), tensors, grad.to(tensors[0].dtype)))


@functools.cache  # one for all targets
def precision_problem(
    dtype: torch.dtype, seed: int, tokens: int, experts: int, k: int
) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Inputs, experts, gradient of the result; then the gradients of eager PyTorch and the true ones.

    Hidden and inner width are the same, because the gradient of a routing weight is a sum over the inner width of sums
    over the hidden one, and eager's the other way round: in float32 the longer inner sums would err more."""
    random, width = Random(seed), 64
    made = [
        random.normal(tokens, width, dtype=dtype),
        random.matrix(experts, 2 * width, width, dtype=dtype),
        random.matrix(experts, width, width, dtype=dtype),
        random.weights(tokens, k),
    ]
    ids, grad = routing(random, "distinct", tokens, k, experts), random.normal(tokens, width, dtype=dtype)
    truth = layer_gradients(eager, [tensor.double() for tensor in made], ids, grad)
    return made, ids, grad, layer_gradients(eager, made, ids, grad), truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_experts_are_as_precise_as_eager(dtype: torch.dtype, target: Target, run_seed: int) -> None:
    """With 10^5 outputs two errors of the same size come out alike within some 0.3%, so there is no other allowance."""
    made, ids, grad, theirs, truth = precision_problem(dtype, run_seed, tokens=25_000, experts=25, k=4)
    ours = layer_gradients(lambda *args: polymoe.experts(*args, backend=target.backend), made, ids, grad)
    for name, a, b, c in zip(("x", "gate_up", "down", "weights"), ours, theirs, truth, strict=True):
        assert a.dtype == b.dtype
        assert c.numel() >= 10**5
        assert relative_frobenius(a, c) <= 1.05 * relative_frobenius(b, c), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_give_the_same_bits_at_any_thread_count_in_any_batch_and_recomputed(
    dtype: torch.dtype, target: Target, seed: int
) -> None:
    if not target.properties.batch_invariant:
        pytest.skip(f"{target.backend} does not promise it")
    random, tokens = Random(seed), 200
    made = [random.normal(tokens, 96, dtype=dtype), random.matrix(6, 160, 96, dtype=dtype)]
    made += [random.matrix(6, 96, 80, dtype=dtype), random.weights(tokens, 2)]
    ids, grad = routing(random, "skipping", tokens, 2, 6), random.normal(tokens, 96, dtype=dtype)

    def call(*args: Tensor) -> Tensor:
        return polymoe.experts(*args, backend=target.backend)

    found = []
    for count in (1, 2, 3, 4):
        with threads(count):
            found.append(layer_gradients(call, made, ids, grad))
    for other in found[1:]:
        for got, expected in zip(other, found[0], strict=True):
            assert_same_bits(got, expected, "threads")
    recomputed = layer_gradients(
        lambda *args: polymoe.experts(*args, backend=target.backend, recompute=True), made, ids, grad
    )
    for got, expected in zip(recomputed, found[0], strict=True):
        assert_same_bits(got, expected, "recomputed")
    for count in (1, 7):
        few = random.permutation(tokens)[:count]
        part = [made[0][few], made[1], made[2], made[3][few]]
        alone = layer_gradients(call, part, ids[few], grad[few])
        assert_same_bits(alone[0], found[0][0][few], "the gradient of x in another batch")
        assert_same_bits(alone[3], found[0][3][few], "the gradient of the routing weights in another batch")


# --- cost, refusals ------------------------------------------------------------------------------------------------


def saved_bytes(call: Callable[[], Any], known: list[Tensor]) -> int:
    """Bytes saved for the backward by `call`, without the tensors `known`."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in {t.data_ptr() for t in known}:
            sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(sizes.values())


def test_what_experts_save() -> None:
    x, weights = torch.randn(32, 16, dtype=torch.bfloat16), torch.rand(32, 2)
    gate_up, down = torch.randn(4, 24, 16, dtype=torch.bfloat16), torch.randn(4, 16, 12, dtype=torch.bfloat16)
    ids = torch.randint(0, 4, (32, 2))

    def saved(*wanted: Tensor, **options: Any) -> int:
        given = [x, gate_up, down, weights]
        tensors = [t.detach().requires_grad_(any(t is w for w in wanted)) for t in given]
        known = [gate_up, down, weights]
        return saved_bytes(lambda: polymoe.experts(*tensors, ids, **options), known)

    plan_and_pre_activation = 2 * 64 * 24 + 4 * (5 + 64 + 64)
    assert saved(x, gate_up, down, weights) == x.nbytes + plan_and_pre_activation
    assert saved(x, weights) == plan_and_pre_activation  # frozen experts
    assert saved(gate_up) == x.nbytes + plan_and_pre_activation
    assert saved(x, gate_up, down, weights, recompute=True) == x.nbytes + ids.nbytes
    assert saved() == 0


class Calls(TorchDispatchMode):
    """The ops called inside: of polymoe by name, with their arguments by name, and how many zeros others make."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[str, dict[str, Any]]] = []
        self.zeros: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "polymoe":
            defaults = {argument.name: argument.default_value for argument in func._schema.arguments}
            given = zip(defaults, args, strict=False)  # trailing defaults are dropped
            self.ops.append((func.__name__.removesuffix(".default"), defaults | dict(given)))
        elif "zero" in func.__name__:
            self.zeros.append(result.numel())
        return result

    def weight_gradients(self) -> int:
        """Products whose reduction is cut: two matrices."""
        return sum(op == "grouped_mm" and args["a"].dim() == args["b"].dim() == 2 for op, args in self.ops)


def test_a_backward_computes_what_is_asked_for(backend: str, seed: int) -> None:
    made = Inputs(seed)
    tensors = [made.normal(T, H), made.normal(E, 2 * I, H), made.normal(E, H, I), made.normal(T, K)]
    products = {"x": 0, "gate_up": 1, "down": 1, "weights": 0}
    for wanted in (("x",), ("x", "weights"), ("gate_up",), ("down",), ("x", "down"), tuple(products)):
        given = [t if name in wanted else t.detach() for name, t in zip(products, tensors, strict=True)]
        out = polymoe.experts(*given, made.ids, backend=backend)
        with Calls() as seen:
            out.backward(torch.ones_like(out))
        assert seen.weight_gradients() == sum(products[name] for name in wanted), wanted
        assert all(size < S * 2 * I for size in seen.zeros), "zeros for a result that was not used"
        for op, args in seen.ops:
            if op == "down_backward":
                assert args["need_activation"] == ("down" in wanted), wanted
                assert args["need_weights"] == ("weights" in wanted), wanted


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("placement", ["output", "activation", "input"])
@pytest.mark.parametrize("weights", ["plain", "transposed", "mxfp4", "adapted"])
def test_no_gradient_of_experts_reads_what_a_tensor_holds(weights: str, placement: str, recompute: bool) -> None:
    """Tensors without data, on every path between the ops: a GPU would not wait for the host, and graphs capture it."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32, wanted: bool = True) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=wanted)

    T, H, I, E, K, r = 6, 64, 32, 4, 2, 3
    frozen = weights in ("mxfp4", "adapted")
    x, routing_weights, ids = empty(T, H), empty(T, K), empty(T, K, dtype=torch.int32, wanted=False)
    options: dict[str, Any] = {"weight_placement": placement, "recompute": recompute}
    options |= {"down_bias": empty(E, H, wanted=weights != "adapted")}
    options |= {"gate_up_bias": empty(E, 2 * I, wanted=weights != "adapted")}
    shapes = [(E, 2 * I, H), (E, H, I)]
    if weights == "mxfp4":
        stored = [polymoe.formats.Mxfp4().quantize(torch.ones(shape)) for shape in shapes]
        projections = [weight.data.to("meta") for weight in stored]
        options |= {"weight_format": "mxfp4", "gate_up_scale": stored[0].scale.to("meta")}
        options |= {"down_scale": stored[1].scale.to("meta")}
    else:
        projections = [empty(*shape, wanted=not frozen) for shape in shapes]
    if weights == "transposed":
        projections, options["transposed"] = [empty(E, H, 2 * I), empty(E, I, H)], True
    if weights == "adapted":
        options |= {"gate_up_lora_a": empty(E, r, H), "gate_up_lora_b": empty(E, 2 * I, r)}
        options |= {"down_lora_a": empty(E, r, I), "down_lora_b": empty(E, H, r)}
    out = polymoe.experts(x, *projections, routing_weights, ids, **options)
    out.backward(torch.empty_like(out))
    for leaf in (x, routing_weights, *projections, *options.values()):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            assert leaf.grad is not None
            assert (leaf.grad.shape, leaf.grad.dtype, leaf.grad.device) == (leaf.shape, leaf.dtype, leaf.device)


def test_a_second_derivative_is_refused(backend: str) -> None:
    made = Inputs(0)
    x, y, weights, gate_up, down = (made.normal(*shape) for shape in ((T, H), (S, H), (T, K), (E, 2 * I, H), (E, H, I)))
    logits, p, ends = made.normal(T, E), made.plan, made.plan.offsets[1:]
    pair = {"down_lora_a": made.normal(E, 1, I), "down_lora_b": made.normal(E, H, 1)}
    adapted = functools.partial(polymoe.experts, **pair)
    calls: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
        "dispatch": (x, lambda x: polymoe.dispatch(x, p, backend=backend)),
        "combine": (y, lambda y: polymoe.combine(y, p, backend=backend)),
        "activate": (y, lambda y: polymoe.activate(y, "silu", backend=backend)),
        "grouped_mm": (y, lambda y: polymoe.grouped_mm(y, gate_up.mT, ends, backend=backend)),
        "gate": (logits, lambda logits: polymoe.gate(logits, K, backend=backend)[0]),
        "experts": (x, lambda x: polymoe.experts(x, gate_up, down, weights, made.ids, backend=backend)),
        "experts_lora": (x, lambda x: adapted(x, gate_up.detach(), down.detach(), weights, made.ids, backend=backend)),
    }
    for op, (leaf, call) in calls.items():
        (first,) = torch.autograd.grad(call(leaf).square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=rf"polymoe\.{op}: it has no second derivative"):
            first.sum().backward()


def test_packed_weights_are_refused_where_a_gradient_is_needed() -> None:
    x = torch.randn(T, 32, requires_grad=True)
    gate_up, down = torch.randn(E, 64, 32), torch.randn(E, 32, 32)
    with pytest.raises(
        ValueError, match='weight_format: expected "plain" or a quantised format where a gradient is needed'
    ):
        polymoe.experts(
            x, gate_up, down, torch.rand(T, K), torch.zeros(T, K, dtype=torch.int32), weight_format="packed"
        )
