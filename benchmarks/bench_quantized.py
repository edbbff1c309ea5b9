"""polymoe.experts with quantised weights beside the same layer in bf16: milliseconds, the share of what memory and
arithmetic allow, in stored bytes (codes, scales and zero points), how many times as fast as bf16, and the error against
float64 with the weights that are stored.

    python -m benchmarks.bench_quantized --shapes w1,w2,w3 --tokens 1,16,128

All formats of a shape take turns in one process, with the probes between them. The bound of weight-only products is the
larger of bytes over bandwidth and operations over the peak of bf16 dot products; for int8 activations bytes alone. A
cell is measured again if anything is more than 3% faster than its bound, and void if it still is. Exits with 1 if a
result is wrong.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import polymoe
from benchmarks import bounds, inputs
from benchmarks._case import Seen
from benchmarks._harness import cpu_name, isa_level, say, torch_threads
from benchmarks._options import supported_levels
from benchmarks._report import markdown, other_cpu
from benchmarks._timing import FULL, QUICK, Effort, OtherCpuUse, rounds, timing
from benchmarks.inputs import SETS
from benchmarks.layer import InputSet, Layer, exact, make_layer, make_set
from benchmarks.models import ALIASES, SHAPES, shape_of
from benchmarks.probes import BandwidthProbe, PeakProbe
from polymoe import formats
from polymoe.formats import Weight
from polymoe.testing.tolerances import relative_frobenius

FORMATS = ("mxfp4", "fp8_block128", "mxfp8", "int8", "int4_g128", "int4_g32")
CHECKED_TOKENS = 2  # dequantising their experts to float64 takes longer than a measurement
ATTEMPTS = 3

# The largest of 128 numbers is at most sqrt(128) times their root mean square, and 8 bits round to within 1/254 of it;
# so are what gate and up multiply, and what down does.
INT8_ERROR = 3 * math.sqrt(128) / 254


@dataclass(frozen=True)
class Stored:
    """A layer in one format and mode: how to call it, bytes of all its weights, and what it should compute with."""

    name: str
    call: Callable[[InputSet], Tensor]
    bytes: int
    weight_only: bool
    exact: Layer


class Dequantized:
    """A weight whose experts are dequantised as they are asked for; in float64 all of them would not fit the memory."""

    def __init__(self, weight: Weight) -> None:
        self.weight = weight

    def __getitem__(self, expert: int) -> Tensor:
        one = replace(self.weight, data=self.weight.data[expert], scale=self.weight.scale[expert])
        return formats.parse(one.format).dequantize(one, torch.float64)


def stored(
    layer: Layer, name: str, nbytes: int, mode: str, gate_up: Tensor, down: Tensor, exact: Layer, **how: Any
) -> Stored:
    def call(given: InputSet) -> Tensor:
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
            mode=mode,
            **how,
        )

    return Stored(name, call, nbytes, mode == "weight_only", exact)


def contenders(layer: Layer, names: Sequence[str]) -> Iterator[Stored]:
    dense = layer.gate_up, layer.down
    yield stored(layer, "bf16", sum(weight.nbytes for weight in dense), "weight_only", *dense, layer)
    for name in names:
        up, down = (_quantized(formats.parse(name), weight) for weight in dense)
        values: dict[str, Any] = {"gate_up": Dequantized(up), "down": Dequantized(down)}
        true = replace(layer, **values)
        scales = {"gate_up_scale": up.scale, "down_scale": down.scale}
        for mode in formats.parse(name).modes:
            label = name if mode == "weight_only" else f"{name}, {mode}"
            both = up.data, down.data
            how: dict[str, Any] = {"weight_format": name, **scales}
            yield stored(layer, label, up.nbytes + down.nbytes, mode, *both, true, **how)


def _quantized(format: formats.Format, weight: Tensor) -> Weight:
    """Expert by expert, for the memory that it takes."""
    parts = [format.quantize(expert) for expert in weight]
    data, scale = torch.stack([part.data for part in parts]), torch.stack([part.scale for part in parts])
    return Weight(data, scale, None, format.name, *weight.shape[-2:])


def errors(found: Sequence[Stored], given: InputSet) -> list[float]:
    """Against float64, of the first tokens of an input set; modes of a format share the truth."""
    x, weights, ids = (tensor[:CHECKED_TOKENS] for tensor in given)
    truths = {id(one.exact): one.exact for one in found}
    values = {key: exact(layer, x, weights, ids) for key, layer in truths.items()}
    return [relative_frobenius(one.call(given)[:CHECKED_TOKENS], values[id(one.exact)]) for one in found]


def tolerance(one: Stored, layer: Layer) -> float:
    """As for plain weights, and with int8 activations what their rounding may cost."""
    shape = layer.shape
    plain = inputs.error_bound(torch.bfloat16, roundings=8 + shape.K, reduction=shape.H + shape.I)
    return plain if one.weight_only else plain + INT8_ERROR


@dataclass(frozen=True)
class Measured:
    """Seconds and the share of the bound, if data come from memory, of each; and what others took of the CPU."""

    medians: list[float]
    shares: list[float | None]
    others: float | None

    @property
    def void(self) -> bool:
        return any(share is not None and share > bounds.VOID_ABOVE for share in self.shares)


def measure_once(layer: Layer, found: Sequence[Stored], sets: list[InputSet], effort: Effort, probes: Seen) -> Measured:
    shape, first = layer.shape, len(probes.bandwidths)
    hit = sum(ids.unique().numel() for _, _, ids in sets) / SETS / shape.E
    touched = torch.cat([ids for _, _, ids in sets]).unique().numel() / shape.E
    flops = 2.0 * sets[0][2].numel() * shape.expert_elements
    calls = [lambda i, one=one: one.call(sets[i]) for one in found]
    with OtherCpuUse() as others:
        *samples, _ = rounds([*calls, probes], SETS, effort)
    count = len(samples[0])
    bandwidths, peaks = probes.bandwidths[first:][-count:], probes.peaks[first:][-count:]
    shares: list[float | None] = []
    for one, taken in zip(found, samples, strict=True):
        bytes_, work = one.bytes * hit + 2 * sets[0][0].nbytes, flops if one.weight_only else 0.0
        streams = bounds.streams(one.bytes * touched)
        shares.append(bounds.share(taken, bytes_, work, bandwidths, peaks) if streams else None)
    return Measured([timing(taken).median for taken in samples], shares, others.share)


def measure(
    layer: Layer, found: Sequence[Stored], T: int, effort: Effort, probes: Seen, seed: int
) -> tuple[list[list[str]], bool]:
    """The lines of a cell, and whether all results are right."""
    shape, source = layer.shape, inputs.generator(seed + T)
    sets = [make_set(shape, T, torch.bfloat16, source) for _ in range(SETS)]
    for _ in range(ATTEMPTS if effort is FULL else 1):
        seen = measure_once(layer, found, sets, effort, probes)
        if not seen.void:
            break
    lines, right = [], True
    for one, median, share, off in zip(found, seen.medians, seen.shares, errors(found, sets[0]), strict=True):
        wrong = not off <= tolerance(one, layer)
        right = right and not wrong
        of_bound = "cache" if share is None else f"{share:.2f}" + (" VOID" if seen.void else "")
        cells = [shape.name, str(T), one.name, f"{median * 1e3:.3f}", of_bound, f"{seen.medians[0] / median:.2f}"]
        rate = 2.0 * T * shape.K * shape.expert_elements / median / 1e9
        lines.append([*cells, f"{off:.1e}" + (" WRONG" if wrong else ""), f"{rate:.0f}", other_cpu(seen.others)])
        say(" ".join(lines[-1]))
    return lines, right


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_quantized", allow_abbrev=False)
    parser.add_argument("--shapes", default="w1,w2,w3", help=f"of {', '.join([*ALIASES, *SHAPES])}")
    parser.add_argument("--tokens", default="1,16,128")
    parser.add_argument("--formats", default=",".join(FORMATS), help=f"of {', '.join(formats.FORMATS)}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", default=supported_levels()[-1], help=f"of {', '.join(supported_levels())}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    given = parser.parse_args(arguments)
    lines: list[list[str]] = []
    status = 0
    probe = closing(BandwidthProbe(32 if given.quick else 1024, given.threads))
    with torch.no_grad(), torch_threads(given.threads), isa_level(given.isa), probe as bandwidth:
        bandwidth.survey()
        probes = Seen(bandwidth, PeakProbe(bounds.instruction(given.isa, "bf16"), given.threads))
        for name in given.shapes.split(","):
            layer = make_layer(shape_of(name), torch.bfloat16, inputs.generator(given.seed))
            found = list(contenders(layer, given.formats.split(",")))
            for T in map(int, given.tokens.split(",")):
                cell, right = measure(layer, found, T, QUICK if given.quick else FULL, probes, given.seed)
                lines, status = lines + cell, status if right else 1
    print(f"polymoe.experts, quantised: {cpu_name()}, {given.threads} threads, ISA level {given.isa}.\n")
    header = ["shape", "T", "weights", "ms", "of bound", "times bf16", "error", "GFLOP/s", "other CPU"]
    print(markdown(header, lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
