"""`quantize`: a checkpoint with dense experts, rewritten with quantised ones. `polymoe quantize` calls it.

Shard by shard, one expert's matrix at a time. Names, and what is no expert's, stay as they are:

    --format      experts in a tensor each                    gpt-oss                      other fused ones
    mxfp4         weight I8, scale F8_E8M0                    _blocks U8, _scales U8       I8, _scale_inv F8_E8M0
    fp8           weight F8_E4M3, scale F32 of 128 x 128      F8_E4M3, _scale_inv F32      as gpt-oss
    int8          weight I8, scale F32 per row                I8, _scale_inv F32           as gpt-oss
    int4          weight U8, scale F32 of groups of 128       U8, _scale_inv F32           as gpt-oss

A scale is `<matrix>.scale` beside w1, w2, w3 and `<matrix>.weight_scale_inv` beside gate_proj, up_proj, down_proj, as
DeepSeek publishes them. config.json gets the quantization_config of DeepSeek-V4 (mxfp4), DeepSeek-V3 (fp8) or gpt-oss,
and {"quant_method": "polymoe", "format": ...} for the integer formats, which no published layout has.
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polymoe.checkpoint.layouts import GROUP, Layer, Place, Sizes, place
from polymoe.checkpoint.progress import bar
from polymoe.checkpoint.reader import INDEX, SINGLE, Checkpoint
from polymoe.checkpoint.shards import Entry, Planned, fail, parse_json, read_header, write_shard
from polymoe.formats import Format, parse
from polymoe.ops._check import choice

FORMATS = {"mxfp4": "mxfp4", "fp8": "fp8_block128", "int8": "int8", "int4": "int4_g128"}
UNFINISHED = "polymoe-quantize.json"  # in the new folder until it is whole
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")  # files that are not copied


class _Matrix(NamedTuple):
    """A dense tensor of experts, and what becomes of it: names and plans of the data and of the scales."""

    entry: Entry
    format: Format
    halves: bool  # [.., 2I, H]: gate and up are quantised apart
    transposed: bool
    plan: dict[str, Planned]

    def convert(self) -> Iterator[tuple[str, Tensor]]:
        """Data and scales, quantised expert by expert into place."""
        dense = self.entry.read()
        made = [torch.empty(planned.shape, dtype=planned.dtype) for planned in self.plan.values()]
        leads = [()] if dense.dim() == 2 else [(expert,) for expert in range(dense.shape[0])]
        for lead in leads:
            one = dense[lead].mT if self.transposed else dense[lead]
            parts = [self._quantize(part) for part in (one.chunk(2) if self.halves else [one])]
            for whole, pieces in zip(made, zip(*parts, strict=True), strict=True):
                joined = torch.cat([piece.view(torch.uint8) for piece in pieces])
                whole[lead].view(torch.uint8).copy_(joined.view(whole[lead].view(torch.uint8).shape))
        yield from zip(self.plan, made, strict=True)

    def _quantize(self, dense: Tensor) -> tuple[Tensor, Tensor]:
        try:
            weight = self.format.quantize(dense)
        except ValueError as error:
            fail(self.entry.file, str(error), self.entry.name)
        return weight.data, weight.scale


_Plan = list[Entry | _Matrix]
_Shards = list[tuple[Path, _Plan]]


def quantize(source: str | Path, target: str | Path, format: str, *, progress: bool | None = None) -> None:
    """Writes the checkpoint in `source` to the new folder `target`, with its experts in `format`.

    Memory stays within the largest tensor written and one expert. A run that was broken off goes on where it stopped
    when it is repeated: shards that are whole stay. config.json comes last.

    Args:
        source: a checkpoint that `Checkpoint` reads, its experts bfloat16, float16 or float32.
        target: a folder that does not exist, is empty, or was left by a run with the same source and format.
        format: mxfp4, fp8, int8 or int4.
        progress: whether to draw bars on stderr; None for "where it is a terminal".

    Raises:
        CheckpointError: the source is damaged or not dense, has widths or numbers that the format does not hold, or the
            target is anything else than said, or cannot be written, or its disk is too small.
    """
    choice("checkpoint.quantize", "format", format, tuple(FORMATS))
    checkpoint = Checkpoint(source, progress=progress)
    shards = _plan(checkpoint, parse(FORMATS[format]))
    try:
        _write(checkpoint, Path(target), format, shards, progress)
    except OSError as error:
        fail(Path(target), f"cannot be written: {error}")


def _write(checkpoint: Checkpoint, target: Path, format: str, shards: _Shards, progress: bool | None) -> None:
    _begin(target, checkpoint.folder, format)
    with open(target / UNFINISHED, "rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fail(target, "is being written by another process")
        missing = [(path, plan) for path, plan in shards if not _is_whole(target / path.name, plan)]
        _check_space(target, missing)
        done = len(shards) - len(missing)
        for path, plan in bar(missing, len(missing), f"shards ({done} done before)" if done else "shards", progress):
            write_shard(target / path.name, _planned(plan), _convert(plan), read_header(path)[1])
        _finish(checkpoint, target, format, shards)


def _plan(checkpoint: Checkpoint, format: Format) -> _Shards:
    """Per shard of the source: its tensors in their order, those of experts with what becomes of them."""
    sizes = Sizes(checkpoint.num_experts, checkpoint.hidden_size, checkpoint.intermediate_size, (128, 128))
    shards: dict[Path, _Plan] = {}
    for entry in checkpoint.tensors.values():
        where, plan = place(entry), shards.setdefault(entry.file, [])
        if where is None or where.part == "bias":
            plan.append(entry)
        elif checkpoint.storage(where.layer).format != "dense":
            fail(entry.file, f"expected dense experts, got {checkpoint.storage(where.layer)}", entry.name)
        else:
            plan.append(_matrix(entry, where, checkpoint._layers[where.layer], sizes, format))
    return list(shards.items())


def _matrix(entry: Entry, where: Place, layer: Layer, sizes: Sizes, format: Format) -> _Matrix:
    N, D = sizes.matrix(where.matrix)
    if format.name == "mxfp4" and D % GROUP:
        fail(entry.file, f"mxfp4 needs a width that is a multiple of {GROUP}, got {D}", entry.name)
    halves = where.matrix == "gate_up" and not layer.interleaved
    lead = entry.shape[:-2]
    parts = [format.scale_shape(N // 2, D)] * 2 if halves else [format.scale_shape(N, D)]
    scale = Planned(format.scale_dtypes[0], (*lead, sum(rows for rows, *_ in parts), *parts[0][1:]))
    data = Planned(format.data_dtypes[0], (*lead, N, format.data_width(D)))
    names = entry.name, f"{entry.name}_scale_inv"
    if re.search(r"\.w[123]\.weight$", entry.name):
        names = entry.name, f"{entry.name.removesuffix('weight')}scale"
    if format.name == "mxfp4" and layer.interleaved:
        names = f"{entry.name}_blocks", f"{entry.name}_scales"
        data = Planned(torch.uint8, (*lead, N, D // GROUP, GROUP // 2))
        scale = Planned(torch.uint8, scale.shape)
    elif format.name == "mxfp4":
        data = Planned(torch.int8, data.shape)
    elif format.name.startswith("fp8"):
        scale = Planned(torch.float32, scale.shape)
    plan = dict(zip(names, (data, scale), strict=True))
    return _Matrix(entry, format, halves, layer.storage.transposed, plan)


def _planned(plan: _Plan) -> dict[str, Planned]:
    tensors: dict[str, Planned] = {}
    for item in plan:
        if isinstance(item, _Matrix):
            tensors.update(item.plan)
        else:
            tensors[item.name] = Planned(item.dtype, item.shape)
    return tensors


def _convert(plan: _Plan) -> Iterator[tuple[str, Tensor]]:
    for item in plan:
        if isinstance(item, _Matrix):
            yield from item.convert()
        else:
            yield item.name, item.read()


def _begin(target: Path, source: Path, format: str) -> None:
    """Makes the folder, or checks that it was left by the same run. The mark in it names source and format."""
    stats = [(path.name, path.stat()) for path in source.iterdir() if path.is_file()]
    files = sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    mark = json.dumps({"source": str(source.resolve()), "format": format, "files": files}).encode()
    marked, partial = target / UNFINISHED, target / f"{UNFINISHED}.partial"
    if target.exists() and (not target.is_dir() or any(path != partial for path in target.iterdir())):
        if not marked.is_file():
            fail(target, "exists and is not empty; nothing is overwritten")
        if marked.read_bytes() != mark:
            fail(marked, "was left by a run with another source or format, or the source changed since")
        return
    target.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(mark)
    partial.replace(marked)


def _is_whole(path: Path, plan: _Plan) -> bool:
    """A file has its name only when it is whole; its header must say what is planned now."""
    if not path.exists():
        return False
    found = {name: Planned(entry.dtype, entry.shape) for name, entry in read_header(path)[0].items()}
    if found != _planned(plan):
        fail(path, "holds other tensors than this run writes")
    return True


def _check_space(target: Path, shards: _Shards) -> None:
    needed = sum(planned.nbytes for _, plan in shards for planned in _planned(plan).values())
    free = shutil.disk_usage(target).free
    if needed > free:
        fail(target, f"expected {needed >> 20} MiB of free disk space, got {free >> 20}")


def _finish(checkpoint: Checkpoint, target: Path, format: str, shards: _Shards) -> None:
    for path in checkpoint.folder.iterdir():
        if path.is_file() and path.suffix not in _WEIGHTS and path.name not in (INDEX, "config.json"):
            shutil.copyfile(path, target / path.name)
    if not (len(shards) == 1 and shards[0][0].name == SINGLE):
        index = checkpoint.folder / INDEX
        given = parse_json(index, index.read_bytes(), INDEX).get("metadata")
        metadata = given if isinstance(given, dict) else {}
        planned = {path.name: _planned(plan) for path, plan in shards}
        metadata["total_size"] = sum(one.nbytes for plan in planned.values() for one in plan.values())
        where = {name: file for file, plan in planned.items() for name in plan}
        _write_json(target / INDEX, {"metadata": metadata, "weight_map": where})
    _write_json(target / "config.json", _config(checkpoint, format))
    (target / UNFINISHED).unlink()


def _write_json(path: Path, table: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(table, indent=2) + "\n")
    partial.replace(path)


def _config(checkpoint: Checkpoint, format: str) -> dict[str, Any]:
    interleaved = any(layer.interleaved for layer in checkpoint._layers.values())
    others = _other_matrices(checkpoint)
    if format in ("int8", "int4"):
        quantization: dict[str, Any] = {"quant_method": "polymoe", "format": FORMATS[format]}
    elif format == "mxfp4" and interleaved:
        quantization = {"quant_method": "mxfp4"}
    else:
        quantization = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
        quantization["weight_block_size"] = [128, 128]
        quantization |= {"scale_fmt": "ue8m0", "expert_dtype": "fp4"} if format == "mxfp4" else {}
    return {**checkpoint.config, "quantization_config": {**quantization, "modules_to_not_convert": others}}


def _other_matrices(checkpoint: Checkpoint) -> list[str]:
    """Modules outside the experts that hold a matrix, for modules_to_not_convert; one pattern for all layers."""
    names = dict[str, None]()
    for entry in checkpoint.tensors.values():
        if place(entry) is None and entry.name.endswith(".weight") and len(entry.shape) == 2:
            names[re.sub(r"\.\d+\.", r".*.", entry.name.removesuffix(".weight"))] = None
    return list(names)
