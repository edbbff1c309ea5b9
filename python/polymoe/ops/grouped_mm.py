from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polymoe.hal.select import select
from polymoe.ops import _check as check_that
from polymoe.ops._library import Gradient, define_op, grad_dtype, public
from polymoe.ops._weights import QUANTIZED, check_differentiable, check_options, check_quantized
from polymoe.ops.grouped_mm_gradient import grouped_mm_dx
from polymoe.ops.lora import check_adapter
from polymoe.ops.quantized_backward import quantized_backward
from polymoe.reference._arithmetic import arithmetic_dtype

UNQUANTIZED = ("plain", "packed", "packed_gate_up")
WEIGHT_FORMATS = (*UNQUANTIZED, *QUANTIZED)


def check(
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    weight_format: str = "plain",
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    mode: str = "weight_only",
) -> None:
    op = "grouped_mm"
    check_that.dtype(op, "a", a, check_that.FLOATS)
    if a.dim() not in (2, 3):
        check_that.fail(op, "a", "2 or 3 dimensions", check_that.describe(a))
    check_options(op, weight_format, UNQUANTIZED, mode, {"scale": scale, "zero": zero})
    if weight_format in QUANTIZED:
        stored = (b.mT if b.dim() >= 2 else b, scale, zero)
        check_quantized(op, ("b", "scale", "zero"), stored, weight_format, a.shape[-1], a)
    else:
        _check_plain(a, b)
    groups = _check_groups(a, b, offs)
    if bias is not None:
        check_that.dtype(op, "bias", bias, (a.dtype, torch.float32))
        if b.dim() == 2 and a.dim() == 3:
            check_that.shape(op, "bias", bias, {"N": b.shape[-1]})
        else:
            check_that.shape(op, "bias", bias, {"G": groups, "N": b.shape[-1]})
        check_that.device(op, "bias", bias, a)
    check_that.output_dtype(op, out_dtype, a.dtype)
    if weight_format.startswith("packed"):
        _check_packed(b, weight_format)


def _check_plain(a: Tensor, b: Tensor) -> None:
    op = "grouped_mm"
    check_that.dtype(op, "b", b, (a.dtype,))
    if b.dim() not in (2, 3):
        check_that.fail(op, "b", "2 or 3 dimensions", check_that.describe(b))
    check_that.device(op, "b", b, a)
    if a.shape[-1] != b.shape[-2]:
        check_that.fail(op, "b", f"D = {a.shape[-1]} rows, as a has columns", check_that.describe(b))


def _check_packed(b: Tensor, weight_format: str) -> None:
    op = "grouped_mm"
    if b.dim() != 3:
        check_that.fail(op, "b", f"3 dimensions where it is {weight_format}", check_that.describe(b))
    if weight_format == "packed_gate_up" and b.shape[-1] % 2 != 0:
        check_that.fail(op, "b", "an even N where it is packed_gate_up", check_that.describe(b))
    if not (b.is_contiguous() or b.mT.is_contiguous()):
        check_that.fail(op, "b", "a packed tensor [G, D, N], or [G, N, D] transposed", check_that.describe(b))


def _check_groups(a: Tensor, b: Tensor, offs: Tensor | None) -> int:
    """Returns G."""
    op = "grouped_mm"
    if a.dim() == 3 and b.dim() == 3:
        if offs is not None:
            check_that.fail(op, "offs", "nothing where a and b have 3 dimensions", check_that.describe(offs))
        if a.shape[0] != b.shape[0]:
            check_that.fail(op, "b", f"G = {a.shape[0]} matrices, as in a", check_that.describe(b))
        return a.shape[0]
    if offs is None:
        check_that.fail(op, "offs", "offsets [G] where a or b has 2 dimensions", None)
    check_that.dtype(op, "offs", offs, check_that.IDS)
    check_that.shape(op, "offs", offs, {"G": None})
    check_that.device(op, "offs", offs, a)
    if a.dim() == 3 or b.dim() == 3:
        check_that.shape(op, "offs", offs, {"G": (a if a.dim() == 3 else b).shape[0]})
    return offs.shape[0]


def fake(
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    weight_format: str = "plain",
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    mode: str = "weight_only",
) -> Tensor:
    M, N = a.shape[-2], b.shape[-1]
    if a.dim() == b.dim():
        groups = a.shape[0] if offs is None else offs.shape[0]
        return a.new_empty((groups, M, N), dtype=out_dtype or a.dtype)
    return a.new_empty((M, N), dtype=out_dtype or a.dtype)


def setup(ctx: Any, args: Any, out: Tensor) -> None:
    check_differentiable("grouped_mm", args.weight_format, {name: ctx.needs[name] for name in ("b", "scale")})
    ctx.save_for_backward(
        args.a if ctx.needs["b"] else None, args.b if ctx.needs["a"] else None, args.offs, args.scale, args.zero
    )
    ctx.weight_format, ctx.D = args.weight_format, args.a.shape[-1]
    ctx.grad_dtype_of_b = grad_dtype(args.b)
    ctx.dtype, ctx.cut_rows_of_a = args.a.dtype, args.a.dim() == 2
    ctx.bias_dtype = None if args.bias is None else grad_dtype(args.bias)


def gradients(ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    """The two products are the same two for every form: what is cut in one is the reduction of the other."""
    a, b, offs, scale, zero = ctx.saved_tensors
    grad = grad.to(ctx.dtype)
    found = {}
    if ctx.needs["a"] and ctx.weight_format != "plain":
        found["a"] = quantized_backward(grad, b.mT, scale, zero, offs, ctx.D, ctx.weight_format, backend=ctx.backend)
    elif ctx.needs["a"] and ctx.cut_rows_of_a and b.dim() == 3:
        found["a"] = grouped_mm_dx(grad, b, offs, backend=ctx.backend)
    elif ctx.needs["a"]:
        found["a"] = torch.ops.polymoe.grouped_mm(grad, b.mT, offs, backend=ctx.backend)
    if ctx.needs["b"]:
        found["b"] = torch.ops.polymoe.grouped_mm(a.mT, grad, offs, None, ctx.grad_dtype_of_b, backend=ctx.backend)
    if ctx.needs["bias"]:
        found["bias"] = _sums_of_rows(grad, None if grad.dim() == 3 else offs, ctx)
    return found


def _sums_of_rows(grad: Tensor, offs: Tensor | None, ctx: Any) -> Tensor:
    """A product with a row of ones: exact products, summed in float32 in a fixed order, rounded once."""
    M = grad.shape[-2]
    ones = torch.ones((1, M), dtype=grad.dtype, device=grad.device)
    if offs is None:
        ones = ones.expand(grad.shape[0], 1, M)
    elif not ctx.cut_rows_of_a:
        ones = ones.expand(offs.shape[0], 1, M)
    out_dtype = ctx.bias_dtype if ctx.dtype != torch.float64 else None
    return torch.ops.polymoe.grouped_mm(ones, grad, offs, None, out_dtype, backend=ctx.backend).squeeze(-2)


_grouped_mm = define_op(
    "grouped_mm",
    "(Tensor a, Tensor b, Tensor? offs=None, Tensor? bias=None, ScalarType? out_dtype=None, "
    'str weight_format="plain", Tensor? scale=None, Tensor? zero=None, str mode="weight_only", *, str backend="") '
    "-> Tensor",
    check,
    fake,
    options={"weight_format": "plain", "mode": "weight_only"},
    gradient=Gradient(setup, gradients),
)


@public
def grouped_mm(
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    weight_format: str = "plain",
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    mode: str = "weight_only",
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """One matrix product per group; a superset of torch.nn.functional.grouped_mm: any strides, any sizes, empty groups.

    Args:
        a, b: one dtype, float32, bfloat16, float16 or float64. G groups; offs says where each group ends along the
            dimension that is cut:
            a [M, D],    b [G, D, N]: rows of a are cut            -> [M, N]
            a [G, M, D], b [D, N]:    columns of b are cut         -> [M, N]
            a [M, D],    b [D, N]:    the reduction D is cut       -> [G, M, N]
            a [G, M, D], b [G, D, N]: nothing is cut, offs is None -> [G, M, N]
        offs: [G] int32 or int64, cumulative ends: group g runs from offs[g-1] (0 for the first) to offs[g]. For a plan,
            plan.offsets[1:]. They must not decrease and must lie in [0, size that is cut]; the CPU checks it.
        bias: [G, N], or [N] where a has 3 dimensions and b has 2; a's dtype or float32.
        out_dtype: dtype of the result, by default a's; float64 if and only if a is float64.
        weight_format: "plain", or "packed" or "packed_gate_up" where b is the transposed view of [G, N, D] (or is the
            [G, D, N]) that polymoe.formats.pack_ packed, without or with gate_up. Or the name of a quantised format: b
            has 3 dimensions and is the transposed view of the format's data for a weight [G, N, D], see
            polymoe.formats. It takes no gradient, but a and bias do.
        scale, zero: scales and zero points as the format documents them; for quantised weights only.
        mode: for quantised weights, see polymoe.experts: "weight_only", or "int8", "int8_g128" or "fp8" for rows
            of a rounded to 8 bits first.
        lora_a, lora_b: [G, r, D] and [G, N, r] of a's dtype, with any strides, where rows of a are cut: an adapter,
            which adds lora_scale * (a @ lora_a[g]^T) @ lora_b[g]^T. a @ lora_a^T is rounded to a's dtype; the sum with
            the other product is float32, and rounded once.
        lora_scale: see there.

    Returns:
        Contiguous. Sums are float32 (float64 for float64), the bias is added in float32, and the result is rounded
        once. Rows (or columns) from offs[-1] on are zero, without bias. The gradient is rounded to a's dtype before it
        is multiplied; packed weights are refused where one is needed.

    Raises:
        ValueError: any other shape, dtype, device; offsets as above.
    """
    chosen = select("grouped_mm", a, (weight_format, mode), backend)
    how = (weight_format, scale, zero, mode)
    if lora_a is None and lora_b is None:
        return _grouped_mm(a, b, offs, bias, out_dtype, *how, backend=chosen)
    if a.dim() != 2 or b.dim() != 3:
        check_that.fail("grouped_mm", "lora_a", "None unless rows of a are cut", check_that.describe(a))
    check_adapter("grouped_mm", "", lora_a, lora_b, a, b.shape[0], b.shape[2], a.shape[1])
    check_that.output_dtype("grouped_mm", out_dtype, a.dtype)
    assert lora_a is not None
    assert lora_b is not None
    wide = arithmetic_dtype(a.dtype)
    low = _grouped_mm(a, lora_a.mT, offs, backend=chosen)
    change = _grouped_mm(low, lora_b.mT, offs, None, wide, backend=chosen)
    product = _grouped_mm(a, b, offs, bias, wide, *how, backend=chosen)
    return (product + lora_scale * change).to(out_dtype or a.dtype)
