"""How fast memory can be read, by what kind of loads and from what pages: the best vector loads of all variants of the
bandwidth probe, loads of matrix tiles as the AMX kernel for 16 rows reads packed bf16 weights, and these with its
products; from pages of 2 MiB and of 4 KiB.

    python -m benchmarks.bench_streams [--threads 2] [--rounds 15]

All take turns. Prints the median of each and of its quotient, round by round, by vector loads from pages of 2 MiB and
by vector loads from the same pages.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial

import torch

from benchmarks._report import markdown
from benchmarks.probes import BandwidthProbe

Way = tuple[str, bool]  # of reading: loads, and whether pages have 2 MiB
VECTORS, TILES, PRODUCTS = "vectors", "tiles", "tiles and products"


def ways(probe: BandwidthProbe) -> dict[Way, Callable[[], float | None]]:
    """Those that this CPU has, vectors first."""
    found: dict[Way, Callable[[], float | None]] = {}
    for huge in (True, False):
        variant, _ = probe.best(huge)
        found[VECTORS, huge] = partial(probe.read, variant)
    for name, multiply in ((TILES, False), (PRODUCTS, True)):
        for huge in (True, False):
            found[name, huge] = partial(probe.read_tiles, huge, multiply)
    return {way: call for way, call in found.items() if call() is not None}


def measure(probe: BandwidthProbe, rounds: int) -> dict[Way, list[float]]:
    """Bytes per second in every round."""
    calls = ways(probe)
    rates: dict[Way, list[float]] = {way: [] for way in calls}
    for _ in range(rounds):
        for way, call in calls.items():
            rates[way].append(call() or 0.0)
    return rates


def over(rates: dict[Way, list[float]], way: Way, base: Way) -> str:
    return f"{statistics.median(a / b for a, b in zip(rates[way], rates[base], strict=True)):.2f}"


def table(rates: dict[Way, list[float]]) -> list[list[str]]:
    return [
        [
            name,
            "2 MiB" if huge else "4 KiB",
            f"{statistics.median(values) / 1e9:.1f}",
            over(rates, (name, huge), (VECTORS, True)),
            over(rates, (name, huge), (VECTORS, huge)),
        ]
        for (name, huge), values in rates.items()
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_streams", allow_abbrev=False)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--probe-mib", type=int, default=1024, help="to read, of each kind of pages")
    given = parser.parse_args(arguments)
    with closing(BandwidthProbe(given.probe_mib, given.threads)) as probe:
        rates = measure(probe, given.rounds)
    print(markdown(["loads", "pages", "GB/s", "x vectors, 2 MiB", "x vectors, same pages"], table(rates)))
    if (TILES, True) not in rates:
        print("Absent: tiles: this CPU has no AMX.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
