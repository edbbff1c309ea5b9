"""The torch.library side of the ops: one schema each, defined here for every backend.

An op is defined twice, as `polymoe::<op>` and as the overload `polymoe::<op>.routed`. The first is what users and
graphs hold; C++ registers its CPU kernel there. Both have a Python kernel for every device (the router), which calls
the backend named by the schema argument `backend`. A C++ kernel that is asked for another backend forwards to the
overload.

The gradient of an op is made of other ops, called with the same `backend`; so it runs, and compiles, like any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import is_
from sys import intern
from types import MappingProxyType, SimpleNamespace
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from polymoe.hal.problem import COMPOSED_OPS, GRADIENT_OPS, OPS, OpSpec, Problem
from polymoe.hal.registry import get
from polymoe.hal.select import choose, declined
from polymoe.ops._check import fail

LIB = torch.library.Library("polymoe", "DEF")
Wrapper = TypeVar("Wrapper", bound=Callable[..., Any])


@dataclass(frozen=True)
class Gradient:
    """The gradient of an op.

    setup    (ctx, arguments, results): saves for compute what it will need. `arguments` has the op's positional
             arguments as attributes; ctx.needs says by name which of them want a gradient, ctx.backend is the backend
    compute  (ctx, *gradients of the results) -> the gradients that ctx.needs asks for, by name; a gradient of a result
             that was not used is None, but not all are
    """

    setup: Callable[..., None]
    compute: Callable[..., dict[str, Tensor]]


def define_op(
    name: str,
    signature: str,
    check: Callable[..., None],
    fake: Callable[..., Any],
    options: Mapping[str, str] = MappingProxyType({}),
    gradient: Gradient | None = None,
    specs: dict[str, OpSpec] = OPS,
    composed: Callable[..., Any] | None = None,
    like: str = "",
) -> Callable[..., Any]:
    """Defines the op `polymoe::<name>` and returns the function that calls it.

    signature  "(arguments, *, str backend=\\"\\") -> (results)"; the first argument is the tensor that selects the
               backend
    check      takes the arguments without `backend`; raises ValueError if no backend may serve them
    fake       takes the same arguments, already checked; returns the results without data
    options    the string arguments that the choice of a backend may depend on, with their defaults
    gradient   of the op; without one its backward is an error
    specs      where the op is listed: among those that users call, or those that only gradients are made of
    composed   the same on other ops of the backend that is its keyword. For an op that only gradients are made of: used
               where a backend leaves the op out; without it the reference serves. For one of COMPOSED_OPS: what it is
    like       of one of COMPOSED_OPS: the op whose backend is chosen where none is named
    """

    def route(*args: Any, backend: str = "") -> Any:
        check(*args)
        if specs is COMPOSED_OPS and composed is not None:
            return composed(
                *args, backend=backend or choose(*OPS[like].problem(args[0].device.type, args[0].dtype), None)
            )
        if specs is GRADIENT_OPS and backend:
            problem = Problem(name, args[0].device.type, args[0].dtype, option_values(args))
            if declined(get(backend), problem) is not None:
                if composed is not None:
                    return composed(*args, backend=backend)
                backend = "reference"
        chosen = choose(name, args[0].device.type, args[0].dtype, option_values(args), backend or None)
        return get(chosen).implementation(name)(*args)

    def checked_fake(*args: Any, backend: str = "") -> Any:
        check(*args)
        return fake(*args)

    for overload in ("", ".routed"):
        LIB.define(f"{name}{overload}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
        qualified = f"polymoe::{name}{overload}"
        LIB.impl(f"{name}{overload}", route, "CompositeExplicitAutograd")
        torch.library.register_fake(qualified, checked_fake, lib=LIB)
        register_gradient(name, qualified, gradient)

    op = getattr(torch.ops.polymoe, name).default
    run = op._op  # what op(...) calls, without a frame of Python between
    names = [argument.name for argument in op._schema.arguments]
    option_slots = [(names.index(option), default) for option, default in options.items()]

    def option_values(args: tuple[Any, ...]) -> tuple[str, ...]:
        # The dispatcher drops trailing arguments that equal their defaults.
        return tuple(args[slot] if slot < len(args) else default for slot, default in option_slots)

    required = sum(not argument.has_default_value() for argument in op._schema.arguments)
    defaults = [argument.default_value for argument in op._schema.arguments[required:] if not argument.kwarg_only]
    defaults = [intern(default) if isinstance(default, str) else default for default in defaults]

    def call(*args: Any, backend: str) -> Any:
        if torch.compiler.is_compiling():
            return op(*args, backend=backend)
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, names, args)
        # An argument costs the dispatcher more than it takes to see that all are the defaults.
        if all(map(is_, args[required:], defaults)):
            args = args[:required]
        # The autograd kernel is Python and costs microseconds: step below it where there is no gradient to record. For
        # CPU tensors C++ does that (csrc/autograd.cpp), and without a gradient that has to know it the backend need not
        # be named: it is the default, but for ops that a backend composes of others.
        recording = torch.is_grad_enabled()
        if backend == "cpu" and not recording and specs is not GRADIENT_OPS:
            return run(*args)
        if backend == "cpu" or (recording and torch._C._any_requires_grad(*args)):
            return op(*args, backend=backend)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, backend=backend)

    specs[name] = OpSpec(name, subject=names[0], options=options, wrapper=call)
    return call


def _refuse_tangents(op: str, names: Sequence[str], args: Sequence[Any]) -> None:
    """Torch leaves a tangent out where an op has no forward-mode derivative: zero would look like a result."""
    for name, value in zip(names, args, strict=False):
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            fail(op, name, "a tensor without a tangent, for there is no forward-mode derivative", "one with a tangent")


def grad_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that the gradient of an argument should have: torch's `grad_dtype` where a leaf names one."""
    named = getattr(tensor, "grad_dtype", None) if tensor.is_leaf else None
    return tensor.dtype if named is None else named


def define_mutable_op(
    name: str, signature: str, check: Callable[..., None], composed: Callable[..., None], like: str
) -> Callable[..., None]:
    """Defines the op `polymoe::<name>`, which writes into its first argument and has no gradient, and returns it. C++
    registers its CPU kernel; for other backends, chosen as for the op `like`, it is `composed` of their ops, as in
    define_op."""

    def route(*args: Any, backend: str = "") -> None:
        check(*args)
        problem = OPS[like].problem(args[1].device.type, args[1].dtype)
        composed(*args, backend=backend or choose(*problem, None))

    def checked_fake(*args: Any, backend: str = "") -> None:
        check(*args)

    for overload in ("", ".routed"):
        LIB.define(f"{name}{overload}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
        LIB.impl(f"{name}{overload}", route, "CompositeExplicitAutograd")
        torch.library.register_fake(f"polymoe::{name}{overload}", checked_fake, lib=LIB)
    op: Callable[..., None] = getattr(torch.ops.polymoe, name).default
    return op


def register_gradient(name: str, qualified: str, gradient: Gradient | None) -> None:
    if gradient is None:

        def refuse(ctx: Any, *grads: Any) -> NoReturn:
            raise NotImplementedError(f"polymoe.{name}: it has no gradient")

        torch.library.register_autograd(qualified, refuse, lib=LIB)
        return

    schema = torch._library.utils.lookup_op(qualified)._schema
    arguments = [argument.name for argument in schema.arguments if not argument.kwarg_only]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
        ctx.set_materialize_grads(False)  # an unused result costs no tensor of zeros
        # The dispatcher drops trailing arguments that equal their defaults.
        ctx.needs = dict.fromkeys(arguments, False) | dict(zip(arguments, ctx.needs_input_grad, strict=False))
        ctx.backend = keyword_only_inputs["backend"]
        gradient.setup(ctx, SimpleNamespace(**dict(zip(arguments, inputs, strict=True))), output)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            unused = all(grad is None for grad in grads)
            found = {} if unused else gradient.compute(ctx, *grads)
        results = tuple(found.get(argument) for argument in ctx.needs)
        return _differentiable_once(name, results) if torch.is_grad_enabled() else results

    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIB)


def _differentiable_once(name: str, results: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Under create_graph: the results as they are, and an error where they are differentiated in turn."""
    message = f"polymoe.{name}: it has no second derivative; its gradient cannot be differentiated again"
    refuse = torch._C._functions.DelayedError(message.encode(), len(results))
    marked: list[Any] = [None if result is None else result.detach().requires_grad_() for result in results]
    return tuple(refuse(*marked))


def public(wrapper: Wrapper) -> Wrapper:
    """Decorator for the function that users call: `explain` reads its signature. It has the name of its op."""
    name = wrapper.__name__
    OPS[name] = replace(OPS[name], wrapper=wrapper)
    return wrapper
