"""Argument checks shared by the ops. Every failure is one ValueError of the form
``polymoe.<op>: <argument>: expected <accepted>, got <what came>``.

The helpers build their message only on failure: the same checks run inside the fake kernels, where formatting a symbolic
size would be wasted work.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    return " or ".join(dict.fromkeys(name_of(dtype) for dtype in dtypes))


def shape_of(tensor: Tensor) -> str:
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"


def rank(op: str, argument: str, tensor: Tensor, letters: str) -> None:
    """`letters` such as "[T, E]": one letter per dimension."""
    if tensor.dim() != letters.count(",") + 1:
        fail(op, argument, f"shape {letters}", f"shape {shape_of(tensor)}")


def shape(op: str, argument: str, tensor: Tensor, letters: str, sizes: Sequence[int]) -> None:
    if tensor.dim() != len(sizes) or any(have != want for have, want in zip(tensor.shape, sizes, strict=True)):
        fail(op, argument, f"shape {letters} = [{', '.join(map(str, sizes))}]", f"shape {shape_of(tensor)}")


def dtype(op: str, argument: str, tensor: Tensor, accepted: Sequence[torch.dtype]) -> None:
    if tensor.dtype not in accepted:
        fail(op, argument, names_of(accepted), name_of(tensor.dtype))


def device(op: str, argument: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        fail(op, argument, f"device {like.device}", f"device {tensor.device}")


def choice(op: str, argument: str, value: str, accepted: Sequence[str]) -> None:
    if value not in accepted:
        fail(op, argument, "one of " + ", ".join(accepted), repr(value))


def output_dtype(op: str, out_dtype: torch.dtype | None, input_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the result: by default the input's; float64 if and only if the input is float64."""
    if out_dtype is None:
        return input_dtype
    accepted = (torch.float64,) if input_dtype == torch.float64 else FLOATS[:3]
    if out_dtype not in accepted:
        fail(op, "out_dtype", f"{names_of(accepted)} for {name_of(input_dtype)} input", name_of(out_dtype))
    return out_dtype


def routing_weights(
    op: str, weights: Tensor, dtypes: Sequence[torch.dtype], slots: Sequence[int], like: Tensor
) -> None:
    dtype(op, "weights", weights, (torch.float32, *dtypes))
    shape(op, "weights", weights, "[T, K]", slots)
    device(op, "weights", weights, like)
