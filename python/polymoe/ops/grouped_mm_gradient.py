"""The products that gradients of grouped_mm need: of rows with transposed weights, and of rows with rows, added to a
gradient that is there already."""

from __future__ import annotations

import torch
from torch import Tensor

from polymoe.hal.problem import GRADIENT_OPS, OPS
from polymoe.hal.select import select
from polymoe.ops import _check as check_that
from polymoe.ops._library import define_mutable_op, define_op
from polymoe.reference._arithmetic import arithmetic_dtype


def check_dx(grad: Tensor, b: Tensor, offs: Tensor, out_dtype: torch.dtype | None = None) -> None:
    op = "grouped_mm_dx"
    check_that.dtype(op, "grad", grad, check_that.FLOATS)
    check_that.shape(op, "grad", grad, {"S": None, "N": None})
    check_that.dtype(op, "b", b, (grad.dtype,))
    check_that.shape(op, "b", b, {"G": None, "D": None, "N": grad.shape[1]})
    check_that.device(op, "b", b, grad)
    check_that.dtype(op, "offs", offs, check_that.IDS)
    check_that.shape(op, "offs", offs, {"G": b.shape[0]})
    check_that.device(op, "offs", offs, grad)
    check_that.output_dtype(op, out_dtype, grad.dtype)


def fake_dx(grad: Tensor, b: Tensor, offs: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    return grad.new_empty((grad.shape[0], b.shape[1]), dtype=out_dtype or grad.dtype)


def compose_dx(grad: Tensor, b: Tensor, offs: Tensor, out_dtype: torch.dtype | None = None, *, backend: str) -> Tensor:
    found: Tensor = torch.ops.polymoe.grouped_mm(grad, b.mT, offs, None, out_dtype, backend=backend)
    return found


# [S, D], the gradient of a in grouped_mm(a [S, D], b [G, D, N], offs), from that of its result [S, N]: the product
# with the transposed weights, in whatever order of sums is fastest for weights that lie along the other dimension.
grouped_mm_dx = define_op(
    "grouped_mm_dx",
    '(Tensor grad, Tensor b, Tensor offs, ScalarType? out_dtype=None, *, str backend="") -> Tensor',
    check_dx,
    fake_dx,
    specs=GRADIENT_OPS,
    composed=compose_dx,
)


def check_dw(main: Tensor, a: Tensor, grad: Tensor, offs: Tensor) -> None:
    op = "grouped_mm_dw_"
    check_that.dtype(op, "a", a, check_that.FLOATS)
    check_that.shape(op, "a", a, {"S": None, "D": None})
    check_that.dtype(op, "grad", grad, (a.dtype,))
    check_that.shape(op, "grad", grad, {"S": a.shape[0], "N": None})
    check_that.device(op, "grad", grad, a)
    wide = a.dtype == torch.float64
    check_that.dtype(op, "main", main, (torch.float64,) if wide else check_that.FLOATS[:3])
    check_that.shape(op, "main", main, {"G": None, "D": a.shape[1], "N": grad.shape[1]})
    check_that.device(op, "main", main, a)
    if 1 not in (main.stride(1), main.stride(2)) and main.numel() > 0:
        check_that.fail(op, "main", "a stride of 1 in dimension 1 or 2", f"strides {tuple(main.stride())}")
    if _overlaps(main):
        expected = "a tensor whose elements share no memory"
        check_that.fail(op, "main", expected, f"{check_that.describe(main)} with strides {tuple(main.stride())}")
    check_that.dtype(op, "offs", offs, check_that.IDS)
    check_that.shape(op, "offs", offs, {"G": main.shape[0]})
    check_that.device(op, "offs", offs, a)


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements may share memory, as those of an expanded tensor do."""
    extent = 1  # of the dimensions with smaller strides
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < extent:
            return tensor.numel() > 0
        extent += (size - 1) * stride
    return False


def compose_dw(main: Tensor, a: Tensor, grad: Tensor, offs: Tensor, *, backend: str) -> None:
    wide = arithmetic_dtype(a.dtype)
    product = torch.ops.polymoe.grouped_mm(a.mT, grad, offs, None, wide, backend=backend)
    main.copy_(main.to(wide).add_(product))


_grouped_mm_dw_ = define_mutable_op(
    "grouped_mm_dw_",
    '(Tensor(a!) main, Tensor a, Tensor grad, Tensor offs, *, str backend="") -> ()',
    check_dw,
    compose_dw,
    like="grouped_mm",
)


def grouped_mm_dw_(main: Tensor, a: Tensor, grad: Tensor, offs: Tensor, *, backend: str | None = None) -> None:
    """Adds the gradient of b in grouped_mm(a, b, offs) to a gradient that is there already: main[g] += a_g^T @ grad_g
    for the rows of every group g. For training with gradients that are accumulated over several backward passes, in
    float32 for bfloat16 weights, without a tensor of the size of the weights for each pass.

    Args:
        main: [G, D, N], the gradient of b, written in place; float32, or any dtype for which a sum is rounded to it;
            float64 if and only if a is. One of its last two dimensions has stride 1.
        a: [S, D] and grad: [S, N], the gradient of the result: one dtype, float32, bfloat16, float16 or float64.
        offs: [G] int32 or int64, cumulative ends of the groups of rows; rows from offs[-1] on take no part.

    Returns:
        None. Groups without a row are left alone. Sums are float32 (float64 for float64). No gradient flows through it.

    Raises:
        ValueError: any other shape, dtype, device or stride; a main gradient that overlaps itself.
    """
    chosen = select("grouped_mm", a, tuple(OPS["grouped_mm"].options.values()), backend)
    with torch.no_grad():
        _grouped_mm_dw_(main, a, grad, offs, backend=chosen)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(main)
