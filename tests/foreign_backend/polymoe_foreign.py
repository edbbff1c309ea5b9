"""A device of a type that torch does not know, and its backend: what the author of an NPU has, without one.

A tensor of the device keeps a CPU tensor out of sight. Whatever torch does with it is done to that one; ops of polymoe
go the way they go on a real device of such a type, by the dispatch key PrivateUse1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from polymoe_toy import ToyBackend
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = "foreign"
_setup_privateuseone_for_python_backend(DEVICE)


class ForeignTensor(Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, hidden: Tensor) -> ForeignTensor:
        layout = {"strides": hidden.stride(), "storage_offset": hidden.storage_offset(), "dtype": hidden.dtype}
        return Tensor._make_wrapper_subclass(cls, hidden.shape, **layout, device=f"{DEVICE}:0")

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace != "polymoe":
            return _by_torch(op, *args, **(kwargs or {}))
        with torch._C._DisableTorchDispatch():
            return op(*args, **(kwargs or {}))

    def tolist(self) -> Any:
        return self.hidden.tolist()


def _hidden(value: Any) -> Any:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.hidden if isinstance(value, ForeignTensor) else value


def _by_torch(op: Any, *args: Any, **kwargs: Any) -> Any:
    hidden = tree_map(_hidden, args)
    result = op(*hidden, **tree_map(_hidden, kwargs))
    if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu":
        return result  # a copy that leaves the device
    if op._schema.is_mutable and args and result is hidden[0]:
        return args[0]
    return tree_map_only(Tensor, ForeignTensor, result)


_library = torch.library.Library("_", "IMPL")
_library.fallback(_by_torch, "PrivateUse1")  # what makes new tensors


class ForeignBackend(ToyBackend):
    name = "foreign"
    device_types = (DEVICE,)

    def implementation(self, op: str) -> Callable[..., Any]:
        kernel = super().implementation(op)

        @functools.wraps(kernel)
        def on_device(*args: Any) -> Any:
            assert not any(isinstance(arg, Tensor) and not isinstance(arg, ForeignTensor) for arg in args)
            return tree_map_only(Tensor, ForeignTensor, kernel(*tree_map(_hidden, args)))

        return on_device
