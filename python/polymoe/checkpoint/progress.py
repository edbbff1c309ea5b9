"""A progress bar on the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

_WIDTH = 30  # characters
_INTERVAL = 0.1  # seconds between two pictures


def bar(items: Iterable[Item], total: int, what: str, show: bool | None = None) -> Iterator[Item]:
    """The items, with a bar on stderr of how many of `total` have been taken.

    show: None for "where stderr is a terminal".
    """
    if show is None:
        show = sys.stderr.isatty()
    started, drawn = time.monotonic(), 0.0
    for count, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if show and (now - drawn > _INTERVAL or count == total):
            drawn = now
            filled = _WIDTH * count // max(total, 1)
            seconds = (now - started) / count * (total - count)
            print(f"\r{what} [{'#' * filled:{_WIDTH}}] {count}/{total}, {seconds:.0f} s left ", end="", file=sys.stderr)
    if show:
        print(file=sys.stderr, flush=True)
