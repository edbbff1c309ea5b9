"""The modules against loops in float64, and everything that a module must survive: copies, files, casts, graphs."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import polymoe
from polymoe.nn import Experts, MoE, Router
from polymoe.testing.tolerances import FUNCTION_ERRORS, assert_same_bits, relative_frobenius, unit_roundoff

H, I, E, K, V, LATENT = 48, 40, 16, 3, 50, 24
BATCH = (3, 11)

MODELS: dict[str, Callable[[], MoE]] = {
    "mixtral": lambda: MoE(Router(H, E, K, renormalize=True), Experts(E, H, I)),
    "deepseek_v3": lambda: MoE(
        Router(H, E, K, scoring="sigmoid", renormalize="add", n_group=4, topk_group=2, scale=2.5, selection_bias=True),
        Experts(E, H, I),
        shared_intermediate_size=2 * I,
    ),
    "deepseek_v4_hash": lambda: MoE(
        Router(H, E, K, scoring="sqrtsoftplus", renormalize="add", scale=1.5, vocab_size=V),
        Experts(E, H, I, activation="swiglu_clamped", limit=0.4, weight_placement="activation"),
        shared_intermediate_size=I,
    ),
    "own_shared_limit": lambda: MoE(
        Router(H, E, K, scoring="sqrtsoftplus", renormalize="add"),
        Experts(E, H, I, activation="swiglu_clamped", limit=0.4),
        shared_intermediate_size=I,
        shared_limit=0.2,
    ),
    "unclamped_shared": lambda: MoE(
        Router(H, E, K, scoring="sqrtsoftplus", renormalize="add"),
        Experts(E, H, I, activation="swiglu_clamped", limit=0.4),
        shared_intermediate_size=I,
        shared_activation="swiglu",
    ),
    "gpt_oss": lambda: MoE(
        Router(H, E, K, scoring="softmax_topk", bias=True),
        Experts(E, H, I, activation="swiglu_oai", limit=0.5, bias=True, transposed=True, interleaved=True),
    ),
    "qwen3_next": lambda: MoE(Router(H, E, K), Experts(E, H, I), shared_intermediate_size=I, shared_gate=True),
    "longcat": lambda: MoE(Router(H, E + 8, K, selection_bias=True, scale=6.0), Experts(E, H, I), identity_experts=8),
    "llama4": lambda: MoE(
        Router(H, E, 1, scoring="sigmoid"), Experts(E, H, I, weight_placement="input"), shared_intermediate_size=I
    ),
    "nemotron": lambda: MoE(
        Router(H, E, K, scoring="sigmoid", renormalize="add"),
        Experts(E, LATENT, I, activation="relu2"),
        latent=True,
        shared_intermediate_size=I,
    ),
    "all_at_once": lambda: MoE(
        Router(H, E + 8, K, scoring="sqrtsoftplus", renormalize="max", bias=True, vocab_size=V),
        Experts(E, LATENT, I, activation="softcapped", alpha=4.0, limit=25.0, bias=True),
        latent=True,
        identity_experts=8,
        shared_intermediate_size=I,
        shared_gate=True,
    ),
}
LOW_PRECISION = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def seeded(seed: int) -> None:
    torch.manual_seed(seed)


def make(name: str, dtype: torch.dtype = torch.float32) -> MoE:
    """A model whose biases are not zero and whose hash table is random."""
    moe = MODELS[name]()
    for key, tensor in [*moe.named_parameters(), *moe.named_buffers()]:
        if "bias" in key:
            torch.nn.init.normal_(tensor, std=0.1)
    if moe.router.tid2eid is not None:
        noise = torch.rand(V, moe.router.num_experts)
        moe.router.tid2eid.copy_(noise.argsort(-1)[:, : moe.router.top_k])
    return moe.to(dtype).requires_grad_(False)


def inputs(dtype: torch.dtype = torch.float32, batch: tuple[int, ...] = BATCH) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(*batch, H).to(dtype)
    return x, torch.randint(V, batch), torch.rand(batch) < 0.8


# --- truth ----------------------------------------------------------------------------------------------------------


def activation(h: Tensor, experts: Experts) -> Tensor:
    if experts.activation == "relu2":
        return F.relu(h).square()
    g, u = (h[0::2], h[1::2]) if experts.interleaved else h.chunk(2)
    limit, alpha = experts.limit, experts.alpha
    if experts.activation == "softcapped":
        return alpha * torch.tanh(g / alpha) * torch.sigmoid(g) * limit * torch.tanh(u / limit)
    if limit is not None:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    if experts.activation == "swiglu_oai":
        return g * torch.sigmoid(1.702 * g) * (u + 1)
    return F.silu(g) * u


def one_expert(x: Tensor, experts: Experts, e: int, weight: Tensor) -> Tensor:
    up, down = experts.gate_up[e].double(), experts.down[e].double()
    if experts.transposed:
        up, down = up.t(), down.t()
    zero = torch.zeros((), dtype=torch.float64)
    up_bias = zero if experts.gate_up_bias is None else experts.gate_up_bias[e].double()
    down_bias = zero if experts.down_bias is None else experts.down_bias[e].double()
    x = weight * x if experts.weight_placement == "input" else x
    a = activation(up @ x + up_bias, experts)
    a = weight * a if experts.weight_placement == "activation" else a
    y = down @ a + down_bias
    return weight * y if experts.weight_placement == "output" else y


def route(x: Tensor, router: Router, token_id: int) -> tuple[list[int], Tensor]:
    """The experts of one token, in float64, and their weights."""
    logits = router.weight.double() @ x + (0 if router.bias is None else router.bias.double())
    chosen_only = router.scoring == "softmax_topk"
    scores = {
        "softmax": lambda: logits.softmax(0),
        "softmax_topk": lambda: logits,
        "sigmoid": lambda: torch.sigmoid(logits),
        "sqrtsoftplus": lambda: F.softplus(logits, threshold=50.0).sqrt(),
    }[router.scoring]()
    biased = scores if router.selection_bias is None else scores + router.selection_bias.double()
    if router.n_group > 1:
        groups = biased.view(router.n_group, -1)
        kept = groups.topk(router.group_top).values.sum(-1).topk(router.topk_group).indices
        biased = torch.full_like(groups, -math.inf).index_copy(0, kept, groups[kept]).flatten()
    ids = biased.topk(router.top_k).indices if router.tid2eid is None else router.tid2eid[token_id].long()
    weights = scores[ids].softmax(0) if chosen_only else scores[ids]
    if router.renormalize not in (False, "none"):
        weights = weights / weights.sum()
    return ids.tolist(), weights * router.scale


def truth(moe: MoE, x: Tensor, token_ids: Tensor, token_mask: Tensor | None = None) -> Tensor:
    rows = []
    mask = torch.ones_like(token_ids, dtype=torch.bool) if token_mask is None else token_mask
    flat = zip(x.double().flatten(0, -2), token_ids.flatten().tolist(), mask.flatten().tolist(), strict=True)
    for token, token_id, alive in flat:
        inner = token if moe.latent_down is None else moe.latent_down.weight.double() @ token
        y = torch.zeros_like(inner)
        for e, weight in zip(*route(token, moe.router, token_id), strict=True):
            if alive:
                y += weight * inner if e >= E else one_expert(inner, moe.experts, e, weight)
        if moe.latent_up is not None:
            y = moe.latent_up.weight.double() @ y
        if moe.shared is not None:
            gate = moe.shared.gate
            weight = torch.ones(()) if gate is None else torch.sigmoid(gate.weight[0].double() @ token)
            y = y + one_expert(token, moe.shared.experts, 0, weight.double())
        rows.append(y)
    return torch.stack(rows).view(x.shape)


def bound(dtype: torch.dtype) -> float:
    """Of the relative error in the Frobenius norm.

    Independent roundings in a sum of n terms leave sqrt(n) u, and n u is far above that. Five sums follow each other
    at most (latent, router, gate and up, down, latent), then functions. A low precision rounds seven times at most:
    latent, activation (and input), output, identity, latent, shared, sum.
    """
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    exact_parts = (4 * H + I + K + 3 * FUNCTION_ERRORS) * unit_roundoff(arithmetic)
    return exact_parts + (7 * unit_roundoff(dtype) if dtype in LOW_PRECISION else 0.0)


# --- what the modules compute ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_moe_is_what_loops_in_float64_say(name: str, dtype: torch.dtype) -> None:
    moe = make(name, dtype)
    x, token_ids, token_mask = inputs(dtype)
    for mask in (None, token_mask):
        out = moe(x, token_ids, mask)
        assert out.dtype == dtype
        assert out.shape == x.shape
        assert relative_frobenius(out, truth(moe, x, token_ids, mask)) <= bound(dtype)


@pytest.mark.parametrize("name", MODELS)
def test_a_token_does_not_see_its_batch(name: str) -> None:
    moe = make(name, torch.bfloat16)
    x, token_ids, _ = inputs(torch.bfloat16, (64,))
    with polymoe.use_backend("cpu"):
        whole = moe(x, token_ids)
        for rows in (slice(7, 8), slice(5, 12)):
            assert_same_bits(moe(x[rows].clone(), token_ids[rows]), whole[rows], f"{name}, tokens {rows}")


@pytest.mark.parametrize("name", MODELS)
def test_no_tokens(name: str) -> None:
    x, token_ids, token_mask = inputs(batch=(2, 0))
    assert make(name)(x, token_ids, token_mask).shape == (2, 0, H)


def test_router_keeps_f32_logits_and_mixes_dtypes() -> None:
    router = Router(H, E, K).requires_grad_(False)
    x = torch.randn(5, H)
    exact = x.bfloat16().double() @ router.weight.double().t()
    logits = router.logits(x.bfloat16())
    assert logits.dtype == torch.float32
    assert relative_frobenius(logits, exact) <= H * unit_roundoff(torch.float32)
    assert router.double().logits(x.bfloat16()).dtype == torch.float64


def test_router_replays_given_experts() -> None:
    for name in ("mixtral", "deepseek_v3", "gpt_oss", "deepseek_v4_hash"):
        router = make(name).router
        x, token_ids, token_mask = inputs(batch=(20,))
        weights, ids = router(x, token_ids, token_mask)
        assert (ids[~token_mask] == -1).all()
        again, same = router(x, token_mask=token_mask, indices=ids.long())
        assert torch.equal(same, ids)
        assert_same_bits(again, weights, name)


def test_masked_tokens_may_carry_any_id() -> None:
    router = make("deepseek_v4_hash").router
    x, token_ids, token_mask = inputs(batch=(20,))
    weights, ids = router(x, token_ids.masked_fill(~token_mask, -100), token_mask)
    expected = router(x, token_ids, token_mask)
    assert torch.equal(ids, expected[1])
    assert_same_bits(weights, expected[0], "weights")
    with pytest.raises(IndexError):
        router(x, token_ids.fill_(V))


# --- what modules must survive --------------------------------------------------------------------------------------


def copies(moe: MoE, name: str) -> list[MoE]:
    loaded = MODELS[name]().to(moe.experts.gate_up.dtype)
    loaded.load_state_dict(moe.state_dict())
    file = io.BytesIO()
    torch.save(moe, file)
    file.seek(0)
    saved = torch.load(file, weights_only=False)
    with torch.device("meta"):
        empty = MODELS[name]()
    empty = empty.to_empty(device="cpu").to(moe.experts.gate_up.dtype)
    empty.load_state_dict(moe.state_dict())
    return [copy.deepcopy(moe), pickle.loads(pickle.dumps(moe)), loaded, saved, empty]


@pytest.mark.parametrize("name", MODELS)
def test_copies_and_files(name: str) -> None:
    moe = make(name, torch.bfloat16)
    x, token_ids, token_mask = inputs(torch.bfloat16)
    expected = moe(x, token_ids, token_mask)
    for other in copies(moe, name):
        assert_same_bits(other(x, token_ids, token_mask), expected, name)
        assert repr(other) == repr(moe)


@pytest.mark.parametrize("name", ["gpt_oss", "longcat", "all_at_once"])
def test_export(name: str) -> None:
    moe = make(name)
    x, token_ids, token_mask = inputs(batch=(9,))
    tokens = torch.export.Dim("tokens", min=2)
    program = torch.export.export(
        moe, (x, token_ids, token_mask), dynamic_shapes=({0: tokens}, {0: tokens}, {0: tokens})
    )
    x, token_ids, token_mask = inputs(batch=(21,))
    assert_same_bits(program.module()(x, token_ids, token_mask), moe(x, token_ids, token_mask), name)


@pytest.mark.parametrize("name", ["gpt_oss", "longcat", "all_at_once"])
def test_compiles_once_for_any_number_of_tokens(name: str) -> None:
    moe = make(name)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    counts: list[int] = []
    compiled = torch.compile(moe, fullgraph=True, dynamic=True, backend=graphs)
    for tokens in (9, 21):
        x, token_ids, token_mask = inputs(batch=(tokens,))
        assert_same_bits(compiled(x, token_ids, token_mask), moe(x, token_ids, token_mask), name)
        counts.append(graphs.frame_count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_selection_bias_is_not_rounded_by_casts(dtype: torch.dtype) -> None:
    moe = make("deepseek_v3")
    before = moe.router.selection_bias.clone()
    cast = moe.to(dtype)
    assert cast.router.weight.dtype == dtype
    assert_same_bits(cast.router.selection_bias, before, "selection_bias")
    assert cast.double().router.selection_bias.dtype == torch.float64


def test_reset_parameters() -> None:
    for name in MODELS:
        moe = make(name)
        moe.reset_parameters()
        assert moe.router.weight.abs().max() <= 1 / math.sqrt(H)
        assert moe.experts.down.abs().max() <= 1 / math.sqrt(I)
        assert all(not tensor.any() for key, tensor in moe.named_parameters() if "bias" in key)
        if moe.router.tid2eid is not None:
            assert all(len(set(row)) == len(row) for row in moe.router.tid2eid.tolist())


def test_explain_names_every_experts_module() -> None:
    found = polymoe.explain(make("qwen3_next")).modules
    assert list(found) == ["experts", "shared.experts"]
    assert all(explanation.op == "experts" for explanation in found.values())


BAD: dict[str, Callable[[], object]] = {
    "nn.Router: top_k": lambda: Router(H, E, E + 1),
    "nn.Router: num_experts": lambda: Router(H, 0, 1),
    "nn.Router: hidden_size": lambda: Router(0, E, K),
    "nn.Router: scoring": lambda: Router(H, E, K, scoring="argmax"),
    "nn.Router: renormalize": lambda: Router(H, E, K, renormalize="sum"),
    "nn.Router: vocab_size": lambda: Router(H, E, K, vocab_size=0),
    "nn.Router: selection_bias": lambda: Router(H, E, K, vocab_size=V, selection_bias=True),
    "nn.Router: n_group": lambda: Router(H, E, K, vocab_size=V, n_group=4),
    "nn.Router: n_group: expected a divisor": lambda: Router(H, E, K, n_group=E - 1),
    "nn.Router: topk_group": lambda: Router(H, E, K, n_group=2, topk_group=3),
    "nn.Router: top_k: expected at most": lambda: Router(H, E, E, n_group=2, group_top=1),
    "nn.Router: x: expected float32": lambda: Router(H, E, K)(torch.ones(2, H).long()),
    "nn.Router: x: expected a tensor": lambda: Router(H, E, K)(torch.ones(2, H + 1)),
    "nn.Router: token_ids: expected int32 or int64": lambda: make("deepseek_v4_hash")(torch.ones(2, H), torch.ones(2)),
    "nn.Router: token_mask: expected bool": lambda: make("deepseek_v4_hash")(
        torch.ones(2, H), torch.zeros(2).int(), torch.ones(2)
    ),
    "nn.Router: token_ids: expected token ids": lambda: make("deepseek_v4_hash")(torch.randn(5, H)),
    "nn.Router: token_ids: expected a tensor": lambda: make("deepseek_v4_hash")(
        torch.randn(5, H), torch.zeros(4).int()
    ),
    "nn.Experts: intermediate_size": lambda: Experts(E, H, 0),
    "nn.Experts: activation": lambda: Experts(E, H, I, activation="swish"),
    "nn.Experts: limit": lambda: Experts(E, H, I, activation="swiglu_clamped"),
    "nn.Experts: interleaved": lambda: Experts(E, H, I, activation="relu", interleaved=True),
    "nn.Experts: weight_placement": lambda: Experts(E, H, I, weight_placement="gate"),
    "nn.MoE: x": lambda: make("qwen3_next")(torch.tensor(1.0)),
    "nn.MoE: router": lambda: MoE(Router(H, E + 1, K), Experts(E, H, I)),
    "nn.MoE: experts": lambda: MoE(Router(H, E, K), Experts(E, LATENT, I)),
    "nn.MoE: identity_experts": lambda: MoE(Router(H, E - 1, K), Experts(E, H, I), identity_experts=-1),
    "nn.MoE: shared_intermediate_size": lambda: MoE(Router(H, E, K), Experts(E, H, I), shared_gate=True),
    "experts: x": lambda: Experts(E, H, I)(torch.ones(2, H).long(), torch.ones(2, K), torch.zeros(2, K).int()),
}


@pytest.mark.parametrize("message", BAD)
def test_errors(message: str) -> None:
    with pytest.raises(ValueError, match=rf"^polymoe\.{message}") as error:
        BAD[message]()
    assert re.fullmatch(r"polymoe\.[\w.]+: \w+: expected .+, got .+", str(error.value))
