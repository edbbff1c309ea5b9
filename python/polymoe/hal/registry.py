"""The backends known to this process: the built-in ones, and others from the entry point group "polymoe.backends"."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from polymoe.backends.cpu import CpuBackend
from polymoe.backends.reference import ReferenceBackend
from polymoe.backends.triton import TritonBackend
from polymoe.hal.problem import Backend, Problem

ENTRY_POINT_GROUP = "polymoe.backends"

# In order of preference where several serve a device; the reference, which serves everything, comes after the backends
# registered from outside.
_native: tuple[Backend, ...] = (CpuBackend(), TritonBackend())
_reference: Backend = ReferenceBackend()
_outside: dict[str, Backend] = {}
_entry_points_loaded = False
_loading = threading.RLock()
_on_change: list[Callable[[], None]] = []


class BrokenBackend:
    """Stands in for an entry point that could not be loaded, so that its error shows wherever backends are listed."""

    device_types: tuple[str, ...] = ("*",)
    deterministic = False
    batch_invariant = False

    def __init__(self, name: str, error: Exception) -> None:
        self.name = name
        self.reason = f"its entry point failed to load: {type(error).__name__}: {error}"

    def supports(self, op: str, problem: Problem) -> str | None:
        return self.reason

    def implementation(self, op: str) -> Callable[..., Any]:
        raise RuntimeError(f"polymoe: backend {self.name}: {self.reason}")


def on_change(callback: Callable[[], None]) -> None:
    """Calls `callback` whenever the set of backends changes (cached decisions are then void)."""
    _on_change.append(callback)


def register_backend(backend: Backend) -> None:
    """Adds a backend to this process. Packages do the same for every process with an entry point in the group
    "polymoe.backends" that names a Backend object, or a function or class that returns one when called.

    Raises ValueError if the object is no Backend or its name is taken.
    """
    if not isinstance(backend, Backend) or isinstance(backend, type):
        raise ValueError(f"polymoe.register_backend: backend: expected {_described()}, got {backend!r}")
    if not isinstance(backend.name, str) or not backend.name:
        raise ValueError(f"polymoe.register_backend: backend.name: expected a name, got {backend.name!r}")
    types: object = backend.device_types
    if not isinstance(types, tuple) or not all(isinstance(device_type, str) for device_type in types):
        raise ValueError(f"polymoe.register_backend: backend.device_types: expected a tuple of names, got {types!r}")
    if backend.name in {known.name for known in (*_native, _reference, *_outside.values())}:
        raise ValueError(f"polymoe.register_backend: backend: expected a new name, got {backend.name!r}")
    _outside[backend.name] = backend
    for callback in _on_change:
        callback()


def _described() -> str:
    members = sorted(Backend.__annotations__) + [name for name in vars(Backend) if not name.startswith("_")]
    return f"a polymoe.hal Backend, an object with {', '.join(members)}"


def unregister_backend(name: str) -> None:
    """Removes a backend that register_backend added. Raises ValueError for any other name."""
    if name not in _outside:
        raise ValueError(f"polymoe.unregister_backend: name: expected a registered backend, got {name!r}")
    del _outside[name]
    for callback in _on_change:
        callback()


def _load_entry_points() -> None:
    global _entry_points_loaded
    with _loading:  # other threads wait; a backend that asks for the list while it loads does not
        if not _entry_points_loaded:
            _entry_points_loaded = True
            for entry in entry_points(group=ENTRY_POINT_GROUP):
                _load_entry_point(entry)


def _load_entry_point(entry: EntryPoint) -> None:
    try:
        loaded = entry.load()
        register_backend(loaded() if callable(loaded) else loaded)
    except Exception as error:  # whatever a stranger's package raises must not break the process, nor be hidden
        broken = BrokenBackend(entry.name, error)
        warnings.warn(f"polymoe: backend {broken.name}: {broken.reason}", stacklevel=4)
        if find(broken.name) is None:
            register_backend(broken)


def by_preference() -> Iterator[Backend]:
    """Every backend, in order of preference; entry points are loaded when the built-in ones are through."""
    yield from _native
    _load_entry_points()
    yield from tuple(_outside.values())
    yield _reference


def all_backends() -> tuple[Backend, ...]:
    """Every backend, in order of preference."""
    return tuple(by_preference())


def backends() -> list[str]:
    """The names of all backends known to this process, in order of preference."""
    return [backend.name for backend in all_backends()]


def find(name: str) -> Backend | None:
    """The backend of that name; entry points are loaded only for a name that is not built in."""
    for backend in (*_native, _reference):
        if backend.name == name:
            return backend
    _load_entry_points()
    return _outside.get(name)


def get(name: str) -> Backend:
    """The backend of a name that selection has returned."""
    backend = find(name)
    assert backend is not None
    return backend
