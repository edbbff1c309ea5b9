"""Adapters of experts, as polymoe.experts and polymoe.grouped_mm take them, from PEFT's parameters and into weights."""

from __future__ import annotations

import torch
from torch import Tensor

from polymoe.ops import _check as check_that

__all__ = ["from_peft", "merged"]


def from_peft(
    lora_A: Tensor, lora_B: Tensor, num_experts: int, *, first_is_output: bool = False
) -> tuple[Tensor, Tensor]:
    """The parameters that PEFT keeps for a weight of experts (`target_parameters`), as adapters: views, so that
    gradients reach them.

    Args:
        lora_A: [E*r, P], the weight of PEFT's lora_A, whose rows are those of expert 0, then of expert 1, and so on.
        lora_B: [Q, r*E], the weight of its lora_B, whose columns name the expert last.
        num_experts: E.
        first_is_output: lora_A lies at the projection's output, as PEFT has it for a weight [E, N, D] (P = N, Q = D)
            unless it swaps the two; else at its input (P = D, Q = N), as for a weight [E, D, N].

    Returns:
        lora_a [E, r, D] and lora_b [E, N, r].

    Raises:
        ValueError: sizes that are no multiple of E, or different ranks.
    """
    op = "lora.from_peft"
    for name, tensor, dimension in (("lora_A", lora_A, 0), ("lora_B", lora_B, 1)):
        if tensor.dim() != 2 or num_experts < 1 or tensor.shape[dimension] % num_experts != 0:
            accepted = f"2 dimensions, the {('first', 'second')[dimension]} a multiple of {num_experts}"
            check_that.fail(op, name, accepted, check_that.describe(tensor))
    if lora_A.shape[0] != lora_B.shape[1]:
        check_that.fail(op, "lora_B", f"{lora_A.shape[0]} columns, as lora_A has rows", check_that.describe(lora_B))
    left = lora_A.view(num_experts, -1, lora_A.shape[1])  # [E, r, P]
    right = lora_B.view(lora_B.shape[0], -1, num_experts).permute(2, 0, 1)  # [E, Q, r]
    return (right.mT, left.mT) if first_is_output else (left, right)


@torch.no_grad()
def merged(weight: Tensor, lora_a: Tensor, lora_b: Tensor, lora_scale: float = 1.0, transposed: bool = False) -> Tensor:
    """weight + lora_scale * lora_b @ lora_a, summed in float32 (float64) and rounded to the weight's dtype.

    Args:
        weight: [E, N, D], or [E, D, N] with `transposed`.
        lora_a, lora_b: [E, r, D] and [E, N, r].

    Returns:
        A new tensor like `weight`.

    Raises:
        ValueError: other shapes, or a weight of another dtype than float32, bfloat16, float16 and float64.
    """
    op, sizes = "lora.merged", ("E", "D", "N") if transposed else ("E", "N", "D")
    check_that.dtype(op, "weight", weight, check_that.FLOATS)
    check_that.shape(op, "weight", weight, dict.fromkeys(sizes))
    E, N, D = (weight.mT if transposed else weight).shape
    check_that.shape(op, "lora_a", lora_a, {"E": E, "r": None, "D": D})
    check_that.shape(op, "lora_b", lora_b, {"E": E, "N": N, "r": lora_a.shape[1]})
    wide = torch.promote_types(weight.dtype, torch.float32)
    change = lora_scale * (lora_b.to(wide) @ lora_a.to(wide))
    return (weight.to(wide) + (change.mT if transposed else change)).to(weight.dtype)
