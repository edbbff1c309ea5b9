"""What the command line says about a run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks._timing import FULL, QUICK, Effort
from benchmarks.inputs import DTYPES
from benchmarks.models import ALIASES, MODELS, SHAPES, SWEEP, Shape, shape_of
from polymoe.backends._extension import extension
from polymoe.hal import device, registry

DEVICES = ("cpu", "cuda", "xpu")
NO_LEVEL = "-"  # of a process without polymoe's C++ extension


@dataclass(frozen=True)
class Options:
    """A generator of cases finds in `levels` and `threads` the one that it runs at; on a device other than the CPU the
    level is the name of its compile target."""

    shapes: tuple[Shape, ...]
    tokens: tuple[int, ...]
    dtypes: tuple[str, ...]
    levels: tuple[str, ...]
    threads: tuple[int, ...]
    backends: tuple[str, ...]
    contenders: tuple[str, ...]
    experts: int | None
    seed: int
    seconds: float | None
    probe_mib: int
    quick: bool
    device: str = "cpu"

    @property
    def effort(self) -> Effort:
        effort = QUICK if self.quick else FULL
        return effort if self.seconds is None else replace(effort, seconds=self.seconds)

    @property
    def attempts(self) -> int:
        """Runs of a case that others disturb, or that beats its bound, before it is marked as such."""
        return 1 if self.quick else 3

    def arguments(self) -> list[str]:
        """The command line that says the same."""
        lists: dict[str, Sequence[object]] = {
            "--shapes": [shape.name for shape in self.shapes],
            "--tokens": self.tokens,
            "--dtype": self.dtypes,
            "--isa": self.levels,
            "--threads": self.threads,
            "--backend": self.backends,
            "--contenders": self.contenders,
        }
        values = {"--experts": self.experts, "--seconds": self.seconds, "--seed": self.seed}
        lists |= {name: [value] for name, value in values.items() if value is not None}
        words = [word for name, values in lists.items() if values for word in (name, *map(str, values))]
        words += ["--device", self.device, "--probe-mib", str(self.probe_mib)]
        return [*words, *(["--quick"] if self.quick else [])]


def add_shapes(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(SHAPES)
    add = parser.add_argument
    add("--shapes", "--shape", nargs="+", metavar="NAME", help=f"all, or some of {names}; w1, w2, w3 for the first")
    add("--experts", type=int, metavar="E", help="hold so many experts, in place of the number in the shape")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shapes(parser)
    add = parser.add_argument
    add("--tokens", nargs="+", metavar="T", help="numbers of tokens, or sweep for 1, 2, 3, 4, 6 ... 8192")
    add("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    add("--isa", nargs="+", choices=supported_levels(), help="ISA levels; default: avx2 and the best")
    add("--threads", nargs="+", type=int, metavar="N")
    add("--contenders", nargs="+", default=[], metavar="NAME", help="of the op experts; `list` lists them")
    add("--backend", nargs="+", choices=registry.backends(), default=[], help="of polymoe")
    add("--device", choices=DEVICES, default="cpu", help="cuda is also AMD's")
    add("--seed", type=int, default=0)
    add("--seconds", type=float, help="of rounds for each case")
    add("--probe-mib", type=int, metavar="MIB", help="that the bandwidth probe reads")
    add("--quick", action="store_true", help="few rounds; the best level, one shape and few tokens by default")


def options(given: argparse.Namespace) -> Options:
    quick = given.quick
    return Options(
        shapes=chosen_shapes(given, MODELS[:1] if quick else MODELS),
        tokens=_tokens(given.tokens or ((1, 16) if quick else (1, 16, 128, 1024))),
        dtypes=tuple(given.dtype),
        levels=tuple(given.isa or default_levels(quick)),
        threads=tuple(given.threads or [torch.get_num_threads()]),
        backends=tuple(given.backend),
        contenders=tuple(given.contenders),
        experts=given.experts,
        seed=given.seed,
        seconds=given.seconds,
        probe_mib=given.probe_mib or (256 if quick else 1024),
        quick=quick,
        device=given.device,
    )


def chosen_shapes(given: argparse.Namespace, default: Sequence[str] = MODELS) -> tuple[Shape, ...]:
    """Those that the arguments of `add_shapes` name."""
    names, experts = given.shapes or default, given.experts
    names = [n for n in SHAPES if n != "tiny"] if list(names) == ["all"] else names
    unknown = [name for name in names if name not in SHAPES and name not in ALIASES]
    if unknown:
        raise SystemExit(f"benchmarks: no shape {', '.join(unknown)}; there are {', '.join([*SHAPES, *ALIASES])}")
    shapes = [shape_of(name) for name in names]
    if experts is None:
        return tuple(shapes)
    small = [shape.name for shape in shapes if experts < shape.K]
    if small:
        raise SystemExit(f"benchmarks: --experts {experts} is less than a token of {', '.join(small)} needs")
    return tuple(replace(shape, E=experts, E_model=max(experts, shape.E_model)) for shape in shapes)


def _tokens(given: Sequence[Any]) -> tuple[int, ...]:
    if list(given) == ["sweep"]:
        return SWEEP
    try:
        return tuple(int(T) for T in given)
    except ValueError:
        raise SystemExit(f"benchmarks: --tokens: expected numbers, or sweep, got {' '.join(given)}") from None


def supported_levels() -> list[str]:
    return [NO_LEVEL] if extension is None else device.isa_supported()


def default_levels(quick: bool = False) -> list[str]:
    supported = supported_levels()
    return [level for level in supported if level == supported[-1] or (level == "avx2" and not quick)]
