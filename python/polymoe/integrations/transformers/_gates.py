"""Which experts modules `polymoe.experts` can serve as a whole: those whose code between the two projections is known.

Three things must hold before a module runs fused, so that it is never computed by another formula than its own:
its `_apply_gate` is the very function that Transformers ships, its act_fn is of a known class and unaltered, and both
together gave what polymoe's formula gives when they were first met.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from functools import lru_cache
from operator import attrgetter
from types import BuiltinFunctionType, FunctionType, SimpleNamespace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import activations
from transformers.integrations.moe import _default_apply_gate

from polymoe.reference.activate import activate

ExpertsModule: TypeAlias = Any  # an nn.Module with the attributes that Transformers gives experts
Act: TypeAlias = Any  # a class of modules, or a function


@dataclass(frozen=True)
class Gate:
    """A model's `_apply_gate` in polymoe's terms.

    kind          an activation kind; "" where the model's act_fn decides among the plain gated kinds
    alpha, limit  attribute paths on the experts module
    act           the class of act_fn that the kind presumes, if the gate calls it: "silu", or the name of a class in
                  the model's own file
    act_config    the entries of the model's config that such a class takes as alpha and limit
    """

    kind: str
    alpha: str | None = None
    limit: str | None = None
    act: str | None = None
    act_config: tuple[str, ...] = ()
    interleaved: bool = False


_CLAMPED = Gate("swiglu_clamped", limit="swiglu_limit")
_OAI = Gate("swiglu_oai", alpha="alpha", limit="limit")

# Keyed by the model's folder and the class whose `_apply_gate` is meant.
_GATES: dict[tuple[str, str], Gate] = {
    ("deepseek_v4", "DeepseekV4Experts"): Gate("swiglu_clamped", limit="limit", act="silu"),
    ("glm5_next", "Glm5NextTextExperts"): _CLAMPED,
    ("hy_v4", "HYV4Experts"): _CLAMPED,
    ("step3p7", "Step3p7Experts"): Gate("swiglu_clamped_after", limit="limit", act="silu"),
    ("gpt_oss", "GptOssExperts"): replace(_OAI, interleaved=True),
    ("openai_privacy_filter", "OpenAIPrivacyFilterExperts"): _OAI,
    ("minimax_m3_vl", "MiniMaxM3VLExperts"): Gate("swiglu_oai", alpha="swiglu_alpha", limit="swiglu_limit"),
    ("inkling2", "Inkling2Experts"): Gate(
        "softcapped",
        alpha="act_fn.gate_softcap.softcap",
        limit="act_fn.up_softcap.softcap",
        act="Inkling2SoftcappedSwiGLU",
        act_config=("mlp_gate_softcap", "mlp_up_softcap"),
    ),
    ("beam", "BeamExperts"): Gate(""),  # the default gate, with its product in f32, as polymoe's is
}

# act_fn -> (kind of the gated product, ungated kind). Both GELU approximations by tanh are one function.
_ACTIVATIONS: dict[Act, tuple[str, str]] = {
    activations.SiLUActivation: ("swiglu", "silu"),
    nn.SiLU: ("swiglu", "silu"),
    nn.functional.silu: ("swiglu", "silu"),
    activations.GELUActivation: ("geglu", "gelu"),
    activations.GELUTanh: ("geglu_tanh", "gelu_tanh"),
    activations.NewGELUActivation: ("geglu_tanh", "gelu_tanh"),
    nn.ReLU: ("reglu", "relu"),
    nn.functional.relu: ("reglu", "relu"),
    activations.ReLUSquaredActivation: ("", "relu2"),
}

_UNCLAMPED = {"swiglu_clamped": "swiglu", "swiglu_clamped_after": "swiglu", "swiglu_oai": "swiglu_oai"}


class Fused(NamedTuple):
    """How `polymoe.experts` computes a module: its arguments of these names."""

    kind: str
    alpha: float | None
    limit: float | None
    interleaved: bool


def fused(module: ExpertsModule) -> Fused | str:
    """How the module runs fused, or why it does not."""
    if getattr(module, "has_post_expert_norm", False):
        return "a norm follows the experts (has_post_expert_norm)"
    gate = type(module)._apply_gate if getattr(module, "has_gate", True) else None
    if gate is not None and _sets(module, "_apply_gate"):
        return "_apply_gate is set on the instance"
    act = getattr(module, "act_fn", None)
    parts: tuple[Act, ...] = ()
    if isinstance(act, nn.Module):
        if _altered(act):
            return "act_fn has hooks or a forward of its own"
        parts = _parts(act)
    decide = _decide if torch.compiler.is_compiling() else _decide_once
    found = decide(_identity(gate), _identity(act), parts, not getattr(module, "is_concatenated", True))
    return found if isinstance(found, str) else _with_numbers(module, found)


def _sets(instance: nn.Module, method: str) -> bool:
    """Whether the instance has a method of its own beside that of its class."""
    getattr(instance, method)  # torch.compile guards on this, not on what __dict__ holds
    return method in instance.__dict__


def _altered(act: nn.Module) -> bool:
    return bool(
        act._forward_hooks
        or act._forward_pre_hooks
        or act._backward_hooks
        or act._backward_pre_hooks
        or _sets(act, "forward")
        or (act._modules and any(part is not None and _altered(part) for part in act._modules.values()))
    )


def _parts(act: nn.Module) -> tuple[Act, ...]:
    """What a module computes by, beside its class: the forward of that class, and the classes of its submodules."""
    return (type(act).forward, *map(type, act._modules.values()))


def _identity(code: Act) -> Act:
    """A function itself, the class of any other callable: what a decision may be remembered by."""
    return code if code is None or isinstance(code, (FunctionType, BuiltinFunctionType)) else type(code)


def _with_numbers(module: ExpertsModule, gate: Gate) -> Fused | str:
    """Reads what may change between two calls. A model says "no clamp" by an infinite limit, polymoe by the kind."""
    kind, alpha, limit = gate.kind, None, None
    if gate.alpha is not None:
        alpha = attrgetter(gate.alpha)(module)
        if not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
            return f"{gate.alpha} is {alpha}, not a positive finite number"
    if gate.limit is not None:
        limit = attrgetter(gate.limit)(module)
        if not isinstance(limit, (int, float)) or not 0 < limit <= math.inf:
            return f"{gate.limit} is {limit}, not a positive number"
        if limit == math.inf:
            if kind not in _UNCLAMPED:
                return f"{gate.limit} is infinite"
            kind, limit = _UNCLAMPED[kind], None
    return Fused(kind, alpha, limit, gate.interleaved)


@torch._dynamo.assume_constant_result
def _decide(gate: Act, act: Act, parts: tuple[Act, ...], interleaved: bool) -> Gate | str:
    """What experts of this gate function (None: ungated), act_fn and weight layout compute, or why that is not known.

    act: the class of act_fn, or the function; parts: the `_parts` of act_fn.
    """
    gated_kind, ungated_kind = _ACTIVATIONS.get(act, ("", ""))
    if gate is None:
        known, expected, name = Gate(ungated_kind), None, "act_fn"
    else:
        name = f"the gate {getattr(gate, '__qualname__', gate)} of {getattr(gate, '__module__', '?')}"
        found = _known_gate(gate)
        if found is None:
            return f"{name} is not known"
        known = replace(found, kind=found.kind or gated_kind)
        if known.interleaved != interleaved:
            return f"{name} does not read the weights' layout (is_concatenated={not interleaved})"
        expected = known.act
    if expected is not None and not _is_expected(act, expected, gate):
        return f"{name} calls the activation {_name(act)}, expected {expected}"
    if not known.kind:
        return f"the activation {_name(act)} is not known"
    if not _agrees(known, gate, act, parts):
        return f"{name}, with the activation {_name(act)}, does not compute {known.kind}"
    return known


_decide_once = lru_cache(maxsize=1024)(_decide)


def _name(act: Act) -> str:
    return getattr(act, "__name__", str(act))


def _known_gate(gate: Act) -> Gate | None:
    """The entry for this very function: one that was written in the model's own file, and is there still."""
    if gate is _default_apply_gate:
        return Gate("")
    if not isinstance(gate, FunctionType):
        return None
    for (folder, owner), known in _GATES.items():
        # Only a module that is loaded already can be the gate's home.
        home = sys.modules.get(f"transformers.models.{folder}.modeling_{folder}")
        if home is not None and getattr(home, owner).__dict__.get("_apply_gate") is gate:
            return known if gate.__code__.co_filename == home.__file__ else None
    return None


def _is_expected(act: Act, expected: str, gate: FunctionType) -> bool:
    if expected == "silu":
        return _ACTIVATIONS.get(act, ("", ""))[1] == "silu"
    return act is getattr(sys.modules[gate.__module__], expected, None)


_ALPHA, _LIMIT = 1.4, 0.8  # of the trial


@torch.no_grad()
def _agrees(known: Gate, gate: Act, act: Act, parts: tuple[Act, ...]) -> bool:
    """Runs the model's own code once, on numbers on both sides of every bend, against polymoe's formula.

    Float32 steps inside the model's code cost 1e-6; the kinds that are nearest to each other, the two GELUs, are 1e-3
    apart here.
    """
    alpha, limit = _ALPHA if known.alpha else None, _LIMIT if known.limit else None
    with _disable_current_modes():
        h = _trial(interleaved=known.interleaved)
        try:
            act_fn = _instance(known, act)
            if isinstance(act_fn, nn.Module) and parts != _parts(act_fn):
                return False
            own = act_fn(h) if gate is None else gate(_stand_in(known, act_fn), h)
        except Exception:  # code that asks for anything else is not the code that is known
            return False
        ours = activate(h, known.kind, alpha, limit, known.interleaved)
        return own.shape == ours.shape and torch.allclose(own.double(), ours, rtol=1e-5, atol=1e-5)


def _trial(interleaved: bool) -> Tensor:
    """[S, 2I] of gates and up halves, each pair of a grid once."""
    line = torch.linspace(-3.3, 3.3, 24, dtype=torch.float64, device="cpu")
    gate, up = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([gate, up], -1).flatten(1) if interleaved else torch.cat([gate, up], -1)


def _instance(known: Gate, act: Act) -> Any:
    if not isinstance(act, type):
        return act
    if not known.act_config:
        return act()
    return act(SimpleNamespace(**dict(zip(known.act_config, (_ALPHA, _LIMIT), strict=True))))


def _stand_in(known: Gate, act_fn: Any) -> SimpleNamespace:
    """For the experts module. Numbers behind a dot are act_fn's."""
    numbers = {known.alpha: _ALPHA, known.limit: _LIMIT}
    return SimpleNamespace(act_fn=act_fn, **{path: numbers[path] for path in numbers if path and "." not in path})
