"""polymoe.optimize: the same bits from packed weights, and no reader that takes permuted numbers for weights."""

from __future__ import annotations

import copy
import io
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, init_device_mesh
from transformers import PreTrainedModel

import polymoe
import polymoe.integrations.transformers
from polymoe.nn import Experts, MoE, Router
from polymoe.packing import PackedWeight, PackedWeightError
from polymoe.testing.tolerances import assert_same_bits

E, H, I, T, K = 4, 72, 40, 9, 2
VARIANTS: dict[str, dict[str, Any]] = {
    "gated": {},
    "interleaved": {"activation": "swiglu_oai", "alpha": 1.7, "limit": 7.0, "interleaved": True, "bias": True},
    "transposed": {"transposed": True, "activation": "geglu"},
    "ungated": {"activation": "relu2"},
}


@pytest.fixture(autouse=True)
def seeded(seed: int) -> Iterator[None]:
    """One thread: more would only wait for one another here."""
    torch.manual_seed(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def experts(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Experts:
    return Experts(E, H, I, dtype=dtype, **options).requires_grad_(False)


def inputs(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)]).int()
    return torch.randn(T, H, dtype=dtype), torch.rand(T, K), ids


def by_hand(module: Experts, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """The same experts from a plain module with packed weights, called by the op."""
    gate_up, down = module.gate_up.detach().clone(), module.down.detach().clone()
    halves = module.activation != "relu2"
    polymoe.formats.pack_(gate_up, gate_up=halves, interleaved=module.interleaved, transposed=module.transposed)
    polymoe.formats.pack_(down, transposed=module.transposed)
    names = ("activation", "alpha", "limit", "gate_up_bias", "down_bias", "transposed", "interleaved")
    options = {name: getattr(module, name) for name in names}
    return polymoe.experts(x, gate_up, down, weights, ids, **options, weight_format="packed")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_same_bits_as_packed_by_hand(variant: str, dtype: torch.dtype) -> None:
    module, batch = experts(dtype, **VARIANTS[variant]), inputs(dtype)
    want = by_hand(module, *batch)
    assert polymoe.optimize(module) == ["gate_up", "down"]
    assert_same_bits(module(*batch), want, "experts")


def test_compiles_as_one_graph() -> None:
    module, batch = experts(), inputs()
    polymoe.optimize(module)
    want = module(*batch)
    torch._dynamo.reset()
    assert_same_bits(torch.compile(module, fullgraph=True, backend="aot_eager")(*batch), want, "compiled")


def test_in_place_and_back() -> None:
    module = experts()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    pointers = module.gate_up.data_ptr(), module.down.data_ptr()
    polymoe.optimize(module)
    assert (module.gate_up_packed.data_ptr(), module.down_packed.data_ptr()) == pointers
    assert not torch.equal(module.gate_up_packed, before["gate_up"])
    assert polymoe.optimize(module) == []
    assert polymoe.unoptimize(module) == ["gate_up", "down"]
    assert (module.gate_up.data_ptr(), module.down.data_ptr()) == pointers
    assert dict(module.named_buffers()) == {}
    for name, tensor in before.items():
        assert_same_bits(getattr(module, name).detach(), tensor, name)


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved,
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_stay_packed_and_apart(kind: str) -> None:
    module, batch = experts(), inputs()
    plain = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    polymoe.optimize(module)
    want = module(*batch)
    copied = COPIES[kind](module)
    assert isinstance(copied.gate_up, PackedWeight)
    assert_same_bits(copied(*batch), want, "the copy")
    assert_same_bits(copied.state_dict()["gate_up"], plain["gate_up"], "its state_dict")
    copied.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in plain.items()})
    assert_same_bits(module(*batch), want, "the first, after the copy changed")
    assert_same_bits(module.state_dict()["gate_up"], plain["gate_up"], "the first's state_dict")


def test_state_dict_holds_the_original_values_both_ways() -> None:
    moe = MoE(Router(H, E, K), Experts(E, H, I), shared_intermediate_size=I).requires_grad_(False)
    plain = {name: tensor.clone() for name, tensor in moe.state_dict().items()}
    assert polymoe.optimize(moe) == [
        "experts.gate_up",
        "experts.down",
        "shared.experts.gate_up",
        "shared.experts.down",
    ]
    packed = moe.state_dict()
    assert packed.keys() == plain.keys()
    for name, tensor in plain.items():
        assert_same_bits(packed[name], tensor, name)

    x = torch.randn(T, H)
    other = MoE(Router(H, E, K), Experts(E, H, I), shared_intermediate_size=I).requires_grad_(False)
    polymoe.optimize(other)
    assert other.load_state_dict(packed) == ([], [])
    assert_same_bits(other(x), moe(x), "loaded")

    del packed["experts.down"]
    assert other.load_state_dict(packed, strict=False) == (["experts.down"], [])
    with pytest.raises(RuntimeError, match=r"size mismatch for experts\.gate_up"):
        other.load_state_dict({**plain, "experts.gate_up": torch.zeros(E, H, I)})


def test_a_parameter_that_is_set_anew_is_plain_again() -> None:
    module, batch = experts(), inputs()
    want = module(*batch)
    plain = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    polymoe.optimize(module)
    module.gate_up, module.down = (nn.Parameter(plain[name], requires_grad=False) for name in ("gate_up", "down"))
    assert_same_bits(module(*batch), want, "experts")
    assert_same_bits(module.state_dict()["gate_up"], plain["gate_up"], "state_dict")


def merge(module: Experts) -> None:
    """What a PEFT merge does."""
    module.gate_up.data += torch.ones(E, 2 * I, H)


READERS: dict[str, Callable[[Experts], Any]] = {
    "index": lambda module: module.gate_up[0],
    "loop": lambda module: list(module.gate_up),
    "method": lambda module: module.gate_up.transpose(1, 2),
    "merge": merge,
    "function": lambda module: torch.stack([module.gate_up]),
    "linear": lambda module: F.linear(torch.ones(1, H), module.gate_up),
    "grouped_mm": lambda module: F.grouped_mm(torch.ones(E, 1, H), module.gate_up),
}


@pytest.mark.parametrize("reader", READERS)
def test_other_readers_get_one_clear_error(reader: str) -> None:
    module = experts()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    polymoe.optimize(module)
    with pytest.raises(PackedWeightError, match=r"polymoe\.optimize: gate_up: expected only polymoe .*unoptimize"):
        READERS[reader](module)
    assert_same_bits(module.state_dict()["gate_up"], before["gate_up"], "gate_up")


def test_who_holds_the_parameter_does_not_see_it_permuted() -> None:
    module = experts()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    polymoe.optimize(module)
    for parameter in optimizer.param_groups[0]["params"]:
        assert parameter.is_meta
        with pytest.raises(NotImplementedError, match="no data"):
            parameter.tolist()


def test_a_cast_is_noticed() -> None:
    module, batch = experts(), inputs(torch.float32)
    polymoe.optimize(module)
    module.float()
    with pytest.raises(ValueError, match=r"gate_up: expected torch.bfloat16, as it was packed; .*, got torch.float32"):
        module(*batch)


# --- refusals -------------------------------------------------------------------------------------------------------


def tied() -> Experts:
    module = experts()
    module.also = module.down
    return module


def overlapping() -> Experts:
    module = experts()
    module.register_buffer("view", module.gate_up[1:, 3:])
    return module


HELD: list[Tensor] = []


def held_outside() -> Experts:
    module = experts()
    HELD[:] = [module.state_dict()["down"]]
    return module


def strided() -> Experts:
    module = experts()
    module.down = nn.Parameter(module.down.mT.contiguous().mT, requires_grad=False)
    return module


def sharded() -> Experts:
    module = experts()
    mesh = init_device_mesh("cpu", (1,))
    module.down = nn.Parameter(DTensor.from_local(module.down.detach(), mesh), requires_grad=False)
    return module


def of_another_dtype() -> Experts:
    module = experts()
    module.down = nn.Parameter(module.down.to(torch.float8_e4m3fn), requires_grad=False)
    return module


def of_odd_width() -> Experts:
    module = experts()
    module.gate_up = nn.Parameter(module.gate_up[:, 1:].contiguous(), requires_grad=False)
    return module


GRAPHS: list[Tensor] = []


def in_a_graph() -> Experts:
    module = experts()
    GRAPHS[:] = [torch.ones_like(module.gate_up).requires_grad_() * module.gate_up]
    return module


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "nothing": (lambda: nn.Linear(2, 2), "model: expected polymoe.nn.Experts"),
    "grad": (lambda: Experts(E, H, I), "gate_up: expected a weight that does not require grad"),
    "tied": (tied, "down: expected memory of its own, got memory shared with also"),
    "overlapping": (overlapping, "gate_up: expected memory of its own, got memory shared with view"),
    "held": (held_outside, "down: expected memory of its own, got memory that a tensor outside the model holds too"),
    "strided": (strided, "down: expected a contiguous tensor"),
    "meta": (lambda: experts().to("meta"), "gate_up: expected a weight on the CPU"),
    "dtype": (of_another_dtype, "down: expected float32, bfloat16, float16 or float64, got float8_e4m3fn"),
    "width": (of_odd_width, "gate_up: expected an even N with gate_up"),
    "processes": (
        lambda: experts().share_memory(),
        "gate_up: expected memory of its own, got memory shared with other p",
    ),
    "graph": (in_a_graph, "gate_up: expected a weight of its own, got one that code in C++ holds too"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_change_nothing(reason: str) -> None:
    make, message = REFUSED[reason]
    module = make()
    names = [name for name, _ in module.named_parameters()]
    with pytest.raises(ValueError, match=re.escape(message)):
        polymoe.optimize(module)
    assert [name for name, _ in module.named_parameters()] == names


def test_sharded_weights_are_refused() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=r"down: expected a whole tensor; pack before the model is sharded"):
            polymoe.optimize(sharded())
    finally:
        torch.distributed.destroy_process_group()


PEAK = """
import resource, torch
import polymoe
from polymoe.nn import Experts

module = Experts(24, 1024, 512, dtype=torch.bfloat16).requires_grad_(False)  # 24 x 3 MiB
small = Experts(2, 64, 64, dtype=torch.bfloat16).requires_grad_(False)
polymoe.optimize(small)  # threads and code are in memory now
touched = torch.ones(64 << 18)  # 64 MiB, so that the peak is above whatever came before
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
polymoe.optimize(module)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_takes_the_memory_of_one_expert() -> None:
    """72 MiB of weights; gate_up of one expert is 2 MiB."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(done.stdout) <= (2 << 10) + 1024  # KiB, a MiB of it for what else moves


# --- Transformers ---------------------------------------------------------------------------------------------------

# Fused plain, fused with bias, transposed and interleaved, fused clamped, ungated, and un-fused by a norm.
MODELS = ("qwen3_moe", "gpt_oss", "deepseek_v4", "nemotron_h", "muse_spark")


def tiny(family: str) -> PreTrainedModel:
    model = zoo.tiny_model(family).eval().requires_grad_(False)
    model.set_experts_implementation("polymoe")
    return model


def logits(model: PreTrainedModel, prompt: Tensor) -> Tensor:
    with torch.no_grad():
        return model(prompt, use_cache=False)[0]


@pytest.mark.parametrize("family", MODELS)
def test_models_of_transformers(family: str, tmp_path: Path) -> None:
    model, prompt = tiny(family), torch.randint(90, (2, 7))
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    want = logits(model, prompt)
    packed = polymoe.optimize(model)
    assert len(packed) == 2 * len(zoo.experts_modules(model))
    got = logits(model, prompt)
    assert torch.linalg.norm(got - want) <= 1e-4 * torch.linalg.norm(want)
    assert_same_bits(logits(copy.deepcopy(model), prompt), got, "a deep copy")
    state = model.state_dict()
    assert state.keys() == plain.keys()
    for name, tensor in plain.items():
        assert_same_bits(state[name], tensor, name)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, experts_implementation="polymoe")
    for name, tensor in loaded.state_dict().items():
        assert_same_bits(tensor, plain[name], f"{name}, saved and loaded")
    for other in ("eager", "grouped_mm"):
        model.set_experts_implementation(other)
        with pytest.raises(PackedWeightError, match="expected only polymoe to read"):
            logits(model, prompt)
    polymoe.unoptimize(model)
    model.set_experts_implementation("polymoe")
    assert_same_bits(logits(model, prompt), want, "unpacked")
