"""What a benchmark consists of: an op, cases, contenders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch

from benchmarks import bounds
from benchmarks._options import Options
from benchmarks._timing import Call, Cold
from benchmarks.probes import BandwidthProbe
from polymoe.hal import registry
from polymoe.hal.problem import OPS, Problem
from polymoe.hal.select import decide, declined


@dataclass(frozen=True)
class Contender:
    """`call(i)` computes on input set i and returns the result. `held`: bytes that it took for weights of its own;
    `peak`: how to find what a call takes, if not by looking at this process. `reads`: whether the host reads results
    of a device on the way, so that no graph can capture it."""

    name: str
    call: Callable[[int], Any]
    peer: bool = True
    held: int | None = 0
    peak: Callable[[], int | None] | None = None
    reads: bool = False


@dataclass(frozen=True)
class Case:
    """labels      what distinguishes the case, one table column each
    contenders  the first is the baseline
    error       of what `call` computes, over all input sets, against float64
    footprint   bytes of all input sets and weights that take turns; default: no set shares anything with another
    helpers     processes that compute for a contender
    cold        whether the caches are emptied before every sample where the footprint alone would not do it
    The other fields are those of Row."""

    labels: dict[str, str | int]
    contenders: tuple[Contender, ...]
    error: Callable[[Callable[[int], Any]], float]
    tolerance: float
    bytes: float
    flops: float = 0.0
    required: dict[str, float] = field(default_factory=dict)
    footprint: float | None = None
    helpers: tuple[int, ...] = ()
    cold: bool = False
    absent: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """One benchmark. `by_dtype`: whether there is a case for every dtype."""

    op: str
    cases: Callable[[Options], Iterator[Case]]
    by_dtype: bool = True

    def count(self, options: Options) -> int:
        cases = len(options.shapes) * len(options.tokens) * (len(options.dtypes) if self.by_dtype else 1)
        return cases * len(options.levels) * len(options.threads)


class Seen:
    """The probes as one more call in every round; what they saw."""

    def __init__(self, bandwidth: Callable[[], float], peak: Callable[[], float]) -> None:
        self._bandwidth, self._peak = bandwidth, peak
        self.bandwidths: list[float] = []
        self.peaks: list[float] = []

    def __call__(self, i: int) -> None:
        self.bandwidths.append(self._bandwidth())
        self.peaks.append(self._peak())

    def seconds(self, first: int, repeats: int, sets: int) -> float:
        """Once, whatever was asked for: one sample a round."""
        start = perf_counter()
        self(first)
        return perf_counter() - start


def cold(calls: list[Call], footprint: float, probe: BandwidthProbe) -> tuple[list[Call], bool]:
    """The calls such that their data come from memory, though they touch `footprint` bytes in turns; and whether they
    do: the probe may not read enough to empty the caches."""
    if bounds.streams(footprint) or not bounds.evicts(probe.bytes):
        return calls, bounds.streams(footprint)
    return [Cold(call, probe) for call in calls], True


def ours(
    options: Options,
    op: str,
    dtype: torch.dtype,
    strings: dict[str, str],
    make: Callable[[str], Callable[[int], Any]],
    best_only: bool = False,
) -> list[Contender]:
    """The contenders from polymoe: make(backend) for every backend that serves, or with `best_only` for the one that
    polymoe selects, unless the user names others. `strings` are the op's arguments that a backend may
    depend on, where they are not the defaults."""
    problem = Problem(op, options.device, dtype, tuple({**OPS[op].options, **strings}.values()))
    if options.backends:
        names = [decide(problem, name) for name in options.backends]
    elif best_only:
        names = [decide(problem, None)]
    else:
        names = [backend.name for backend in registry.all_backends() if declined(backend, problem) is None]
    return [Contender(contender_name(name), make(name), peer=False) for name in names]


def contender_name(backend: str | None) -> str:
    return "polymoe" if backend in (None, "cpu") else f"polymoe/{backend}"
