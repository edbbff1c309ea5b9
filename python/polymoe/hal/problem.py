"""What a backend is asked to serve, and what a backend is."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch


class Problem(NamedTuple):
    """One call as far as the choice of a backend may depend on it: everything here is cheap to hash and none of it is a
    size, so that a decision holds for every batch."""

    op: str
    device_type: str
    dtype: torch.dtype
    options: tuple[str, ...]

    @property
    def option(self) -> dict[str, str]:
        """The options by the names of their arguments."""
        return dict(zip(spec_of(self.op).options, self.options, strict=True))


@runtime_checkable
class Backend(Protocol):
    """A set of kernels. Structural: a backend need not inherit from anything.

    name           how users select it
    device_types   torch device types it serves, for example ("npu",); "*" is every type
    deterministic, batch_invariant
                   properties it promises for all that it serves (the conformance kit tests what is promised)

    A method notes(op, problem, arguments) -> list[str] is optional: remarks on the path of a call, for explain().
    """

    name: str
    device_types: tuple[str, ...]
    deterministic: bool
    batch_invariant: bool

    def supports(self, op: str, problem: Problem) -> str | None:
        """None if the backend serves `problem`, else the reason why it does not, as the end of a sentence. The answer
        is remembered, so it must be the same every time."""

    def implementation(self, op: str) -> Callable[..., Any]:
        """The function that computes `op`, called anew for every call of it: the schema's arguments without `backend`
        and with its defaults, the schema's results. Arguments are checked before; results must not alias them."""


@dataclass(frozen=True)
class OpSpec:
    """What the hardware abstraction layer knows of an op. `subject` is the tensor argument whose device and dtype the
    choice of a backend depends on; `options` are the string arguments that it may depend on, with their defaults."""

    name: str
    subject: str
    options: Mapping[str, str]
    wrapper: Callable[..., Any]

    def problem(self, device_type: str, dtype: torch.dtype) -> Problem:
        """The problem of a call with the default options."""
        return Problem(self.name, device_type, dtype, tuple(self.options.values()))


OPS: dict[str, OpSpec] = {}  # what users call
GRADIENT_OPS: dict[str, OpSpec] = {}  # of gradients alone; the reference serves what a backend leaves out
COMPOSED_OPS: dict[str, OpSpec] = {}  # made of others on the backend of the call; no backend has kernels for them
FORMAT_OPS: dict[str, OpSpec] = {}  # of polymoe.formats, whose plain PyTorch serves what a backend leaves out
_SPECS = ChainMap(OPS, GRADIENT_OPS, FORMAT_OPS)


def spec_of(op: str) -> OpSpec:
    return _SPECS[op]
