"""What a contender for `experts` is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

from torch import Tensor

from benchmarks.layer import InputSet, Layer
from benchmarks.models import Shape


@dataclass(frozen=True)
class Problem:
    """What is to be computed. `best_level`: whether `level` is all that this machine can do; libraries whose
    instruction set cannot be limited take part only then."""

    shape: Shape
    dtype: str
    level: str
    best_level: bool
    device: str = "cpu"


@dataclass(frozen=True)
class Prepared:
    """A contender that holds its weights. `run` is what is timed; `convert` brings an input set, once and untimed, to
    the dtypes that the library asks for. Whatever else must live as long is bound to `run`."""

    run: Callable[[InputSet], Tensor]
    convert: Callable[[InputSet], InputSet] = lambda inputs: inputs


class Plugin(ABC):
    """A way to compute the experts.

    name      in tables and on the command line
    peer      not polymoe
    isolated  runs in a process of its own, stopped while it is not its turn: for libraries whose threads spin
    copies    copies of the weights that `prepare` makes, for the estimate of memory
    devices   types of devices that it runs on
    reads     see Contender
    """

    name: str
    peer: ClassVar[bool] = True
    isolated: ClassVar[bool] = False
    copies: ClassVar[int] = 0
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    reads: ClassVar[bool] = False

    @abstractmethod
    def declined(self, problem: Problem) -> str | None:
        """Why this contender cannot run that; None if it can."""

    @abstractmethod
    def prepare(self, layer: Layer) -> Prepared:
        """Takes over a layer. The weights belong to all contenders: one that changes them takes a copy."""


def not_installed(module: str) -> str | None:
    return None if find_spec(module) else f"{module} is not installed (make peers installs what PyPI has)"


def only(what: str, value: object, accepted: tuple[object, ...]) -> str | None:
    """A reason if a value is none of those."""
    return None if value in accepted else f"no {what} {value}"


def limited(problem: Problem) -> str | None:
    return None if problem.best_level else f"cannot be limited to {problem.level}"
