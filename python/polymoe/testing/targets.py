"""What a test runs on: a backend, a device, and for the cpu backend one ISA level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

import polymoe
from polymoe.backends._extension import extension, missing_reason
from polymoe.hal.problem import OPS, Backend, Problem
from polymoe.hal.registry import BrokenBackend, find
from polymoe.hal.select import declined, serving


@dataclass(frozen=True)
class Target:
    """backend: its name, for the ops' argument `backend`. level: an ISA level of the cpu backend, or None. device_type:
    where the inputs live, or None for the CPU if the backend serves it, else for its first device type."""

    backend: str
    level: str | None = None
    device_type: str | None = None

    def __str__(self) -> str:
        return "-".join(part for part in (self.backend, self.level, self.device_type) if part is not None)

    @property
    def properties(self) -> Backend:
        backend = find(self.backend)
        if backend is None:
            raise ValueError(f"polymoe.testing: backend: expected one of {polymoe.backends()}, got {self.backend!r}")
        if isinstance(backend, BrokenBackend):
            raise ValueError(f"polymoe.testing: backend {self.backend}: {backend.reason}")
        return backend

    @property
    def device(self) -> str:
        """The device type of the inputs."""
        if self.device_type is not None:
            return self.device_type
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
        elif self.device != "cpu" and not _has_device(self.device):
            return f"this machine has no {self.device} device that torch knows"
        return None

    def declines(self, op: str, dtype: torch.dtype, options: tuple[str, ...] = ()) -> str | None:
        """Why the backend does not serve such calls, or None. Options that are left out have their defaults."""
        options += tuple(OPS[op].options.values())[len(options) :]
        return declined(self.properties, Problem(op, self.device, dtype, options))

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the cpu backend runs at the target's level."""
        if self.level is None:
            yield
        else:
            with polymoe.force_isa_level(self.level):
                yield


def _has_device(device_type: str) -> bool:
    try:
        return bool(torch.get_device_module(device_type).is_available())
    except RuntimeError:  # torch does not know the name before the package that brings it is imported
        return False


def servers(op: str, dtype: torch.dtype = torch.float32, **options: str) -> list[str]:
    """The backends that serve such calls for CPU tensors here, the best first. Options left out have their defaults."""
    return serving(Problem(op, "cpu", dtype, tuple({**OPS[op].options, **options}.values())))


def targets(backends: Sequence[str], device_type: str | None = None) -> list[Target]:
    """Every target of these backends; the cpu backend has one for each ISA level, also those this machine lacks."""
    found: list[Target] = []
    for name in backends:
        if name == "cpu" and extension is not None:
            found += [Target(name, level) for level in extension.isa_levels()]
        else:
            found.append(Target(name, device_type=device_type))
    return found
