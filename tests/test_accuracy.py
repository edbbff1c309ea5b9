"""The error against float64 is at most 1.05 times that of eager PyTorch in the same dtype, over 10^5 outputs or more,
on every ISA level. The truth is what eager PyTorch gives in float64 for the same, already rounded inputs."""

import functools
import math

import pytest
import torch
from torch.nn import functional as F

import polymoe
from polymoe.testing.cases import Random
from polymoe.testing.conformance import activate, experts
from polymoe.testing.tolerances import relative_frobenius

OUTPUTS = 10**5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_as_accurate(got, eager, truth, what):
    assert truth.numel() >= OUTPUTS
    ours, theirs = relative_frobenius(got, truth), relative_frobenius(eager, truth)
    assert ours <= 1.05 * theirs, f"{what}: relative error {ours:.4g}, eager PyTorch's is {theirs:.4g}"


# Limits as models have them. Were they so narrow that many outputs are clamped to one value, the rounding of this one
# value would decide and not the errors of 10^5 outputs.
KINDS = [
    (kind, alpha if alpha is None else 1.702, limit if limit is None else 7.0)
    for kind, alpha, limit in activate.KINDS
    if kind != "softcapped"
] + [("softcapped", 3.0, 3.0)]


def clamp(u, limit):
    return u.clamp(-limit, limit)


def eager_swiglu_oai(g, u, alpha):
    return g * torch.sigmoid(g * alpha) * (u + 1)


# As PyTorch models write them: every operation in the dtype of its input.
EAGER = {  # of gate, up, alpha, limit
    "swiglu": lambda g, u, a, m: F.silu(g) * u,
    "swiglu_clamped": lambda g, u, a, m: F.silu(g.clamp(max=m)) * clamp(u, m),
    "swiglu_clamped_after": lambda g, u, a, m: F.silu(g).clamp(max=m) * clamp(u, m),
    "swiglu_oai": lambda g, u, a, m: eager_swiglu_oai(g.clamp(max=m or math.inf), clamp(u, m or math.inf), a or 1.702),
    "geglu": lambda g, u, a, m: F.gelu(g) * u,
    "geglu_tanh": lambda g, u, a, m: F.gelu(g, approximate="tanh") * u,
    "reglu": lambda g, u, a, m: F.relu(g) * u,
    "softcapped": lambda g, u, a, m: a * torch.tanh(g / a) * torch.sigmoid(g) * m * torch.tanh(u / m),
    "silu": lambda g, u, a, m: F.silu(g),
    "gelu": lambda g, u, a, m: F.gelu(g),
    "gelu_tanh": lambda g, u, a, m: F.gelu(g, approximate="tanh"),
    "relu": lambda g, u, a, m: F.relu(g),
    "relu2": lambda g, u, a, m: F.relu(g).square(),
}


def eager_activation(h, kind):
    name, alpha, limit = kind
    g, u = (h, None) if name in activate.UNGATED else h.chunk(2, dim=-1)
    return EAGER[name](g, u, alpha, limit)


def double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def eager_experts(kind, x, gate_up, down, weights, ids):
    """The loop over experts of Transformers."""
    out = torch.zeros_like(x)
    for e in range(gate_up.shape[0]):
        token, slot = torch.where(ids == e)
        h = F.linear(x[token], gate_up[e])
        y = F.linear(eager_activation(h, kind), down[e]) * weights[token, slot, None]
        out.index_add_(0, token, y.to(out.dtype))
    return out


@functools.cache  # one for all targets
def experts_problem(H, I, kind, dtype, seed):
    case = experts.Case(T=-(-OUTPUTS // H), H=H, I=I, E=3, K=2, kind=kind, dtype=dtype)
    inputs = experts.make_inputs(case, Random(seed))[:5]
    truth = eager_experts((kind, None, None), *map(double, inputs))
    return inputs, eager_experts((kind, None, None), *inputs), truth


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("H", "I", "kind"), [(2048, 768, "swiglu"), (500, 2048, "swiglu"), (704, 512, "geglu"), (704, 512, "silu")]
)
def test_experts(H, I, kind, dtype, target, run_seed):
    inputs, eager, truth = experts_problem(H, I, kind, dtype, run_seed)
    got = polymoe.experts(*inputs, activation=kind, backend=target.backend)
    assert_as_accurate(got, eager, truth, "experts")


@functools.cache
def matmul_problem(form, D, dtype, seed):
    """Two groups; in the form 2x2 they cut D."""
    random = Random(seed)
    ends = torch.tensor([D // 3, D] if form == "2x2" else [100, 320], dtype=torch.int32)
    N = 160 if form == "2x2" else 320
    a, b = random.matrix(320, D, dtype=dtype), random.normal(D, N, dtype=dtype)
    if form == "2x3":
        b = torch.stack([b, random.normal(D, N, dtype=dtype)])

    def eager(a, b):
        if form == "2x3":
            return torch.cat([a[: ends[0]] @ b[0], a[ends[0] :] @ b[1]])
        return torch.stack([a[:, : ends[0]] @ b[: ends[0]], a[:, ends[0] :] @ b[ends[0] :]])

    return (a, b, ends), eager(a, b), eager(a.double(), b.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", [100, 2048, 9000])
@pytest.mark.parametrize("form", ["2x3", "2x2"])
def test_grouped_mm(form, D, dtype, target, run_seed):
    inputs, eager, truth = matmul_problem(form, D, dtype, run_seed)
    got = polymoe.grouped_mm(*inputs, backend=target.backend)
    assert_as_accurate(got, eager, truth, f"grouped_mm {form}")


@functools.cache
def activation_problem(kind, dtype, seed):
    h = Random(seed).normal(320, 2 * 320, dtype=dtype, scale=2.0)
    return h, eager_activation(h, kind), eager_activation(h.double(), kind)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind)))
def test_activate(kind, dtype, target, run_seed):
    h, eager, truth = activation_problem(kind, dtype, run_seed)
    got = polymoe.activate(h, *kind, backend=target.backend)
    assert_as_accurate(got, eager, truth, f"activate {kind}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_combine(dtype, target, seed):
    random = Random(seed)
    T, H, K = 400, 260, 6
    y, weights = random.normal(T * K, H, dtype=dtype), random.weights(T, K)
    plan = polymoe.plan(torch.argsort(torch.rand(T, K), dim=1), K, backend=target.backend)
    got = polymoe.combine(y, plan, weights, backend=target.backend)

    def eager(y, weights):
        return (y[plan.slot_row.long()] * weights[..., None].to(y.dtype)).sum(dim=1)

    assert_as_accurate(got, eager(y, weights), eager(y.double(), weights.double()), "combine")


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_gate(scoring, target, seed):
    """k = E, so that the weights are all scores, sorted."""
    logits = Random(seed).normal(4000, 128, scale=2.0)

    def eager(logits):
        score = {
            "softmax": lambda: logits.softmax(dim=-1),
            "sigmoid": lambda: logits.sigmoid(),
            "sqrtsoftplus": lambda: F.softplus(logits).sqrt(),
        }[scoring]()
        return score.sort(dim=-1, descending=True).values

    got, _ = polymoe.gate(logits, 128, scoring, backend=target.backend)
    assert_as_accurate(got, eager(logits), eager(logits.double()), f"gate {scoring}")
