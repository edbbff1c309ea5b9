"""Runs the DeepSeek-V4 architecture of Transformers with three experts implementations and compares them.

Expert shapes, routing and activation are V4-Flash's: hidden 4096, expert intermediate 2048, top-6 of sqrt-softplus
scores, clamped SwiGLU, hash routing in the first three layers, one shared expert. Number of layers and experts follow
from the free memory; attention is tiny. Weights are random; the text is real, and its bytes are the tokens.

    python examples/demo_deepseek_v4.py [--layers 4] [--experts 64] [--quick]

Times "eager", "grouped_mm" (both Transformers' own) and "polymoe", interleaved, on prefill of 128 and 512 tokens and on
token-by-token decode, and compares the logits with an f32 run of the same weights. "polymoe fp8" and "polymoe mxfp4"
are the same experts quantised, as DeepSeek publishes them. Exits with 1 if polymoe did not run.
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from demo_weights import FORMATS, Pool, quantized_experts
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.integrations.moe import ExpertsInterface
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Experts,
    DeepseekV4HashRouter,
    DeepseekV4TopKRouter,
)

import polymoe
import polymoe.integrations.transformers  # registers "polymoe"

TEXT = Path(__file__).parent / "data" / "kjv.txt"
# Of Transformers' paths for a CPU, batched_mm is left out: it copies the weights of every slot and is slower by far.
PEERS = ("eager", "grouped_mm")
QUANTIZED = {f"polymoe {name}": name for name in FORMATS}
IMPLEMENTATIONS = (*PEERS, "polymoe", *QUANTIZED)
HIDDEN, INTERMEDIATE, TOP_K = 4096, 2048, 6
HASH_LAYERS = 3
EXPERT_BYTES = 3 * HIDDEN * INTERMEDIATE * 2  # gate, up and down in bf16
SECONDS = 50  # for one workload, once it has three rounds
START = time.perf_counter()


def say(message: str) -> None:
    print(f"[{time.perf_counter() - START:6.1f} s] {message}", flush=True)


# --- the model ------------------------------------------------------------------------------------------------------


def free_memory() -> int:
    """Bytes that Linux reports as available."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("demo: /proc/meminfo has no MemAvailable")


def choose_experts(available: int, layers: int) -> int:
    """Experts a layer: what 70% of the free memory (of 24 GiB at most) holds, in bf16, in fp8 and in mxfp4 at once; a
    multiple of 8, from 8 to 256."""
    budget = 0.7 * min(available, 24 * 2**30)
    every_format = EXPERT_BYTES * (16 + 8 + 4.25) / 16
    return max(8, min(256, int(budget / (layers * every_format)) // 8 * 8))


def make_config(layers: int, experts: int) -> DeepseekV4Config:
    return DeepseekV4Config(
        vocab_size=256,
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        n_routed_experts=experts,
        num_experts_per_tok=TOP_K,
        num_hidden_layers=layers,
        num_hash_layers=HASH_LAYERS,
        layer_types=["sliding_attention"] * layers,
        num_attention_heads=4,
        head_dim=64,
        q_lora_rank=64,
        o_groups=1,
        o_lora_rank=64,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )


def expert_modules(model: nn.Module) -> list[DeepseekV4Experts]:
    return [module for module in model.modules() if isinstance(module, DeepseekV4Experts)]


def allocate(model: DeepseekV4ForCausalLM, dtype: torch.dtype) -> None:
    """Gives every tensor outside the experts memory in `dtype`; what the model keeps in f32 gets f32."""
    keep_f32 = set(model._keep_in_fp32_modules_strict)
    for name, module in model.named_modules():
        if isinstance(module, DeepseekV4Experts):
            continue
        for key, tensor in list(module.named_parameters(recurse=False)) + list(module.named_buffers(recurse=False)):
            strict = keep_f32 & {*name.split("."), key}
            own = tensor.dtype if not tensor.is_floating_point() else torch.float32 if strict else dtype
            if "inv_freq" in key:
                own = torch.float32
            real = torch.empty(tensor.shape, dtype=own)
            setattr(module, key, nn.Parameter(real, requires_grad=False) if key in module._parameters else real)


def fill_experts(model: DeepseekV4ForCausalLM, generator: torch.Generator) -> None:
    """Normal weights in bf16, and the same quantised in `quantized`, by format."""
    pool = Pool(model.config.initializer_range, generator)
    modules = expert_modules(model)
    for done, module in enumerate(modules, 1):
        for key, parameter in list(module.named_parameters()):
            filled = pool.weight(parameter.shape)
            filled._is_hf_initialized = True  # type: ignore[attr-defined]
            setattr(module, key, filled)
        both = module.gate_up_proj, module.down_proj
        module.quantized = {name: tuple(pool.quantized(weight, name) for weight in both) for name in FORMATS}
        say(f"filled the experts of layer {done}/{len(modules)}")


def fill_hash_tables(model: nn.Module, generator: torch.Generator) -> None:
    for module in model.modules():
        if isinstance(module, DeepseekV4HashRouter):
            noise = torch.rand(module.tid2eid.shape[0], module.num_experts, generator=generator)
            module.tid2eid.copy_(noise.argsort(-1)[:, : module.top_k])


def build(config: DeepseekV4Config, seed: int) -> DeepseekV4ForCausalLM:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        model = DeepseekV4ForCausalLM(config).eval()
    allocate(model, torch.bfloat16)
    fill_experts(model, generator)
    model.initialize_weights()
    fill_hash_tables(model, generator)
    return model


# --- the f32 run ----------------------------------------------------------------------------------------------------


def f32_experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts in f32 from bf16 weights, widened one expert at a time."""
    out = torch.zeros_like(hidden_states, dtype=torch.float32)
    for expert in top_k_index.unique().tolist():
        token, slot = torch.where(top_k_index == expert)
        h = F.linear(hidden_states[token].float(), self.gate_up_proj[expert].float())
        y = F.linear(self._apply_gate(h), self.down_proj[expert].float())
        out.index_add_(0, token, y * top_k_weights[token, slot, None].float())
    return out


ExpertsInterface.register("f32", f32_experts)
for implementation, name in QUANTIZED.items():
    ExpertsInterface.register(implementation, quantized_experts(name, polymoe.experts))


def widened(model: DeepseekV4ForCausalLM) -> DeepseekV4ForCausalLM:
    """The same weights with everything in f32. The experts' bf16 weights are shared, not copied."""
    with torch.device("meta"):
        wide = DeepseekV4ForCausalLM(copy.deepcopy(model.config)).eval()
    allocate(wide, torch.float32)
    source = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, module in wide.named_modules():
        for key in [*module._parameters, *module._buffers]:
            full = f"{name}.{key}" if name else key
            if isinstance(module, DeepseekV4Experts):
                setattr(module, key, source[full])
            elif full in source:
                getattr(module, key).copy_(source[full])
    wide.set_experts_implementation("f32")
    return wide


class Routes:
    """The experts that a model's scored routers chose in a run, to be chosen again in a run of another model."""

    def __init__(self) -> None:
        self.ids: list[Tensor] = []

    @contextmanager
    def hooked(self, model: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
        routers = [module for module in model.modules() if isinstance(module, DeepseekV4TopKRouter)]
        handles = [router.register_forward_hook(hook) for router in routers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def recorded(self, model: nn.Module) -> Any:
        return self.hooked(model, lambda router, args, output: self.ids.append(output[2]))

    def replayed(self, model: nn.Module) -> Any:
        ids = iter(self.ids)

        def replay(router: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
            logits, chosen = output[0], next(ids)
            weights = router.score_fn(logits).gather(1, chosen)
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
            return logits, weights * router.routed_scaling_factor, chosen

        return self.hooked(model, replay)


# --- measuring ------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Sums the time spent in the forward of each experts module."""

    def __init__(self, model: nn.Module) -> None:
        self.seconds = 0.0
        for module in expert_modules(model):
            module.forward = self._timed(module.forward)

    def _timed(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def timed(*args: Any, **kwargs: Any) -> Tensor:
            begin = time.perf_counter()
            try:
                return forward(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begin

        return timed


class CountOps(TorchDispatchMode):
    """Counts the calls of one op, whoever makes them."""

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func._schema.name == self.op
        return func(*args, **(kwargs or {}))


@dataclass
class Workload:
    """`run` does the work once and returns nothing; times are per token, in milliseconds."""

    name: str
    tokens: int
    prepare: Callable[[int], Any]
    run: Callable[[Any], None]
    model_ms: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in IMPLEMENTATIONS})
    experts_ms: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in IMPLEMENTATIONS})

    def model(self, implementation: str) -> float:
        return statistics.median(self.model_ms[implementation])

    def experts(self, implementation: str) -> float:
        return statistics.median(self.experts_ms[implementation])


@contextmanager
def experts_implementation(model: DeepseekV4ForCausalLM, name: str) -> Iterator[None]:
    before = model.config._experts_implementation
    model.set_experts_implementation(name)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def prefill(model: DeepseekV4ForCausalLM, text: Tensor, tokens: int) -> Workload:
    def prepare(round_: int) -> Tensor:
        return text[round_ * 4096 :][:tokens].unsqueeze(0)

    return Workload(f"prefill {tokens}", tokens, prepare, lambda ids: model(ids, use_cache=False))


def decode(model: DeepseekV4ForCausalLM, text: Tensor, prompt: int, tokens: int) -> Workload:
    """Feeds the text token by token behind a prompt, whose cache is made once a round and copied for each run."""

    def prepare(round_: int) -> tuple[Any, Tensor]:
        ids = text[round_ * 4096 + 2048 :][: prompt + tokens].unsqueeze(0)
        return model(ids[:, :prompt], use_cache=True).past_key_values, ids[:, prompt:]

    def run(prepared: tuple[Any, Tensor]) -> None:
        cache = copy.deepcopy(prepared[0])
        for token in prepared[1].split(1, dim=1):
            cache = model(token, past_key_values=cache, use_cache=True).past_key_values

    return Workload("decode", tokens, prepare, run)


def measure(model: DeepseekV4ForCausalLM, workload: Workload, rounds: int, watch: Stopwatch) -> None:
    """`rounds` rounds, or 3 on a machine where more would take longer than SECONDS."""
    start = time.perf_counter()
    for round_ in range(rounds):
        if round_ >= 3 and time.perf_counter() - start > SECONDS:
            break
        prepared = workload.prepare(round_)
        for turn in range(len(IMPLEMENTATIONS)):
            implementation = IMPLEMENTATIONS[(round_ + turn) % len(IMPLEMENTATIONS)]
            with experts_implementation(model, implementation):
                watch.seconds = 0.0
                begin = time.perf_counter()
                workload.run(prepared)
                total = time.perf_counter() - begin
            workload.model_ms[implementation].append(1e3 * total / workload.tokens)
            workload.experts_ms[implementation].append(1e3 * watch.seconds / workload.tokens)
        latest = ", ".join(f"{name} {workload.experts_ms[name][-1]:.2f}" for name in IMPLEMENTATIONS)
        say(f"{workload.name}, round {round_ + 1}/{rounds}: ms per token in the experts: {latest}")


@dataclass
class LogitError:
    """Against the f32 run, relative Frobenius norms over all passages."""

    free: float  # every run routes by its own scores: a near tie that flips counts as an error
    same_experts: float  # scored layers choose the experts of the f32 run: arithmetic alone


def logit_errors(model: DeepseekV4ForCausalLM, passages: list[Tensor]) -> dict[str, LogitError]:
    wide = widened(model)
    size = 0.0
    squares = {name: [0.0, 0.0] for name in IMPLEMENTATIONS}
    for number, ids in enumerate(passages, 1):
        routes = Routes()
        with routes.recorded(wide):
            truth = wide(ids, use_cache=False).logits.double()
        size += float(truth.square().sum())
        for name in IMPLEMENTATIONS:
            with experts_implementation(model, name):
                free = model(ids, use_cache=False).logits.double()
                with routes.replayed(model):
                    pinned = model(ids, use_cache=False).logits.double()
            for kind, logits in enumerate((free, pinned)):
                squares[name][kind] += float((logits - truth).square().sum())
        so_far = ", ".join(f"{name} {(squares[name][0] / size) ** 0.5:.5f}" for name in IMPLEMENTATIONS)
        say(f"logit error after passage {number}/{len(passages)}: {so_far}")
    return {name: LogitError(*((square / size) ** 0.5 for square in squares[name])) for name in IMPLEMENTATIONS}


def polymoe_calls(model: DeepseekV4ForCausalLM, ids: Tensor) -> int:
    with experts_implementation(model, "polymoe"), CountOps("polymoe::experts") as count:
        model(ids, use_cache=False)
    return count.calls


# --- the report -----------------------------------------------------------------------------------------------------


def table(workloads: list[Workload], errors: dict[str, LogitError], sizes: dict[str, int]) -> str:
    head = (
        "workload",
        "experts by",
        "GB",
        "ms/token",
        "in experts",
        "experts x eager",
        "experts x best",
        "model x eager",
    )
    rows = [(*head, "model x best", "logit error", "same experts")]
    for workload in workloads:
        best_experts = min(workload.experts(name) for name in PEERS)
        best_model = min(workload.model(name) for name in PEERS)
        for name in IMPLEMENTATIONS:
            experts, whole = workload.experts(name), workload.model(name)
            ratios = (
                workload.experts("eager") / experts,
                best_experts / experts,
                workload.model("eager") / whole,
                best_model / whole,
            )
            cells = (workload.name, name, f"{sizes[name] / 1e9:.2f}", f"{whole:.2f}", f"{experts:.2f}")
            both = (f"{errors[name].free:.5f}", f"{errors[name].same_experts:.5f}")
            rows.append((*cells, *(f"{ratio:.2f}" for ratio in ratios), *both))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def expert_bytes(model: DeepseekV4ForCausalLM) -> dict[str, int]:
    """Of the experts' weights and scales, by implementation."""
    modules = expert_modules(model)
    dense = sum(parameter.nbytes for module in modules for parameter in module.parameters())
    sizes = dict.fromkeys(IMPLEMENTATIONS, dense)
    for implementation, name in QUANTIZED.items():
        sizes[implementation] = sum(weight.nbytes for module in modules for weight in module.quantized[name])
    return sizes


def how_it_ran(model: DeepseekV4ForCausalLM) -> str:
    """The backend and ISA level of the experts, and whether they are fused."""
    with experts_implementation(model, "polymoe"):
        explanation = next(iter(polymoe.explain(model).modules.values()))
    return f"backend {explanation.backend}, ISA level {explanation.isa_level}, {explanation.notes[0]}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, help="decoder layers; the first 3 are hash-routed (default 4)")
    parser.add_argument(
        "--experts", type=int, help="experts a layer (default: what the free memory holds, 256 at most)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a look in seconds: 2 layers of 8 experts, few tokens, one round"
    )
    return parser.parse_args()


@torch.inference_mode()
def main() -> int:
    arguments = parse_arguments()
    available = free_memory()
    layers = arguments.layers or (2 if arguments.quick else 4)
    experts = arguments.experts or (8 if arguments.quick else choose_experts(available, layers))
    size = layers * experts * EXPERT_BYTES
    say(
        f"{available / 2**30:.1f} GiB free: {layers} layers ({min(layers, HASH_LAYERS)} hash-routed) x {experts} of "
        f"V4-Flash's 256 experts = {size / 1e9:.1f} GB of bf16"
    )
    seed = 0
    model = build(make_config(layers, experts), seed)
    text = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long()
    watch = Stopwatch(model)

    calls = polymoe_calls(model, text[:32].unsqueeze(0))
    say(f"polymoe.experts ran {calls} times for {layers} MoE layers: {how_it_ran(model)}")
    if calls != layers:
        say("FAILED: polymoe did not compute the experts")
        return 1

    short, long, rounds, steps, passages = (32, 64, 1, 4, 1) if arguments.quick else (128, 512, 5, 16, 3)
    say(f"logits of {passages} x {long} tokens in f32, then by {', '.join(IMPLEMENTATIONS)} (this also warms up)")
    starts = [number * len(text) // passages for number in range(passages)]
    errors = logit_errors(model, [text[start : start + long].unsqueeze(0) for start in starts])
    workloads = [decode(model, text, 64, steps), prefill(model, text, short), prefill(model, text, long)]
    for workload in workloads:
        measure(model, workload, rounds, watch)

    print()
    print(table(workloads, errors, expert_bytes(model)))
    print()
    print("Medians of interleaved runs. x eager, x best: the time of Transformers' eager path, or of the better of its")
    print("two, over this row's. Logit error: relative Frobenius norm against an f32 run of the bf16 weights; a near")
    print("tie of router scores that bf16 or a format decides otherwise counts. Same experts: the same with the f32")
    print("run's choices. GB: the experts' weights and scales.")
    print(f"polymoe {polymoe.__version__}, {how_it_ran(model)}, {torch.get_num_threads()} threads")
    say(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
