"""polymoe.experts, plan and combine included, against the ways in which Transformers runs experts on the CPU.

Run it as `python -m benchmarks.bench_experts`; --help lists the options. The reference backend is left
out by default: it widens all weights in every call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

import polymoe
from benchmarks import inputs, peers
from benchmarks._harness import Bench, Case, Contender, Options, main, ours
from benchmarks.inputs import DTYPES, SETS
from benchmarks.peers import Layer
from benchmarks.shapes import MODELS, Shape
from polymoe.testing.tolerances import relative_frobenius

# Speed-up over the eager loop that is asked for in bfloat16, by tokens. The limit of the machine is another matter.
REQUIRED = {1: 1.1, 16: 1.5, 128: 1.0, 1024: 0.9}
REQUIRED_LEVELS = ("avx2", "avx512_bf16")

CHECKED_TOKENS = 32  # of every input set; the float64 computation is slow
JUDGED_OUTPUTS = 100_000  # with fewer, the ratio of two errors says little

InputSet = tuple[Tensor, Tensor, Tensor]  # x, weights, ids


def cases(options: Options) -> Iterator[Case]:
    for dtype in options.dtypes:
        for shape in options.shapes:
            source = inputs.generator(options.seed)
            layer = make_layer(shape, DTYPES[dtype], source)
            for T in options.tokens:
                yield make_case(options, layer, T, dtype, source)
            del layer  # before the next one: two may not fit the memory


def make_layer(shape: Shape, dtype: torch.dtype, source: torch.Generator) -> Layer:
    return Layer(
        shape,
        gate_up=inputs.weight((shape.E, 2 * shape.I, shape.H), dtype, source),
        down=inputs.weight((shape.E, shape.H, shape.I), dtype, source),
    )


def make_case(options: Options, layer: Layer, T: int, dtype: str, source: torch.Generator) -> Case:
    shape, torch_dtype = layer.shape, DTYPES[dtype]
    sets = [make_set(shape, T, torch_dtype, source) for _ in range(SETS)]
    checked = min(T, CHECKED_TOKENS)
    x, weights, ids = (torch.cat([tensor[:checked] for tensor in same]) for same in zip(*sets, strict=True))
    truth = exact(layer, x, weights, ids)

    def error(call: Callable[[int], Tensor]) -> float:
        return relative_frobenius(torch.cat([call(i)[:checked] for i in range(SETS)]), truth)

    def run(i: int, function: Callable[..., Tensor]) -> Tensor:
        return function(layer, *sets[i])

    def on(backend: str) -> Callable[[int], Tensor]:
        return partial(run, function=partial(polymoe_experts, backend=backend))

    contenders = [Contender(name, partial(run, function=peer)) for name, peer in peers.EXPERTS.items()]
    weight_bytes = 3 * shape.H * shape.I * layer.down.element_size()
    hit = sum(ids.unique().numel() for _, _, ids in sets) / SETS
    return Case(
        labels={"shape": shape.name, "dtype": dtype, "T": T},
        contenders=(*contenders, *ours(options, "experts", torch_dtype, (shape.activation, "output"), on)),
        error=error,
        # The eager loop rounds five times (matmul, silu, product with up, matmul, product with the weight), and once
        # more whenever an expert adds to the output.
        tolerance=inputs.error_bound(torch_dtype, roundings=5 + shape.K, reduction=shape.H + shape.I),
        bytes=hit * weight_bytes + 2 * sets[0][0].nbytes,
        flops=6.0 * T * shape.K * shape.H * shape.I,
        required=required(options, shape, dtype, T),
        judge_accuracy=truth.numel() >= JUDGED_OUTPUTS,
    )


def required(options: Options, shape: Shape, dtype: str, T: int) -> float | None:
    judged = options.levels[0] in REQUIRED_LEVELS and shape.name in MODELS and dtype == "bf16"
    return REQUIRED.get(T) if judged else None


def make_set(shape: Shape, T: int, dtype: torch.dtype, source: torch.Generator) -> InputSet:
    return inputs.normal((T, shape.H), dtype, source), *inputs.routing(T, shape.E, shape.K, dtype, source)


def polymoe_experts(layer: Layer, x: Tensor, weights: Tensor, ids: Tensor, backend: str) -> Tensor:
    shape = layer.shape
    return polymoe.experts(
        x, layer.gate_up, layer.down, weights, ids, shape.activation, limit=shape.limit, backend=backend
    )


def exact(layer: Layer, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """The same in float64, one expert at a time."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for e in ids.unique().tolist():
        token, slot = (ids == e).nonzero(as_tuple=True)
        a = peers.gated(x[token].double() @ layer.gate_up[e].double().mT, layer.shape)
        y = (a @ layer.down[e].double().mT) * weights[token, slot, None].double()
        out.index_add_(0, token, y)
    return out


BENCH = Bench("experts", cases, best_backend_only=True)

if __name__ == "__main__":
    sys.exit(main(BENCH))
