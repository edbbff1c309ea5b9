"""Checks of a backend's answers: those that polymoe relies on before any kernel runs."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator

import torch

from polymoe.hal.problem import OPS, OpSpec, Problem
from polymoe.ops.activate import KINDS
from polymoe.ops.experts import WEIGHT_FORMATS, WEIGHT_PLACEMENTS
from polymoe.ops.gate import SCORINGS
from polymoe.ops.grouped_mm import WEIGHT_FORMATS as MATMUL_FORMATS
from polymoe.testing.cases import FLOATS
from polymoe.testing.targets import Target

# (op, option): its values
OPTIONS: dict[tuple[str, str], tuple[str, ...]] = {
    ("gate", "scoring"): SCORINGS,
    ("grouped_mm", "weight_format"): MATMUL_FORMATS,
    ("activate", "kind"): tuple(KINDS),
    ("experts", "activation"): tuple(KINDS),
    ("experts", "weight_placement"): WEIGHT_PLACEMENTS,
    ("experts", "weight_format"): WEIGHT_FORMATS,
}


# Arguments that come with other values than the default of an option only.
COMPANIONS = {
    ("grouped_mm", "weight_format"): ("scale", "zero"),
    ("experts", "weight_format"): ("gate_up_scale", "down_scale", "gate_up_zero", "down_zero"),
}


def problems(op: OpSpec, device_type: str) -> Iterator[Problem]:
    """Everything about a call of `op` that the choice of a backend may depend on."""
    dtypes = (torch.int32, torch.int64) if op.subject == "ids" else FLOATS
    values = [OPTIONS.get((op.name, name), (default,)) for name, default in op.options.items()]
    for dtype, options in itertools.product(dtypes, itertools.product(*values)):
        yield Problem(op.name, device_type, dtype, options)


def check(target: Target) -> None:
    backend = target.properties
    for promise in ("deterministic", "batch_invariant"):
        value = getattr(backend, promise)
        assert isinstance(value, bool), f"{promise}: expected True or False, got {value!r}"
    served = 0
    for op in OPS.values():
        used = dict[str, set[str]]()  # values of the options that are served
        for problem in problems(op, target.device):
            answer = backend.supports(op.name, problem)
            assert answer is None or (isinstance(answer, str) and answer), (
                f"supports({op.name!r}, {problem}): expected None or a reason, got {answer!r}"
            )
            assert backend.supports(op.name, problem) == answer, f"supports({op.name!r}, {problem}) changes its answer"
            if answer is None:
                for name, value in {"": "", **problem.option}.items():
                    used.setdefault(name, set()).add(value)
        if used:
            served += 1
            unused = {name for name in op.options if used[name] == {op.options[name]}}
            companions = {argument for name in unused for argument in COMPANIONS.get((op.name, name), ())}
            _check_signature(target, op, unused | companions)
    assert served, f"{target} serves no op on {target.device}; {op.name}: {answer}"


def _check_signature(target: Target, op: OpSpec, unused: set[str]) -> None:
    """The dispatcher drops trailing arguments that equal the schema's defaults, so an implementation needs the same. It
    may lack arguments at the end of which it serves only the default (`unused`): those of later versions of polymoe."""
    implementation = target.properties.implementation(op.name)
    try:
        parameters = list(inspect.signature(implementation).parameters.values())
    except ValueError:
        return  # a compiled function that does not tell
    what = f"implementation({op.name!r})"
    arguments = [a for a in getattr(torch.ops.polymoe, op.name).default._schema.arguments if a.name != "backend"]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not any(p.kind == p.VAR_POSITIONAL for p in parameters):
        lacking = [a.name for a in arguments[len(positional) :] if a.name not in unused]
        assert not lacking, f"{what}: lacks the arguments {', '.join(lacking)}"
    for argument, parameter in zip(arguments, positional, strict=False):
        default = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        assert parameter.default == default, (
            f"{what}: {argument.name}: expected the default {default!r}, got {parameter.default!r}"
        )
    extra = [p.name for p in positional[len(arguments) :] if p.default is p.empty]
    assert not extra, f"{what}: requires {', '.join(extra)}, which {op.name} does not have"
