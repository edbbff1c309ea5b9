"""The choice of a backend: explicit argument > use_backend > environment variable > the best that serves the problem.

It happens once, in the Python wrapper of an op, and travels into the op as a schema argument.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from polymoe.hal import registry
from polymoe.hal.problem import OPS, Backend, Problem, spec_of

ENVIRONMENT_VARIABLE = "POLYMOE_BACKEND"
_environment: str | None = os.environ.get(ENVIRONMENT_VARIABLE) or None


class _Scope(threading.local):
    """The innermost use_backend of this thread. The attribute is set here and not in the class body, because
    torch.compile guards on the instance."""

    def __init__(self) -> None:
        self.name: str | None = None


_scope = _Scope()
_decisions: dict[tuple[str, str, torch.dtype, tuple[str, ...], str | None], str] = {}
registry.on_change(_decisions.clear)


class use_backend:
    """Context manager: inside it, ops of this thread use the backend `name` unless one is given explicitly.

    Works inside and around code under torch.compile(fullgraph=True): the choice is a constant of the compiled graph,
    and a call under another choice compiles anew. `use_backend(None)` restores the automatic choice.
    """

    def __init__(self, name: str | None) -> None:
        if name == "":
            raise ValueError('polymoe.use_backend: name: expected the name of a backend or None, got ""')
        self.name = name
        self.outer: list[str | None] = []

    def __enter__(self) -> None:
        self.outer.append(_scope.name)
        _scope.name = self.name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _scope.name = self.outer.pop()


def declined(backend: Backend, problem: Problem) -> str | None:
    """Why `backend` does not serve `problem`; None if it does."""
    if "*" not in backend.device_types and problem.device_type not in backend.device_types:
        return f"it serves {', '.join(backend.device_types)} tensors, not {problem.device_type}"
    try:
        reason = backend.supports(problem.op, problem)
    except Exception as error:  # a stranger's fault must not break calls that others serve
        return f"its supports() failed: {type(error).__name__}: {error}"
    if reason is None or (isinstance(reason, str) and reason):
        return reason
    return f"its supports() returned {reason!r}, neither None nor a reason"


def _in_turn(problem: Problem) -> Iterator[str]:
    return (backend.name for backend in registry.by_preference() if declined(backend, problem) is None)


def serving(problem: Problem) -> list[str]:
    """The names of all backends that serve `problem`, the best first; the reference is always among them."""
    return list(_in_turn(problem))


def decide(problem: Problem, requested: str | None) -> str:
    """The name of the backend for `problem`, uncached. Raises ValueError if `requested` does not exist or declines."""
    if requested is not None:
        backend = registry.find(requested)
        if backend is None:
            raise ValueError(
                f"polymoe.{problem.op}: backend: expected one of {', '.join(registry.backends())}, got {requested!r}"
            )
        reason = declined(backend, problem)
        if reason is not None:
            raise ValueError(
                f"polymoe.{problem.op}: backend: expected one that serves this call, got {requested!r}: {reason}"
            )
        return requested
    return next(_in_turn(problem))  # others are not even asked


@torch._dynamo.assume_constant_result
def _decide_in_graph(
    op: str, device_type: str, dtype: torch.dtype, options: tuple[str, ...], requested: str | None
) -> str:
    return decide(Problem(op, device_type, dtype, options), requested)


def choose(op: str, device_type: str, dtype: torch.dtype, options: tuple[str, ...], requested: str | None) -> str:
    """`decide`, remembered."""
    key = (op, device_type, dtype, options, requested)
    chosen = _decisions.get(key)
    if chosen is None:
        chosen = _decisions[key] = decide(Problem(op, device_type, dtype, options), requested)
    return chosen


def kernel_of(op: str, subject: Tensor, options: tuple[str, ...], like: str) -> Callable[..., Any] | None:
    """For one of FORMAT_OPS: the kernel of the backend that is asked for or else serves the op `like` on this device;
    None if it has none."""
    name = requested_by(None)[0] or choose(*OPS[like].problem(subject.device.type, subject.dtype), None)
    backend = registry.find(name)
    if backend is None or declined(backend, Problem(op, subject.device.type, subject.dtype, options)) is not None:
        return None
    return backend.implementation(op)


def requested_by(backend: str | None) -> tuple[str | None, str]:
    """The backend asked for, if any, and in words what decides: `select` spells out the same order, for speed."""
    if backend is not None:
        return backend, "explicit argument"
    if _scope.name is not None:
        return _scope.name, "use_backend"
    if _environment is not None:
        return _environment, f"environment variable {ENVIRONMENT_VARIABLE}"
    return None, "the best that serves this call"


def select(op: str, subject: Tensor, options: tuple[str, ...], backend: str | None) -> str:
    """The name of the backend for a call of `op` with the leading tensor `subject` and the argument `backend`."""
    requested = backend if backend is not None else _scope.name or _environment
    if torch.compiler.is_compiling():
        return _decide_in_graph(op, subject.device.type, subject.dtype, options, requested)
    try:
        device_type = "cpu" if subject.is_cpu else subject.device.type  # the latter takes five times as long
    except AttributeError:
        name = spec_of(op).subject
        raise ValueError(f"polymoe.{op}: {name}: expected a tensor, got {type(subject).__name__}") from None
    return choose(op, device_type, subject.dtype, options, requested)
