"""The safetensors file format: checked headers, tensors as memory maps, and a writer that holds one tensor at a time.

A file is the length of its header (8 bytes, little endian), the header (JSON: name -> dtype, shape, data_offsets), and
the bytes of the tensors one after another, without a gap. Everything that a header says is checked against the size of
the file before a byte of a tensor is read.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

HEADER_LIMIT = 100_000_000  # bytes; the limit of the format
_LENGTH = 8  # bytes of the header's length


class CheckpointError(ValueError):
    """A checkpoint that is damaged or in no known layout. The message names the file and, where there is one, the
    tensor."""


def fail(file: Path, what: str, tensor: str = "") -> NoReturn:
    raise CheckpointError(f"polymoe.checkpoint: {file}: " + (f"tensor {tensor!r}: " if tensor else "") + what)


@dataclass(frozen=True)
class Entry:
    """One tensor of one file: where it lies and what it is, as the header says."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # of its first byte in the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{NAMES[self.dtype]} {list(self.shape)}"

    def read(self) -> Tensor:
        """The tensor, as a private memory map of its own: pages are read where they are looked at, writes stay in
        memory, and the memory is given back with the tensor. The file must keep its size meanwhile."""
        if self.nbytes == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        page = self.begin - self.begin % mmap.ALLOCATIONGRANULARITY
        try:
            with open(self.file, "rb") as file:
                if os.fstat(file.fileno()).st_size < self.begin + self.nbytes:
                    fail(self.file, "became shorter after it was opened", self.name)
                mapped = mmap.mmap(file.fileno(), self.begin - page + self.nbytes, access=mmap.ACCESS_COPY, offset=page)
        except OSError as error:
            fail(self.file, f"cannot be read: {error}", self.name)
        data = torch.frombuffer(mapped, dtype=torch.uint8, count=self.nbytes, offset=self.begin - page)
        if self.begin % self.dtype.itemsize != 0:
            data = data.clone()  # headers of other writers may leave tensors unaligned
        return data.view(self.dtype).view(self.shape)


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file by name, in the order of their data, and the file's metadata.

    Raises:
        CheckpointError: the file cannot be read, is cut off, or its header does not fit the format or the file's size.
    """
    header, data_begin, size = _load(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        fail(path, "the header's __metadata__ is not a table of strings")
    entries, ends = [], {}
    for name, entry in header.items():
        entries.append(_entry(path, name, entry, data_begin))
        ends[name] = data_begin + entry["data_offsets"][1]
    entries.sort(key=lambda entry: (entry.begin, ends[entry.name]))
    position = data_begin
    for tensor in entries:
        if tensor.begin != position:
            fail(path, f"its data begins at byte {tensor.begin}, expected {position}", tensor.name)
        position = ends[tensor.name]
        if position > size:
            fail(path, f"cut off: its data ends at byte {position}, the file at {size}", tensor.name)
    if position != size:
        fail(path, f"{size - position} bytes after the last tensor's data belong to none")
    return {entry.name: entry for entry in entries}, metadata


def _load(path: Path) -> tuple[dict[str, Any], int, int]:
    """The parsed header, where the data begins, and the size of the file."""
    try:
        # Opening a pipe would wait for a writer.
        if not stat.S_ISREG(os.stat(path).st_mode):
            fail(path, "is not a regular file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < _LENGTH:
                fail(path, f"cut off: {size} bytes are no safetensors file")
            length = int.from_bytes(file.read(_LENGTH), "little")
            if length > min(HEADER_LIMIT, size - _LENGTH):
                fail(path, f"damaged or cut off: the header is {length} bytes long, the file {size}")
            text = file.read(length)
    except OSError as error:
        fail(path, f"cannot be read: {error}")
    return parse_json(path, text, "the header"), _LENGTH + length, size


def parse_json(path: Path, text: bytes, what: str) -> dict[str, Any]:
    """A JSON object without a name that comes twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for name, value in pairs:
            if name in table:
                fail(path, f"comes twice in {what}", name)
            table[name] = value
        return table

    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        fail(path, f"{what} is not JSON: {error}")
    if not isinstance(table, dict):
        fail(path, f"{what} is not a JSON object")
    return table


def _entry(path: Path, name: str, entry: Any, data_begin: int) -> Entry:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        fail(path, "expected dtype, shape and data_offsets in the header", name)
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        fail(path, f"expected a dtype of {', '.join(DTYPES)}, got {entry['dtype']!r}", name)
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _are_sizes(shape) or len(shape) > 8:
        fail(path, f"expected a shape of at most 8 sizes, got {str(shape)[:80]}", name)
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        fail(path, f"expected two ascending data_offsets, got {str(offsets)[:80]}", name)
    dtype = DTYPES[entry["dtype"]]
    needed = math.prod(shape) * dtype.itemsize
    if needed != offsets[1] - offsets[0]:
        fail(path, f"{entry['dtype']} {shape} takes {needed} bytes, its data has {offsets[1] - offsets[0]}", name)
    return Entry(path, name, dtype, tuple(shape), data_begin + offsets[0])


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


@dataclass(frozen=True)
class Planned:
    """What a tensor will be that is still to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shard(
    path: Path, plan: Mapping[str, Planned], tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str]
) -> None:
    """Writes a file of the planned tensors, which come one at a time and in the plan's order.

    It is written beside `path` and renamed when it is whole and on the disk, so that `path` is never half a file.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, planned in plan.items():
        begin, end = end, end + planned.nbytes
        header[name] = {"dtype": NAMES[planned.dtype], "shape": list(planned.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH)  # tensors begin aligned
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(len(text).to_bytes(_LENGTH, "little") + text)
        for (name, planned), (came, tensor) in zip(plan.items(), tensors, strict=True):
            as_came = Planned(tensor.dtype, tuple(tensor.shape))
            assert (came, as_came) == (name, planned), f"planned {name} as {planned}, got {came} as {as_came}"
            file.write(_bytes(tensor))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _bytes(tensor: Tensor) -> bytes | ctypes.Array[ctypes.c_char]:
    """The tensor's bytes, without a copy where it is contiguous; the view lives as long as the tensor."""
    tensor = tensor.contiguous()
    if tensor.numel() == 0:
        return b""
    view = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    view._tensor = tensor  # type: ignore[attr-defined]
    return view
