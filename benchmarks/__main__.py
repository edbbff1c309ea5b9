"""The benchmarks as a command: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from benchmarks import bench_quantized, compare, plots, report, tune
from benchmarks._harness import Bench, add_run_arguments, run
from benchmarks._options import NO_LEVEL, options, supported_levels
from benchmarks._report import markdown
from benchmarks.contenders import Problem, plugins
from benchmarks.models import ALIASES, SHAPES
from polymoe.hal.problem import OPS

BENCHES = (*OPS, "training", "quantized")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", allow_abbrev=False, description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    add = commands.add_parser("run", help="measure ops", allow_abbrev=False)
    add.add_argument(
        "ops", nargs="*", metavar="OP", help=f"of {', '.join(BENCHES)}; default: all but training and quantized"
    )
    add_run_arguments(add)
    add.set_defaults(do=_run)

    add = commands.add_parser("list", help="shapes and contenders, and who can run here")
    add.set_defaults(do=_list)

    add = commands.add_parser("compare", help="two files of JSON lines, by share of the bound and speed-up")
    add.add_argument("before", type=Path)
    add.add_argument("after", type=Path)
    add.add_argument("--tolerance", type=float, default=0.05, help="what may get lost; exit with 1 beyond it")
    add.set_defaults(do=compare.main)

    add = commands.add_parser("plot", help="PNG plots of a file of JSON lines; needs matplotlib")
    add.add_argument("results", type=Path)
    add.add_argument("--out", type=Path, default=Path("."), help="folder")
    add.set_defaults(do=plots.main)

    add = commands.add_parser("report", help="measure what docs/benchmarks.md shows, and write it")
    report.add_arguments(add)
    add.set_defaults(do=report.main)

    add = commands.add_parser("tune", help="refine the tiles of the Triton kernels for a GPU", allow_abbrev=False)
    tune.add_arguments(add)
    add.set_defaults(do=tune.main)

    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0].startswith("--") and words[0] != "--help":
        words.insert(0, "run")  # `python -m benchmarks --device cuda`
    given = parser.parse_args(words)
    status: int = given.do(given)
    return status


def _run(given: argparse.Namespace) -> int:
    unknown = [op for op in given.ops if op not in BENCHES]
    if unknown:
        raise SystemExit(f"benchmarks: no op {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    status = 0
    if "quantized" in given.ops:  # its cells hold many weights, each with a bound of its own
        given.ops.remove("quantized")
        status = bench_quantized.run_command(given)
        if not given.ops:
            return status
    return max(status, run([bench_of(op) for op in given.ops or OPS], options(given), given))


def bench_of(op: str) -> Bench:
    bench: Bench = import_module(f"benchmarks.bench_{op}").BENCH
    return bench


def _list(given: argparse.Namespace) -> int:
    names = {full: alias for alias, full in ALIASES.items()}
    header = ["shape", "H", "I", "experts", "K", "activation", "GiB in bf16"]
    lines = [
        [
            s.name + (f" ({names[s.name]})" if s.name in names else ""),
            *map(str, (s.H, s.I, s.slice, s.K, s.activation)),
            f"{2 * s.E * s.expert_elements / 2**30:.2f}",
        ]
        for s in SHAPES.values()
    ]
    print(markdown(header, lines), end="\n\n")
    level = supported_levels()[-1]
    problem = Problem(SHAPES["tiny"], "bf16", level, best_level=True)
    ready = {name: plugin.declined(problem) for name, plugin in plugins().items()}
    of_level = "" if level == NO_LEVEL else f" at {level}"
    print(markdown([f"contender, bf16{of_level}", "here"], [[n, reason or "ready"] for n, reason in ready.items()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
