"""How every check calls an op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import polymoe
from polymoe.testing.poison import poisoned
from polymoe.testing.targets import Target
from polymoe.testing.tolerances import bits


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for entry in value for tensor in _tensors(entry)]
    return []


def run(target: Target, op: str, *args: Any, **kwargs: Any) -> Any:
    """Calls polymoe.<op> on the target's backend in poisoned memory, and checks that it leaves its inputs alone."""
    inputs = _tensors([*args, *kwargs.values()])
    before = [bits(tensor).clone() for tensor in inputs]
    with torch.no_grad(), poisoned():
        result = getattr(polymoe, op)(*args, **kwargs, backend=target.backend)
    for tensor, content in zip(inputs, before, strict=True):
        assert torch.equal(bits(tensor), content), f"polymoe.{op} wrote into an input of shape {tuple(tensor.shape)}"
    return result
