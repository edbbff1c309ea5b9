"""Results: one Row per case and ISA level, as JSON lines to keep and as a Markdown table to read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

OTHER_CPU_LIMIT = 0.12  # above this share a row is marked: its times are worth little
ACCURACY_MARGIN = 1.05  # polymoe's error over that of the baseline


@dataclass(frozen=True)
class Result:
    """One contender. Seconds per call, median and quartiles; relative error against float64."""

    name: str
    peer: bool
    seconds: float
    low: float
    high: float
    samples: int
    error: float


@dataclass(frozen=True)
class Row:
    """One case. The first result is the baseline; `subject` is the contender that the verdict is about.

    isa, torch_isa           the level of polymoe's kernels, and what torch is limited to
    bytes, flops             that one call must read and write, and compute
    probe_before, probe_after
                             read bandwidth in bytes per second
    other_cpu                share of the machine that others used meanwhile; None if unknown
    tolerance                above this error a result is wrong
    required                 speed-up over the baseline that is asked for, if any
    judge_accuracy           if the error may be at most ACCURACY_MARGIN times the baseline's
    """

    op: str
    labels: dict[str, str | int]
    isa: str
    torch_isa: str
    threads: int
    results: tuple[Result, ...]
    subject: str
    bytes: float
    flops: float
    probe_before: float
    probe_after: float
    other_cpu: float | None
    tolerance: float
    required: float | None
    judge_accuracy: bool

    @property
    def baseline(self) -> Result:
        return self.results[0]

    @property
    def ours(self) -> Result:
        return next(result for result in self.results if result.name == self.subject)

    @property
    def ratio(self) -> float:
        return self.baseline.seconds / self.ours.seconds

    @property
    def ratio_to_best_peer(self) -> float:
        return min(result.seconds for result in self.results if result.peer) / self.ours.seconds

    @property
    def verdict(self) -> str:
        wrong = [result.name for result in self.results if not result.error <= self.tolerance]
        if wrong:
            return f"WRONG: {', '.join(wrong)}"
        if self.required is None and not self.judge_accuracy:
            return "-"
        faults = []
        if self.required is not None and self.ratio < self.required:
            faults.append("too slow")
        if self.judge_accuracy and self.ours.error > ACCURACY_MARGIN * self.baseline.error:
            faults.append("too inexact")
        return f"FAIL: {', '.join(faults)}" if faults else "pass"

    @property
    def failed(self) -> bool:
        return self.verdict.startswith(("WRONG", "FAIL"))

    @property
    def summary(self) -> str:
        labels = ", ".join(f"{key} {value}" for key, value in self.labels.items())
        return f"{labels}: {self.ratio:.2f} times {self.baseline.name}, verdict {self.verdict}"

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"ratio": self.ratio, "verdict": self.verdict})

    @staticmethod
    def from_json(line: str) -> Row:
        fields = json.loads(line)
        del fields["ratio"], fields["verdict"]
        return Row(**fields | {"results": tuple(Result(**result) for result in fields["results"])})


def table(rows: Sequence[Row]) -> str:
    """A Markdown table with a line per row and a column per contender."""
    names = list(dict.fromkeys(result.name for row in rows for result in row.results))
    unit, scale = _unit(min(row.ours.seconds for row in rows))
    lines = [_line(row, names, scale) for row in rows]
    header = list(lines[0])
    for name in names:
        header[header.index(name)] = f"{name} [{unit}]"
    return markdown(header, [list(line.values()) for line in lines])


def _line(row: Row, names: Sequence[str], scale: float) -> dict[str, str]:
    results = {result.name: result for result in row.results}
    cells = {key: str(value) for key, value in row.labels.items()} | {"ISA": f"{row.isa} (torch {row.torch_isa})"}
    cells |= {name: _time(results[name], scale) if name in results else "-" for name in names}
    cells[f"speed-up over {row.baseline.name}"] = f"{row.ratio:.2f}"
    if sum(result.peer for result in row.results) > 1:
        cells["over best peer"] = f"{row.ratio_to_best_peer:.2f}"
    cells["required"] = "-" if row.required is None else f"{row.required:.1f}"
    cells["verdict"] = row.verdict
    for name in names:
        cells[f"error {name}"] = f"{results[name].error:.3g}" if name in results else "-"
    cells["GB/s"] = f"{row.bytes / row.ours.seconds / 1e9:.1f}"
    if row.flops:
        cells["GFLOP/s"] = f"{row.flops / row.ours.seconds / 1e9:.0f}"
    cells["probe GB/s"] = f"{row.probe_before / 1e9:.0f} / {row.probe_after / 1e9:.0f}"
    cells["other CPU"] = other_cpu(row.other_cpu)
    return cells


def other_cpu(share: float | None) -> str:
    if share is None:
        return "?"
    return f"{share:.0%}" + (" (!)" if share > OTHER_CPU_LIMIT else "")


def _unit(seconds: float) -> tuple[str, float]:
    return ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)


def _time(result: Result, scale: float) -> str:
    """Median and half of the distance between the quartiles, in percent."""
    return f"{result.seconds * scale:.4g} ±{(result.high - result.low) / 2 / result.seconds:.0%}"


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))
