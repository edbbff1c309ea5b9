"""The torch.library side of the ops: one schema each, defined here for every backend.

An op is defined twice, as `polymoe::<op>` and as the overload `polymoe::<op>.routed`. The first is what users and
graphs hold; C++ registers its CPU kernel there. Both have a Python kernel for every device (the router), which calls
the backend named by the schema argument `backend`. A C++ kernel that is asked for another backend forwards to the
overload.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

import torch

from polymoe.hal.problem import OPS, OpSpec
from polymoe.hal.registry import get
from polymoe.hal.select import choose

LIB = torch.library.Library("polymoe", "DEF")
Wrapper = TypeVar("Wrapper", bound=Callable[..., Any])


def define_op(
    name: str,
    signature: str,
    check: Callable[..., None],
    fake: Callable[..., Any],
    options: Mapping[str, str] = MappingProxyType({}),
) -> Callable[..., Any]:
    """Defines the op `polymoe::<name>` and returns the function that calls it.

    signature  "(arguments, *, str backend=\\"\\") -> (results)"; the first argument is the tensor that selects the
               backend
    check      takes the arguments without `backend`; raises ValueError if no backend may serve them
    fake       takes the same arguments, already checked; returns the results without data
    options    the string arguments that the choice of a backend may depend on, with their defaults
    """

    def route(*args: Any, backend: str = "") -> Any:
        check(*args)
        chosen = choose(name, args[0].device.type, args[0].dtype, option_values(args), backend or None)
        return get(chosen).implementation(name)(*args)

    def checked_fake(*args: Any, backend: str = "") -> Any:
        check(*args)
        return fake(*args)

    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise NotImplementedError(
            f"polymoe.{name}: backward is not implemented yet in this version; run under torch.no_grad(), or call it "
            "with tensors that do not require grad"
        )

    for overload in ("", ".routed"):
        LIB.define(f"{name}{overload}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
        qualified = f"polymoe::{name}{overload}"
        LIB.impl(f"{name}{overload}", route, "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, checked_fake, lib=LIB)
        torch.library.register_autograd(qualified, backward, lib=LIB)

    op = getattr(torch.ops.polymoe, name).default
    names = [argument.name for argument in op._schema.arguments]
    option_slots = [(names.index(option), default) for option, default in options.items()]

    def option_values(args: tuple[Any, ...]) -> tuple[str, ...]:
        # The dispatcher drops trailing arguments that equal their defaults.
        return tuple(args[slot] if slot < len(args) else default for slot, default in option_slots)

    def call(*args: Any, backend: str) -> Any:
        # The autograd kernel is Python and costs microseconds: step below it where there is no gradient to record.
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return op(*args, backend=backend)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, backend=backend)

    OPS[name] = OpSpec(name, subject=names[0], options=options, wrapper=call)
    return call


def public(wrapper: Wrapper) -> Wrapper:
    """Decorator for the function that users call: `explain` reads its signature. It has the name of its op."""
    name = wrapper.__name__
    OPS[name] = replace(OPS[name], wrapper=wrapper)
    return wrapper
