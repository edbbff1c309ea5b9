"""Gradients sent back through frozen quantised weights: of grouped_mm, and of experts."""

from __future__ import annotations

import torch
from torch import Tensor

from polymoe.hal.problem import GRADIENT_OPS
from polymoe.ops import _check as check_that
from polymoe.ops._library import define_op
from polymoe.ops._weights import QUANTIZED, check_quantized


def check(
    grad: Tensor,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offs: Tensor | None,
    D: int,
    weight_format: str,
    out_dtype: torch.dtype | None = None,
) -> None:
    op = "quantized_backward"
    check_that.dtype(op, "grad", grad, check_that.FLOATS)
    check_that.choice(op, "weight_format", weight_format, QUANTIZED)
    check_quantized(op, ("data", "scale", "zero"), (data, scale, zero), weight_format, D, grad)
    G, N = data.shape[:2]
    if offs is None:
        check_that.shape(op, "grad", grad, {"G": G, "M": None, "N": N})
    else:
        check_that.shape(op, "grad", grad, {"M": None, "N": N})
        check_that.dtype(op, "offs", offs, check_that.IDS)
        check_that.shape(op, "offs", offs, {"G": G})
        check_that.device(op, "offs", offs, grad)
    check_that.output_dtype(op, out_dtype, grad.dtype)


def fake(
    grad: Tensor,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    offs: Tensor | None,
    D: int,
    weight_format: str,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], D), dtype=out_dtype or grad.dtype)


# [M, D]: every row of grad [M, N] times the weight [N, D] of its group, or [G, M, N] by [G, M, D] without offs. Weights
# count as code times scale, sums are float32 (float64 for float64); rows from offs[-1] on are zero.
quantized_backward = define_op(
    "quantized_backward",
    "(Tensor grad, Tensor data, Tensor scale, Tensor? zero, Tensor? offs, SymInt D, str weight_format, "
    'ScalarType? out_dtype=None, *, str backend="") -> Tensor',
    check,
    fake,
    options={"weight_format": ""},
    specs=GRADIENT_OPS,
)
