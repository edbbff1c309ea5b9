"""What the microbenchmarks share: the run over cases, ISA levels and threads, and the report.

A benchmark is an op and a generator of cases. A case holds contenders that compute the same on the same input sets:
first the baseline, then other libraries, then polymoe. Below the best ISA level of the machine torch must be limited
alike, and that it only learns from its environment when it starts, so such a level runs in a process of its own, which
hands its rows back as JSON lines.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from benchmarks import bounds, gpu
from benchmarks._case import Bench, Case, Contender, Seen, cold, contender_name, ours
from benchmarks._options import NO_LEVEL, Options, add_arguments, options, supported_levels
from benchmarks._progress import Progress, say
from benchmarks._report import OTHER_CPU_LIMIT, Result, Row, table
from benchmarks._timing import Call, OtherCpuUse, rounds, timing
from benchmarks.inputs import SETS
from benchmarks.memory import peak_memory
from benchmarks.probes import BandwidthProbe, PeakProbe
from polymoe.hal import device

__all__ = ["Bench", "Case", "Contender", "Options", "contender_name", "cpu_name", "main", "measure", "ours", "say"]

TORCH_LIMITS = {
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx512_bf16": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512_E1",
    },
}


class Probes:
    """The probes of one process at one number of threads."""

    def __init__(self, mebibytes: int, threads: int) -> None:
        self.bandwidth, self._threads = BandwidthProbe(mebibytes, threads), threads

    def peak(self, instruction: str) -> Callable[[], float]:
        return PeakProbe(instruction, self._threads) if instruction else lambda: 0.0


def measure(op: str, case: Case, level: str, options: Options, probes: Probes) -> Row:
    """Times the contenders of one case, again if the numbers are of no use."""
    for attempt in range(1, options.attempts + 1):
        row = replace(_measure_once(op, case, level, options, probes), attempts=attempt)
        if row.usable:
            break
    return row


def _measure_once(op: str, case: Case, level: str, options: Options, probes: Probes) -> Row:
    """Errors are taken before and after, so that a contender that spoils the common inputs is found out; the larger one
    is reported. The probes take their turns between the contenders."""
    calls: list[Call] = [contender.call for contender in case.contenders]
    errors = [case.error(call) for call in calls]
    peaks = [peak_memory(c.call) if c.peak is None else c.peak() for c in case.contenders]
    dtype = str(case.labels.get("dtype", ""))
    instruction = bounds.instruction(level, dtype) if case.flops else ""
    seen = Seen(probes.bandwidth, probes.peak(instruction))
    before = probes.bandwidth.survey()
    footprint = case.bytes * SETS if case.footprint is None else case.footprint
    timed, streams = cold(calls, footprint, probes.bandwidth) if case.cold else (calls, bounds.streams(footprint))
    with OtherCpuUse(case.helpers) as others:
        *samples, _ = rounds([*timed, seen], SETS, options.effort)
    after = probes.bandwidth.survey()
    errors = [max(error, case.error(call)) for error, call in zip(errors, calls, strict=True)]

    bandwidths, ceilings = seen.bandwidths[-len(samples[0]) :], seen.peaks[-len(samples[0]) :]
    results = []
    for contender, taken, error, peak in zip(case.contenders, samples, errors, peaks, strict=True):
        t = timing(taken)
        share = bounds.share(taken, case.bytes, case.flops, bandwidths, ceilings) if streams else None
        results.append(
            Result(
                contender.name, contender.peer, t.median, t.low, t.high, t.samples, error, share, contender.held, peak
            )
        )
    return Row(
        op=op,
        labels=case.labels,
        isa=level,
        torch_isa=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        results=tuple(results),
        subject=next(c.name for c in case.contenders if not c.peer),
        bytes=case.bytes,
        flops=case.flops,
        bandwidths=(before, median(bandwidths), after),
        instruction=instruction,
        peak=median(ceilings),
        other_cpu=others.share,
        tolerance=case.tolerance,
        required=case.required,
        absent=case.absent,
    )


def run_here(bench: Bench, options: Options, emit: Callable[[Row], None]) -> None:
    """All cases at one ISA level and one number of threads, in this process."""
    (level,), (threads,) = options.levels, options.threads
    with torch.no_grad(), torch_threads(threads), isa_level(level):
        probes = Probes(options.probe_mib, threads)
        for case in bench.cases(options):
            emit(measure(bench.op, case, level, options, probes))
            del case  # or its weights stay while those of the next one are made
        probes.bandwidth.close()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    former = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(former)


def isa_level(level: str) -> AbstractContextManager[None]:
    return nullcontext() if level == NO_LEVEL else device.force_isa_level(level)


def run_limited(bench: Bench, options: Options, environment: dict[str, str], emit: Callable[[Row], None]) -> None:
    """The same in a process of its own with that environment."""
    command = [sys.executable, "-m", "benchmarks", "run", bench.op, *options.arguments(), "--json", "--silent"]
    with subprocess.Popen(
        command, env=environment, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True
    ) as child:
        for line in child.stdout or ():
            emit(Row.from_json(line))
    if child.returncode != 0:
        raise SystemExit(f"benchmarks: {bench.op}: the run at ISA level {options.levels[0]} failed")


def environment_for(level: str) -> dict[str, str]:
    """This process's environment with torch limited as `level` is; without limits for the best level of the machine,
    where torch may use all that it knows."""
    limits = {} if level in (NO_LEVEL, supported_levels()[-1]) else TORCH_LIMITS[level]
    names = {name for of_level in TORCH_LIMITS.values() for name in of_level}
    return {name: value for name, value in os.environ.items() if name not in names} | limits


def collect(bench: Bench, options: Options, emit: Callable[[Row], None], apart: bool = False) -> None:
    """All cases; `emit` gets every row as soon as it is there. With `apart` always in another process."""
    if options.device != "cpu":
        gpu.run(bench, options, gpu.Gpu(options.device), emit)
        return
    for level in options.levels:
        environment = environment_for(level)
        for threads in options.threads:
            one = replace(options, levels=(level,), threads=(threads,))
            if environment == dict(os.environ) and not apart:
                run_here(bench, one, emit)
            else:
                run_limited(bench, one, environment, emit)


def run(benches: Sequence[Bench], options: Options, given: argparse.Namespace) -> int:
    """Runs benchmarks and prints their reports. Returns the exit status: 1 if a result is wrong, or with --check if a
    requirement is missed or a row is void."""
    rows: list[Row] = []
    machine = cpu_name() if options.device == "cpu" else gpu.Gpu(options.device).name
    stem = given.report or ("" if options.device == "cpu" else f"benchmarks-{options.device}")
    progress = Progress(sum(bench.count(options) for bench in benches))

    def emit(row: Row) -> None:
        rows.append(row)
        if given.json:
            print(row.to_json(), flush=True)
        if given.out:
            with open(given.out, "a") as file:
                file.write(row.to_json() + "\n")
        if not given.silent:
            progress.step(row.summary)

    for bench in benches:
        collect(bench, options, emit)
        if not given.json:
            print(report(bench.op, [row for row in rows if row.op == bench.op], machine) + "\n", flush=True)
        if stem:  # after every op, for a run may be stopped
            write_report(Path(stem), machine, rows)
    wrong = any(row.verdict.startswith("WRONG") for row in rows)
    return int(wrong or (given.check and any(row.failed or row.void for row in rows)))


def main(bench: Bench, arguments: Sequence[str] | None = None) -> int:
    """One benchmark as a command of its own."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.bench_{bench.op}", allow_abbrev=False)
    add_run_arguments(parser)
    given = parser.parse_args(arguments)
    return run([bench], options(given), given)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    add_arguments(parser)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a requirement is missed or a row is void")
    parser.add_argument("--json", action="store_true", help="JSON lines in place of tables")
    parser.add_argument("--out", metavar="FILE", help="append the JSON lines to a file")
    parser.add_argument(
        "--report",
        metavar="STEM",
        help="write all rows to STEM.json and the tables to STEM.md; default on other devices: benchmarks-DEVICE",
    )
    parser.add_argument("--silent", action="store_true", help="no progress on stderr")


def report(op: str, rows: Sequence[Row], machine: str) -> str:
    if not rows:
        return f"polymoe.{op}: no cases."
    notes = [f"polymoe.{op}: {machine}, torch {torch.__version__}.", "", table(rows), ""]
    notes.append(
        "Medians of interleaved calls on rotating inputs, ± half of the interquartile range. Of bound: the least time "
        "that memory and arithmetic allow, by probes in the same rounds, over the time taken."
    )
    if any(row.contended for row in rows):
        notes.append(f"(!): others used more than {OTHER_CPU_LIMIT:.0%} of the CPU meanwhile; the row is worth little.")
    for name, reason in sorted({item for row in rows for item in row.absent.items()}):
        notes.append(f"Absent: {name}: {reason}.")
    for name, note in sorted({item for row in rows for item in row.notes.items()}):
        notes.append(f"{name}: {note}.")
    judged = [row for row in rows if row.verdict != "-"]
    if judged:
        notes.append(f"{sum(row.verdict == 'pass' for row in judged)} of {len(judged)} judged rows pass.")
    return "\n".join(notes)


def write_report(stem: Path, machine: str, rows: Sequence[Row]) -> None:
    """STEM.json with everything, STEM.md with a section for every op."""
    whole = {"machine": machine, "torch": torch.__version__, "rows": [json.loads(row.to_json()) for row in rows]}
    stem.with_name(f"{stem.name}.json").write_text(json.dumps(whole, indent=1) + "\n")
    lines = [f"# polymoe on {machine}", ""]
    for op in dict.fromkeys(row.op for row in rows):
        lines += [f"## {op}", "", report(op, [row for row in rows if row.op == op], machine), ""]
    stem.with_name(f"{stem.name}.md").write_text("\n".join(lines))


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
