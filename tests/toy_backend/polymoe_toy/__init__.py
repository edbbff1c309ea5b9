"""A backend for polymoe from outside polymoe: float32 on the CPU, in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from polymoe.hal.problem import OPS, Problem
from polymoe_toy import kernels

# What the kernels serve of each option. Of one that a later polymoe adds, only the default is served.
OPTIONS = {
    "scoring": tuple(kernels.SCORES),
    "kind": tuple(kernels.ACTIVATIONS),
    "activation": tuple(kernels.ACTIVATIONS),
    "weight_placement": ("output", "activation", "input"),
}


class ToyBackend:
    name = "toy"
    device_types = ("cpu",)
    # Promised because every kernel here adds up one output element in one order, whatever else is in the batch. With a
    # matrix product from a BLAS library the second would be False: such libraries choose their loops by the shape.
    deterministic = True
    batch_invariant = True

    def supports(self, op: str, problem: Problem) -> str | None:
        """None, or why not, as the end of a sentence. No size is part of a problem: an op serves them all."""
        if op not in kernels.OPS:
            return f"it has no {op}"
        if op != "plan" and problem.dtype != torch.float32:  # the subject of plan is the ids, int32 or int64
            return f"its kernels compute in float32, not in {problem.dtype}"
        for name, value in problem.option.items():
            if value not in OPTIONS.get(name, (OPS[op].options[name],)):
                return f"it has no kernel for {name} {value}"
        return None

    def implementation(self, op: str) -> Callable[..., Any]:
        return kernels.OPS[op]
