"""How much memory is resident, and what a call takes at its peak."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    try:
        return _status("VmRSS")
    except (OSError, KeyError):
        return 0


def peak_memory(call: Callable[[int], object]) -> int | None:
    """Bytes that a call needs beyond what was resident before it, at its peak, its result included; None where the
    system does not say. Memory that the C library holds free is handed back first, so that it counts when taken."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
        before = _status("VmRSS")
        call(0)
        return max(0, _status("VmHWM") - before)
    except (AttributeError, OSError, KeyError):
        return None


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int({key: value for key, _, value in (line.partition(":") for line in lines)}[field].split()[0]) * 1024
