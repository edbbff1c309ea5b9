"""Trains a small DeepSeek-V4-style language model of Transformers twice from the same seed, once with its own eager
experts and once with polymoe's, step by step in turn: byte by byte on examples/data/kjv.txt, in float32, a few minutes
on two cores.

    python examples/train_tiny_moe.py [--steps 120] [--control] [--out train_tiny_moe.png]

Prints the loss of both on the way and on held-out text, and tokens per second. With matplotlib it writes a picture:
both loss curves, and the load of one layer's experts over time. The selection bias of the routers moves after each step
against the load (auxiliary-loss-free balancing), as DeepSeek trains.

The two losses drift apart, because training amplifies roundings and the sums of the two are rounded in another order.
--control shows how far roundings alone take them: a third model, eager too, begins with one weight of each expert moved
to the next float32 number.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts, DeepseekV4TopKRouter

import polymoe
import polymoe.integrations.transformers  # registers "polymoe"

TEXT = Path(__file__).parent / "data" / "kjv.txt"
HELD_OUT = 100_000  # bytes at the end
IMPLEMENTATIONS = ("eager", "polymoe")
CONTROL = "eager, moved"


@dataclass(frozen=True)
class Options:
    steps: int
    batch: int
    length: int
    hidden: int
    experts: int
    layers: int
    gamma: float
    seed: int
    out: Path
    control: bool = False


@dataclass
class Run:
    """What one training run recorded."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loads: list[Tensor] = field(default_factory=list)  # of the last layer, [E] per step
    held_out: float = 0.0

    def tokens_per_second(self, tokens: int) -> float:
        return tokens / statistics.median(self.seconds[min(2, len(self.seconds) - 1) :])

    def imbalance(self) -> list[float]:
        """The most loaded expert over the mean, step by step."""
        return [float(load.max() / load.float().mean()) for load in self.loads]


def make_model(options: Options, implementation: str) -> DeepseekV4ForCausalLM:
    """The same weights for every implementation of the experts."""
    torch.manual_seed(options.seed)
    config = DeepseekV4Config(
        vocab_size=256,
        hidden_size=options.hidden,
        moe_intermediate_size=options.hidden // 2,
        n_routed_experts=options.experts,
        num_experts_per_tok=4,
        num_hidden_layers=options.layers,
        mlp_layer_types=["hash_moe"] + ["moe"] * (options.layers - 1),
        layer_types=["sliding_attention"] * options.layers,
        num_attention_heads=4,
        head_dim=32,
        qk_rope_head_dim=16,
        q_lora_rank=64,
        o_groups=2,
        o_lora_rank=32,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    model = DeepseekV4ForCausalLM(config)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):  # each byte's experts in the hash layer
            buffer.copy_(torch.rand(buffer.shape[0], options.experts).argsort(-1)[:, : buffer.shape[1]])
    model.set_experts_implementation(implementation)
    return model


@torch.no_grad()
def moved(model: DeepseekV4ForCausalLM) -> DeepseekV4ForCausalLM:
    """The model with one weight of each expert moved to the next number: a difference of the size of a rounding."""
    for module in model.modules():
        if isinstance(module, DeepseekV4Experts):
            weight = module.gate_up_proj[:, 0, 0]
            weight.copy_(torch.nextafter(weight, torch.full_like(weight, math.inf)))
    return model


def make_models(options: Options) -> dict[str, DeepseekV4ForCausalLM]:
    models = {implementation: make_model(options, implementation) for implementation in IMPLEMENTATIONS}
    return models | ({CONTROL: moved(make_model(options, "eager"))} if options.control else {})


class Balancer:
    """Counts what every router chooses, and moves its selection bias against it."""

    def __init__(self, model: DeepseekV4ForCausalLM, gamma: float) -> None:
        self.routers = [module for module in model.modules() if isinstance(module, DeepseekV4TopKRouter)]
        self.gamma = gamma
        self.chosen: dict[DeepseekV4TopKRouter, Tensor] = {}
        for router in self.routers:
            router.register_forward_hook(self.count)

    def count(self, router: DeepseekV4TopKRouter, _: object, results: tuple[Tensor, Tensor, Tensor]) -> None:
        self.chosen[router] = polymoe.expert_counts(results[2], router.num_experts)

    def step(self) -> Tensor:
        """Returns the load of the last layer."""
        for router in self.routers:
            bias = polymoe.update_bias(router.e_score_correction_bias, self.chosen[router], self.gamma)
            router.e_score_correction_bias.copy_(bias)
        return self.chosen[self.routers[-1]]


def read_text() -> tuple[Tensor, Tensor]:
    """Bytes to train on, and held-out ones."""
    text = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long()
    return text[:-HELD_OUT], text[-HELD_OUT:]


def batches(text: Tensor, options: Options, count: int, seed: int) -> list[Tensor]:
    """[batch, length + 1] each, at random places."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - options.length - 1, (count, options.batch), generator=generator)
    return [text[row[:, None] + torch.arange(options.length + 1)] for row in starts]


def loss_of(model: DeepseekV4ForCausalLM, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


class Training:
    """One model, its name, and how the training went."""

    def __init__(self, model: DeepseekV4ForCausalLM, name: str, options: Options) -> None:
        self.model, self.name, self.run = model, name, Run()
        self.balancer = Balancer(model, options.gamma)
        self.optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.01)
        warmup = max(1, options.steps // 10)
        rate = torch.optim.lr_scheduler.LambdaLR
        self.schedule = rate(self.optimiser, lambda step: min(1.0, (step + 1) / warmup))
        model.train()

    def step(self, batch: Tensor) -> None:
        start = time.perf_counter()
        loss = loss_of(self.model, batch)
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        self.schedule.step()
        self.run.loads.append(self.balancer.step())
        self.run.seconds.append(time.perf_counter() - start)
        self.run.losses.append(loss.item())

    def __str__(self) -> str:
        return f"{self.name} {self.run.losses[-1]:.4f}, {self.run.seconds[-1]:.2f} s"


def train(models: dict[str, DeepseekV4ForCausalLM], options: Options) -> dict[str, Run]:
    """By name. They take turns, step by step: so all meet the same load of the machine."""
    train_text, held_out = read_text()
    trainings = [Training(model, name, options) for name, model in models.items()]
    for step, batch in enumerate(batches(train_text, options, options.steps, options.seed), 1):
        for training in trainings:
            training.step(batch)
        if step % 20 == 0 or step == options.steps:
            print(f"step {step:4}: loss", "; ".join(map(str, trainings)), flush=True)
    for training in trainings:
        training.model.eval()
        with torch.no_grad():
            losses = [loss_of(training.model, batch).item() for batch in batches(held_out, options, 4, options.seed)]
        training.run.held_out = statistics.mean(losses)
    return {training.name: training.run for training in trainings}


def largest_difference(a: Run, b: Run) -> float:
    return max(abs(x - y) for x, y in zip(a.losses, b.losses, strict=True))


def draw(runs: dict[str, Run], options: Options) -> bool:
    """Writes the picture; False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    styles = ({"linewidth": 3, "alpha": 0.45}, {"linewidth": 1}, {"linewidth": 1, "linestyle": ":"})
    for (name, run), style in zip(runs.items(), styles, strict=False):
        speed = run.tokens_per_second(options.batch * options.length)
        left.plot(range(1, len(run.losses) + 1), run.losses, label=f"{name}, {speed:,.0f} tokens/s", **style)
    left.set(xlabel="step", ylabel="loss (nats a byte)", title="the same training, two implementations of the experts")
    left.legend()
    loads = torch.stack(runs["polymoe"].loads, dim=1).float()
    image = right.imshow(loads / loads.mean(dim=0), aspect="auto", interpolation="nearest", cmap="viridis", vmin=0)
    right.set(xlabel="step", ylabel="expert of the last layer", title="load over the mean, selection bias on")
    figure.colorbar(image, ax=right)
    figure.savefig(options.out, dpi=120)
    return True


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--length", type=int, default=128, help="bytes a sequence")
    parser.add_argument("--hidden", type=int, default=256, help="width of the model; experts have half of it")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--gamma", type=float, default=0.01, help="step of the selection bias")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("train_tiny_moe.png"))
    parser.add_argument("--control", action="store_true", help="train eager again, one ulp away at the start")
    return Options(**vars(parser.parse_args()))


def main() -> int:
    options = parse()
    runs = train(make_models(options), options)
    tokens = options.batch * options.length
    print("\n| experts | tokens/s | last loss | held-out loss | busiest expert over the mean: first quarter, last |")
    print("|---|---|---|---|---|")
    for name, run in runs.items():
        spread = run.imbalance()
        quarter = max(1, len(spread) // 4)
        busiest = f"{statistics.mean(spread[:quarter]):.2f}, {statistics.mean(spread[-quarter:]):.2f}"
        speed = run.tokens_per_second(tokens)
        print(f"| {name} | {speed:,.0f} | {run.losses[-1]:.4f} | {run.held_out:.4f} | {busiest} |")
    print(f"\nlargest difference of the two losses: {largest_difference(runs['eager'], runs['polymoe']):.1e}")
    if options.control:
        print(f"of eager's from one ulp away at the start: {largest_difference(runs['eager'], runs[CONTROL]):.1e}")
    print(f"wrote {options.out}" if draw(runs, options) else "no picture: matplotlib is not installed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
