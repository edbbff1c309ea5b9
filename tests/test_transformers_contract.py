"""What Transformers may hand an experts implementation: every flag, sentinel, stride, dtype and device."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from benchmarks import bench_adapter
from experts_modules import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    assert_right,
    batch,
    config,
    fill,
    float32_bound,
    float64_experts,
    watch_experts,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.utils import parametrize
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

import polymoe
from polymoe.integrations.transformers import experts_forward
from polymoe.testing.tolerances import assert_same_bits, relative_frobenius


@pytest.fixture(autouse=True)
def seeded(seed: int) -> None:
    torch.manual_seed(seed)


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return watch_experts(monkeypatch)


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(HIDDEN))

    def forward(self, y: Tensor) -> Tensor:
        return self.weight * y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def experts_class(
    has_gate: bool = True,
    has_bias: bool = False,
    is_transposed: bool = False,
    is_concatenated: bool = True,
    has_post_expert_norm: bool = False,
) -> type[nn.Module]:
    """An experts class with these flags, and gpt-oss's gate where the halves are interleaved."""
    shape = (lambda n, d: (EXPERTS, d, n)) if is_transposed else (lambda n, d: (EXPERTS, n, d))
    up, width = ("gate_up_proj", 2 * INTERMEDIATE) if has_gate else ("up_proj", INTERMEDIATE)

    class Experts(nn.Module):
        def __init__(self, config: SimpleNamespace) -> None:
            super().__init__()
            self.num_experts = EXPERTS
            self.act_fn = ACT2FN[config.hidden_act]
            self.alpha, self.limit = 1.4, config.swiglu_limit
            self.register_parameter(up, nn.Parameter(torch.empty(shape(width, HIDDEN))))
            self.down_proj = nn.Parameter(torch.empty(shape(HIDDEN, INTERMEDIATE)))
            if has_bias:
                self.register_parameter(f"{up}_bias", nn.Parameter(torch.empty(EXPERTS, width)))
                self.down_proj_bias = nn.Parameter(torch.empty(EXPERTS, HIDDEN))
            if has_post_expert_norm:
                self.post_expert_norm = Norm()

        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return float64_experts(self, hidden_states, top_k_index, top_k_weights)

        if not is_concatenated:
            _apply_gate = GptOssExperts._apply_gate

    return use_experts_implementation(
        Experts,
        has_gate=has_gate,
        has_bias=has_bias,
        is_transposed=is_transposed,
        is_concatenated=is_concatenated,
        has_post_expert_norm=has_post_expert_norm,
    )


def plain(**flags: bool) -> nn.Module:
    return fill(experts_class(**flags)(config()))


def through(module: nn.Module, implementation: str, *inputs: Tensor) -> Tensor:
    """Of an implementation that Transformers registers; "eager" is the truth here."""
    module.config = config(implementation)
    try:
        return module(*inputs)
    finally:
        module.config = config()


# --- flags and sentinels --------------------------------------------------------------------------------------------

FLAGS = [
    {"has_bias": bias, "is_transposed": transposed, "has_post_expert_norm": norm} | gate
    for bias, transposed, norm in product((False, True), repeat=3)
    for gate in ({}, {"is_concatenated": False}, {"has_gate": False})
]


def named(flags: dict[str, bool]) -> str:
    """By those that are not as in most models."""
    usual = ("has_gate", "is_concatenated")
    return "-".join(name for name, value in flags.items() if value != (name in usual)) or "plain"


@pytest.mark.parametrize("flags", FLAGS, ids=named)
def test_flags(flags: dict[str, bool], fused_calls: list[int]) -> None:
    module = plain(**flags)
    x, ids, weights = batch(37)
    ours = assert_right(module, x, ids, weights)
    for implementation in ("grouped_mm", "batched_mm"):
        theirs = through(module, implementation, x, ids, weights)
        assert relative_frobenius(ours, theirs) <= 2 * float32_bound()
    assert len(fused_calls) == (not flags["has_post_expert_norm"])
    assert assert_same_bits(experts_forward(module, x, ids.int(), weights), ours, "int32 ids") is None
    assert experts_forward(module, x[:0], ids[:0], weights[:0]).shape == (0, HIDDEN)


@pytest.mark.parametrize("flags", FLAGS, ids=named)
def test_sentinels(flags: dict[str, bool]) -> None:
    """Slots of other ranks' experts add nothing, whatever their weights; tokens without any slot here are zero."""
    module = plain(**flags)
    module._is_expert_parallel = True
    x, ids, weights = batch(37)
    off_rank = torch.rand(ids.shape) < 0.4
    off_rank[3:6] = True
    ids = ids.masked_fill(off_rank, EXPERTS).masked_fill(off_rank & (torch.rand(ids.shape) < 0.3), EXPERTS + 5)
    masked = weights.masked_fill(off_rank, 0)
    ours = assert_right(module, x, ids, masked)
    assert not ours[3:6].any()
    assert relative_frobenius(ours, through(module, "grouped_mm", x, ids, masked)) <= 2 * float32_bound()
    assert_same_bits(experts_forward(module, x, ids, weights), ours, "with weights")
    assert_same_bits(experts_forward(module, x, ids, weights.masked_fill(off_rank, math.nan)), ours, "with NaN")
    nobody = torch.full_like(ids, EXPERTS)
    assert not experts_forward(module, x, nobody, weights).any()


# --- strides, dtypes, devices ---------------------------------------------------------------------------------------


def expanded(weight: Tensor) -> Tensor:
    return weight[:1].expand_as(weight)


def transposed(weight: Tensor) -> Tensor:
    return weight.mT.contiguous().mT


def sliced(weight: Tensor) -> Tensor:
    E, N, D = weight.shape
    whole = torch.full((E + 2, N + 3, 2 * D + 5), math.nan)
    part = whole[1:-1, 2:-1, 3 : 2 * D + 3 : 2]
    part.copy_(weight)
    return part


@pytest.mark.parametrize("view", [expanded, transposed, sliced])
@pytest.mark.parametrize("norm", [False, True], ids=["fused", "unfused"])
def test_weights_of_any_stride(view: Callable[[Tensor], Tensor], norm: bool) -> None:
    module = plain(has_post_expert_norm=norm)
    for name in ("gate_up_proj", "down_proj"):
        viewed = view(getattr(module, name))
        setattr(module, name, nn.Parameter(viewed, requires_grad=False))
        assert getattr(module, name).stride() == viewed.stride()
    assert_right(module, *batch(37))


@pytest.mark.parametrize("norm", [False, True], ids=["fused", "unfused"])
def test_inputs_of_any_stride(norm: bool) -> None:
    module, inputs = plain(has_post_expert_norm=norm), batch(37)
    viewed = [t.repeat_interleave(2, 1)[:, ::2] for t in inputs]
    assert not any(t.is_contiguous() for t in viewed)
    assert_same_bits(experts_forward(module, *viewed), experts_forward(module, *inputs), "views")


def test_parametrized_weights() -> None:
    """As adapters of fine-tuning change them: the class of the module is another one, and what is read is computed."""

    class Plus(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + 0.1

    module, inputs = plain(), batch(37)
    before = experts_forward(module, *inputs)
    parametrize.register_parametrization(module, "down_proj", Plus())
    assert relative_frobenius(assert_right(module, *inputs), before) > 0.01


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("flags", [{}, {"has_bias": True, "has_post_expert_norm": True}], ids=["fused", "unfused"])
def test_dtypes_are_those_of_grouped_mm(
    flags: dict[str, bool], x_dtype: torch.dtype, weights_dtype: torch.dtype, autocast: torch.dtype | None
) -> None:
    """The weights' dtype decides what is computed, that of autocast where it is on, and hidden_states' dtype what is
    returned. Transformers' grouped_mm does not know of autocast, so its weights are cast by hand."""
    module = plain(**flags).to(weights_dtype)
    x, ids, weights = batch(128)
    x = x.to(x_dtype)
    cast, rows = copy.deepcopy(module), x
    if autocast is not None:
        rows = x.to(autocast)
        for parameter in cast.parameters(recurse=False):  # not those of its norm
            parameter.data = parameter.data.to(autocast)
    truth = float64_experts(cast, rows.double(), ids, weights)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            ours = experts_forward(module, x, ids, weights.to(dtype))
        theirs = through(cast, "grouped_mm", rows, ids, weights.to(dtype)).to(x_dtype)
        assert ours.dtype == x_dtype
        limit = 1.05 * relative_frobenius(theirs, truth) + float32_bound()
        assert relative_frobenius(ours, truth) <= limit, dtype


def test_autocast_leaves_routing_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    module, (x, ids, weights) = plain(has_bias=True), batch(5)
    stock, seen = polymoe.ops.experts, []

    def watched(*args: object, **options: object) -> Tensor:
        seen.append([value.dtype for value in args if isinstance(value, Tensor) and value.is_floating_point()])
        return stock(*args, **options)

    monkeypatch.setattr(polymoe.ops, "experts", watched)
    with torch.autocast("cpu", torch.bfloat16):
        assert experts_forward(module, x, ids, weights).dtype == torch.float32
    b, f = torch.bfloat16, torch.float32
    assert seen == [[b, b, b, f, b, b]]  # x, both weights, the routing weights, both biases


def test_projections_of_two_dtypes() -> None:
    module, inputs = plain(), batch(37)
    module.down_proj = nn.Parameter(module.down_proj.double(), requires_grad=False)
    assert_right(module, *inputs)
    (explanation,) = polymoe.explain(module).modules.values()
    assert "the projections are torch.float32 and torch.float64" in explanation.notes[0]


@pytest.mark.parametrize("flags", FLAGS, ids=named)
def test_meta_device(flags: dict[str, bool]) -> None:
    module = plain(**flags).to("meta")
    for tokens in (0, 5):
        x, ids, weights = (t.to("meta") for t in batch(tokens))
        out = experts_forward(module, x, ids, weights)
        assert (out.device.type, out.shape, out.dtype) == ("meta", x.shape, x.dtype)
    assert len(polymoe.explain(module).modules) == 1


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_weights(mesh: DeviceMesh) -> None:
    """FSDP2 unshards them for the forward. Whoever does not gets an error, as from Transformers' own code."""
    module, inputs = plain(), batch(9)
    expected = experts_forward(module, *inputs)
    wrapped = fully_shard(copy.deepcopy(module), mesh=mesh)
    assert isinstance(wrapped.gate_up_proj, torch.distributed.tensor.DTensor)
    assert_same_bits(wrapped(*inputs), expected, "FSDP2")
    for placement in (Shard(0), Shard(1), Replicate()):
        module.down_proj = nn.Parameter(distribute_tensor(module.down_proj.data, mesh, [placement]))
        with pytest.raises(ValueError, match=r"down_proj: expected a plain tensor.*got <class .*DTensor"):
            experts_forward(module, *inputs)
        module.down_proj = nn.Parameter(module.down_proj.to_local().detach())


def test_another_number_of_experts_is_refused() -> None:
    module, inputs = plain(), batch(9)
    module.num_experts = EXPERTS // 2
    with pytest.raises(ValueError, match=rf"gate_up_proj: expected .* num_experts = 4 experts, got \({EXPERTS}, "):
        experts_forward(module, *inputs)


# --- torch.compile --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", FLAGS, ids=named)
def test_flags_compile(flags: dict[str, bool]) -> None:
    torch._dynamo.reset()
    module, inputs = plain(**flags), batch(9)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert_same_bits(compiled(*inputs), experts_forward(module, *inputs), "compiled")


# --- cost -----------------------------------------------------------------------------------------------------------


def test_the_benchmark_judges(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_adapter.main(["--quick"]) == 0
    monkeypatch.setattr(bench_adapter, "LIMIT", -1.0)
    monkeypatch.setattr(bench_adapter, "layers", lambda: [bench_adapter.unfused("own", bench_adapter.OwnGate)])
    assert bench_adapter.main(["--quick", "--check"]) == 1
    assert "| own | un-fused | " in capsys.readouterr().out


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True], ids=["fused", "unfused"])
def test_gradients_are_those_of_the_models_own_forward(norm: bool) -> None:
    module, (x, ids, weights) = plain(has_post_expert_norm=norm), batch(9)
    tensors = [x, weights, *module.parameters()]
    for tensor in tensors:
        tensor.requires_grad_()
    ours = torch.autograd.grad(experts_forward(module, x, ids, weights).square().sum(), tensors)
    own = torch.autograd.grad(type(module).forward(module, x, ids, weights).square().sum(), tensors)
    for got, expected in zip(ours, own, strict=True):
        # Either forward and either backward.
        assert relative_frobenius(got, expected) <= 4 * float32_bound()
