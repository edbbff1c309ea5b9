"""Code that calls torch's grouped_mm, with torch's kernel and with polymoe's in its place: the six products of an
expert layer's forward and backward one by one, the experts of Transformers ("grouped_mm"), and a layer as training
frameworks write it.

Run it as `python -m benchmarks.bench_torch_grouped_mm`; --help lists the options. With --check the exit status is 1
where whole code, forward or forward and backward, is less than 1.5 times as fast as with torch's kernel. Every call
allocates its results anew, by default from memory that the process has had before: see benchmarks/_pages.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks import inputs
from benchmarks._pages import keep_freed_memory
from benchmarks._report import markdown
from benchmarks._timing import Effort, OtherCpuUse, interleave
from benchmarks.inputs import SETS
from benchmarks.models import Shape, shape_of
from polymoe.integrations import torch as override

DTYPE = torch.bfloat16
REQUIRED = 1.5
Run = Callable[[int], object]


class Layer:
    """Weights of one expert layer, and input sets for T tokens."""

    def __init__(self, shape: Shape, source: torch.Generator) -> None:
        self.shape, self.source = shape, source
        self.gate_up = inputs.weight((shape.E, 2 * shape.I, shape.H), DTYPE, source).requires_grad_()
        self.down = inputs.weight((shape.E, shape.H, shape.I), DTYPE, source).requires_grad_()

    def draw(self, T: int) -> None:
        shape, rows = self.shape, T * self.shape.K
        self.x = [inputs.normal((T, shape.H), DTYPE, self.source).requires_grad_() for _ in range(SETS)]
        self.grad = [inputs.normal((T, shape.H), DTYPE, self.source) for _ in range(SETS)]
        self.routed = [inputs.routing(T, shape.E, shape.K, DTYPE, self.source) for _ in range(SETS)]
        self.offs = [offsets(ids, shape.E) for _, ids in self.routed]
        self.wide = [inputs.normal((rows, 2 * shape.I), DTYPE, self.source) for _ in range(SETS)]
        self.narrow = [inputs.normal((rows, shape.I), DTYPE, self.source) for _ in range(SETS)]
        self.rows = [inputs.normal((rows, shape.H), DTYPE, self.source) for _ in range(SETS)]


def offsets(ids: Tensor, experts: int) -> Tensor:
    counts = torch.histc(ids.view(-1).float(), bins=experts, min=0, max=experts - 1)
    return counts.cumsum(0, dtype=torch.int32)


def products(layer: Layer) -> dict[str, tuple[Run, float, float]]:
    """The calls that torch's autograd makes, each with the bytes it must move at the least and its operations."""
    shape, up, down = layer.shape, layer.gate_up.detach(), layer.down.detach()
    x, wide, narrow, offs = layer.rows, layer.wide, layer.narrow, layer.offs
    hit = sum(ids.unique().numel() for _, ids in layer.routed) / SETS / shape.E
    calls: dict[str, tuple[Run, Tensor, float]] = {
        "forward up": (lambda i: F.grouped_mm(x[i], up.mT, offs=offs[i]), up, hit),
        "forward down": (lambda i: F.grouped_mm(narrow[i], down.mT, offs=offs[i]), down, hit),
        "dA up": (lambda i: F.grouped_mm(wide[i], up, offs=offs[i]), up, hit),
        "dA down": (lambda i: F.grouped_mm(x[i], down, offs=offs[i]), down, hit),
        "dB up": (lambda i: F.grouped_mm(wide[i].mT, x[i], offs=offs[i]), up, 1.0),
        "dB down": (lambda i: F.grouped_mm(x[i].mT, narrow[i], offs=offs[i]), down, 1.0),
    }
    rows = x[0].shape[0]
    return {
        name: (run, share * weight.nbytes, 2.0 * rows * weight.shape[1] * weight.shape[2])
        for name, (run, weight, share) in calls.items()
    }


def transformers_experts(layer: Layer) -> tuple[Callable[[int], Tensor], list[Tensor]]:
    shape = layer.shape
    config = SimpleNamespace(
        num_experts=shape.E,
        hidden_size=shape.H,
        moe_intermediate_size=shape.I,
        hidden_act="silu",
        _experts_implementation="grouped_mm",
    )
    with torch.device("meta"):
        module: Any = Qwen3MoeExperts(config)
    module.gate_up_proj, module.down_proj = nn.Parameter(layer.gate_up), nn.Parameter(layer.down)
    return lambda i: module(layer.x[i], layer.routed[i][1], layer.routed[i][0]), [module.gate_up_proj, module.down_proj]


def training_code(layer: Layer) -> tuple[Callable[[int], Tensor], list[Tensor]]:
    I, K = layer.shape.I, layer.shape.K
    w1, w3 = (part.detach().requires_grad_() for part in (layer.gate_up[:, :I], layer.gate_up[:, I:]))

    def forward(i: int) -> Tensor:
        x, (weights, ids) = layer.x[i], layer.routed[i]
        order = torch.argsort(ids.view(-1), stable=True)
        offs, tokens = offsets(ids, layer.shape.E), order // K
        rows = (x[tokens].float() * weights.view(-1)[order, None]).to(x.dtype)
        hidden = F.silu(F.grouped_mm(rows, w1.mT, offs=offs)) * F.grouped_mm(rows, w3.mT, offs=offs)
        routed = F.grouped_mm(hidden, layer.down.mT, offs=offs)
        return torch.zeros_like(x).scatter_add(0, tokens[:, None].expand_as(routed), routed)

    return forward, [w1, w3, layer.down]


def both(run: Run) -> list[Run]:
    """With torch's kernel, and with polymoe's."""

    def overridden(i: int) -> object:
        with override.grouped_mm():
            return run(i)

    return [run, overridden]


def rows_of(layer: Layer, T: int, effort: Effort) -> tuple[list[list[str]], bool]:
    """Lines of the table, and whether a required speed-up is missed."""
    layer.draw(T)
    lines: list[list[str]] = []
    missed = False

    def measure(name: str, run: Run, required: float | None, size: float = 0, flops: float = 0) -> None:
        nonlocal missed
        with OtherCpuUse() as others:
            theirs, ours = interleave(both(run), SETS, effort)
        ratio = theirs.median / ours.median
        missed |= required is not None and ratio < required
        rates = [f"{size / t.median / 1e9:.1f} / {flops / t.median / 1e9:.0f}" if size else "" for t in (theirs, ours)]
        times = [f"{t.median * 1e3:.2f} ±{(t.high - t.low) / 2 / t.median:.0%}" for t in (theirs, ours)]
        need = "" if required is None else f"{required}"
        share = "?" if others.share is None else f"{others.share:.0%}"
        lines.append([str(T), name, times[0], times[1], f"{ratio:.2f}", need, *rates, share])

    with torch.no_grad():
        for name, (run, size, flops) in products(layer).items():
            measure(name, run, None, size, flops)
    for name, make in (("Transformers", transformers_experts), ("training code", training_code)):
        forward, weights = make(layer)

        def step(i: int, forward: Callable[[int], Tensor] = forward, weights: list[Tensor] = weights) -> object:
            return torch.autograd.grad(forward(i), [layer.x[i], *weights], layer.grad[i])

        with torch.no_grad():
            measure(f"{name}: forward", forward, REQUIRED)
        measure(f"{name}: forward and backward", step, REQUIRED)
    return lines, missed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_torch_grouped_mm", allow_abbrev=False)
    parser.add_argument("--shape", default="qwen3-30b-a3b")
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 128], metavar="T")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each line")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a required speed-up is missed")
    parser.add_argument("--fresh-pages", action="store_true", help="let the system have freed memory back every time")
    given = parser.parse_args(arguments)
    if not given.fresh_pages:
        keep_freed_memory()
    effort = Effort(seconds=given.seconds, min_rounds=SETS, max_rounds=200)
    layer = Layer(shape_of(given.shape), inputs.generator(given.seed))
    lines: list[list[str]] = []
    missed = False
    for T in given.tokens:
        of_T, missed_here = rows_of(layer, T, effort)
        lines, missed = lines + of_T, missed or missed_here
    header = ["T", "code", "torch [ms]", "polymoe [ms]", "speed-up", "required"]
    print(markdown([*header, "torch GB/s / GFLOP/s", "polymoe GB/s / GFLOP/s", "other CPU"], lines))
    print(f"\n{given.shape}, {DTYPE}, threads: {torch.get_num_threads()}, torch {torch.__version__}. Medians of calls")
    print(
        "that take turns on rotating inputs, ± half of the interquartile range. Results are allocated anew, from pages"
    )
    print("that the system gives." if given.fresh_pages else "that the process has kept.")
    return int(given.check and missed)


if __name__ == "__main__":
    sys.exit(main())
