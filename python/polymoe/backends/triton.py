"""The Triton backend's place: it serves nothing in this version, and says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polymoe.hal.problem import Problem


class TritonBackend:
    name = "triton"
    device_types: tuple[str, ...] = ("cuda", "xpu")  # ROCm devices are of torch's type cuda
    deterministic = True
    batch_invariant = True

    def supports(self, op: str, problem: Problem) -> str | None:
        return f"this version has no Triton kernel for {op}"

    def implementation(self, op: str) -> Callable[..., Any]:
        raise NotImplementedError(f"polymoe: backend triton: this version has no Triton kernel for {op}")
