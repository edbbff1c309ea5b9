"""What a run says on stderr while it lasts."""

from __future__ import annotations

import sys
from time import perf_counter

START = perf_counter()
WIDTH = 20


def say(message: str) -> None:
    print(f"[{perf_counter() - START:6.1f} s] {message}", file=sys.stderr, flush=True)


class Progress:
    """A line for every case: a bar, what is left at this pace, and what came out."""

    def __init__(self, total: int, done: int = 0) -> None:
        """`done` of the total were there before."""
        self._total, self._done, self._before, self._start = total, done, done, perf_counter()

    def step(self, message: str) -> None:
        self._done += 1
        left = (perf_counter() - self._start) / (self._done - self._before) * max(0, self._total - self._done)
        bar = ("#" * round(WIDTH * self._done / max(1, self._total))).ljust(WIDTH, ".")[:WIDTH]
        say(f"[{bar}] {self._done}/{self._total}, {left:.0f} s left: {message}")
