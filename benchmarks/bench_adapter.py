"""What the Transformers adapter adds to polymoe's own functions in every layer, on a layer so small that little else
takes time (T 1, H 64, I 128, E 8, K 2).

Fused rows stand beside one call of polymoe.experts, un-fused ones beside the same ops called one by one around the
model's own gate. The last column is the whole call of the module, with what torch and Transformers do in it.

Run it as `python -m benchmarks.bench_adapter`; --help lists the options.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.inkling2.modeling_inkling2 import Inkling2Experts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import polymoe
from benchmarks import inputs
from benchmarks._harness import cpu_name, say
from benchmarks._report import markdown, other_cpu
from benchmarks._timing import FULL, QUICK, Effort, OtherCpuUse, Timing, interleave
from polymoe.integrations.transformers import experts_forward

LIMIT = 15e-6  # seconds that the adapter may add to a layer
T, H, I, E, K = 1, 64, 128, 8, 2
DTYPE = torch.bfloat16
CONFIG = SimpleNamespace(
    num_local_experts=E,
    n_routed_experts=E,
    hidden_size=H,
    intermediate_size=I,
    moe_intermediate_size=I,
    moe_latent_size=None,
    hidden_act="silu",
    mlp_hidden_act="relu2",
    swiglu_alpha=1.702,
    swiglu_limit=7.0,
    mlp_gate_softcap=15.0,
    mlp_up_softcap=15.0,
    _experts_implementation="polymoe",
)


@dataclass(frozen=True)
class Layer:
    """An experts module, and what it amounts to in calls of polymoe's functions."""

    name: str
    module: nn.Module
    own: Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Costs:
    name: str
    road: str
    own: Timing
    adapter: Timing
    module: Timing
    other_cpu: float | None

    @property
    def added(self) -> float:
        return self.adapter.median - self.own.median

    @property
    def verdict(self) -> str:
        return "pass" if self.added < LIMIT else "FAIL: too slow"


class OwnGate(MixtralExperts):
    """Mixtral with a gate that nobody knows."""

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up


def built(experts_class: Any) -> Any:
    source, module = inputs.generator(0), experts_class(CONFIG).to(DTYPE).requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(inputs.weight(tuple(parameter.shape), DTYPE, source))
    return module


def fused(name: str, experts_class: type[nn.Module], activation: str, **options: Any) -> Layer:
    module = built(experts_class)
    up = module.gate_up_proj if module.has_gate else module.up_proj
    if module.has_bias:
        options |= {"gate_up_bias": module.gate_up_proj_bias, "down_bias": module.down_proj_bias}

    def own(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return polymoe.experts(x, up, module.down_proj, weights, ids, activation, **options)

    return Layer(name, module, own)


def unfused(name: str, experts_class: type[nn.Module]) -> Layer:
    module = built(experts_class)
    gate_up, down = module.gate_up_proj.mT, module.down_proj.mT

    def own(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        plan = polymoe.plan(ids, E)
        offs = plan.offsets[1:]
        a = module._apply_gate(polymoe.grouped_mm(polymoe.dispatch(x, plan), gate_up, offs))
        return polymoe.combine(polymoe.grouped_mm(a, down, offs), plan, weights)

    return Layer(name, module, own)


def layers() -> list[Layer]:
    return [
        fused("Mixtral", MixtralExperts, "swiglu"),
        fused("DeepSeek-V4", DeepseekV4Experts, "swiglu_clamped", limit=7.0),
        fused("gpt-oss", GptOssExperts, "swiglu_oai", alpha=1.702, limit=7.0, transposed=True, interleaved=True),
        fused("Inkling2", Inkling2Experts, "softcapped", alpha=15.0, limit=15.0),
        fused("Nemotron-H", NemotronHExperts, "relu2"),
        unfused("Mixtral with a gate of its own", OwnGate),
    ]


def batch(source: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    weights, ids = inputs.routing(T, E, K, DTYPE, source)
    return inputs.normal((T, H), DTYPE, source), ids, weights


def measure(layer: Layer, effort: Effort) -> Costs:
    source = inputs.generator(1)
    given = [batch(source) for _ in range(inputs.SETS)]
    if not torch.equal(experts_forward(layer.module, *given[0]), layer.own(*given[0])):
        raise AssertionError(f"{layer.name}: the adapter computes something else than what it is compared with")
    road = polymoe.explain(layer.module).modules[""].notes[0].partition(",")[0]
    with OtherCpuUse() as others:
        own, adapter, module = interleave(
            [
                lambda i: layer.own(*given[i]),
                lambda i: experts_forward(layer.module, *given[i]),
                lambda i: layer.module(*given[i]),
            ],
            inputs.SETS,
            effort,
        )
    return Costs(layer.name, road, own, adapter, module, others.share)


def table(rows: Sequence[Costs]) -> str:
    header = ["model", "road", "polymoe [us]", "adapter [us]", "added [us]", "limit", "verdict", "other CPU"]
    lines = [
        [
            row.name,
            row.road,
            f"{row.own.median * 1e6:.2f}",
            f"{row.adapter.median * 1e6:.2f}",
            f"{row.added * 1e6:+.2f}",
            f"{LIMIT * 1e6:.0f}",
            row.verdict,
            other_cpu(row.other_cpu),
            f"{row.module.median * 1e6:.2f}",
        ]
        for row in rows
    ]
    return markdown([*header, "module [us]"], lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table. Returns the exit status: with --check 1 if the adapter adds too much."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_adapter", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the adapter adds too much")
    given = parser.parse_args(arguments)
    rows = []
    with torch.no_grad():
        for layer in layers():
            rows.append(measure(layer, QUICK if given.quick else FULL))
            say(f"adapter {layer.name}: {rows[-1].added * 1e6:+.2f} us, verdict {rows[-1].verdict}")
    print(f"polymoe, Transformers adapter: {cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}.")
    print(f"\n{table(rows)}")
    return int(given.check and any(row.verdict != "pass" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
