"""Where published checkpoints keep their experts: names, shapes and storage formats.

Two families of names. Split ones have a tensor per matrix and expert, `<layer>.experts.<e>.<matrix>.<part>`:

    DeepSeek-V3, Qwen3-MoE    gate_proj, up_proj, down_proj    weight, weight_scale_inv
    DeepSeek-V4               w1 (gate), w3 (up), w2 (down)    weight, scale
    Mixtral                   w1 (gate), w3 (up), w2 (down)    weight
    Kimi-K3                   w1 (gate), w3 (up), w2 (down)    weight_packed, weight_scale (compressed-tensors' names)

Fused ones have a tensor per layer, `<layer>.experts.<tensor>`:

    Transformers              gate_up_proj, down_proj, each with _scale_inv if it is quantised, and _bias
    gpt-oss                   gate_up_proj, down_proj, each as _blocks and _scales, or in bf16 and transposed, and _bias

What a matrix [N, D] is stored as follows from dtypes and shapes:

    dense    BF16, F16 or F32 [N, D]
    fp8      F8_E4M3 [N, D]; scales F32 or F8_E8M0 [ceil(N / n), ceil(D / d)], one per block of n x d elements
    mxfp8    F8_E4M3 [N, D]; scales F8_E8M0 or U8 [N, D / 32]
    mxfp4    I8 or U8 [N, D / 2], the even element in the low half of a byte; scales F8_E8M0 or U8 [N, D / 32]
             gpt-oss: U8 [N, D / 32, 16]
    int8     I8 [N, D]; scales F32 [N]; `polymoe quantize` writes this and the next
    int4     U8 or I8 [N, ceil(D / 2)], as above, 8 standing for zero; scales F32 [N, ceil(D / G)], G of 32, 64 or 128
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from polymoe.checkpoint.shards import Entry, fail
from polymoe.formats.integer import GROUPS

GROUP = 32  # elements along D that share a scale in the MX formats
DENSE = (torch.bfloat16, torch.float16, torch.float32)
BYTES = (torch.uint8, torch.int8)
EXPONENTS = (torch.float8_e8m0fnu, torch.uint8)

MATRICES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
PARTS = {
    "weight": "weight",
    "weight_packed": "weight",
    "weight_scale_inv": "scale",
    "weight_scale": "scale",
    "scale": "scale",
}
SUFFIXES = {"": "weight", "_scale_inv": "scale", "_blocks": "weight", "_scales": "scale", "_bias": "bias"}
FUSED = {
    f"{projection}_proj{suffix}": (projection, part)
    for projection in ("gate_up", "down")
    for suffix, part in SUFFIXES.items()
}


class Place(NamedTuple):
    """What a tensor's name says: `expert` is None where one tensor holds all experts."""

    layer: str
    expert: int | None
    matrix: str  # gate, up, down or gate_up
    part: str  # weight, scale or bias


def place(entry: Entry) -> Place | None:
    """The place of a tensor among the experts, or None if it is none of theirs.

    Raises:
        CheckpointError: it is some expert's, by its name, but not by one of the names above.
    """
    layer, experts, rest = entry.name.rpartition(".experts.")
    if not experts:
        return None
    if rest in FUSED:
        return Place(layer, None, *FUSED[rest])
    words = rest.split(".")
    known = len(words) == 3 and words[0].isdecimal() and words[1] in MATRICES and words[2] in PARTS
    if not known or len(words[0]) > 5:
        fail(entry.file, "belongs to experts in a layout that is not known", entry.name)
    return Place(layer, int(words[0]), MATRICES[words[1]], PARTS[words[2]])


class Sizes(NamedTuple):
    """What config.json says: E experts, H hidden width, I intermediate width, and the block of fp8 scales."""

    experts: int
    hidden: int
    intermediate: int
    block: tuple[int, int]

    def matrix(self, name: str) -> tuple[int, int]:
        """(N, D)."""
        rows = {"gate": self.intermediate, "up": self.intermediate, "gate_up": 2 * self.intermediate}
        return (self.hidden, self.intermediate) if name == "down" else (rows[name], self.hidden)


@dataclass
class Parts:
    """The tensors of one matrix, or of that matrix of all experts."""

    weight: Entry | None = None
    scale: Entry | None = None
    bias: Entry | None = None

    def all(self) -> list[Entry]:
        return [entry for entry in (self.weight, self.scale, self.bias) if entry is not None]


class Storage(NamedTuple):
    """How the matrices of a layer are stored."""

    format: str  # dense, fp8, mxfp8, mxfp4, int8 or int4
    dtype: torch.dtype
    scale_dtype: torch.dtype | None
    block: tuple[int, int] | None  # elements per scale along N and D; None: dense, or int8
    transposed: bool = False

    def __str__(self) -> str:
        scales = "" if self.scale_dtype is None else f", scales {self.scale_dtype}"
        return f"{self.format} ({self.dtype}{scales}{', transposed' if self.transposed else ''})"


@dataclass
class Layer:
    """One layer's experts: matrices[None] of a fused layer, matrices[e] of a split one."""

    name: str
    matrices: dict[int | None, dict[str, Parts]] = field(default_factory=dict)
    storage: Storage = field(init=False)

    @property
    def fused(self) -> bool:
        return None in self.matrices

    @property
    def interleaved(self) -> bool:
        """Whether gate and up rows take turns: gpt-oss, alone among these, does that and has biases."""
        return self.fused and self.matrices[None].get("gate_up", Parts()).bias is not None

    def add(self, where: Place, entry: Entry) -> None:
        parts = self.matrices.setdefault(where.expert, {}).setdefault(where.matrix, Parts())
        other = getattr(parts, where.part)
        if other is not None:
            fail(entry.file, f"is the same matrix as {other.name!r} in {other.file}", entry.name)
        setattr(parts, where.part, entry)

    def check(self, sizes: Sizes) -> None:
        """Raises CheckpointError unless every tensor is there, once, and of the shape that the config asks for."""
        first = next(entry for parts in next(iter(self.matrices.values())).values() for entry in parts.all())
        if self.fused and len(self.matrices) > 1:
            fail(first.file, "experts come fused and one by one in the same layer", first.name)
        experts = [None] if self.fused else range(sizes.experts)
        matrices = ("gate_up", "down") if self.fused else ("gate", "up", "down")
        for expert in self.matrices:
            if expert not in experts:
                entry = next(entry for parts in self.matrices[expert].values() for entry in parts.all())
                fail(entry.file, f"expected {sizes.experts} experts, as config.json says", entry.name)
        storages = [
            (self._check_matrix(expert, name, sizes, first), self.matrices[expert][name].weight)
            for expert in experts
            for name in matrices
        ]
        self.storage = storages[0][0]
        for storage, weight in storages:
            if storage != self.storage:
                assert weight is not None
                fail(weight.file, f"is {storage}, others of its layer are {self.storage}", weight.name)

    def _check_matrix(self, expert: int | None, name: str, sizes: Sizes, sibling: Entry) -> Storage:
        parts = self.matrices.get(expert, {}).get(name, Parts())
        which = f"{self.name}.experts" + ("" if expert is None else f".{expert}") + f": {name}"
        if parts.weight is None:
            known = (parts.all() or [sibling])[0]
            fail(known.file.parent, f"{which}: the weight is missing, though there is {known.name!r}")
        rows, columns = sizes.matrix(name)
        lead = (sizes.experts,) if expert is None else ()
        blocks = [-(-size // step) for size, step in zip(sizes.matrix(name), sizes.block, strict=True)]
        if name == "gate_up" and not self.interleaved:  # gate and up have blocks of their own
            blocks[0] = 2 * -(-sizes.intermediate // sizes.block[0])
        storage = _storage(
            parts.weight, parts.scale, _Expected(lead, rows, columns, sizes.block, blocks, self.interleaved)
        )
        if parts.bias is not None and (parts.bias.shape != (*lead, rows) or parts.bias.dtype not in DENSE):
            fail(parts.bias.file, f"expected floats {[*lead, rows]}, got {parts.bias}", parts.bias.name)
        return storage


class _Expected(NamedTuple):
    """Of one matrix: the sizes before the last two, N and D, the block of fp8 scales, how many blocks there are along
    N and D, and whether a dense matrix is transposed."""

    lead: tuple[int, ...]
    rows: int
    columns: int
    block: tuple[int, int]
    blocks: list[int]
    transposed: bool

    def check(self, entry: Entry, what: str, *shapes: tuple[int, ...]) -> None:
        if entry.shape not in [(*self.lead, *shape) for shape in shapes]:
            wanted = " or ".join(str([*self.lead, *shape]) for shape in shapes)
            fail(entry.file, f"expected {what} of shape {wanted}, got {entry}", entry.name)


def _storage(weight: Entry, scale: Entry | None, expected: _Expected) -> Storage:
    rows, columns = expected.rows, expected.columns
    if weight.dtype in DENSE:
        if scale is not None:
            fail(scale.file, f"is a scale, but the weight is {weight}", scale.name)
        expected.check(weight, "a weight", (columns, rows) if expected.transposed else (rows, columns))
        return Storage("dense", weight.dtype, None, None, expected.transposed)
    if weight.dtype not in (torch.float8_e4m3fn, *BYTES):
        fail(weight.file, f"expected a weight of bf16, f16, f32, e4m3 or packed e2m1, got {weight}", weight.name)
    if scale is None:
        fail(weight.file, f"is {weight}, but its scales are missing", weight.name)
    groups = (rows, columns // GROUP)
    if weight.dtype == torch.float8_e4m3fn:
        expected.check(weight, "a weight", (rows, columns))
        if scale.shape == (*expected.lead, *groups) and scale.dtype in EXPONENTS and columns % GROUP == 0:
            return Storage("mxfp8", weight.dtype, scale.dtype, (1, GROUP))
        expected.check(scale, "scales of {} x {} blocks".format(*expected.block), tuple(expected.blocks))
        if scale.dtype not in (torch.float32, torch.float8_e8m0fnu):
            fail(scale.file, f"expected scales of F32 or F8_E8M0, got {scale}", scale.name)
        return Storage("fp8", weight.dtype, scale.dtype, expected.block)
    if scale.dtype == torch.float32:
        return _integers(weight, scale, expected)
    if columns % GROUP != 0:
        fail(weight.file, f"expected a width that is a multiple of {GROUP}, got {columns}", weight.name)
    expected.check(weight, "packed e2m1", (rows, columns // 2), (rows, columns // GROUP, GROUP // 2))
    expected.check(scale, "scales", groups)
    if scale.dtype not in EXPONENTS:
        fail(scale.file, f"expected scales of F8_E8M0, U8 or F32, got {scale}", scale.name)
    return Storage("mxfp4", weight.dtype, scale.dtype, (1, GROUP))


def _integers(weight: Entry, scale: Entry, expected: _Expected) -> Storage:
    rows, columns = expected.rows, expected.columns
    if scale.shape == (*expected.lead, rows):
        expected.check(weight, "int8", (rows, columns))
        if weight.dtype != torch.int8:
            fail(weight.file, f"expected int8 as I8, got {weight}", weight.name)
        return Storage("int8", weight.dtype, scale.dtype, None)
    expected.check(weight, "packed int4", (rows, -(-columns // 2)))
    # Where several group sizes give as many scales, a row is one group, and they mean the same.
    counts = {-(-columns // group): group for group in GROUPS}
    expected.check(scale, "scales", (rows,), *((rows, count) for count in counts))
    return Storage("int4", weight.dtype, scale.dtype, (1, counts[scale.shape[-1]]))


def find_layers(entries: Mapping[str, Entry], sizes: Sizes) -> dict[str, Layer]:
    """The layers with experts, in the order of their numbers, each checked."""
    layers: dict[str, Layer] = {}
    for entry in entries.values():
        where = place(entry)
        if where is not None:
            layers.setdefault(where.layer, Layer(where.layer)).add(where, entry)
    for layer in layers.values():
        layer.check(sizes)
    return dict(sorted(layers.items(), key=lambda item: _by_number(item[0])))


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10. What has more digits than a layer's number is a word."""
    return [(int(word), "") if word.isdecimal() and len(word) < 10 else (-1, word) for word in name.split(".")]
