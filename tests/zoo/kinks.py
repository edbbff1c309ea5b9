"""Elements so near a clamp's bound, or to where a ReLU begins, that rounding decides whether they have a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from polymoe.testing.tolerances import unit_roundoff

KINKED = ("clamp", "clamp_min", "clamp_max", "relu")
ROUNDINGS = 64  # of float32, of the root mean square of all elements: what products and earlier layers come to


class Kinks(TorchDispatchMode):
    """While it is on, `near` counts such elements."""

    near = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in KINKED and args[0].is_floating_point():
            x, *given = args
            within = ROUNDINGS * unit_roundoff(torch.float32) * x.square().mean().sqrt()
            bounds = [bound for bound in given or (0.0,) if isinstance(bound, (int, float))]
            self.near += sum(int(((x - bound).abs() < within).sum()) for bound in bounds)
        return func(*args, **(kwargs or {}))
