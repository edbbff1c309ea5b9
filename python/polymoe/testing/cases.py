"""Inputs for the ops: routings, memory layouts, random numbers. Everything random comes from a seed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Random:
    """Random inputs of one test case, from a seed, on a device."""

    def __init__(self, seed: int, device: str = "cpu") -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.randn(*shape, generator=self.generator, dtype=compute).mul_(scale).to(dtype).to(self.device)

    def integer(self, low: int, high: int) -> int:
        """In [low, high)."""
        return int(torch.randint(low, high, (), generator=self.generator))

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(dtype).to(self.device)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator).to(self.device)

    def weights(self, T: int, K: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Routing weights [T, K], all positive and of different sizes."""
        return (torch.rand(T, K, generator=self.generator) + 0.05).to(dtype).to(self.device)

    def matrix(self, *shape: int, dtype: torch.dtype, reduction: int = -1) -> Tensor:
        """Normal entries with variance 1 / D, so that products with unit inputs stay of size 1."""
        return self.normal(*shape, dtype=dtype, scale=1.0 / math.sqrt(max(shape[reduction], 1)))


def _distinct(random: Random, T: int, K: int, E: int) -> Tensor:
    scores = torch.rand(T, E, generator=random.generator)
    ids = scores.argsort(dim=-1)[:, :K]
    return ids if K <= E else ids[:, torch.arange(K) % E]


def _repeated(random: Random, T: int, K: int, E: int) -> Tensor:
    return torch.randint(0, E, (T, K), generator=random.generator)


def _one_hot(random: Random, T: int, K: int, E: int) -> Tensor:
    return torch.full((T, K), random.integer(0, E))


def _few(random: Random, T: int, K: int, E: int) -> Tensor:
    """Only every third expert is used: the others are empty, the first and the last among them where E allows."""
    used = torch.arange(1, max(E - 1, 2), 3) % E
    return used[torch.randint(0, len(used), (T, K), generator=random.generator)]


def _skipping(random: Random, T: int, K: int, E: int) -> Tensor:
    """About a third of the slots are skipped, in every way there is."""
    ids = _distinct(random, T, K, E)
    ways = torch.tensor([-1, E, E + 5, -(2**31), 2**31 - 1])
    skipped = ways[torch.randint(0, len(ways), (T, K), generator=random.generator)]
    return torch.where(torch.rand(T, K, generator=random.generator) < 0.35, skipped, ids)


def _all_skipped(random: Random, T: int, K: int, E: int) -> Tensor:
    return torch.where(torch.rand(T, K, generator=random.generator) < 0.5, -1, E)


def _sorted(random: Random, T: int, K: int, E: int) -> Tensor:
    """Neighbouring tokens go to the same expert."""
    return (torch.arange(T * K) * E // max(T * K, 1)).reshape(T, K)


ROUTINGS: dict[str, Callable[[Random, int, int, int], Tensor]] = {
    "distinct": _distinct,
    "repeated": _repeated,
    "one_hot": _one_hot,
    "few": _few,
    "skipping": _skipping,
    "all_skipped": _all_skipped,
    "sorted": _sorted,
}


def routing(random: Random, pattern: str, T: int, K: int, E: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """ids [T, K]; see ROUTINGS for the patterns."""
    return ROUTINGS[pattern](random, T, K, E).to(dtype).to(random.device)


def _filler(like: Tensor) -> float | int:
    """Fills the memory around a view: a read outside of the view shows."""
    if like.dtype.is_floating_point:
        return math.nan
    return 0 if like.dtype == torch.bool else int(torch.iinfo(like.dtype).max)


def _sliced(tensor: Tensor) -> Tensor:
    """A window of a larger buffer, at an odd offset in every dimension."""
    buffer = tensor.new_full([size + 4 for size in tensor.shape], _filler(tensor))
    view = buffer[tuple(slice(1, 1 + size) for size in tensor.shape)]
    return view.copy_(tensor)


def _strided(tensor: Tensor) -> Tensor:
    """Every third element of the last dimension."""
    buffer = tensor.new_full((*tensor.shape[:-1], 3 * tensor.shape[-1] + 1), _filler(tensor))
    view = buffer[..., 1 : 3 * tensor.shape[-1] + 1 : 3]
    return view.copy_(tensor)


def _transposed(tensor: Tensor) -> Tensor:
    """The last two dimensions are stored the other way round."""
    return tensor.mT.contiguous().mT if tensor.dim() >= 2 else tensor


def _outermost(tensor: Tensor) -> Tensor:
    """The first dimension is stored as the last: nothing else is contiguous."""
    return tensor.movedim(0, -1).contiguous().movedim(-1, 0)


def _expanded(tensor: Tensor) -> Tensor:
    """Stride 0 in the first dimension: all entries along it are the first one (an empty dimension stays empty)."""
    return tensor[:1].expand_as(tensor) if tensor.shape[0] > 0 else tensor


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor.contiguous(),
    "sliced": _sliced,
    "strided": _strided,
    "transposed": _transposed,
    "outermost": _outermost,
    "expanded": _expanded,
}


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout ("expanded" keeps the first entry of the first dimension alone)."""
    return LAYOUTS[layout](tensor)


def name_of(case: Any) -> str:
    """A name for a case, a dataclass: its fields that differ from their defaults."""
    parts = []
    for field in fields(case):
        value = getattr(case, field.name)
        if field.default is MISSING or value != field.default:
            text = "x".join(map(str, value[:8])) if isinstance(value, tuple) else str(value).removeprefix("torch.")
            parts.append(f"{field.name}={text}")
    return "-".join(parts)
