"""Two runs side by side. Times of different runs say little where memory bounds them, so shares of the bound and
speed-ups over the baseline are compared, which were taken in the same rounds."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from benchmarks._report import Result, Row, markdown

Key = tuple[str, ...]


def load(path: Path) -> list[Row]:
    """The rows of a file; of a case that is there twice, the last."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise SystemExit(f"benchmarks: {path}: {error.strerror}") from None
    return list({key_of(row): row for row in map(Row.from_json, lines)}.values())


def key_of(row: Row) -> Key:
    return (row.part, row.op, *map(str, row.labels.values()), row.isa, str(row.threads))


def main(given: argparse.Namespace) -> int:
    """Prints the table. Exit status 1 if polymoe lost more than the tolerance anywhere."""
    text, lost = compare(load(given.before), load(given.after), given.tolerance)
    print(text)
    return int(lost > 0)


def compare(before: Iterable[Row], after: Iterable[Row], tolerance: float) -> tuple[str, int]:
    """A Markdown table of the cases and contenders of polymoe in both, and how many lost more than the tolerance: of
    the share of the bound absolutely, or where there is none, of the speed-up relatively."""
    former, lines, lost = {key_of(row): row for row in before}, [], 0
    for row in after:
        if key_of(row) not in former:
            continue
        old_row = former[key_of(row)]
        olds = {result.name: result for result in old_row.results}
        for new in row.results:
            if new.peer or new.name not in olds:
                continue
            old = olds[new.name]
            worse = _loss(old_row, old, row, new) > tolerance
            lost += worse
            line = [f"{row.op}: {row.case}", new.name, _pair(old.share, new.share)]
            line += [_pair(old_row.ratio(old), row.ratio(new)), f"{old.error:.3g} -> {new.error:.3g}"]
            lines.append([*line, "LOST" if worse else ""])
    header = ["case", "contender", "share of the bound", "speed-up over baseline", "error", ""]
    return f"{markdown(header, lines)}\n\n{len(lines)} compared, {lost} lost more than {tolerance:g}.", lost


def _loss(old_row: Row, old: Result, new_row: Row, new: Result) -> float:
    if old.share is not None and new.share is not None:
        return old.share - new.share
    return 1 - new_row.ratio(new) / old_row.ratio(old)


def _pair(old: float | None, new: float | None) -> str:
    return " -> ".join("-" if value is None else f"{value:.2f}" for value in (old, new))
