"""What quantised experts cost a language model: trains the model of train_tiny_moe.py with polymoe, then reads the
whole held-out text with its experts in bf16 and in every quantised format and mode, and prints the perplexity of each.

    python examples/quantized_perplexity.py [--steps 400] [--out docs/quantized-perplexity.md]

Everything but the routed experts stays float32 and the same, so the differences are those of the experts alone.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import train_tiny_moe
from demo_weights import quantized_experts
from torch import Tensor, nn
from transformers import DeepseekV4ForCausalLM
from transformers.integrations.moe import ExpertsInterface
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

import polymoe
from polymoe.formats import parse

FORMATS = ("fp8_block128", "fp8_block32", "mxfp8", "mxfp4", "int8", "int4_g128", "int4_g64", "int4_g32")

SIZES = {"batch": 8, "length": 128, "experts": 32, "layers": 4, "gamma": 0.01, "seed": 0, "out": Path()}

PAGE = """# What quantised experts cost a language model

The model of [train_tiny_moe.py](../examples/train_tiny_moe.py), trained for {steps} steps, reads the whole held-out
text with its routed experts stored in each format. Everything else stays float32 and the same. Written by
`python examples/quantized_perplexity.py --steps {steps} --out docs/quantized-perplexity.md`.

{table}

"int8" and "int8_g128" as mode: activations rounded to 8-bit integers too, in groups of 32 or of 128. The formats' names
are those of `polymoe.formats.FORMATS`.
"""

Forward = Callable[..., Tensor]


def in_bf16(forward: Forward) -> Forward:
    """The experts with x rounded to bf16 and the result in the model's dtype again."""

    def run(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return forward(self, hidden_states.bfloat16(), top_k_index, top_k_weights).to(hidden_states.dtype)

    return run


def bf16_experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    both = (weight.bfloat16() for weight in (self.gate_up_proj, self.down_proj))
    routed = (top_k_weights.float(), top_k_index)
    return polymoe.experts(hidden_states, *both, *routed, "swiglu_clamped", limit=self.limit)


def has_kernels(name: str, mode: str) -> bool:
    """Whether more than the reference, in plain PyTorch, serves this mode here."""
    x = torch.empty(1, 1, dtype=torch.bfloat16)
    return polymoe.explain("experts", x, weight_format=name, mode=mode).backend != "reference"


def store(model: nn.Module, name: str) -> float:
    """Keeps the weights of all experts in the format `name`, where `quantized_experts` looks for them. Returns bits a
    weight, with scales and zero points."""
    bits = elements = 0
    for module in model.modules():
        if isinstance(module, DeepseekV4Experts):
            both = [parse(name).quantize(weight.detach()) for weight in (module.gate_up_proj, module.down_proj)]
            module.quantized = {name: both}
            bits += sum(8 * weight.nbytes for weight in both)
            elements += sum(weight.shape.numel() for weight in both)
    return bits / elements


@torch.no_grad()
def nats_per_byte(model: DeepseekV4ForCausalLM, text: Tensor, length: int) -> float:
    """The mean over the whole text, in windows of `length` that do not overlap."""
    windows = text[: (len(text) - 1) // length * length].view(-1, length)
    following = text[1 : windows.numel() + 1].view(-1, length)
    total = 0.0
    for inputs, targets in zip(windows.split(16), following.split(16), strict=True):
        logits = model(inputs, use_cache=False).logits
        total += float(nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
    return total / windows.numel()


def measure(model: DeepseekV4ForCausalLM, text: Tensor, length: int) -> Iterator[tuple[str, str, float, float]]:
    """Format, mode, stored bits a weight, nats a byte; float32 first."""

    def run(implementation: str) -> float:
        model.set_experts_implementation(implementation)
        return nats_per_byte(model, text, length)

    yield "float32", "", 32.0, run("polymoe")
    ExpertsInterface.register("bf16", in_bf16(bf16_experts))
    yield "bf16", "", 16.0, run("bf16")
    for name in FORMATS:
        bits = store(model, name)
        for mode in parse(name).modes:
            if not has_kernels(name, mode):
                continue
            ExpertsInterface.register(f"{name} {mode}", in_bf16(quantized_experts(name, polymoe.experts, mode)))
            yield name, mode, bits, run(f"{name} {mode}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--hidden", type=int, default=256, help="width of the model; experts have half of it")
    parser.add_argument("--held-out", type=int, default=train_tiny_moe.HELD_OUT, help="bytes to read")
    parser.add_argument("--out", type=Path, help="writes the table there too")
    own = parser.parse_args()
    options = train_tiny_moe.Options(steps=own.steps, hidden=own.hidden, **SIZES)
    model = train_tiny_moe.make_model(options, "polymoe")
    train_tiny_moe.train({"polymoe": model}, options)
    lines = ["| experts | mode | bits a weight | perplexity a byte | over float32 |", "|---|---|---|---|---|"]
    print("\n" + "\n".join(lines))
    base = None
    for name, mode, bits, nats in measure(model, train_tiny_moe.read_text()[1][: own.held_out], options.length):
        base = nats if base is None else base
        lines.append(f"| {name} | {mode} | {bits:.2f} | {math.exp(nats):.4f} | {math.exp(nats - base) - 1:+.2%} |")
        print(lines[-1], flush=True)
    if own.out:
        own.out.write_text(PAGE.format(steps=own.steps, table="\n".join(lines)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
