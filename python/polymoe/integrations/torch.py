"""torch.nn.functional.grouped_mm on the CPU, computed by polymoe.

While `enable()` holds, `aten::_grouped_mm` is served for CPU tensors by polymoe's kernel, so that code which calls
torch's grouped_mm, its backward included, runs faster as it stands:

    import polymoe.integrations.torch
    with polymoe.integrations.torch.grouped_mm():  # or enable() ... disable()
        model(x).sum().backward()

The kernel takes exactly the calls that torch's takes, and lays the results out as torch's does: rows padded to 16
bytes. Rows and columns that belong to no group are zero, where torch leaves them undefined. Whatever torch refuses,
and group ends that torch would clamp, go to torch's own kernel. The kernel is the cpu backend's whatever
`polymoe.use_backend` says. It is in place for the whole process: for all threads, and for compiled code, which calls
whatever is in place when it runs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from polymoe.backends._extension import extension, missing_reason

__all__ = ["Calls", "calls", "disable", "enable", "enabled", "grouped_mm"]


class Calls(NamedTuple):
    """Calls of aten::_grouped_mm that came to polymoe in this process: those it served, and those it passed on."""

    served: int
    passed_on: int


_lock = threading.Lock()
_holds = 0


def _serve(on: bool) -> None:
    assert extension is not None
    extension.serve_aten_grouped_mm(on)
    # Torch remembers, for tracing, which key of an op has a kernel.
    torch.ops.aten._grouped_mm.default._dispatch_cache.clear()


def enable() -> None:
    """Let polymoe serve `aten::_grouped_mm` on the CPU until each `enable()` has met its `disable()`.

    Raises:
        RuntimeError: the C++ extension is missing.
    """
    global _holds
    if extension is None:
        raise RuntimeError(
            f"polymoe.integrations.torch: expected the cpu backend, which is unavailable: {missing_reason}"
        )
    with _lock:
        if _holds == 0:
            _serve(True)
        _holds += 1


def disable() -> None:
    """Take one `enable()` back. After the last one, torch's own kernel serves again as if nothing had been.

    Raises:
        RuntimeError: there is no `enable()` left to take back.
    """
    global _holds
    with _lock:
        if _holds == 0:
            raise RuntimeError("polymoe.integrations.torch: disable: expected an enable() before, got none")
        _holds -= 1
        if _holds == 0:
            _serve(False)


def enabled() -> bool:
    """True while polymoe serves."""
    return _holds > 0


@contextmanager
def grouped_mm() -> Iterator[None]:
    """Context manager: `enable()` at its start, `disable()` at its end, whatever happens inside."""
    enable()
    try:
        yield
    finally:
        disable()


def calls() -> Calls:
    """How many calls polymoe has served and passed on so far: shows whether code runs through it."""
    return Calls(0, 0) if extension is None else Calls(*extension.aten_grouped_mm_calls())
