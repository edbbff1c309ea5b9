"""A linear map by polymoe.grouped_mm, and what all modules here need."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from polymoe import ops
from polymoe.ops import _check as check_that


def expect(condition: bool, where: str, argument: str, accepted: str, got: object) -> None:
    if not condition:
        check_that.fail(f"nn.{where}", argument, accepted, got)


def uniform_by_fan_in(weight: Tensor, fan_in: int) -> None:
    """Uniform in +-1/sqrt(fan_in), as nn.Linear starts."""
    bound = 1.0 / math.sqrt(fan_in) if fan_in else 0.0
    nn.init.uniform_(weight, -bound, bound)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """x [T,H] @ weight [N,H]^T + bias [N] -> [T,N], as a grouped matmul of one group."""
    group_bias = None if bias is None else bias.unsqueeze(0)
    return ops.grouped_mm(x.unsqueeze(0), weight.t().unsqueeze(0), bias=group_bias, out_dtype=out_dtype).squeeze(0)


class Linear(nn.Linear):
    """nn.Linear for x [T, in_features] that multiplies with polymoe.grouped_mm, which is batch-invariant."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
