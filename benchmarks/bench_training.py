"""polymoe.experts forward and backward, all gradients, against F.grouped_mm (as Transformers uses it) and a loop of
F.linear over separate parameters, each through autograd.

Run it as `python -m benchmarks.bench_training`; --help lists the options. Transformers' own eager loop takes part where
experts are few alone: it indexes one parameter that holds all experts, whose gradient autograd then fills with zeros
once for every expert. The column `kept` is what each, and that loop, saves for its backward beside inputs and weights.
Gradients are allocated anew in every call, from memory that the process has had before: see benchmarks/_pages.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

import polymoe
from benchmarks import inputs
from benchmarks._harness import Bench, Case, Contender, Options, main, ours
from benchmarks._pages import keep_freed_memory
from benchmarks.contenders.eager import eager
from benchmarks.contenders.torch_grouped import grouped
from benchmarks.inputs import DTYPES, SETS
from benchmarks.layer import InputSet, Layer, exact, gated, make_layer, make_set
from polymoe.testing.tolerances import relative_frobenius

CHECKED_TOKENS = 32  # of every input set; the float64 computation is slow
FEW_EXPERTS = 8

Forward = Callable[[Layer, Tensor, Tensor, Tensor], Tensor]


def cases(options: Options) -> Iterator[Case]:
    keep_freed_memory()
    for dtype in options.dtypes:
        for shape in options.shapes:
            if shape.bias:
                continue  # gpt-oss: its peers would need code of their own
            source = inputs.generator(options.seed, options.device)
            layer = make_layer(shape, DTYPES[dtype], source)
            for T in options.tokens:
                sets = [make_set(shape, T, DTYPES[dtype], source) for _ in range(SETS)]
                yield make_case(options, layer, sets, dtype)
            del layer  # before the next one: two may not fit the memory


@torch.enable_grad()
def step(layer: Layer, forward: Forward, one: InputSet, weights: list[Tensor], grad: Tensor) -> list[Tensor]:
    """The gradients of x, of the routing weights and of all weights."""
    x, factors = (tensor.detach().requires_grad_() for tensor in one[:2])
    out = forward(layer, x, factors, one[2])
    return list(torch.autograd.grad(out, (x, factors, *weights), grad))


def linear_loop(parts: list[Tensor], layer: Layer, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """Expert by expert over parameters of their own, the experts' gate/up first, then their down."""
    out = torch.zeros_like(x)
    for e in range(layer.shape.E):
        token, slot = torch.where(ids == e)
        h = F.linear(x[token], parts[e])
        y = F.linear(gated(h, layer.shape), parts[layer.shape.E + e])
        out = out.index_add(0, token, (y * weights[token, slot, None]).to(x.dtype))
    return out


def kept(call: Callable[[int], object], known: list[Tensor]) -> float:
    """MiB that `call` saves for its backward, without the tensors `known`."""
    sizes: dict[int, int] = {}
    apart = {tensor.data_ptr() for tensor in known}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in apart and tensor.data_ptr() not in apart:
            sizes[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(0)
    return sum(sizes.values()) / 2**20


def make_case(options: Options, layer: Layer, sets: list[InputSet], dtype: str) -> Case:
    shape, T, torch_dtype = layer.shape, sets[0][0].shape[0], DTYPES[dtype]
    source = inputs.generator(options.seed + 1, options.device)
    grad = inputs.normal((T, shape.H), torch_dtype, source)
    trained = replace(layer, gate_up=layer.gate_up.requires_grad_(), down=layer.down.requires_grad_())
    whole = [trained.gate_up, trained.down]
    parts = [part.detach().requires_grad_() for weight in whole for part in weight.detach()]

    def of(forward: Forward, weights: list[Tensor]) -> Callable[[int], list[Tensor]]:
        return lambda i: step(trained, forward, sets[i], weights, grad)

    def on(backend: str) -> Callable[[int], list[Tensor]]:
        def forward(layer: Layer, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
            how = (shape.activation, None, shape.limit)
            return polymoe.experts(x, layer.gate_up, layer.down, weights, ids, *how, backend=backend)

        return of(forward, whole)

    peers = [
        Contender("F.linear loop", of(lambda *args: linear_loop(parts, *args), parts), reads=True),
        Contender("F.grouped_mm", of(grouped, whole)),
    ]
    if shape.E <= FEW_EXPERTS:
        peers.append(Contender("eager", of(eager, whole), reads=True))
    contenders = (*peers, *ours(options, "experts", torch_dtype, {}, on, best_only=True))
    known = [*whole, *parts, grad, *(tensor for one in sets for tensor in one[:2])]

    @torch.enable_grad()
    def eager_forward(i: int) -> Tensor:
        x, factors = (tensor.detach().requires_grad_() for tensor in sets[i][:2])
        return eager(trained, x, factors, sets[i][2])

    calls = {c.name: c.call for c in contenders} | {"eager": eager_forward}
    saved = ", ".join(f"{name} {kept(call, known):.0f}" for name, call in calls.items())

    def error(call: Callable[[int], list[Tensor]]) -> float:
        found = torch.cat([call(i)[0][:CHECKED_TOKENS] for i in range(SETS)])
        return relative_frobenius(found, truth(layer, sets, grad))

    expert_bytes = shape.expert_elements * layer.down.element_size()
    hit = sum(one.unique().numel() for _, _, one in sets) / SETS
    return Case(
        labels={"shape": shape.name, "experts": shape.slice, "dtype": dtype, "T": T, "kept, MiB": saved},
        contenders=contenders,
        error=error,
        tolerance=inputs.error_bound(torch_dtype, roundings=12 + shape.K, reduction=2 * (shape.H + shape.I)),
        bytes=(2 * hit + shape.E) * expert_bytes,
        flops=3 * 2.0 * T * shape.K * shape.expert_elements,
    )


@torch.enable_grad()
def truth(layer: Layer, sets: list[InputSet], grad: Tensor) -> Tensor:
    """The gradient of x for the first tokens of every set, in float64."""
    found: list[Tensor] = []
    frozen = replace(layer, gate_up=layer.gate_up.detach(), down=layer.down.detach())
    for one in sets:
        x, weights, ids = (tensor[:CHECKED_TOKENS] for tensor in one)
        wide = x.detach().double().requires_grad_()
        out = exact(frozen, wide, weights.detach(), ids)
        found += torch.autograd.grad(out, wide, grad[:CHECKED_TOKENS].double())
    return torch.cat(found)


BENCH = Bench("training", cases)

if __name__ == "__main__":
    sys.exit(main(BENCH))
