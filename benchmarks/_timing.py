"""Times that can be compared on a shared machine: contenders take turns in one loop, and what else went on is noted.

Memory bandwidth of such a machine drifts by a factor of two within minutes, so times of separate runs say nothing
about each other. Here every round runs every contender once, and the medians of the same rounds are compared.
"""

from __future__ import annotations

import gc
import math
import os
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from time import perf_counter, perf_counter_ns

# Runs once, on the input set of that number. One that has a method seconds(first, repeats, sets), as those do that run
# in another process, brings its time along.
Call = Callable[[int], object]

MIN_SAMPLE_SECONDS = 5e-4  # shorter calls are repeated until a sample lasts this long
LONG_CALL_SECONDS = 0.05  # from here on a call's first run says what a later one takes


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


class Cold:
    """A call of which every sample finds the caches emptied by `evict`: data that did come from memory, whatever the
    size of the cache. The weights of a model of many layers never stay in one."""

    def __init__(self, call: Call, evict: Callable[[], object]) -> None:
        self._call, self._evict = call, evict
        self.evicting = 0.0  # seconds that the last time took

    def __call__(self, i: int) -> object:
        return self._call(i)

    def seconds(self, first: int, repeats: int, sets: int) -> float:
        start = perf_counter()
        self._evict()
        self.evicting = perf_counter() - start
        return _sample(self._call, repeats, first, sets)


def interleave(calls: Sequence[Call], sets: int, effort: Effort) -> list[Timing]:
    """Times the calls in turns on `sets` rotating input sets."""
    return [timing(samples) for samples in rounds(calls, sets, effort)]


def rounds(calls: Sequence[Call], sets: int, effort: Effort, least: float = MIN_SAMPLE_SECONDS) -> list[list[float]]:
    """Seconds per call, for every call and round; samples of one round are neighbours in time, and last `least` seconds
    or longer.

    Each contender meets each input set equally often, and never the set that the contender before it has just left in
    the caches. The order within a round is random, so that none always follows the same one.
    """
    seconds = [_first(call, sets) for call in calls]
    repeats = [_repeats(s, sets, least) for s in seconds]
    round_seconds = sum(s * n + getattr(c, "evicting", 0.0) for c, s, n in zip(calls, seconds, repeats, strict=True))
    wanted = min(max(effort.seconds / round_seconds, effort.min_rounds), effort.max_rounds)
    count = math.ceil(wanted / sets) * sets
    samples: list[list[float]] = [[] for _ in calls]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for round_, order in zip(range(count), _orders(len(calls), sets), strict=False):
            for j in order:
                samples[j].append(_sample(calls[j], repeats[j], round_ + j, sets))
    finally:
        if collecting:
            gc.enable()
    return samples


def _orders(count: int, sets: int) -> Iterator[list[int]]:
    """An order for every round. Contender j of round r has input set r + j; neighbours shall have different ones."""
    shuffled, last = random.Random(count), -1
    while True:
        for _ in range(1000):  # with one contender, or one set, there is no such order
            order = shuffled.sample(range(count), count)
            places = ([] if last < 0 else [last - 1]) + order
            if all((a - b) % sets for a, b in pairwise(places)):
                break
        last = order[-1]
        yield order


def _first(call: Call, sets: int) -> float:
    """Seconds of a call, by one call; of a short one by a whole turn through the input sets, which also warms it up."""
    seconds = _sample(call, 1, 0, sets)
    return seconds if seconds > LONG_CALL_SECONDS else _sample(call, max(1, sets - 1), 1, sets)


def _sample(call: Call, repeats: int, first: int, sets: int) -> float:
    if (seconds := getattr(call, "seconds", None)) is not None:
        return float(seconds(first, repeats, sets))
    start = perf_counter_ns()
    for i in range(first, first + repeats):
        call(i % sets)
    return (perf_counter_ns() - start) * 1e-9 / repeats


def _repeats(seconds: float, sets: int, least: float) -> int:
    """Calls in a sample: one, or whole turns through the input sets."""
    return 1 if seconds >= least else math.ceil(least / seconds / sets) * sets


def timing(samples: Sequence[float]) -> Timing:
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, low, high, len(samples))


class OtherCpuUse:
    """Context manager. `share` afterwards: how much of the machine's CPU time others had meanwhile, of 1; None where
    the system does not say. Time that a hypervisor took away counts too. `helpers` are processes that count as ours."""

    share: float | None = None

    def __init__(self, helpers: Sequence[int] = ()) -> None:
        self._helpers = helpers

    def __enter__(self) -> OtherCpuUse:
        self._before = _machine_seconds(), self._own_seconds(), perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        (busy_before, own_before, start), busy = self._before, _machine_seconds()
        if busy is not None and busy_before is not None:
            others = (busy - busy_before) - (self._own_seconds() - own_before)
            available = (perf_counter() - start) * (os.cpu_count() or 1)
            self.share = min(max(others / available, 0.0), 1.0)

    def _own_seconds(self) -> float:
        times = os.times()
        return times.user + times.system + sum(map(_process_seconds, self._helpers))


def _machine_seconds() -> float | None:
    """CPU seconds that were not idle, over all cores, since boot."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _process_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
