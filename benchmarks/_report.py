"""Results: one Row per case, ISA level and number of threads, as JSON lines to keep and as Markdown tables to read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks import bounds

OTHER_CPU_LIMIT = 0.12  # above this share a row is run again, or marked: its times are worth little


@dataclass(frozen=True)
class Result:
    """One contender. Seconds per call, median and quartiles; relative error against float64, the larger of before and
    after; share of the bound, None where there is none; bytes that the weights took when it prepared its own, and that
    a call took at its peak, None if unknown."""

    name: str
    peer: bool
    seconds: float
    low: float
    high: float
    samples: int
    error: float
    share: float | None = None
    held: int | None = None
    peak: int | None = None


@dataclass(frozen=True)
class Row:
    """One case. The first result is the baseline; `subject` is the contender that the verdict is about.

    isa, torch_isa           the level of polymoe's kernels, and what torch is limited to
    bytes, flops             that one call must read and write, and compute
    bandwidths               bytes per second: by all variants of the probe before the rounds, by the best one within
                             them (median), and by all variants after them
    instruction, peak        operations per second of that instruction; "" and 0 where only bytes count
    other_cpu                share of the machine that others used meanwhile; None if unknown
    tolerance                above this error a result is wrong
    required                 what is asked for, see `faults`
    absent                   contenders that did not take part, and why
    attempts                 runs of this case until its numbers could be used, or for good
    notes                    on how contenders were timed, by name
    part                     of a report
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
    bandwidths: tuple[float, float, float]
    instruction: str
    peak: float
    other_cpu: float | None
    tolerance: float
    required: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    attempts: int = 1
    part: str = ""
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def baseline(self) -> Result:
        return self.results[0]

    @property
    def ours(self) -> Result:
        return self.result(self.subject)

    @property
    def best_peer(self) -> Result:
        return min((result for result in self.results if result.peer), key=lambda result: result.seconds)

    @property
    def limit(self) -> str:
        """What the bound is made of: memory or compute; "cache" where the data do not come from memory."""
        if self.ours.share is None:
            return "cache"
        return "compute" if self.peak and self.flops / self.peak > self.bytes / self.bandwidths[1] else "memory"

    @property
    def void(self) -> list[str]:
        """Contenders faster than their bound: the probes were too slow, so the row proves nothing."""
        return [r.name for r in self.results if r.share is not None and r.share > bounds.VOID_ABOVE]

    @property
    def contended(self) -> bool:
        return (self.other_cpu or 0.0) > OTHER_CPU_LIMIT

    @property
    def usable(self) -> bool:
        return not (self.void or self.contended)

    def result(self, name: str) -> Result:
        return next(result for result in self.results if result.name == name)

    def ratio(self, result: Result) -> float:
        """Speed-up of a contender over the baseline."""
        return self.baseline.seconds / result.seconds

    def measured(self) -> dict[str, float]:
        """What `required` may name:
        over_baseline   speed-up over the first contender
        over_best_peer  speed-up over the fastest peer
        share           of the bound
        error           relative to float64; less is better
        error_ratio     error over that of the baseline; less is better
        plain           speed on weights in the layout of nn.Linear over that of the subject, if it is another one
        """
        ours, plain = self.ours, next((r for r in self.results if r.name == "polymoe"), self.ours)
        found = {
            "over_baseline": self.ratio(ours),
            "over_best_peer": self.best_peer.seconds / ours.seconds,
            "error": ours.error,
            "error_ratio": ours.error / self.baseline.error if self.baseline.error else 0.0,
        }
        if ours.share is not None:
            found["share"] = ours.share
        if plain is not ours:
            found["plain"] = ours.seconds / plain.seconds
        return found

    @property
    def faults(self) -> list[str]:
        """Requirements that are missed: "error" and "error_ratio" are upper limits, the others lower ones."""
        measured = self.measured()
        return [
            f"{name} {measured[name]:.3g}, asked {asked:g}"
            for name, asked in self.required.items()
            if name in measured
            and not (measured[name] <= asked if name.startswith("error") else measured[name] >= asked)
        ]

    @property
    def verdict(self) -> str:
        wrong = [result.name for result in self.results if not result.error <= self.tolerance]
        if wrong:
            return f"WRONG: {', '.join(wrong)}"
        if self.void:
            return f"VOID: {', '.join(self.void)} above the bound"
        if not self.required:
            return "-"
        return f"FAIL: {'; '.join(self.faults)}" if self.faults else "pass"

    @property
    def failed(self) -> bool:
        return self.verdict.startswith(("WRONG", "FAIL"))

    @property
    def case(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.labels.items()) + f", {self.isa}, {self.threads} thr"

    @property
    def summary(self) -> str:
        share = "" if self.ours.share is None else f", {self.ours.share:.2f} of the bound"
        speed = f"{self.ratio(self.ours):.2f} times {self.baseline.name}"
        return f"{self.op} {self.case}: {speed}{share}, verdict {self.verdict}"

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"verdict": self.verdict})

    @staticmethod
    def from_json(line: str) -> Row:
        fields: dict[str, Any] = json.loads(line)
        del fields["verdict"]
        fields["results"] = tuple(Result(**result) for result in fields["results"])
        return Row(**fields | {"bandwidths": tuple(fields["bandwidths"])})


def table(rows: Sequence[Row]) -> str:
    """A Markdown table with a line for every contender of every row."""
    unit, scale = _unit(min(row.ours.seconds for row in rows))
    keys = list(dict.fromkeys(key for row in rows for key in row.labels))
    header = [*keys, "ISA", "threads", "contender", f"median [{unit}]", "spread", "x baseline", "x best peer"]
    header += ["of bound", "limit", "error", "held [MiB]", "peak [MiB]", "GB/s", "GFLOP/s", "probe GB/s", "other CPU"]
    return markdown([*header, "verdict"], [_line(row, one, keys, scale) for row in rows for one in row.results])


def _line(row: Row, one: Result, keys: Sequence[str], scale: float) -> list[str]:
    subject = one.name == row.subject
    peers = [r.seconds for r in row.results if r.peer and r is not one]
    return [
        *(str(row.labels.get(key, "-")) for key in keys),
        row.isa if row.isa == row.torch_isa.lower() else f"{row.isa} (torch {row.torch_isa})",
        str(row.threads),
        f"**{one.name}**" if subject else one.name,
        f"{one.seconds * scale:.4g}",
        spread(one),
        f"{row.ratio(one):.2f}",
        f"{min(peers) / one.seconds:.2f}" if peers else "-",
        share(one),
        row.limit,
        f"{one.error:.3g}",
        mebibytes(one.held),
        mebibytes(one.peak),
        f"{row.bytes / one.seconds / 1e9:.1f}",
        f"{row.flops / one.seconds / 1e9:.0f}" if row.flops else "-",
        " / ".join(f"{bandwidth / 1e9:.0f}" for bandwidth in row.bandwidths),
        other_cpu(row.other_cpu),
        row.verdict if subject else "",
    ]


def spread(result: Result) -> str:
    """Half of the distance between the quartiles, in percent of the median."""
    return f"±{(result.high - result.low) / 2 / result.seconds:.0%}"


def share(result: Result) -> str:
    return "-" if result.share is None else f"{result.share:.2f}"


def mebibytes(count: int | None) -> str:
    return "?" if count is None else f"{count / 2**20:.0f}"


def other_cpu(share: float | None) -> str:
    if share is None:
        return "?"
    return f"{share:.0%}" + (" (!)" if share > OTHER_CPU_LIMIT else "")


def _unit(seconds: float) -> tuple[str, float]:
    return ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))
