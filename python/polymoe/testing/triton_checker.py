"""Finds out-of-bounds accesses and races of Triton kernels, in Triton's interpreter.

    with checked() as found:
        kernel[grid](...)
    assert not found

- Bounds: every active lane of every load, store and atomic operation, also those of tensor descriptors, must lie on an
  element of a tensor that the launch was given. What lies between the elements of a strided view is out of bounds.
- Races: programs run in no order. No two of them may store to one byte, or one load what another stores, unless both
  accesses are atomic; nor may two lanes of one store go to one byte.

A lane out of bounds is reported and then switched off. Races within a program are not found, and an order that programs
make for themselves with atomic operations is not seen. It rests on private functions of Triton 3.9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle
from triton.tools.tensor_descriptor import TensorDescriptor

NOBODY, SEVERAL = -1, -2  # instead of the number of a program


class _Memory:
    """The bytes of one storage: which belong to an argument, and which programs loaded and stored them."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.start, self.size = storage.data_ptr(), storage.nbytes()
        self.names: list[str] = []
        self.valid = torch.zeros(self.size, dtype=torch.bool)
        self.loaded, self.stored, self.updated = (np.full(self.size, NOBODY, dtype=np.int64) for _ in range(3))

    def add(self, name: str, tensor: Tensor) -> None:
        width = tensor.element_size()
        strides = [stride * width for stride in tensor.stride()]
        elements = self.valid.as_strided((*tensor.shape, width), (*strides, 1), tensor.storage_offset() * width)
        elements.fill_(True)
        self.names.append(name)

    def element(self, place: int) -> str:
        return f"byte {place} of {'/'.join(self.names)}"


class _Launch:
    """What the programs of one launch have done so far."""

    def __init__(self, kernel: str, arguments: dict[str, Any], found: list[str]) -> None:
        self.kernel, self.found = kernel, found
        self.memories: dict[int, _Memory] = {}
        for name, argument in arguments.items():
            tensor = argument.base if isinstance(argument, TensorDescriptor) else argument
            if isinstance(tensor, Tensor) and tensor.numel() > 0:
                storage = tensor.untyped_storage()
                self.memories.setdefault(storage.data_ptr(), _Memory(storage)).add(name, tensor)

    def report(self, program: tuple[int, ...], text: str) -> None:
        self.found.append(f"{self.kernel}, program {program}: {text}")

    def access(self, kind: str, builder: InterpreterBuilder, pointers: TensorHandle, mask: np.ndarray) -> np.ndarray:
        """Notes one access; returns the mask without the lanes that are out of bounds."""
        x, y, z = builder.grid_idx
        number = (x * builder.grid_dim[1] + y) * builder.grid_dim[2] + z
        width = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        addresses = pointers.data.astype(np.int64)
        inside = np.zeros(addresses.shape, dtype=bool)
        for memory in self.memories.values():
            place = addresses - memory.start
            lanes = mask & (place >= 0) & (place <= memory.size - width)
            spans = place[lanes][:, None] + np.arange(width)
            lanes[lanes] = memory.valid.numpy()[spans].all(axis=1)
            inside |= lanes
            if lanes.any():
                self._note(kind, builder.grid_idx, number, memory, place[lanes][:, None] + np.arange(width))
        outside = mask & ~inside
        if outside.any():
            self.report(builder.grid_idx, f"{kind} out of bounds: {self._nearest(int(addresses[outside][0]))}")
        return mask & inside

    def _nearest(self, address: int) -> str:
        def distance(memory: _Memory) -> int:
            return max(memory.start - address, address - memory.start - memory.size + 1, 0)

        if not self.memories:
            return "the kernel has no memory"
        memory = min(self.memories.values(), key=distance)
        return f"{memory.element(address - memory.start)}, which has {memory.size} bytes"

    def _note(self, kind: str, program: tuple[int, ...], number: int, memory: _Memory, spans: np.ndarray) -> None:
        bytes_ = spans.ravel()
        mine = {"load": memory.loaded, "store": memory.stored, "atomic": memory.updated}[kind]
        conflicting = {"load": "store update", "store": "load store update", "atomic": "load store"}[kind].split()
        others = {"load": memory.loaded, "store": memory.stored, "update": memory.updated}
        for name in conflicting:
            before = others[name][bytes_]
            clash = (before != NOBODY) & (before != number)
            if clash.any():
                place = int(bytes_[clash][0])
                self.report(program, f"race: {kind} and another program's {name} of {memory.element(place)}")
        if kind == "store":
            places, counts = np.unique(spans[:, 0], return_counts=True)
            if (counts > 1).any():
                self.report(program, f"race: two lanes store to {memory.element(int(places[counts > 1][0]))}")
        mine[bytes_] = np.where((mine[bytes_] == NOBODY) | (mine[bytes_] == number), number, SEVERAL)


_launch: _Launch | None = None
_found: list[str] | None = None


def _mask_of(mask: TensorHandle | None, pointers: TensorHandle) -> np.ndarray:
    return np.broadcast_to(True if mask is None else mask.data, pointers.data.shape)


def _watch_load(stock: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def load(
        builder: InterpreterBuilder, pointers: TensorHandle, mask: TensorHandle, *rest: Any, **named: Any
    ) -> TensorHandle:
        if _launch is not None:
            mask = TensorHandle(_launch.access("load", builder, pointers, _mask_of(mask, pointers)), tl.int1)
        return stock(builder, pointers, mask, *rest, **named)

    return load


def _watch_store(stock: Callable[..., None]) -> Callable[..., None]:
    def store(builder: InterpreterBuilder, pointers: TensorHandle, value: Any, mask: TensorHandle, *rest: Any) -> None:
        if _launch is not None:
            mask = TensorHandle(_launch.access("store", builder, pointers, _mask_of(mask, pointers)), tl.int1)
        stock(builder, pointers, value, mask, *rest)

    return store


def _watch_update(stock: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def update(
        builder: InterpreterBuilder, op: Any, pointers: TensorHandle, value: Any, mask: TensorHandle, *rest: Any
    ) -> TensorHandle:
        if _launch is not None:
            mask = TensorHandle(_launch.access("atomic", builder, pointers, _mask_of(mask, pointers)), tl.int1)
        return stock(builder, op, pointers, value, mask, *rest)

    return update


def _watch_exchange(stock: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    def exchange(builder: InterpreterBuilder, pointers: TensorHandle, *rest: Any) -> TensorHandle:
        if _launch is not None:
            _launch.access("atomic", builder, pointers, _mask_of(None, pointers))
        return stock(builder, pointers, *rest)

    return exchange


def _watch_arguments(stock: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    def arguments(executor: GridExecutor, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        global _launch
        on_host, named_on_host = stock(executor, args, kwargs)
        if _found is not None:
            given = dict(zip(executor.arg_names, on_host, strict=False)) | named_on_host
            _launch = _Launch(executor.fn.__name__, given, _found)
        return on_host, named_on_host

    return arguments


_WATCHED: list[tuple[Any, str, Callable[[Any], Any]]] = [
    (InterpreterBuilder, "create_masked_load", _watch_load),
    (InterpreterBuilder, "create_masked_store", _watch_store),
    (InterpreterBuilder, "create_atomic_rmw", _watch_update),
    (InterpreterBuilder, "create_atomic_cas", _watch_exchange),
    (GridExecutor, "_init_args_hst", _watch_arguments),
]


@contextmanager
def checked() -> Iterator[list[str]]:
    """Inside, every launch in this process is checked; the list that it gives grows by what is found."""
    global _launch, _found
    stock = [(owner, name, getattr(owner, name)) for owner, name, _ in _WATCHED]
    for owner, name, watch in _WATCHED:
        setattr(owner, name, watch(getattr(owner, name)))
    _found = []
    try:
        yield _found
    finally:
        _launch = _found = None
        for owner, name, function in stock:
            setattr(owner, name, function)
