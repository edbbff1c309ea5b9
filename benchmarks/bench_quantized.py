"""polymoe.experts with quantised weights beside the same layer in bf16, the eager bf16 loop, and other libraries that
have the format: milliseconds, the share of what memory and arithmetic allow, in stored bytes (codes, scales and zero
points), how many times as fast as bf16, as the loop and as the best other library in that format, and the error against
float64 with the weights that are stored.

    python -m benchmarks.bench_quantized --shapes w1,w2,w3 --tokens 1,16,128 --out page.md
    python -m benchmarks run quantized --shapes w1 w2 w3 --tokens 1 16 128 --report page

All of a shape take turns in one process, with the probes between them. Of few tokens a turn is several calls, each of
which hits experts of its own, as in a model of many layers. The bound of weight-only products is the larger
of bytes over bandwidth and operations over the peak of bf16 dot products; for int8 activations bytes alone. A cell is
measured again if anything is more than 3% faster than its bound, and void if it still is. Every cell is kept in a file
beside the page as soon as it is measured, and a run that was cut off goes on there. Exits with 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import polymoe
from benchmarks import bounds, inputs
from benchmarks._case import Seen, cold
from benchmarks._harness import Probes, cpu_name, isa_level, torch_threads
from benchmarks._options import options, supported_levels
from benchmarks._progress import say
from benchmarks._report import markdown, other_cpu
from benchmarks._timing import FULL, MIN_SAMPLE_SECONDS, QUICK, Call, Effort, OtherCpuUse, rounds, timing
from benchmarks.contenders.base import Prepared, Problem
from benchmarks.contenders.eager import eager
from benchmarks.contenders.isolated import Worker
from benchmarks.contenders.quantized import QUANTIZED, Quantized, quantized
from benchmarks.layer import InputSet, Layer, exact, make_layer, make_sets
from benchmarks.models import ALIASES, SHAPES, Shape, shape_of
from benchmarks.stand_ins import times_eager
from polymoe import formats
from polymoe.formats import Weight
from polymoe.testing.tolerances import relative_frobenius

FORMATS = ("mxfp4", "fp8_block128", "mxfp8", "int8", "int4_g128", "int4_g32")
TURN_SECONDS = 5e-3  # of calls that hit experts of their own, at least
CHECKED_TOKENS = 2  # dequantising their experts to float64 takes longer than a measurement
ATTEMPTS = 3
BF16, EAGER = "bf16", "eager bf16 loop"

# The largest of 128 numbers is at most sqrt(128) times their root mean square, and 8 bits round to within 1/254 of it;
# so are what gate and up multiply, and what down does.
INT8_ERROR = 3 * math.sqrt(128) / 254


@dataclass(frozen=True)
class Stored:
    """A layer in one format and mode, or a library's: what to call on input sets, bytes of all its weights, what it
    should compute with, and how far off that may be, None for a library that quantises in its own way."""

    name: str
    format: str
    prepare: Callable[[list[InputSet]], Call]
    bytes: int
    weight_only: bool
    exact: Layer
    tolerance: float | None
    peer: bool = False


class Dequantized:
    """A weight whose experts are dequantised as they are asked for; in float64 all of them would not fit the memory."""

    def __init__(self, weight: Weight) -> None:
        self.weight = weight

    def __getitem__(self, expert: int) -> Tensor:
        one = replace(self.weight, data=self.weight.data[expert], scale=self.weight.scale[expert])
        return formats.parse(one.format).dequantize(one, torch.float64)


def on_sets(run: Callable[[InputSet], Tensor]) -> Callable[[list[InputSet]], Call]:
    def prepare(sets: list[InputSet]) -> Call:
        return lambda i: run(sets[i])

    return prepare


def ours(layer: Layer, gate_up: Tensor, down: Tensor, **how: Any) -> Callable[[list[InputSet]], Call]:
    def run(given: InputSet) -> Tensor:
        x, weights, ids = given
        return polymoe.experts(
            x,
            gate_up,
            down,
            weights,
            ids,
            layer.shape.activation,
            limit=layer.shape.limit,
            interleaved=layer.shape.interleaved,
            gate_up_bias=layer.gate_up_bias,
            down_bias=layer.down_bias,
            **how,
        )

    return on_sets(run)


def has_kernels(format: str, mode: str) -> bool:
    """Whether more than the reference, in plain PyTorch, serves this mode here."""
    x = torch.empty(1, 1, dtype=torch.bfloat16)
    return polymoe.explain("experts", x, weight_format=format, mode=mode).backend != "reference"


def contenders(layer: Layer, names: Sequence[str], cell: Cells, stack: ExitStack) -> Iterator[Stored]:
    """bf16 first, then the loop, then formats with the libraries that have them. The processes of libraries end with
    `stack`."""
    dense, nbytes, bound = (layer.gate_up, layer.down), layer.gate_up.nbytes + layer.down.nbytes, tolerance(layer.shape)
    yield Stored(BF16, BF16, ours(layer, *dense), nbytes, True, layer, bound)
    yield Stored(EAGER, BF16, on_sets(lambda given: eager(layer, *given)), nbytes, True, layer, bound, peer=True)
    for name in names:
        up, down = (quantized(name, weight) for weight in dense)
        values: dict[str, Any] = {"gate_up": Dequantized(up), "down": Dequantized(down)}
        true, stored = replace(layer, **values), up.nbytes + down.nbytes
        how: dict[str, Any] = {"weight_format": name, "gate_up_scale": up.scale, "down_scale": down.scale}
        for mode in filter(partial(has_kernels, name), formats.parse(name).modes):
            label, only = (name, True) if mode == "weight_only" else (f"{name}, {mode}", False)
            run = ours(layer, up.data, down.data, mode=mode, **how)
            yield Stored(label, name, run, stored, only, true, bound if only else bound + INT8_ERROR)
        for plugin in cell.libraries(name, layer.shape):
            held = hold(plugin, layer, up, down, cell, stack)
            if held is not None:
                allowed = None if plugin.own else bound + INT8_ERROR
                yield Stored(plugin.name, name, held, stored, False, layer if plugin.own else true, allowed, peer=True)


def hold(
    plugin: Quantized, layer: Layer, up: Weight, down: Weight, cell: Cells, stack: ExitStack
) -> Callable[[list[InputSet]], Call] | None:
    """None for a library that fails to take the weights; it is said."""
    try:
        if plugin.isolated:
            worker = stack.enter_context(Worker(plugin.name, layer.shape, "bf16", cell.seed, cell.threads))

            def take(sets: list[InputSet]) -> Call:
                worker.take(sets)
                return worker

            return take
        prepared: Prepared = plugin.take(layer, up, down)
    except Exception as error:
        say(f"{plugin.name} raises {type(error).__name__}: {error}")
        return None
    return lambda sets: on_sets(prepared.run)([prepared.convert(one) for one in sets])


def errors(found: Sequence[Stored], given: InputSet, calls: Sequence[Call]) -> list[float]:
    """Against float64, of the first tokens of an input set; modes of a format share the truth."""
    x, weights, ids = (tensor[:CHECKED_TOKENS] for tensor in given)
    truths = {id(one.exact): one.exact for one in found}
    values = {key: exact(layer, x, weights, ids) for key, layer in truths.items()}
    outs = [call(0) for call in calls]
    return [
        relative_frobenius(cast("Tensor", out)[:CHECKED_TOKENS], values[id(one.exact)])
        for one, out in zip(found, outs, strict=True)
    ]


def tolerance(shape: Shape) -> float:
    """As for plain weights; with int8 activations INT8_ERROR more, which their rounding may cost."""
    return inputs.error_bound(torch.bfloat16, roundings=8 + shape.K, reduction=shape.H + shape.I)


@dataclass(frozen=True)
class Measured:
    """Seconds and the share of the bound, if data come from memory, of each; and what others took of the CPU."""

    medians: list[float]
    shares: list[float | None]
    others: float | None

    @property
    def void(self) -> bool:
        return any(share is not None and share > bounds.VOID_ABOVE for share in self.shares)


@dataclass(frozen=True)
class Line:
    """One contender of one cell, as it is kept; `run` is what else its times depend on."""

    run: str
    shape: str
    T: int
    threads: int
    isa: str
    name: str
    format: str
    peer: bool
    weight_only: bool
    seconds: float
    share: float | None
    void: bool
    error: float
    wrong: bool
    flops: float
    others: float | None


def measure_once(
    layer: Layer,
    found: Sequence[Stored],
    calls: list[Call],
    sets: list[InputSet],
    least: float,
    cell: Cells,
    probes: Probes,
) -> Measured:
    shape = layer.shape
    seen = Seen(probes.bandwidth, probes.peak(bounds.instruction(cell.isa, "bf16")))
    hit = sum(ids.unique().numel() for _, _, ids in sets) / len(sets) / shape.E
    touched = torch.cat([ids for _, _, ids in sets]).unique().numel() / shape.E
    flops = 2.0 * sets[0][2].numel() * shape.expert_elements
    timed, streams = cold(calls, min(one.bytes for one in found) * touched, probes.bandwidth)
    with OtherCpuUse([call.pid for call in calls if isinstance(call, Worker)]) as others:
        *samples, _ = rounds([*timed, seen], len(sets), cell.effort, least)
    count = len(samples[0])
    bandwidths, peaks = seen.bandwidths[-count:], seen.peaks[-count:]
    shares: list[float | None] = []
    for one, taken in zip(found, samples, strict=True):
        bytes_, work = one.bytes * hit + 2 * sets[0][0].nbytes, flops if one.weight_only else 0.0
        shares.append(bounds.share(taken, bytes_, work, bandwidths, peaks) if streams else None)
    return Measured([timing(taken).median for taken in samples], shares, others.share)


def measure(layer: Layer, found: Sequence[Stored], T: int, cell: Cells, probes: Probes) -> list[Line]:
    """The lines of a cell."""
    shape, source = layer.shape, inputs.generator(cell.seed + T)
    sets, apart = make_sets(shape, T, torch.bfloat16, source, min(one.bytes for one in found))
    least = TURN_SECONDS if apart else MIN_SAMPLE_SECONDS
    calls = [one.prepare(sets) for one in found]
    for _ in range(ATTEMPTS if cell.effort is FULL else 1):
        seen = measure_once(layer, found, calls, sets, least, cell, probes)
        if not seen.void:
            break
    lines = []
    for one, median, share, off in zip(found, seen.medians, seen.shares, errors(found, sets[0], calls), strict=True):
        wrong = one.tolerance is not None and not off <= one.tolerance
        where = (cell.described, shape.name, T, cell.threads, cell.isa, one.name, one.format, one.peer, one.weight_only)
        flops = 2.0 * T * shape.K * shape.expert_elements
        lines.append(Line(*where, median, share, seen.void, off, wrong, flops, seen.others))
    for text in table(lines):
        say(" ".join(text))
    return lines


@dataclass(frozen=True)
class Cells:
    """What is to be measured, at one number of threads and one ISA level, and where the lines are kept."""

    shapes: tuple[Shape, ...]
    tokens: tuple[int, ...]
    formats: tuple[str, ...]
    threads: int
    isa: str
    seed: int
    effort: Effort
    peers: bool
    probe_mib: int
    kept: Path | None

    @property
    def described(self) -> str:
        peers = "with" if self.peers else "without"
        return f"seed {self.seed}, {self.effort.seconds} s, {peers} libraries, {', '.join(self.formats)}"

    def libraries(self, format: str, shape: Shape) -> list[Quantized]:
        problem = Problem(shape, format, self.isa, self.isa == supported_levels()[-1])
        plugins = [plugin for plugin in QUANTIZED.values() if self.peers and plugin.format == format]
        return [plugin for plugin in plugins if plugin.declined(problem) is None]

    def absent(self) -> list[str]:
        problem = Problem(self.shapes[0], "", self.isa, self.isa == supported_levels()[-1])
        wanted = [plugin for plugin in QUANTIZED.values() if self.peers and plugin.format in self.formats]
        reasons = {plugin.name: plugin.declined(problem) for plugin in wanted}
        return [f"Absent: {name}: {reason}." for name, reason in reasons.items() if reason]

    def run(self) -> list[Line]:
        """The lines of all cells, in their order. Those that are kept from a run like this are not measured again."""
        lines = self._kept()
        probes = Probes(self.probe_mib, self.threads)
        with torch.no_grad(), torch_threads(self.threads), isa_level(self.isa), closing(probes.bandwidth):
            probes.bandwidth.survey()
            for shape in self.shapes:
                have = {line.T for line in lines if line.shape == shape.name}
                missing = [T for T in self.tokens if T not in have]
                if missing:
                    lines += self._measure_shape(shape, missing, probes)
        return [line for shape in self.shapes for T in self.tokens for line in lines if is_of(line, shape.name, T)]

    def _measure_shape(self, shape: Shape, tokens: Sequence[int], probes: Probes) -> list[Line]:
        lines = []
        with ExitStack() as stack:
            layer = make_layer(shape, torch.bfloat16, inputs.generator(self.seed))
            found = list(contenders(layer, self.formats, self, stack))
            for T in tokens:
                of_cell = measure(layer, found, T, self, probes)
                lines += of_cell
                if self.kept:
                    with self.kept.open("a") as file:
                        file.write("".join(json.dumps(asdict(line)) + "\n" for line in of_cell))
        return lines

    def _kept(self) -> list[Line]:
        if self.kept is None or not self.kept.exists():
            return []
        lines = [Line(**json.loads(text)) for text in self.kept.read_text().splitlines()]
        same = (self.described, self.threads, self.isa)
        return [line for line in lines if (line.run, line.threads, line.isa) == same]


def is_of(line: Line, shape: str, T: int) -> bool:
    return line.shape == shape and line.T == T


HEADER = ("shape", "T", "weights", "ms", "of bound", "x bf16", "x eager", "x best peer", "x sgl-kernel (stand-in)")
MORE = ("error", "GFLOP/s", "other CPU")


def table(lines: Sequence[Line]) -> list[list[str]]:
    """The cells of the Markdown table."""
    return [_cells(line, [other for other in lines if is_of(other, line.shape, line.T)]) for line in lines]


def _cells(line: Line, cell: Sequence[Line]) -> list[str]:
    """`cell`: all lines of its cell."""
    times = {other.name: other.seconds for other in cell}
    same = [other.seconds for other in cell if other.peer and other.format == line.format and other is not line]
    alias = next((short for short, name in ALIASES.items() if name == line.shape), line.shape)
    theirs = None if line.peer else times_eager(alias, line.T, line.format)
    faster = times[EAGER] / line.seconds
    return [
        line.shape,
        str(line.T),
        line.name if line.peer else f"**{line.name}**",
        f"{line.seconds * 1e3:.3f}",
        "cache" if line.share is None else f"{line.share:.2f}" + (" VOID" if line.void else ""),
        f"{times[BF16] / line.seconds:.2f}",
        f"{faster:.2f}",
        f"{min(same) / line.seconds:.2f}" if same else "-",
        "-" if theirs is None else f"{faster / theirs:.2f}",
        f"{line.error:.1e}" + (" WRONG" if line.wrong else ""),
        f"{line.flops / line.seconds / 1e9:.0f}",
        other_cpu(line.others),
    ]


NOTES = """of bound: the least time that memory and arithmetic allow, by probes in the same rounds, over the time taken.
x bf16, x eager: times as fast as polymoe in bf16 and as the loop over experts. x best peer: as the fastest library here
with that format. x sgl-kernel (stand-in): that library is not on PyPI; the speed-up over the eager loop, over the one
that sgl-kernel had on another machine without AMX. error: of the first tokens, against float64 with the weights that
are stored; of libraries that quantise by themselves, with the bf16 weights."""


def write(cells: Cells, lines: Sequence[Line]) -> str:
    title = f"polymoe.experts, quantised: {cpu_name()}, {cells.threads} threads, ISA level {cells.isa}, torch "
    parts = [
        f"{title}{torch.__version__}.",
        "",
        markdown([*HEADER, *MORE], table(lines)),
        "",
        NOTES,
        "",
        *cells.absent(),
    ]
    return "\n".join(parts).rstrip() + "\n"


def run(every: Sequence[Cells], out: Path | None) -> int:
    """Measures, prints and writes the page. Returns the exit status."""
    pages, wrong = [], False
    for cells in every:
        lines = cells.run()
        wrong = wrong or any(line.wrong for line in lines)
        pages.append(write(cells, lines))
        print(pages[-1], flush=True)
        if out:
            out.write_text("# Quantised experts\n\n" + "\n".join(pages))
    return int(wrong)


def run_command(given: argparse.Namespace) -> int:
    """`python -m benchmarks run quantized`: at the best ISA level unless others are given."""
    refused = {
        "--dtype": given.dtype != ["bf16"],
        "--device": given.device != "cpu",
        "--contenders": given.contenders not in ([], ["eager"]),
        **{f"--{name}": getattr(given, name) for name in ("backend", "check", "json", "out", "silent")},
    }
    words = [word for word, is_given in refused.items() if is_given]
    if words:
        raise SystemExit(f"benchmarks: quantized has no use for {', '.join(words)}; run it by itself, without")
    wanted, report = options(given), given.report
    kept, out = (Path(f"{report}{suffix}") for suffix in (".jsonl", ".md")) if report else (None, None)
    shared = (wanted.seed, wanted.effort, not given.contenders, wanted.probe_mib, kept)
    every = [
        Cells(wanted.shapes, wanted.tokens, FORMATS, threads, level, *shared)
        for level in given.isa or wanted.levels[-1:]
        for threads in wanted.threads
    ]
    return run(every, out)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_quantized", allow_abbrev=False)
    parser.add_argument("--shapes", default="w1,w2,w3", help=f"of {', '.join([*ALIASES, *SHAPES])}")
    parser.add_argument("--tokens", default="1,16,128")
    parser.add_argument("--formats", default=",".join(FORMATS), help=f"of {', '.join(formats.FORMATS)}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", default=supported_levels()[-1], help=f"of {', '.join(supported_levels())}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--no-peers", action="store_true", help="leave other libraries out, but for the eager loop")
    parser.add_argument("--out", type=Path, metavar="FILE", help="writes the page there; cells are kept in FILE.jsonl")
    given = parser.parse_args(arguments)
    cells = Cells(
        tuple(map(shape_of, given.shapes.split(","))),
        tuple(map(int, given.tokens.split(","))),
        tuple(given.formats.split(",")),
        given.threads,
        given.isa,
        given.seed,
        QUICK if given.quick else FULL,
        not given.no_peers,
        32 if given.quick else 1024,
        given.out and Path(f"{given.out}.jsonl"),
    )
    return run([cells], given.out)


if __name__ == "__main__":
    sys.exit(main())
