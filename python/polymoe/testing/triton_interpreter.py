"""Triton's interpreter (TRITON_INTERPRET=1) with its arithmetic repaired, so that results on the CPU mean something.

What `repair` changes in the interpreter of Triton 3.9, whose private functions it rests on:

- bfloat16 and float8 values are held as their bit patterns, and arithmetic, comparisons, dot products and reductions
  treat these as integers. Here elementwise operations compute in float32 and round once, as GPUs do; a sum or scan of
  such values raises, for its roundings differ from GPU to GPU.
- Casts to bfloat16 truncate, and casts to float8 lose the carry of the rounding. Here they round to nearest even;
  float8 saturates, as Triton's own casts do.
- tl.dot and tl.sum leave the order of a sum to numpy, which chooses it by the shape. Here both add in ascending order,
  one product after the other, so that equal bits prove an equal order. Operands of a tf32 dot are rounded to tf32.
- tl.dot_scaled rounds nothing but its float32 sum, in the same order: scales are powers of two.
- Every call of a device function patches the language anew, which costs more than the arithmetic. Here it is patched
  once, for the rest of the process.
- Integer arithmetic is computed a second time in 64 bits, to check for overflow, but the check is off. So is this here.
- NumPy's warnings of overflow and invalid operations are off inside kernels: GPUs have none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

# The float types that the interpreter holds as integers. float8e4b15 has no counterpart in torch and stays unrepaired.
_PACKED = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
}

_repaired = False


def _is_packed(handle: TensorHandle) -> bool:
    """Whether `handle` holds bit patterns. (Stock comparisons give booleans under the type of their inputs.)"""
    return handle.dtype.scalar in _PACKED and handle.data.dtype != np.bool_


def values(handle: TensorHandle) -> np.ndarray:
    """The numbers that a handle stands for: float32 for packed floats."""
    if not _is_packed(handle):
        return handle.data
    if handle.dtype.scalar == tl.bfloat16:  # the upper half of a float32
        return (handle.data.astype(np.uint32) << 16).view(np.float32)
    bits = torch.from_numpy(np.array(handle.data, order="C"))
    return bits.view(_PACKED[handle.dtype.scalar]).float().numpy()


def packed(numbers: np.ndarray, dtype: tl.dtype) -> TensorHandle:
    """A handle of a packed float type that holds `numbers`, rounded to nearest even."""
    source = np.array(numbers, dtype=np.float32, order="C")
    if dtype == tl.bfloat16:
        bits = source.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return TensorHandle(np.where(np.isnan(source), 0x7FC0, rounded).astype(np.uint16), dtype)
    target = _PACKED[dtype]
    largest = torch.finfo(target).max
    saturated = torch.from_numpy(source).clamp(-largest, largest)  # NaN stays
    return TensorHandle(saturated.to(target).view(torch.uint8).numpy(), dtype)


def _elementwise(stock: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """For the builder's methods f(operands..., op), where op is a function of numpy arrays."""

    def compute(builder: InterpreterBuilder, *arguments: Any) -> TensorHandle:
        *operands, op = arguments
        # A selection copies; its operands need no arithmetic.
        if op is np.where or not any(map(_is_packed, operands)):
            return stock(builder, *arguments)
        result = op(*map(values, operands))
        return TensorHandle(result, tl.int1) if result.dtype == np.bool_ else packed(result, operands[-1].dtype.scalar)

    return compute


def _fma(stock: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def compute(builder: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if not _is_packed(z):
            return stock(builder, x, y, z)
        # A product of two such numbers is exact in float64, and so is a float64 sum but for far smaller terms.
        return packed(values(x).astype(np.float64) * values(y) + values(z), z.dtype.scalar)

    return compute


def _cast(stock: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """For the builder's methods f(source, type, ...)."""

    def compute(builder: InterpreterBuilder, source: TensorHandle, target: tl.dtype, *mode: Any) -> TensorHandle:
        dtype = target.scalar
        if dtype in _PACKED:
            return packed(values(source), dtype)
        if _is_packed(source):
            return TensorHandle(values(source).astype(interpreter._get_np_dtype(dtype)), dtype)
        return stock(builder, source, target, *mode)

    return compute


def _dot(
    builder: InterpreterBuilder, a: TensorHandle, b: TensorHandle, start: TensorHandle, precision: Any, imprecise: int
) -> TensorHandle:
    dtype = start.dtype.scalar
    total = np.array(values(start), dtype=values(start).dtype)
    compute = np.float32 if dtype in (tl.float16, tl.bfloat16) else total.dtype
    total = total.astype(compute, copy=False)
    x, y = values(a).astype(compute), values(b).astype(compute)
    if a.dtype.scalar == tl.float32 and getattr(precision, "name", "") == "TF32":
        x, y = interpreter._round_f32_to_tf32(x), interpreter._round_f32_to_tf32(y)
    columns = np.ascontiguousarray(np.moveaxis(x, -1, 0))[..., None]
    rows = np.ascontiguousarray(np.moveaxis(y, -2, 0))[..., None, :]
    product = np.empty_like(total)
    for column, row in zip(columns, rows, strict=True):
        np.multiply(column, row, out=product)
        total += product
    return packed(total, dtype) if dtype in _PACKED else TensorHandle(total.astype(start.data.dtype), dtype)


def _dot_scaled(
    builder: InterpreterBuilder,
    a: TensorHandle,
    a_scale: TensorHandle,
    a_format: Any,
    b: TensorHandle,
    b_scale: TensorHandle,
    b_format: Any,
    fast_math: bool,
    a_packed_along_k: bool,
    b_packed_along_k: bool,
    start: TensorHandle,
) -> TensorHandle:
    operand = interpreter._prepare_dot_scaled_operand
    x = operand(a, a_scale, a_format, a_packed_along_k, tl.bfloat16, is_rhs=False)
    y = operand(b, b_scale, b_format, b_packed_along_k, tl.bfloat16, is_rhs=True)
    left, right = (TensorHandle(part.astype(np.float32), tl.float32) for part in (x, y))
    return _dot(builder, left, right, start, None, 0)


def _sum(stock: Callable[..., tl.tensor]) -> Callable[..., tl.tensor]:
    def compute(reduction: interpreter.ReduceOps, tensor: tl.tensor) -> tl.tensor:
        if not tensor.dtype.is_floating():
            return stock(reduction, tensor)
        data = tensor.handle.data
        axis = 0 if reduction.axis is None else reduction.axis
        terms = data.reshape(-1) if reduction.axis is None else data
        total = np.add.accumulate(terms, axis=axis).take(-1, axis=axis)
        if reduction.keep_dims:
            total = total.reshape([1] * data.ndim) if reduction.axis is None else np.expand_dims(total, axis)
        return reduction.to_tensor(total, tensor.dtype)

    return compute


def _reduce(stock: Callable[..., Any]) -> Callable[..., Any]:
    """tl.sort is made of reductions by xor, for which the stock interpreter runs Python for every element."""

    def compute(reduction: interpreter.ReduceOps, tensors: tuple[tl.tensor, ...]) -> Any:
        if reduction.combine_fn is not tl.standard._xor_combine or reduction.axis is None:
            return stock(reduction, tensors)
        (tensor,) = tensors
        result = np.bitwise_xor.reduce(tensor.handle.data, axis=reduction.axis, keepdims=reduction.keep_dims)
        return reduction.to_tensor(result, tensor.dtype)

    return compute


def _check_tensor(stock: Callable[..., None]) -> Callable[..., None]:
    def check(reduction: interpreter.ReduceScanOpInterface, tensors: tuple[tl.tensor, ...]) -> None:
        stock(reduction, tensors)
        for tensor in tensors:
            if tensor.dtype.scalar in _PACKED:
                raise TypeError(f"a reduction or scan of {tensor.dtype.scalar}: convert it to float32 before")

    return check


def _call_quietly(stock: Callable[..., None]) -> Callable[..., None]:
    def call(executor: interpreter.GridExecutor, *args: Any, **kwargs: Any) -> None:
        with np.errstate(all="ignore"):
            stock(executor, *args, **kwargs)

    return call


def _patch_language_once() -> None:
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()


def repair() -> None:
    """Repairs Triton's interpreter for the rest of this process; again does nothing."""
    global _repaired
    if _repaired:
        return
    builder: Any = InterpreterBuilder
    for name in ("binary_op", "unary_op", "ternary_op"):
        setattr(builder, name, _elementwise(getattr(builder, name)))
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(builder, name, _cast(getattr(builder, name)))
    builder.create_fma = _fma(builder.create_fma)
    builder.create_dot = _dot
    builder.create_dot_scaled = _dot_scaled
    interpreter.ReduceOps.sum = _sum(interpreter.ReduceOps.sum)
    interpreter.ReduceOps.apply_impl = _reduce(interpreter.ReduceOps.apply_impl)
    interface = interpreter.ReduceScanOpInterface
    interface.check_tensor = _check_tensor(interface.check_tensor)
    interpreter.GridExecutor.__call__ = _call_quietly(interpreter.GridExecutor.__call__)
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    _patch_language_once()
    _repaired = True
