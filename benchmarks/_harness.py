"""What the microbenchmarks share: options, the run over cases and ISA levels, the report.

A benchmark is an op and a generator of cases. A case holds contenders that compute the same on the same input sets:
first torch, which is the baseline, then polymoe's backends. Below the best ISA level of the machine torch must be
limited alike, and that it only learns from its environment when it starts, so such a level runs in a process of its
own, which hands its rows back as JSON lines.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benchmarks._report import OTHER_CPU_LIMIT, Result, Row, table
from benchmarks._timing import FULL, QUICK, BandwidthProbe, Effort, OtherCpuUse, interleave
from benchmarks.inputs import DTYPES, SETS
from benchmarks.shapes import MODELS, SHAPES, Shape
from polymoe.backends._extension import extension
from polymoe.hal import device, registry
from polymoe.hal.problem import Problem
from polymoe.hal.select import decide, declined

TORCH_LIMITS = {
    "portable": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}
START = perf_counter()
NO_LEVEL = "-"  # of a process without polymoe's C++ extension


@dataclass(frozen=True)
class Contender:
    """`call(i)` computes on input set i and returns the result."""

    name: str
    call: Callable[[int], Any]
    peer: bool = True


@dataclass(frozen=True)
class Case:
    """labels      what distinguishes the case, one table column each
    contenders  the first is the baseline
    error       of what `call` computes, over all input sets, against float64
    The other fields are those of Row."""

    labels: dict[str, str | int]
    contenders: tuple[Contender, ...]
    error: Callable[[Callable[[int], Any]], float]
    tolerance: float
    bytes: float
    flops: float = 0.0
    required: float | None = None
    judge_accuracy: bool = False


@dataclass(frozen=True)
class Options:
    """What the command line says. A generator of cases finds in `levels` the one that it runs at."""

    shapes: tuple[Shape, ...]
    tokens: tuple[int, ...]
    dtypes: tuple[str, ...]
    levels: tuple[str, ...]
    backends: tuple[str, ...]
    best_backend_only: bool
    threads: int
    seed: int
    quick: bool
    check: bool
    json: bool

    @property
    def effort(self) -> Effort:
        return QUICK if self.quick else FULL


@dataclass(frozen=True)
class Bench:
    """One benchmark. Where the user names no backend it runs all that serve, or with `best_backend_only` the one that
    polymoe selects."""

    op: str
    cases: Callable[[Options], Iterator[Case]]
    best_backend_only: bool = False


def ours(
    options: Options,
    op: str,
    dtype: torch.dtype,
    strings: tuple[str, ...],
    make: Callable[[str], Callable[[int], Any]],
) -> list[Contender]:
    """The contenders from polymoe: make(backend) for every backend that is to run. `strings` are the op's arguments
    that a backend may depend on."""
    problem = Problem(op, "cpu", dtype, strings)
    if options.backends:
        names = [decide(problem, name) for name in options.backends]
    elif options.best_backend_only:
        names = [decide(problem, None)]
    else:
        names = [backend.name for backend in registry.all_backends() if declined(backend, problem) is None]
    return [Contender(name, make(name), peer=False) for name in names]


def measure(op: str, case: Case, level: str, effort: Effort, probe: BandwidthProbe) -> Row:
    """Times the contenders of one case. Errors are taken before and after, so that a contender that spoils the common
    inputs is found out; the larger one is reported."""
    errors = [case.error(contender.call) for contender in case.contenders]
    before = probe()
    with OtherCpuUse() as others:
        timings = interleave([contender.call for contender in case.contenders], SETS, effort)
    after = probe()
    errors = [max(e, case.error(c.call)) for e, c in zip(errors, case.contenders, strict=True)]
    results = tuple(
        Result(c.name, c.peer, t.median, t.low, t.high, t.samples, e)
        for c, t, e in zip(case.contenders, timings, errors, strict=True)
    )
    return Row(
        op=op,
        labels=case.labels,
        isa=level,
        torch_isa=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        results=results,
        subject=next(c.name for c in case.contenders if not c.peer),
        bytes=case.bytes,
        flops=case.flops,
        probe_before=before,
        probe_after=after,
        other_cpu=others.share,
        tolerance=case.tolerance,
        required=case.required,
        judge_accuracy=case.judge_accuracy,
    )


def run_here(bench: Bench, options: Options, level: str) -> list[Row]:
    """All cases at one ISA level, in this process."""
    rows = []
    with torch.no_grad(), threads(options.threads), isa_level(level):
        probe = BandwidthProbe(64 if options.quick else 256)
        for case in bench.cases(replace(options, levels=(level,))):
            rows.append(measure(bench.op, case, level, options.effort, probe))
            say(f"{bench.op} {level}: {rows[-1].summary}")
    return rows


def say(message: str) -> None:
    print(f"[{perf_counter() - START:6.1f} s] {message}", file=sys.stderr, flush=True)


@contextmanager
def threads(count: int) -> Iterator[None]:
    former = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(former)


def isa_level(level: str) -> AbstractContextManager[None]:
    return nullcontext() if level == NO_LEVEL else device.force_isa_level(level)


def run_limited(bench: Bench, arguments: Sequence[str], level: str, environment: dict[str, str]) -> list[Row]:
    """All cases at one ISA level, in a process of its own with that environment."""
    mine = [argument for argument in arguments if argument != "--check"]
    child = subprocess.run(
        [sys.executable, "-m", f"benchmarks.bench_{bench.op}", *mine, "--isa", level, "--json"],
        env=environment,
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        text=True,
    )
    if child.returncode != 0:
        raise SystemExit(f"benchmarks: {bench.op}: the run at ISA level {level} failed")
    return [Row.from_json(line) for line in child.stdout.splitlines()]


def environment_for(level: str) -> dict[str, str]:
    """This process's environment with torch limited as `level` is; without limits for the best level of the machine,
    where torch may use all that it knows."""
    limits = {} if level in (NO_LEVEL, _supported()[-1]) else TORCH_LIMITS[level]
    names = {name for of_level in TORCH_LIMITS.values() for name in of_level}
    return {name: value for name, value in os.environ.items() if name not in names} | limits


def main(bench: Bench, arguments: Sequence[str] | None = None) -> int:
    """Runs a benchmark and prints its report. Returns the exit status: 1 if a result is wrong, or with --check if a
    requirement is missed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(bench, arguments)
    rows = []
    for level in options.levels:
        environment = environment_for(level)
        if environment == dict(os.environ):
            rows += run_here(bench, options, level)
        else:
            rows += run_limited(bench, arguments, level, environment)
    if options.json:
        print("\n".join(row.to_json() for row in rows))
        return 0
    print(report(bench.op, rows))
    wrong = any(row.verdict.startswith("WRONG") for row in rows)
    return int(wrong or (options.check and any(row.failed for row in rows)))


def report(op: str, rows: Sequence[Row]) -> str:
    notes = [f"polymoe.{op}: {cpu_name()}, threads: {rows[0].threads}, torch {torch.__version__}.", "", table(rows), ""]
    notes.append("Medians of interleaved calls on rotating inputs, ± half of the interquartile range.")
    if any((row.other_cpu or 0) > OTHER_CPU_LIMIT for row in rows):
        notes.append(f"(!): others used more than {OTHER_CPU_LIMIT:.0%} of the CPU meanwhile; the row is worth little.")
    failed = sum(row.failed for row in rows)
    judged = sum(row.verdict != "-" for row in rows)
    if judged:
        notes.append(f"{judged - failed} of {judged} judged rows pass.")
    return "\n".join(notes)


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def parse(bench: Bench, arguments: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.bench_{bench.op}", allow_abbrev=False)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, metavar="NAME", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", nargs="+", type=int, metavar="T")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--isa", nargs="+", choices=_supported(), help="ISA levels; default: avx2 and the best")
    parser.add_argument("--backend", nargs="+", choices=registry.backends())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few rounds; one shape and few tokens by default")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a requirement is missed")
    parser.add_argument("--json", action="store_true", help="JSON lines in place of the table")
    given = parser.parse_args(arguments)
    return Options(
        shapes=tuple(SHAPES[name] for name in given.shape or (MODELS[:1] if given.quick else MODELS)),
        tokens=tuple(given.tokens or ((1, 16) if given.quick else (1, 16, 128, 1024))),
        dtypes=tuple(given.dtype),
        levels=tuple(given.isa or _default_levels()),
        backends=tuple(given.backend or ()),
        best_backend_only=bench.best_backend_only,
        threads=given.threads,
        seed=given.seed,
        quick=given.quick,
        check=given.check,
        json=given.json,
    )


def _supported() -> list[str]:
    return [NO_LEVEL] if extension is None else device.isa_supported()


def _default_levels() -> list[str]:
    supported = _supported()
    return [level for level in supported if level in ("avx2", supported[-1])]
