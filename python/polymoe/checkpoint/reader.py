"""`Checkpoint`: the experts of a published model, read one at a time from its safetensors shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polymoe.checkpoint.layouts import Layer, Parts, Sizes, Storage, find_layers
from polymoe.checkpoint.progress import bar
from polymoe.checkpoint.shards import Entry, fail, parse_json, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_JSON_LIMIT = 1 << 28  # bytes of a config or an index


@dataclass(frozen=True)
class ExpertWeights:
    """Weights as stored, of one expert ([N, D] each) or of a whole layer ([E, N, D]).

    gate_up        [2I, H]: gate rows, then up rows, or in turns if `interleaved`; [H, 2I] if `transposed`
    down           [H, I]; [I, H] if `transposed`
    *_scale        the scales, where `format` is not dense; those of gate_up, like its rows, gate's and then up's
    *_bias         [2I] and [H], or None
    format, block  dense, fp8, mxfp8, mxfp4, int8 or int4, and the elements along N and D that share a scale; None for
                   dense, and for int8, where rows do

    Packed e2m1 and int4 are uint8 [N, ceil(D / 2)], the scales of mxfp4 and mxfp8 are float8_e8m0fnu, whatever they
    came as.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_scale: Tensor | None
    down_scale: Tensor | None
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    format: str
    block: tuple[int, int] | None
    transposed: bool
    interleaved: bool


class Checkpoint:
    """A folder with config.json and safetensors files, as DeepSeek-V3, DeepSeek-V4, gpt-oss, Kimi-K3, Qwen3-MoE,
    Mixtral and models with the same names are published; see polymoe.checkpoint.layouts.

    Opening reads every header, and checks that no tensor is missing, comes twice or has another shape than config.json
    asks for. Tensors are memory maps of their own: reading an expert costs the memory of that expert.

    Args:
        folder: the checkpoint.
        progress: whether to draw bars on stderr; None for "where it is a terminal".

    Attributes:
        config: config.json.
        tensors: name -> Entry, all tensors of all files.
        layers: the names of the layers that have experts, such as "model.layers.3.mlp", in the order of their numbers.
        num_experts, hidden_size, intermediate_size: E, H, I of the experts.

    Raises:
        CheckpointError: anything is damaged, missing, duplicated, misshapen or in no known layout; names file and
            tensor.
    """

    def __init__(self, folder: str | Path, *, progress: bool | None = None) -> None:
        self.folder = Path(folder)
        self.progress = progress
        self.config = _json(self.folder / "config.json")
        self.tensors = _tensors(self.folder, progress)
        sizes = _sizes(self.folder / "config.json", self.config)
        self.num_experts, self.hidden_size, self.intermediate_size, _ = sizes
        self._layers = find_layers(self.tensors, sizes)
        if not self._layers:
            fail(self.folder, "holds no experts in a layout that is known")
        self.layers = tuple(self._layers)

    def storage(self, layer: str) -> Storage:
        """How the layer's experts are stored."""
        return self._layer(layer).storage

    def _layer(self, name: str) -> Layer:
        if name not in self._layers:
            fail(self.folder, f"layer {name!r}: expected one of .layers, such as {self.layers[0]!r}")
        return self._layers[name]

    def tensor(self, name: str) -> Tensor:
        """Any tensor of the checkpoint, memory-mapped."""
        if name not in self.tensors:
            fail(self.folder, "is not in this checkpoint", name)
        return self.tensors[name].read()

    def expert(self, layer: str, index: int) -> ExpertWeights:
        """One expert. Where gate and up are stored apart, they are copied together; all else stays mapped."""
        found = self._layer(layer)
        if not 0 <= index < self.num_experts:
            raise IndexError(f"polymoe.checkpoint: expert: expected 0 to {self.num_experts - 1}, got {index}")
        if found.fused:
            return _weights(found, lambda entry: entry.read()[index], None)
        return _weights(found, Entry.read, index)

    def load(self, layer: str) -> ExpertWeights:
        """All experts of a layer, stacked: one expert's memory beside the result's."""
        found = self._layer(layer)
        if found.fused:
            return _weights(found, lambda entry: entry.read().clone(), None)
        stacked: ExpertWeights | None = None
        for index in bar(range(self.num_experts), self.num_experts, layer, self.progress):
            expert = self.expert(layer, index)
            if stacked is None:
                stacked = _map(expert, lambda one: one.new_empty((self.num_experts, *one.shape)))
            for name, one in _tensors_of(expert).items():
                getattr(stacked, name)[index].copy_(one)
        assert stacked is not None
        return stacked


def _tensors_of(weights: ExpertWeights) -> dict[str, Tensor]:
    return {name: value for name, value in vars(weights).items() if isinstance(value, Tensor)}


def _map(weights: ExpertWeights, function: Callable[[Tensor], Tensor]) -> ExpertWeights:
    return ExpertWeights(**{**vars(weights), **{name: function(t) for name, t in _tensors_of(weights).items()}})


def _weights(layer: Layer, read: Callable[[Entry], Tensor], expert: int | None) -> ExpertWeights:
    matrices, storage = layer.matrices[expert], layer.storage

    def weight(parts: Parts) -> Tensor:
        assert parts.weight is not None
        data = read(parts.weight)
        if storage.format not in ("mxfp4", "int4"):
            return data
        blocks = parts.scale is not None and len(parts.weight.shape) == len(parts.scale.shape) + 1  # gpt-oss
        return (data.flatten(-2) if blocks else data).view(torch.uint8)

    def scale(parts: Parts) -> Tensor | None:
        if parts.scale is None:
            return None
        data = read(parts.scale)
        return data.view(torch.float8_e8m0fnu) if data.dtype == torch.uint8 else data

    def bias(parts: Parts) -> Tensor | None:
        return None if parts.bias is None else read(parts.bias)

    down = matrices["down"]
    if layer.fused:
        gate_up = matrices["gate_up"]
        gate_up_weight, gate_up_scale, gate_up_bias = weight(gate_up), scale(gate_up), bias(gate_up)
    else:
        halves = [matrices["gate"], matrices["up"]]
        gate_up_weight = _joined([weight(half) for half in halves])
        gate_up_scale = _joined([s for half in halves if (s := scale(half)) is not None]) if halves[0].scale else None
        gate_up_bias = None
    return ExpertWeights(
        gate_up_weight,
        weight(down),
        gate_up_scale,
        scale(down),
        gate_up_bias,
        bias(down),
        storage.format,
        storage.block,
        storage.transposed,
        layer.interleaved,
    )


def _joined(tensors: list[Tensor]) -> Tensor:
    """torch.cat, for eight-bit floats too."""
    if tensors[0].element_size() == 1:
        return torch.cat([tensor.view(torch.uint8) for tensor in tensors]).view(tensors[0].dtype)
    return torch.cat(tensors)


def _json(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            fail(path, "is missing or not a regular file")
        if path.stat().st_size > _JSON_LIMIT:
            fail(path, f"expected at most {_JSON_LIMIT} bytes, got {path.stat().st_size}")
        return parse_json(path, path.read_bytes(), path.name)
    except OSError as error:
        fail(path, f"cannot be read: {error}")


def _tensors(folder: Path, progress: bool | None) -> dict[str, Entry]:
    """Every tensor of every shard, as the index says where there is one."""
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            fail(folder, f"holds neither {INDEX} nor {SINGLE}")
        return read_header(folder / SINGLE)[0]
    where = _weight_map(index)
    found: dict[str, Entry] = {}
    shards = sorted(set(where.values()))
    for shard in bar(shards, len(shards), "headers", progress):
        for name, entry in read_header(folder / shard)[0].items():
            if name in found:
                fail(entry.file, f"is also in {found[name].file.name}", name)
            if name not in where:
                fail(entry.file, f"is not in {INDEX}", name)
            found[name] = entry
    for name, shard in where.items():
        if name not in found:
            fail(folder / shard, f"is missing, though {INDEX} says that it is here", name)
        if found[name].file.name != shard:
            fail(found[name].file, f"should be in {shard}, as {INDEX} says", name)
    return found


def _weight_map(index: Path) -> Mapping[str, str]:
    where = _json(index).get("weight_map")
    if not isinstance(where, dict):
        fail(index, "has no weight_map")
    for name, shard in where.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            fail(index, f"expected the name of a safetensors file beside it, got {str(shard)[:80]!r}", name)
    return where


def _sizes(path: Path, config: dict[str, Any]) -> Sizes:
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        fail(path, "text_config is not a table")

    def size(*names: str) -> int:
        found = [name for name in names if text.get(name) is not None]
        if not found:
            fail(path, f"expected one of {', '.join(names)}")
        value = text[found[0]]
        if type(value) is not int or not 1 <= value < 2**31:
            fail(path, f"{found[0]}: expected a positive size, got {str(value)[:80]!r}")
        return value

    quantization = config.get("quantization_config") or text.get("quantization_config") or {}
    block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    block = block or [128, 128]
    if not isinstance(block, list) or len(block) != 2 or any(type(n) is not int or not 1 <= n < 2**31 for n in block):
        fail(path, f"weight_block_size: expected two positive sizes, got {str(block)[:80]!r}")
    return Sizes(
        size("n_routed_experts", "num_local_experts", "num_experts"),
        size("routed_expert_hidden_size", "hidden_size"),  # Kimi-K3's experts work at a width of their own
        size("moe_intermediate_size", "intermediate_size"),
        (block[0], block[1]),
    )
