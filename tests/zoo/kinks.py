"""Elements so near a clamp's bound, or to where a ReLU begins, that rounding decides whether they have a gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from polymoe.testing.tolerances import unit_roundoff

# The positions of the bounds among the arguments.
_BOUNDS = {"clamp": (1, 2), "clamp_min": (1,), "clamp_max": (1,), "relu": ()}
ROUNDINGS = 64  # of float32, of the root mean square of all elements: what products and earlier layers come to


class Kinks(TorchDispatchMode):
    """While it is on, `near` counts such elements."""

    near = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        x = args[0] if args else None
        positions = _BOUNDS.get(func.overloadpacket.__name__)
        if positions is not None and isinstance(x, Tensor) and x.is_floating_point():
            given = [args[i] if i < len(args) else None for i in positions] if positions else [0.0]
            within = ROUNDINGS * unit_roundoff(torch.float32) * x.square().mean().sqrt()
            self.near += sum(
                int(((x - bound).abs() < within).sum()) for bound in given if isinstance(bound, (int, float))
            )
        return func(*args, **(kwargs or {}))
