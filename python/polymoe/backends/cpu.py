"""The cpu backend: the C++ kernels of polymoe._C, registered with torch's dispatcher for CPU tensors."""

from __future__ import annotations

from collections.abc import Callable
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
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"polymoe::{op}", "CPU"):
            return f"the C++ extension has no kernel for {op}"
        return None

    def implementation(self, op: str) -> Callable[..., Any]:
        overload = getattr(torch.ops.polymoe, op).default

        def kernel(*args: Any, **kwargs: Any) -> Any:
            return overload(*args, **kwargs, backend="cpu")

        return kernel
