"""Times that can be compared on a shared machine: contenders take turns in one process, and what else went on is noted.

Memory bandwidth of such a machine drifts by a factor of two within minutes, so times of separate runs say nothing
about each other. Here every round runs every contender once, and the medians of the same rounds are compared.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, perf_counter_ns

import torch

Call = Callable[[int], object]  # runs once, on the input set of that number

MIN_SAMPLE_SECONDS = 5e-4  # shorter calls are repeated until a sample lasts this long


@dataclass(frozen=True)
class Effort:
    """Rounds are as many as fit `seconds`, within bounds."""

    seconds: float
    min_rounds: int
    max_rounds: int


FULL = Effort(seconds=4.0, min_rounds=8, max_rounds=200)
QUICK = Effort(seconds=0.2, min_rounds=4, max_rounds=20)


@dataclass(frozen=True)
class Timing:
    """Seconds per call: median and quartiles of the samples."""

    median: float
    low: float
    high: float
    samples: int


def interleave(calls: Sequence[Call], sets: int, effort: Effort) -> list[Timing]:
    """Times the calls in turns on `sets` rotating input sets.

    Each contender meets each input set equally often, never the set that the contender before it in the round has just
    left in the caches, and every place in the order.
    """
    seconds = [_sample(call, sets, 0, sets) for call in calls]  # also warms up
    repeats = [_repeats(s, sets) for s in seconds]
    round_seconds = sum(s * n for s, n in zip(seconds, repeats, strict=True))
    wanted = min(max(effort.seconds / round_seconds, effort.min_rounds), effort.max_rounds)
    rounds = math.ceil(wanted / sets) * sets
    samples: list[list[float]] = [[] for _ in calls]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for round_ in range(rounds):
            for place in range(len(calls)):
                j = (round_ + place) % len(calls)
                samples[j].append(_sample(calls[j], repeats[j], round_ + j, sets))
    finally:
        if collecting:
            gc.enable()
    return [_timing(of_one) for of_one in samples]


def _sample(call: Call, repeats: int, first: int, sets: int) -> float:
    start = perf_counter_ns()
    for i in range(first, first + repeats):
        call(i % sets)
    return (perf_counter_ns() - start) * 1e-9 / repeats


def _repeats(seconds: float, sets: int) -> int:
    """Calls in a sample: one, or whole turns through the input sets."""
    if seconds >= MIN_SAMPLE_SECONDS:
        return 1
    return math.ceil(MIN_SAMPLE_SECONDS / seconds / sets) * sets


def _timing(samples: list[float]) -> Timing:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, low, high, len(samples))


class OtherCpuUse:
    """Context manager. `share` afterwards: how much of the machine's CPU time others had meanwhile, of 1; None where
    the system does not say. Time that a hypervisor took away counts too."""

    share: float | None = None

    def __enter__(self) -> OtherCpuUse:
        self._before = _machine_seconds(), _own_seconds(), perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        (busy_before, own_before, start), busy = self._before, _machine_seconds()
        if busy is not None and busy_before is not None:
            others = (busy - busy_before) - (_own_seconds() - own_before)
            available = (perf_counter() - start) * (os.cpu_count() or 1)
            self.share = min(max(others / available, 0.0), 1.0)


def _machine_seconds() -> float | None:
    """CPU seconds that were not idle, over all cores, since boot."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


class BandwidthProbe:
    """Bytes per second that torch's threads read from memory: the best of a few simple reductions over a buffer that
    no cache holds. It is a yardstick for drift, not the limit of the machine: a kernel that prefetches better exceeds
    it."""

    def __init__(self, mebibytes: int) -> None:
        buffer = torch.ones(mebibytes * 2**20 // 4)
        matrix, vector, integers = buffer.view(-1, 4096), buffer[:4096], buffer.view(torch.int64)
        self._bytes = buffer.nbytes
        self._reads: list[Callable[[], object]] = [
            integers.sum,
            buffer.sum,
            buffer.norm,
            lambda: torch.mv(matrix, vector),
        ]

    def __call__(self, turns: int = 2) -> float:
        best = math.inf
        for read in self._reads * turns:
            start = perf_counter()
            read()
            best = min(best, perf_counter() - start)
        return self._bytes / best
