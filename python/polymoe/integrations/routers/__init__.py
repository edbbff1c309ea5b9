"""Routers of Transformers' models through `polymoe.gate`, model by model and only if asked for:

    from polymoe.integrations.routers import use_polymoe_routers, restore_routers
    print(use_polymoe_routers(model))  # which routers were replaced, by what, and why the others were not
    restore_routers(model)

or, for a while, `with polymoe_routers(model): ...`. A router is known by the identity of its class's forward, and was
seen to choose the same experts with the same weights before it is replaced. Its projection stays the model's own, in
the model's dtypes; gate does the scoring, the choice and the weighing, and the tuple that comes back has the router's
own members and dtypes. The order of the slots is gate's, and logits that are NaN or infinite follow gate's rules.

A call that needs a gradient, and a call under autocast, whose casts are part of the result, take the router's own
forward; so does a router whose settings have changed to something that gate does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from polymoe.hal.explain import by_layer
from polymoe.integrations.routers import _families
from polymoe.integrations.routers._families import Entry
from polymoe.integrations.routers._recipes import Recipe, Routed
from polymoe.integrations.routers._trial import disagreement

__all__ = ["RoutersReport", "polymoe_routers", "restore_routers", "routers", "use_polymoe_routers"]


@dataclass(frozen=True)
class RoutersReport:
    """What became of a model's routers; str() of it is for reading.

    replaced  by name, what polymoe.gate computes
    kept      by name, why the router is the model's own
    """

    replaced: Mapping[str, str]
    kept: Mapping[str, str]

    def __str__(self) -> str:
        lines = {name: f"polymoe.gate: {text}" for name, text in self.replaced.items()}
        lines |= {name: f"the model's own: {text}" for name, text in self.kept.items()}
        return "\n".join(f"{names}: {text}" for names, text in by_layer(lines)) or "no routers"


def use_polymoe_routers(model: nn.Module) -> RoutersReport:
    """Replaces the forward of every known router in `model`, on these instances only.

    Args:
        model: a Transformers model, or any part of one. Weights may be on the meta device; a router elsewhere is tried
            out first, on a few random rows.

    Returns:
        a report. Routers that are replaced already count as replaced.
    """
    replaced, kept = {}, {}
    for name, router in routers(model).items():
        how = _replace(router)
        if isinstance(how, str):
            kept[name] = how
        else:
            replaced[name] = how.describe(router)
    return RoutersReport(replaced, kept)


def restore_routers(model: nn.Module) -> list[str]:
    """Undoes `use_polymoe_routers` without trace. Returns the names of the routers that run their own forward again."""
    restored = [name for name, router in model.named_modules() if replacement(router) is not None]
    for name in restored:
        del model.get_submodule(name).__dict__["forward"]
    return restored


@contextmanager
def polymoe_routers(model: nn.Module) -> Iterator[RoutersReport]:
    """`use_polymoe_routers` for the body of a with statement. Routers that were replaced before stay so."""
    before = {router for router in model.modules() if replacement(router) is not None}
    try:
        yield use_polymoe_routers(model)
    finally:
        for router in model.modules():
            if router not in before and replacement(router) is not None:
                del router.__dict__["forward"]


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """By name: modules of a class that is known as a router, and what stands beside experts as `gate` or `router`."""
    found = {}
    for name, module in model.named_modules():
        if _families.is_listed(module):
            found[name] = module
        if hasattr(getattr(module, "experts", None), "_is_expert_parallel"):
            for attribute in ("gate", "router"):
                if isinstance(getattr(module, attribute, None), nn.Module):
                    found[f"{name}.{attribute}".lstrip(".")] = getattr(module, attribute)
    return found


def replacement(router: nn.Module) -> Recipe | str | None:
    """The recipe that a replaced router follows, or why it runs its own forward after all; None if not replaced."""
    entry = _entries.get(getattr(router.__dict__.get("forward"), "__func__", None))
    return None if entry is None else _families.recipe(entry, router)


def would_be(router: nn.Module) -> Recipe | str:
    """The recipe that `use_polymoe_routers` has for a router, before any trial, or why it would leave it alone."""
    if "forward" in router.__dict__:
        return "its forward is set on the instance"
    return _families.recipe(_families.entry(router), router)


def _replace(router: nn.Module) -> Recipe | str:
    how = replacement(router)
    if how is None:
        how = would_be(router)
        if isinstance(how, str):
            return how
        why_not = disagreement(how, router)
        if why_not is not None:
            return why_not
        router.__dict__["forward"] = MethodType(_forward(_families.entry(router)), router)
    return how


Forward = Callable[..., Routed]
_entries: dict[Forward | None, Entry] = {}


@cache
def _forward(entry: Entry) -> Forward:
    """A forward for routers of that entry."""

    def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Routed:
        how = _families.recipe(entry, self)
        if isinstance(how, str) or _needs_gradient(self, hidden_states) or _casts(hidden_states):
            own: Routed = type(self).forward(self, hidden_states, *args, **kwargs)
            return own
        return how.route(self, hidden_states, *args, *kwargs.values())

    _entries[forward] = entry
    return forward


def _needs_gradient(router: nn.Module, hidden_states: Tensor) -> bool:
    return torch.is_grad_enabled() and (
        hidden_states.requires_grad or any(parameter.requires_grad for parameter in router.parameters())
    )


def _casts(hidden_states: Tensor) -> bool:
    return torch.is_autocast_enabled(hidden_states.device.type)
