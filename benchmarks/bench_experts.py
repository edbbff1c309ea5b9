"""polymoe.experts, plan and combine included, against every other way to run experts on this CPU.

Run it as `python -m benchmarks run experts`; `python -m benchmarks list` lists shapes and contenders.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks import inputs
from benchmarks._harness import Bench, Case, Contender, Options, contender_name, main
from benchmarks._options import NO_LEVEL, supported_levels
from benchmarks.contenders import Plugin, Prepared, Problem, choose, plugins
from benchmarks.contenders.isolated import Worker
from benchmarks.inputs import DTYPES, SETS
from benchmarks.layer import InputSet, Layer, exact, make_layer, make_set
from benchmarks.memory import resident
from benchmarks.models import Shape
from benchmarks.requirements import required
from polymoe.testing.tolerances import relative_frobenius

CHECKED_TOKENS = 32  # of every input set; the float64 computation is slow
JUDGED_OUTPUTS = 100_000  # with fewer, the ratio of two errors says little

Holder = tuple[Plugin, Prepared | Worker, int | None]  # who holds the weights, and bytes that it took for them


def cases(options: Options) -> Iterator[Case]:
    for dtype in options.dtypes:
        for shape in options.shapes:
            with ExitStack() as stack:
                yield from shape_cases(options, shape, dtype, stack)


def shape_cases(options: Options, shape: Shape, dtype: str, stack: ExitStack) -> Iterator[Case]:
    """The cases of one layer. Its weights go when it is done: two layers may not fit the memory."""
    level = options.levels[0]
    best_level = level in (NO_LEVEL, supported_levels()[-1])
    problem = Problem(shape, dtype, level, best_level, options.device)
    taking_part, absent = choose(problem, wanted(options))
    source = inputs.generator(options.seed, options.device)
    layer = make_layer(shape, DTYPES[dtype], source)
    found = {plugin.name: hold(plugin, layer, options, dtype, stack) for plugin in taking_part}
    holders = [holder for holder in found.values() if not isinstance(holder, str)]
    absent |= {name: reason for name, reason in found.items() if isinstance(reason, str)}
    for T in options.tokens:
        sets = [make_set(shape, T, DTYPES[dtype], source) for _ in range(SETS)]
        able, unable = try_out([contender(holder, sets) for holder in holders])
        helpers = tuple(prepared.pid for _, prepared, _ in holders if isinstance(prepared, Worker))
        yield replace(make_case(layer, able, sets, dtype, level), absent=absent | unable, helpers=helpers)


def wanted(options: Options) -> tuple[str, ...]:
    """Names of contenders. Backends of polymoe that it would not select take part only if asked for: the reference
    widens all weights in every call."""
    here = (name for name, plugin in plugins().items() if options.device in plugin.devices)
    names = options.contenders or tuple(name for name in here if not name.startswith(contender_name("")))
    if not options.backends:
        return names
    others = tuple(name for name in names if not name.startswith("polymoe"))
    return (*others, *map(contender_name, options.backends))


def hold(plugin: Plugin, layer: Layer, options: Options, dtype: str, stack: ExitStack) -> Holder | str:
    """Or why another library, which may have changed, does not take part after all."""
    if plugin.isolated:
        worker = Worker(plugin.name, layer.shape, dtype, options.seed, options.threads[0])
        return plugin, stack.enter_context(worker), worker.held
    before = resident()
    try:
        prepared = plugin.prepare(layer)
    except Exception as error:
        if not plugin.peer:
            raise
        return f"it raises {type(error).__name__}: {error}"
    return plugin, prepared, max(0, resident() - before)


def contender(holder: Holder, sets: list[InputSet]) -> Contender:
    plugin, prepared, held = holder
    if isinstance(prepared, Worker):
        prepared.take(sets)
        return Contender(plugin.name, prepared, plugin.peer, held, prepared.peak)
    converted = [prepared.convert(one) for one in sets]
    return Contender(plugin.name, lambda i: prepared.run(converted[i]), plugin.peer, held, reads=plugin.reads)


def try_out(given: list[Contender]) -> tuple[list[Contender], dict[str, str]]:
    """Those that can compute these inputs, and why another library cannot after all."""
    faults = {one.name: fault(one) for one in given}
    return [one for one in given if not faults[one.name]], {name: why for name, why in faults.items() if why}


def fault(one: Contender) -> str:
    try:
        one.call(0)
    except Exception as error:
        if not one.peer:
            raise
        return f"it raises {type(error).__name__}: {error}"
    return ""


def make_case(layer: Layer, able: list[Contender], sets: list[InputSet], dtype: str, level: str) -> Case:
    shape, T, torch_dtype = layer.shape, sets[0][0].shape[0], DTYPES[dtype]
    checked = min(T, CHECKED_TOKENS)
    x, weights, ids = (torch.cat([tensor[:checked] for tensor in same]) for same in zip(*sets, strict=True))
    truth = exact(layer, x, weights, ids)

    def error(call: Callable[[int], Tensor]) -> float:
        return relative_frobenius(torch.cat([call(i)[:checked] for i in range(SETS)]), truth)

    expert_bytes = shape.expert_elements * layer.down.element_size()
    hit = sum(one.unique().numel() for _, _, one in sets) / SETS
    return Case(
        labels={"shape": shape.name, "experts": shape.slice, "dtype": dtype, "T": T},
        contenders=tuple(able),
        error=error,
        # The eager loop rounds five times (matmul, silu, product with up, matmul, product with the weight), gpt-oss's
        # activation three times more, and once more whenever an expert adds to the output.
        tolerance=inputs.error_bound(torch_dtype, roundings=8 + shape.K, reduction=shape.H + shape.I),
        bytes=hit * expert_bytes + 2 * sets[0][0].nbytes,
        flops=2.0 * T * shape.K * shape.expert_elements,
        required=required(shape, dtype, T, level, judge_accuracy=truth.numel() >= JUDGED_OUTPUTS),
        footprint=torch.cat([one for _, _, one in sets]).unique().numel() * expert_bytes + 2 * SETS * sets[0][0].nbytes,
        cold=True,
    )


BENCH = Bench("experts", cases)

if __name__ == "__main__":
    sys.exit(main(BENCH))
