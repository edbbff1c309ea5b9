"""Where the memory of large results comes from."""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """From here on the process keeps what it frees, so that every contender allocates anew from pages it had before.

    By default glibc returns each large block to the system when it is freed. The next one then costs page faults, and
    in a virtual machine whose host takes free pages back they cost from 0.1 to 1.8 seconds for the same 800 MiB: more
    than what is measured, and a matter of who freed what before. Does nothing where there is no glibc.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
