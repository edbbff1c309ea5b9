"""What a test runs on: a backend, and for the cpu backend one ISA level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

import polymoe
from polymoe.backends._extension import extension, missing_reason
from polymoe.hal.problem import Backend, Problem
from polymoe.hal.registry import find
from polymoe.hal.select import declined


@dataclass(frozen=True)
class Target:
    """backend: its name, for the ops' argument `backend`. level: an ISA level of the cpu backend, or None."""

    backend: str
    level: str | None = None

    def __str__(self) -> str:
        return self.backend if self.level is None else f"{self.backend}-{self.level}"

    @property
    def properties(self) -> Backend:
        backend = find(self.backend)
        if backend is None:
            raise ValueError(f"polymoe.testing: backend: expected one of {polymoe.backends()}, got {self.backend!r}")
        return backend

    @property
    def device(self) -> str:
        """Where the inputs live: the CPU if the backend serves it, else its first device type."""
        types = self.properties.device_types
        return "cpu" if "cpu" in types or "*" in types else types[0]

    @property
    def unavailable(self) -> str | None:
        """Why this machine cannot run this target, or None."""
        if self.level is not None:
            if extension is None:
                return missing_reason
            if self.level not in extension.isa_supported():
                return f"this CPU lacks {', '.join(extension.isa_missing(self.level))} of level {self.level}"
        elif self.device != "cpu" and not torch.get_device_module(self.device).is_available():
            return f"this machine has no {self.device} device"
        return None

    def declines(self, op: str, dtype: torch.dtype, options: tuple[str, ...] = ()) -> str | None:
        """Why the backend does not serve such calls, or None."""
        return declined(self.properties, Problem(op, self.device, dtype, options))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the cpu backend runs at the target's level."""
        if self.level is None:
            yield
        else:
            with polymoe.force_isa_level(self.level):
                yield


def targets(backends: Sequence[str]) -> list[Target]:
    """Every target of these backends; the cpu backend has one for each ISA level, also those this machine lacks."""
    found: list[Target] = []
    for name in backends:
        if name == "cpu" and extension is not None:
            found += [Target(name, level) for level in extension.isa_levels()]
        else:
            found.append(Target(name))
    return found
