"""`explain`: which backend and path a call takes, and why not another."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor, nn

from polymoe.hal import device, registry
from polymoe.hal.problem import OPS, Backend, Problem
from polymoe.hal.select import decide, declined, requested_by


@dataclass(frozen=True)
class Explanation:
    """How one call of an op runs on this machine; str() of it is for reading.

    op, device, dtype     what was asked
    backend, chosen_by    who serves it, and what decided that
    properties            what the backend promises: "deterministic", "batch-invariant"
    isa_level, isa_flags  cpu backend: the level of its kernels, and every CPUID flag this level uses
    threads               cpu backend: at most so many
    notes                 remarks on the path: what costs extra, what is rounded or skipped
    not_chosen            every other backend, and why not
    higher_levels         cpu backend: every higher ISA level, and why not
    """

    op: str
    device: str
    dtype: torch.dtype
    backend: str
    chosen_by: str
    properties: tuple[str, ...]
    isa_level: str | None
    isa_flags: tuple[str, ...]
    threads: int | None
    notes: tuple[str, ...]
    not_chosen: Mapping[str, str]
    higher_levels: Mapping[str, str]

    def __str__(self) -> str:
        promises = ", ".join(self.properties) or "neither deterministic nor batch-invariant"
        lines = [
            f"polymoe.{self.op} on {self.device}, {str(self.dtype).removeprefix('torch.')}",
            f"  backend: {self.backend} ({self.chosen_by}); {promises}",
        ]
        if self.isa_level is not None:
            lines.append(f"  ISA level: {self.isa_level} (uses {', '.join(self.isa_flags) or 'no CPUID flags'})")
        if self.threads is not None:
            lines.append(f"  threads: up to {self.threads}")
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  not {level}: {reason}" for level, reason in self.higher_levels.items()]
        lines += [f"  not {name}: {reason}" for name, reason in self.not_chosen.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class ModuleExplanation:
    """How the parts of a model that polymoe knows run; str() of it is for reading, layers that are alike as one.

    modules  by name, the Explanation of each submodule that polymoe runs
    others   by name, of each that it could run or that decides for it: what runs instead, and why
    """

    modules: Mapping[str, Explanation]
    others: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        layers: dict[str, str] = {}
        for name, found in sorted({**self.modules, **self.others}.items(), key=lambda item: _natural(item[0])):
            layer, _, part = name.rpartition(".")
            if not layer or part.isdigit():
                layer, part = name, ""
            text = f"{part}: {found}" if part else str(found)
            layers[layer] = layers.get(layer, "") + "\n  " + text.replace("\n", "\n  ")
        if not layers:
            return "no module that polymoe runs"
        return "\n".join(f"{names or 'the module itself'}:{text}" for names, text in by_layer(layers))


def by_layer(texts: Mapping[str, str]) -> list[tuple[str, str]]:
    """Joins modules that have the same text and differ in one number: "layers.0.mlp", "layers.1.mlp" are
    "layers.0-1.mlp"."""
    numbers: dict[tuple[str, str, str], list[int]] = {}
    for name, text in texts.items():
        start, number, end = _split_at_last_number(name)
        numbers.setdefault((start, end, text), []).extend([int(number)] if number else [])
    return [(start + _ranges(found) + end, text) for (start, end, text), found in numbers.items()]


def _split_at_last_number(name: str) -> tuple[str, str, str]:
    found = re.fullmatch(r"((?:.*\.)?)(\d+)((?:\..*)?)", name)
    return (found[1], found[2], found[3]) if found else (name, "", "")


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] is "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 behind layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


ModuleHook = Callable[[nn.Module], Explanation | None]
ModelHook = Callable[[nn.Module], Mapping[str, Explanation | str]]
_module_hooks: list[ModuleHook] = []
_model_hooks: list[ModelHook] = []


def register_module_hook(hook: ModuleHook) -> ModuleHook:
    """Teaches `explain` a kind of module: `hook` returns the Explanation of a module it knows, else None.
    Usable as a decorator."""
    _module_hooks.append(hook)
    return hook


def register_model_hook(hook: ModelHook) -> ModelHook:
    """Teaches `explain` what a module's surroundings decide: `hook` gets the whole model and returns, by name, how a
    submodule runs, or what runs in place of polymoe and why. Usable as a decorator."""
    _model_hooks.append(hook)
    return hook


@overload
def explain(target: nn.Module, *args: Any, **kwargs: Any) -> ModuleExplanation: ...
@overload
def explain(target: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation: ...
def explain(target: str | Callable[..., Any] | nn.Module, *args: Any, **kwargs: Any) -> Explanation | ModuleExplanation:
    """Says how a call would run, without running it.

    Args:
        target: an op (polymoe.experts or "experts"), with the arguments of the call; or a module, whose experts are
            explained one by one.
        args, kwargs: as for the op. Those that do not matter may be left out; its leading tensor may not.

    Raises:
        ValueError: the op or an argument is unknown, or a backend asked for by name cannot serve the call.
    """
    if isinstance(target, nn.Module):
        return _explain_module(target)
    op = target if isinstance(target, str) else getattr(target, "__name__", repr(target))
    if op not in OPS or (callable(target) and target is not OPS[op].wrapper):
        raise ValueError(f"polymoe.explain: target: expected a module or one of {', '.join(OPS)}, got {target!r}")
    arguments = _bind(op, args, kwargs)
    subject = arguments[OPS[op].subject]
    options = tuple(str(arguments[option]) for option in OPS[op].options)
    return _explain(Problem(op, subject.device.type, subject.dtype, options), subject, arguments)


def _explain_module(target: nn.Module) -> ModuleExplanation:
    found: dict[str, Explanation | str] = {}
    if any(type(module).__module__.startswith("transformers.") for module in target.modules()):
        # By name, since nothing below the integrations may depend on them; it registers a hook.
        importlib.import_module("polymoe.integrations.explain")
    for hook in _model_hooks:
        found |= hook(target)
    for name, module in target.named_modules():
        for how in (hook(module) for hook in _module_hooks):
            if how is not None:
                found[name] = how
    return ModuleExplanation(
        {name: how for name, how in found.items() if isinstance(how, Explanation)},
        {name: how for name, how in found.items() if isinstance(how, str)},
    )


def _bind(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(OPS[op].wrapper)
    try:
        given = signature.bind_partial(*args, **kwargs).arguments
    except TypeError as error:
        raise ValueError(f"polymoe.explain: expected the arguments of {op}, got others: {error}") from None
    # An argument that is left out is absent, as far as the path goes.
    defaults = {name: None if p.default is p.empty else p.default for name, p in signature.parameters.items()}
    arguments = defaults | given
    if not isinstance(arguments[OPS[op].subject], Tensor):
        raise ValueError(f"polymoe.explain: {OPS[op].subject}: expected a tensor, got {arguments[OPS[op].subject]!r}")
    return arguments


def _explain(problem: Problem, subject: Tensor, arguments: Mapping[str, Any]) -> Explanation:
    requested, by = requested_by(arguments["backend"])
    chosen = registry.get(decide(problem, requested))
    on_cpu_kernels = chosen.name == "cpu"
    level = ("portable" if problem.dtype == torch.float64 else device.isa_level()) if on_cpu_kernels else None
    return Explanation(
        op=problem.op,
        device=str(subject.device),
        dtype=problem.dtype,
        backend=chosen.name,
        chosen_by=by,
        properties=properties(chosen),
        isa_level=level,
        isa_flags=tuple(device.isa_flags(level)) if level else (),
        threads=device.num_threads() if on_cpu_kernels else None,
        notes=_notes(chosen, problem, arguments),
        not_chosen={
            other.name: declined(other, problem) or _why_not(other, chosen, requested)
            for other in registry.all_backends()
            if other is not chosen
        },
        higher_levels=_higher_levels(level, problem.dtype),
    )


def properties(backend: Backend) -> tuple[str, ...]:
    promised = (("deterministic", backend.deterministic), ("batch-invariant", backend.batch_invariant))
    return tuple(name for name, promise in promised if promise)


def _notes(backend: Backend, problem: Problem, arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """A backend may have a method notes(op, problem, arguments) -> list[str], with remarks on the path of a call."""
    notes = getattr(backend, "notes", None)
    own = [] if notes is None else notes(problem.op, problem, arguments)
    return (*own, *_stored(arguments), *_skipped(arguments))


def _stored(arguments: Mapping[str, Any]) -> Iterator[str]:
    weight_format = arguments.get("weight_format", "plain")
    if weight_format != "plain" and not weight_format.startswith("packed"):
        yield f"weights are read as {weight_format}, mode {arguments['mode']}"


def _skipped(arguments: Mapping[str, Any]) -> Iterator[str]:
    ids, gate_up = arguments.get("ids"), arguments.get("gate_up")
    num_experts = arguments.get("num_experts") if gate_up is None else gate_up.shape[0]
    if isinstance(ids, Tensor) and not ids.is_meta and num_experts is not None:
        skipped = int(((ids < 0) | (ids >= num_experts)).sum())
        if skipped:
            yield f"ids: {skipped} of {ids.numel()} slots are outside [0, {num_experts}) and are skipped"


def _why_not(other: Backend, chosen: Backend, requested: str | None) -> str:
    if requested is not None:
        return f"{chosen.name} was asked for"
    return f"it could serve this, but {chosen.name} comes first"


def _higher_levels(level: str | None, dtype: torch.dtype) -> dict[str, str]:
    if level is None:
        return {}
    higher = device.levels_above(level)
    if dtype == torch.float64:
        return dict.fromkeys(higher, "float64 is served at the portable level")
    return higher
