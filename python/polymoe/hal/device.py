"""Facts about this machine, and the instruction set (ISA) level of the CPU kernels. Thin over polymoe._C."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from polymoe.backends._extension import extension, missing_reason


def _require(function: str) -> ModuleType:
    if extension is None:
        raise RuntimeError(f"polymoe.{function}: not available: {missing_reason}")
    return extension


def isa_levels() -> list[str]:
    """All ISA levels of the cpu backend, the lowest first. RuntimeError without the C++ extension, as all of these."""
    return list(_require("isa_levels").isa_levels())


def isa_supported() -> list[str]:
    """The levels that this machine can run."""
    return list(_require("isa_supported").isa_supported())


def isa_level() -> str:
    """The level that the cpu kernels use now: the best supported one, unless set_isa_level says otherwise."""
    return str(_require("isa_level").isa_level())


def set_isa_level(name: str | None) -> None:
    """Makes the cpu kernels use the level `name` from now on, in the whole process; None means the best.

    Raises ValueError for an unknown level and for one that this machine cannot run, and then changes nothing.
    """
    _require("set_isa_level").set_isa_level(name or "")


@contextmanager
def force_isa_level(name: str) -> Iterator[None]:
    """Context manager: set_isa_level(name) inside, the former level afterwards. For tests and comparisons; it changes
    the level of the whole process, other threads included."""
    former = isa_level()
    set_isa_level(name)
    try:
        yield
    finally:
        set_isa_level(former)


def levels_above(level: str) -> dict[str, str]:
    """Every level above `level`, and why it is not in use."""
    if extension is None:
        return {}
    levels = isa_levels()
    reasons = {}
    for higher in levels[levels.index(level) + 1 :]:
        missing = extension.isa_missing(higher)
        reasons[higher] = f"this machine lacks {', '.join(missing)}" if missing else f"{level} is forced"
    return reasons


def isa_flags(level: str) -> list[str]:
    """Every CPUID flag that a level uses, and the registers it needs the OS to save."""
    return list(_require("isa_flags").isa_flags(level))


def num_threads() -> int:
    """At most so many threads of torch's intra-op pool run an op called here."""
    return int(_require("num_threads").num_threads())
