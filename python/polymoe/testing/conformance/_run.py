"""How every check calls an op."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ParamSpec

import torch
from torch import Tensor

import polymoe
from polymoe.testing.poison import poisoned
from polymoe.testing.targets import Target
from polymoe.testing.tolerances import bits

P = ParamSpec("P")

THREADS = 2  # of an op under test, if its backend promises the same bits on any number


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Inside, torch's intra-op pool has n threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def op_threads(target: Target) -> AbstractContextManager[None]:
    return threads(THREADS if target.properties.deterministic else 1)


def serial(check: Callable[P, None]) -> Callable[P, None]:
    """Decorates a check: only the op under test runs on several threads. The many small operations of a truth gain
    nothing from them, and on a busy machine they would spend their time waiting for one another."""

    @functools.wraps(check)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        with threads(1):
            check(*args, **kwargs)

    return wrapper


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for entry in value for tensor in _tensors(entry)]
    return []


def _all_nan(value: Any) -> Any:
    """The same arguments, with NaN in place of every float, laid out alike."""
    if isinstance(value, Tensor) and value.dtype.is_floating_point:
        extent = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
        return value.new_full((max(extent, 0),), torch.nan).as_strided(value.shape, value.stride())
    return value


def run(target: Target, op: str, *args: Any, **kwargs: Any) -> Any:
    """Calls polymoe.<op> on the target's backend in poisoned memory, and checks that it leaves its inputs alone.

    Kernels may keep scratch memory from call to call. What a call on NaN leaves there poisons it too.
    """
    inputs = _tensors([*args, *kwargs.values()])
    before = [bits(tensor).clone() for tensor in inputs]
    call = functools.partial(getattr(polymoe, op), backend=target.backend)
    with torch.no_grad(), poisoned(), op_threads(target):
        call(*map(_all_nan, args), **{name: _all_nan(value) for name, value in kwargs.items()})
        result = call(*args, **kwargs)
    for tensor, content in zip(inputs, before, strict=True):
        assert torch.equal(bits(tensor), content), f"polymoe.{op} wrote into an input of shape {tuple(tensor.shape)}"
    return result
