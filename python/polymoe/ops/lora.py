"""Low-rank adapters (LoRA, arXiv 2106.09685) of a projection."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from polymoe.ops import _check as check_that


class Adapter(NamedTuple):
    """The change scale * b[e] @ a[e] of a projection [E, N, D]."""

    a: Tensor  # [E, r, D]
    b: Tensor  # [E, N, r]
    scale: float


def check_adapter(op: str, name: str, a: Tensor | None, b: Tensor | None, like: Tensor, E: int, N: int, D: int) -> None:
    """Raises unless a [E, r, D] and b [E, N, r], named <name>lora_a and <name>lora_b, are both there or both None."""
    if a is None and b is None:
        return
    for part, tensor in (("lora_a", a), ("lora_b", b)):
        if tensor is None:
            check_that.fail(op, name + part, "an adapter's two parts or neither", None)
        check_that.dtype(op, name + part, tensor, (like.dtype,))
        check_that.device(op, name + part, tensor, like)
    assert a is not None
    assert b is not None
    check_that.shape(op, f"{name}lora_a", a, {"E": E, "r": None, "D": D})
    check_that.shape(op, f"{name}lora_b", b, {"E": E, "N": N, "r": a.shape[1]})
