"""Argument checks shared by the ops. Every failure is one ValueError of the form
``polymoe.<op>: <argument>: expected <accepted>, got <what came>``, in the words that the C++ kernels use too.

The helpers build their message only on failure: the checks also run inside the fake kernels, where formatting a
symbolic size would be wasted work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IDS = (torch.int32, torch.int64)
INT32 = (torch.int32,)


def fail(op: str, argument: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"polymoe.{op}: {argument}: expected {expected}, got {got}")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def names_of(dtypes: Sequence[torch.dtype]) -> str:
    """ "float32, bfloat16 or float16" """
    *others, last = dict.fromkeys(name_of(dtype) for dtype in dtypes)
    return f"{', '.join(others)} or {last}" if others else last


def describe(tensor: Tensor) -> str:
    """ "float32 [3, 4]", with " on <device>" for a tensor that is not on the CPU."""
    sizes = ", ".join(str(size) for size in tensor.shape)
    return f"{name_of(tensor.dtype)} [{sizes}]" + ("" if tensor.device.type == "cpu" else f" on {tensor.device}")


def dtype(op: str, argument: str, tensor: Tensor, accepted: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in accepted:
        fail(op, argument, names_of(accepted), describe(tensor))
    if tensor.layout != torch.strided:
        fail(op, argument, "a strided tensor", f"{describe(tensor)} of layout {str(tensor.layout).split('.')[-1]}")


def shape(op: str, argument: str, tensor: Tensor, dims: Mapping[str, int | None]) -> None:
    """`dims`: the letter of each dimension, and its size where it is known."""
    if tensor.dim() != len(dims) or any(
        want is not None and have != want for have, want in zip(tensor.shape, dims.values(), strict=True)
    ):
        letters = (letter if size is None else f"{letter}={size}" for letter, size in dims.items())
        fail(op, argument, f"a tensor [{', '.join(letters)}]", describe(tensor))


def contiguous(op: str, argument: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        fail(op, argument, "a contiguous tensor", f"{describe(tensor)} with strides {tuple(tensor.stride())}")


def device(op: str, argument: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        fail(op, argument, f"a tensor on {like.device}", f"{name_of(tensor.dtype)} on {tensor.device}")


def choice(op: str, argument: str, value: str, accepted: Sequence[str]) -> None:
    if value not in accepted:
        fail(op, argument, "one of " + ", ".join(accepted), f'"{value}"')


def output_dtype(op: str, out_dtype: torch.dtype | None, input_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the result: by default the input's; float64 if and only if the input is float64."""
    if out_dtype is None:
        return input_dtype
    accepted = (torch.float64,) if input_dtype == torch.float64 else FLOATS[:3]
    if out_dtype not in accepted:
        fail(op, "out_dtype", f"{names_of(accepted)} for {name_of(input_dtype)} input", name_of(out_dtype))
    return out_dtype


def routing_weights(op: str, weights: Tensor, others: Sequence[torch.dtype], slots: Sequence[int], x: Tensor) -> None:
    """Weights [T, K] in float32 or one of the `others`, beside the tensor `x`; `slots` is (T, K)."""
    dtype(op, "weights", weights, (torch.float32, *others))
    shape(op, "weights", weights, {"T": slots[0], "K": slots[1]})
    device(op, "weights", weights, x)


def slots(op: str, ids: Tensor) -> None:
    """Slots are numbered in int32. Symbolic sizes pass: a guard on them would bound the sizes that a graph accepts, and
    the kernel checks again."""
    count = ids.numel()
    if isinstance(count, int) and count >= 2**31:
        fail(op, "ids", "fewer than 2^31 slots", describe(ids))
