"""The reference backend: plain PyTorch on any device. It defines what every op means and is not made to be fast."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from polymoe import reference

if TYPE_CHECKING:
    from polymoe.hal.problem import Problem


class ReferenceBackend:
    name = "reference"
    device_types: tuple[str, ...] = ("*",)
    # It is built from torch's matmul, which chooses its kernel by the shape of the batch.
    deterministic = False
    batch_invariant = False

    def supports(self, op: str, problem: Problem) -> str | None:
        return None if hasattr(reference, op) else f"there is no reference for {op}"

    def implementation(self, op: str) -> Callable[..., Any]:
        return getattr(reference, op)
