"""The cpu backend: the C++ kernels of polymoe._C, registered with torch's dispatcher for CPU tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from polymoe.backends._extension import extension, missing_reason

if TYPE_CHECKING:
    from polymoe.hal.problem import Problem


class CpuBackend:
    name = "cpu"
    device_types: tuple[str, ...] = ("cpu",)
    deterministic = True
    batch_invariant = True

    def supports(self, op: str, problem: Problem) -> str | None:
        if extension is None:
            return missing_reason
        known = hasattr(torch.ops.polymoe, op)
        if not known or not torch._C._dispatch_has_kernel_for_dispatch_key(f"polymoe::{op}", "CPU"):
            return f"the C++ extension has no kernel for {op}"
        weight_format = problem.option.get("weight_format", "plain")
        if weight_format in importlib.import_module("polymoe.formats").FORMATS:  # by name: it imports the ops
            if problem.dtype == torch.float64:
                return f"it has no float64 kernel for {weight_format} weights"
            if problem.option.get("mode") == "fp8":
                return 'it has no kernel for the mode "fp8"'
        return None

    def implementation(self, op: str) -> Callable[..., Any]:
        overload = getattr(torch.ops.polymoe, op).default

        def kernel(*args: Any, **kwargs: Any) -> Any:
            return overload(*args, **kwargs, backend="cpu")

        return kernel

    def notes(self, op: str, problem: Problem, arguments: Mapping[str, Any]) -> list[str]:
        """Remarks for explain(): what on this path costs extra."""
        notes = []
        if problem.dtype == torch.float64:
            notes.append("float64 is served at the portable level")
        if extension is not None and extension.in_forked_child():
            notes.append("this process was forked after polymoe was imported: ops run on one thread")
        notes += [
            f"{name}: not contiguous along the reduction, so tiles of it are copied before they are multiplied"
            for name, weight, reduction in _weights(op, arguments)
            if isinstance(weight, torch.Tensor)
            and weight.dim() >= 2
            and weight.dtype == problem.dtype
            and weight.shape[reduction] > 1
            and weight.stride(reduction) != 1
        ]
        return notes


def _weights(op: str, arguments: Mapping[str, Any]) -> list[tuple[str, Any, int]]:
    """The matrices that `op` multiplies by, and the dimension it sums over."""
    if op == "grouped_mm":
        return [("b", arguments["b"], -2)]
    if op == "experts":
        reduction = -2 if arguments["transposed"] else -1
        return [(name, arguments[name], reduction) for name in ("gate_up", "down")]
    return []
