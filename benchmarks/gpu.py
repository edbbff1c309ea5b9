"""Measurements on a device other than the CPU.

A result is compared with float64 first, and a contender that computes something else is not timed. What a contender
launches is captured in a graph, so that the host's part is left out, unless the host reads results on the way; the row
says so. Every call is timed by two events, after a write to a buffer larger than any cache, and the calls of all
contenders take turns on rotating input sets, as on the CPU. The bound is made of the device's own memory bandwidth and
of its matmul rate, measured in the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import nan
from statistics import median
from typing import Any

import torch

from benchmarks import bounds
from benchmarks._case import Bench, Case, Contender, Seen
from benchmarks._options import Options
from benchmarks._report import Result, Row
from benchmarks._timing import Timing, rounds, timing
from benchmarks.inputs import DTYPES, SETS
from polymoe.kernels import devices

FLUSHED_MIB = 512  # beyond the caches of all GPUs, AMD's last level included
MATMUL = 8192  # rows and columns of the matmul whose rate is the peak
NOT_TIMED = Timing(nan, nan, nan, 0)

Run = Callable[[], Any]


class Gpu:
    """A device as torch offers it: `api` is torch.cuda or a module like it."""

    def __init__(
        self, device: str, api: Any = None, flushed: int = FLUSHED_MIB * 2**20, matmul: int = MATMUL, name: str = ""
    ) -> None:
        self.api = torch.get_device_module(device) if api is None else api
        if not self.api.is_available():
            raise SystemExit(f"benchmarks: --device {device}: torch sees no such device")
        self.device, self.matmul = device, matmul
        self.name = name or self.api.get_device_name()
        self.family = devices.current(torch.device(device)).family
        self._flushed = torch.empty(flushed, dtype=torch.uint8, device=device)

    def captured(self, run: Run) -> tuple[Run, str]:
        """What replays `run`, which ran before, as a graph; or `run` itself, and why it has none."""
        if not hasattr(self.api, "CUDAGraph"):
            return run, "this device has no graphs"
        self.api.synchronize()
        graph = self.api.CUDAGraph()
        try:
            with self.api.graph(graph):
                result = run()
        except RuntimeError as error:
            return run, f"it cannot be captured ({str(error).splitlines()[0]})"

        def replay() -> Any:
            graph.replay()
            return result

        return replay, ""

    def seconds(self, runs: Sequence[Run]) -> float:
        """Of one run, on average; each finds the caches empty."""
        events = []
        for run in runs:
            self._flushed.zero_()
            pair = [self.api.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            run()
            pair[1].record()
            events.append(pair)
        self.api.synchronize()
        return sum(float(start.elapsed_time(end)) for start, end in events) / 1e3 / len(runs)

    def peak_memory(self, run: Run) -> int:
        """Bytes that a call takes beside its inputs, its result included."""
        self.api.reset_peak_memory_stats()
        before = self.api.memory_allocated()
        run()
        return int(self.api.max_memory_allocated() - before)


class Call:
    """A contender's call, captured for every input set, and timed by the device."""

    def __init__(self, contender: Contender, gpu: Gpu) -> None:
        self._gpu, self.note = gpu, "the host reads results on the way" if contender.reads else ""
        self._runs: list[Run] = []
        for i in range(SETS):
            run, note = partial(contender.call, i), self.note
            captured, note = (run, note) if note else gpu.captured(run)
            self._runs.append(captured)
            self.note = self.note or note

    def __call__(self, i: int) -> Any:
        return self._runs[i]()

    def seconds(self, first: int, repeats: int, sets: int) -> float:
        return self._gpu.seconds([self._runs[i % sets] for i in range(first, first + repeats)])


class BandwidthProbe:
    """Bytes per second of memory: the better of a sum over a buffer and a copy of one half of it to the other."""

    def __init__(self, gpu: Gpu, mebibytes: int) -> None:
        self._gpu = gpu
        numbers = torch.ones(mebibytes * 2**18, device=gpu.device)
        left, right = numbers.chunk(2)
        self._bytes, self._variants = numbers.nbytes, (numbers.sum, partial(left.copy_, right))
        self._best: Run = numbers.sum

    def survey(self) -> float:
        rates = [self._rate(run) for run in self._variants]
        self._best = self._variants[rates.index(max(rates))]
        return max(rates)

    def __call__(self) -> float:
        return self._rate(self._best)

    def _rate(self, run: Run) -> float:
        return self._bytes / self._gpu.seconds([run])


class MatmulProbe:
    """Operations per second of torch.mm."""

    def __init__(self, gpu: Gpu, dtype: torch.dtype) -> None:
        n = gpu.matmul
        a, b = (torch.randn(n, n, device=gpu.device).to(dtype) for _ in range(2))
        self._gpu, self._operations, self._run = gpu, 2.0 * n**3, partial(torch.mm, a, b)

    def __call__(self) -> float:
        return self._operations / self._gpu.seconds([self._run])


def run(bench: Bench, options: Options, gpu: Gpu, emit: Callable[[Row], None]) -> None:
    """All cases of a benchmark; `emit` gets every row as soon as it is there."""
    options = replace(options, levels=(gpu.family,), threads=(torch.get_num_threads(),))
    with torch.no_grad():
        probe = BandwidthProbe(gpu, options.probe_mib)
        for case in bench.cases(options):
            emit(measure(bench.op, case, options, gpu, probe))
            del case  # or its weights stay while those of the next one are made


def measure(op: str, case: Case, options: Options, gpu: Gpu, bandwidth: BandwidthProbe) -> Row:
    """Times the contenders of one case that compute the right thing."""
    dtype = str(case.labels.get("dtype", ""))
    calls, notes, absent, errors = {}, {}, dict(case.absent), {}
    for contender in case.contenders:
        try:
            errors[contender.name] = case.error(contender.call)
        except Exception as error:  # of another library, on a device it may not know
            if not contender.peer:
                raise
            absent[contender.name] = f"it raises {type(error).__name__}: {error}"
            continue
        if errors[contender.name] <= case.tolerance:
            calls[contender.name] = call = Call(contender, gpu)
            if call.note:
                notes[contender.name] = f"timed with its launches: {call.note}"
    peaks = {c.name: gpu.peak_memory(partial(c.call, 0)) for c in case.contenders if c.name in calls}
    peak = MatmulProbe(gpu, DTYPES[dtype]) if case.flops else lambda: 0.0
    seen, before = Seen(bandwidth, peak), bandwidth.survey()
    *samples, _ = rounds([*calls.values(), seen], SETS, options.effort)
    count = len(samples[0]) if samples else 1
    bandwidths, ceilings = seen.bandwidths[-count:], seen.peaks[-count:]

    taken = dict(zip(calls, samples, strict=True))
    results = []
    for contender in case.contenders:
        name = contender.name
        if name in errors:
            if name in calls:  # of what the graphs give; and has anybody spoilt the common inputs?
                errors[name] = max(errors[name], case.error(calls[name]))
            t = timing(taken[name]) if name in taken else NOT_TIMED
            share = bounds.share(taken[name], case.bytes, case.flops, bandwidths, ceilings) if name in taken else None
            results.append(
                Result(
                    name, contender.peer, t.median, t.low, t.high, t.samples, errors[name], share, contender.held,
                    peaks.get(name),
                )
            )  # fmt: skip
    return Row(
        op=op,
        labels=case.labels,
        isa=gpu.family,
        torch_isa=gpu.family,
        threads=options.threads[0],
        results=tuple(results),
        subject=next(c.name for c in case.contenders if not c.peer),
        bytes=case.bytes,
        flops=case.flops,
        bandwidths=(before, median(bandwidths), bandwidth.survey()),
        instruction=f"torch.mm {dtype}" if case.flops else "",
        peak=median(ceilings),
        other_cpu=None,
        tolerance=case.tolerance,
        absent=absent,
        notes=notes,
    )
