"""Inputs: several sets of each, so that no call finds its own data in the caches, and weights without repeats."""

from __future__ import annotations

import torch
from torch import Tensor

from polymoe.testing.tolerances import arithmetic_roundoff, growth, unit_roundoff

SETS = 4
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

# Random numbers drawn for a weight before they repeat. A prime: no two experts, rows or columns are alike.
_POOL = 1_048_583


def generator(seed: int, device: str = "cpu") -> torch.Generator:
    """What is drawn from it lives on its device."""
    return torch.Generator(device).manual_seed(seed)


def normal(size: tuple[int, ...], dtype: torch.dtype, source: torch.Generator, scale: float = 1.0) -> Tensor:
    return (torch.randn(size, generator=source, device=source.device) * scale).to(dtype)


def weight(size: tuple[int, ...], dtype: torch.dtype, source: torch.Generator) -> Tensor:
    """[..., N, D] of variance 1/D. A gigabyte takes a second: a pool of random numbers fills it again and again."""
    out = torch.empty(size, dtype=dtype, device=source.device)
    pool = normal((_POOL,), dtype, source, scale=size[-1] ** -0.5)
    for part in out.view(-1).split(_POOL):
        part.copy_(pool[: part.numel()])
    return out


def routing(T: int, E: int, K: int, dtype: torch.dtype, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Routing weights [T, K] and ids [T, K] int64, as models hand them on: the renormalised top K of a softmax."""
    scores = normal((T, E), torch.float32, source).softmax(-1)
    weights, ids = scores.topk(K)
    return (weights / weights.sum(-1, keepdim=True)).to(dtype), ids


def routing_apart(
    T: int, E: int, K: int, dtype: torch.dtype, source: torch.Generator, sets: int
) -> list[tuple[Tensor, Tensor]]:
    """As `routing`, weights [T, K] and ids [T, K] int64, for so many input sets, of which no two hit the same expert:
    T * K * sets <= E."""
    experts = torch.randperm(E, generator=source, device=source.device)
    given = []
    for of_set in experts[: sets * T * K].view(sets, T, K):
        weights, _ = routing(T, E, K, dtype, source)
        given.append((weights, of_set.clone()))
    return given


def error_bound(dtype: torch.dtype, roundings: int, reduction: int = 1) -> float:
    """By how much a correct result on such inputs may be off, relative to its norm: `roundings` to dtype on the way,
    and sums of `reduction` terms of both signs, whose partial sums are no larger than the result is expected to be."""
    return roundings * unit_roundoff(dtype) + growth(reduction) * arithmetic_roundoff(dtype)
