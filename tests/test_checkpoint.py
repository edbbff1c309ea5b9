"""Published checkpoints, read expert by expert; and damaged ones, which end in one clear error."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import published
import pytest
import torch
from published import EXPERTS, HIDDEN, INTERMEDIATE
from torch import Tensor

from polymoe.checkpoint import Checkpoint, CheckpointError
from polymoe.checkpoint.shards import Planned, read_header, write_shard
from polymoe.testing.tolerances import assert_same_bits

INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def seeded(seed: int) -> None:
    torch.manual_seed(seed)


# What the model cards and header dumps say, and where an expert's gate_up is, for the last layer's expert 3.
NAMES = {
    "deepseek_v3": {
        "model.layers.1.mlp.experts.3.gate_proj.weight": "F8_E4M3 [128, 256]",
        "model.layers.1.mlp.experts.3.gate_proj.weight_scale_inv": "F32 [1, 2]",
        "model.layers.1.mlp.experts.3.down_proj.weight": "F8_E4M3 [256, 128]",
        "model.layers.1.mlp.experts.3.down_proj.weight_scale_inv": "F32 [2, 1]",
        "model.layers.1.self_attn.kv_a_proj_with_mqa.weight_scale_inv": "F32 [1, 2]",
        "model.layers.1.mlp.shared_experts.up_proj.weight": "F8_E4M3 [128, 256]",
        "model.layers.1.mlp.gate.e_score_correction_bias": "F32 [4]",
        "lm_head.weight": "BF16 [96, 256]",
    },
    "deepseek_v4": {
        "layers.1.ffn.experts.3.w1.weight": "I8 [128, 128]",
        "layers.1.ffn.experts.3.w1.scale": "F8_E8M0 [128, 8]",
        "layers.1.ffn.experts.3.w2.weight": "I8 [256, 64]",
        "layers.1.ffn.experts.3.w2.scale": "F8_E8M0 [256, 4]",
        "layers.1.ffn.shared_experts.w1.weight": "F8_E4M3 [128, 256]",
        "layers.1.ffn.shared_experts.w1.scale": "F8_E8M0 [1, 2]",
        "layers.0.ffn.gate.tid2eid": "I64 [96, 2]",
        "layers.1.ffn.gate.bias": "F32 [4]",
        "layers.1.attn.compressor.wkv.weight": "BF16 [128, 256]",
        "embed.weight": "BF16 [96, 256]",
    },
    "gpt_oss": {
        "model.layers.1.mlp.experts.gate_up_proj_blocks": "U8 [4, 256, 8, 16]",
        "model.layers.1.mlp.experts.gate_up_proj_scales": "U8 [4, 256, 8]",
        "model.layers.1.mlp.experts.gate_up_proj_bias": "BF16 [4, 256]",
        "model.layers.1.mlp.experts.down_proj_blocks": "U8 [4, 256, 4, 16]",
        "model.layers.1.mlp.experts.down_proj_scales": "U8 [4, 256, 4]",
    },
    "kimi_k3": {
        "language_model.model.layers.1.block_sparse_moe.experts.3.w1.weight_packed": "U8 [128, 128]",
        "language_model.model.layers.1.block_sparse_moe.experts.3.w1.weight_scale": "U8 [128, 8]",
        "language_model.model.layers.1.block_sparse_moe.experts.3.w2.weight_packed": "U8 [256, 64]",
        "language_model.model.layers.1.block_sparse_moe.experts.3.w2.weight_scale": "U8 [256, 4]",
        "language_model.model.layers.1.block_sparse_moe.shared_experts.up_proj.weight": "BF16 [128, 512]",
    },
    "qwen3_moe": {"model.layers.1.mlp.experts.3.up_proj.weight": "BF16 [128, 256]"},
    "mixtral": {"model.layers.1.block_sparse_moe.experts.3.w3.weight": "BF16 [128, 256]"},
}


@pytest.mark.parametrize("family", NAMES)
def test_the_generator_writes_published_names(family: str, tmp_path: Path) -> None:
    tensors = published.write(tmp_path, family)
    assert {name: published.described(tensors[name]) for name in NAMES[family]} == NAMES[family]
    assert len(list(tmp_path.glob("*.safetensors"))) > 1


def parts(tensors: dict[str, Tensor], layer: str, expert: int) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and scales of gate_up and down as they were written, on their way by hand."""

    def named(matrix: str) -> tuple[Tensor, Tensor | None]:
        prefix = f"{layer}.experts.{expert}.{matrix}."
        found = {
            part: tensors[prefix + part]
            for part in ("weight", "weight_packed", "scale", "weight_scale", "weight_scale_inv")
            if prefix + part in tensors
        }
        weight = found.pop("weight", None)
        return found.pop("weight_packed") if weight is None else weight, next(iter(found.values()), None)

    if f"{layer}.experts.down_proj_blocks" in tensors:
        fused = [f"{layer}.experts.{name}" for name in ("gate_up_proj", "down_proj")]
        return (
            [tensors[f"{name}_blocks"][expert].flatten(1) for name in fused],
            [tensors[f"{name}_scales"][expert].view(torch.float8_e8m0fnu) for name in fused],
        )
    if f"{layer}.experts.down_proj" in tensors:
        return [tensors[f"{layer}.experts.{name}"][expert] for name in ("gate_up_proj", "down_proj")], []
    plain = any(name.startswith(f"{layer}.experts.0.w1.") for name in tensors)
    names = ("w1", "w3", "w2") if plain else ("gate_proj", "up_proj", "down_proj")
    (gate, gate_scale), (up, up_scale), (down, down_scale) = map(named, names)

    def stacked(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([a.view(torch.uint8), b.view(torch.uint8)]).flatten(0, 1).view(a.dtype)

    weights = [stacked(gate, up), down]
    if gate_scale is None or up_scale is None or down_scale is None:
        return weights, []
    return weights, [stacked(gate_scale, up_scale), down_scale]


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("family", published.FAMILIES)
def test_reads_every_expert_as_stored(family: str, tmp_path: Path) -> None:
    tensors = published.write(tmp_path, family)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.tensors.keys() == tensors.keys()
    assert (checkpoint.num_experts, checkpoint.hidden_size, checkpoint.intermediate_size) == (
        EXPERTS,
        HIDDEN,
        INTERMEDIATE,
    )
    assert len(checkpoint.layers) == (1 if family in ("deepseek_v3", "kimi_k3") else 2)
    for layer in checkpoint.layers:
        whole = checkpoint.load(layer)
        for index in range(EXPERTS):
            one = checkpoint.expert(layer, index)
            weights, scales = parts(tensors, layer, index)
            for name, want in zip(("gate_up", "down", "gate_up_scale", "down_scale"), weights + scales, strict=False):
                for got in (getattr(one, name), getattr(whole, name)[index]):
                    assert_same_bits(as_bytes(got), as_bytes(want), f"{name} of {layer}, expert {index}")
            assert (one.gate_up_scale is None) == (not scales)
            assert one.format == whole.format == checkpoint.storage(layer).format
    for name, tensor in tensors.items():
        assert_same_bits(as_bytes(checkpoint.tensor(name)), as_bytes(tensor), name)


@pytest.mark.parametrize("progress", [True, False, None])
def test_bars_are_drawn_where_they_are_asked_for(
    progress: bool | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Captured output is no terminal."""
    published.write(tmp_path, "mixtral")
    capsys.readouterr()  # Transformers' own bars
    checkpoint = Checkpoint(tmp_path, progress=progress)
    checkpoint.load(checkpoint.layers[1])
    drawn, full = capsys.readouterr().err, "#" * 30
    for what in ("headers", checkpoint.layers[1]):
        assert (f"{what} [{full}] " in drawn) == bool(progress), what
    assert bool(drawn) == bool(progress)


def test_writes_to_a_tensor_do_not_reach_the_file(tmp_path: Path) -> None:
    tensors = published.write(tmp_path, "mixtral")
    checkpoint = Checkpoint(tmp_path)
    name = next(iter(tensors))
    checkpoint.tensor(name).zero_()
    assert_same_bits(checkpoint.tensor(name), tensors[name], name)


def test_reads_experts_in_the_memory_of_one(tmp_path: Path) -> None:
    """96 MiB of experts, read one after another, leave no more than a few of them resident."""
    E, H, I = 96, 512, 512
    config = {"num_local_experts": E, "hidden_size": H, "intermediate_size": I}
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = [f"model.layers.0.mlp.experts.{e}.{m}_proj.weight" for e in range(E) for m in ("gate", "up", "down")]
    ones = torch.ones(H, I, dtype=torch.bfloat16)
    plan = dict.fromkeys(names, Planned(ones.dtype, (H, I)))
    write_shard(tmp_path / "model.safetensors", plan, ((name, ones) for name in names), {})

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    checkpoint = Checkpoint(tmp_path)
    before, most = resident(), 0
    for index in range(E):
        expert = checkpoint.expert("model.layers.0.mlp", index)
        assert bool((expert.gate_up == 1).all())
        assert bool((expert.down == 1).all())
        most = max(most, resident() - before)
    assert most < 16 << 20


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("intact")
    published.write(folder, "deepseek_v4")
    return folder


VICTIM = "layers.1.ffn.experts.2.w3.weight"


def victim_file(folder: Path) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][VICTIM]


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Changes the tensors of the victim's shard; the index stays as it was."""
    file = victim_file(folder)
    tensors = {name: entry.read().clone() for name, entry in read_header(file)[0].items()}
    change(tensors)
    plan = {name: Planned(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_shard(file, plan, tensors.items(), {})


def edit_header(folder: Path, old: str, new: str) -> None:
    """Replaces text in the victim's header by text of the same length."""
    assert len(old) == len(new)
    file = victim_file(folder)
    data = file.read_bytes()
    assert data.count(old.encode()) >= 1
    file.write_bytes(data.replace(old.encode(), new.encode(), 1))


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def missing(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.__delitem__(VICTIM))


def missing_everywhere(folder: Path) -> None:
    missing(folder)
    edit_index(folder, lambda where: where.__delitem__(VICTIM))


def missing_scale(folder: Path) -> None:
    scale = VICTIM.replace(".weight", ".scale")
    rewrite(folder, lambda tensors: tensors.__delitem__(scale))
    edit_index(folder, lambda where: where.__delitem__(scale))


def cut_off(folder: Path) -> None:
    file = victim_file(folder)
    os.truncate(file, file.stat().st_size - 1)


def longer(folder: Path) -> None:
    with open(victim_file(folder), "ab") as file:
        file.write(b"\0")


def twice_in_a_file(folder: Path) -> None:
    other = VICTIM.replace(".w3.", ".w1.")
    edit_header(folder, f'"{other}"', f'"{VICTIM}"')


def twice_in_two_files(folder: Path) -> None:
    file = victim_file(folder)
    other = next(path for path in folder.glob("*.safetensors") if path != file)
    tensors = {name: entry.read().clone() for name, entry in read_header(other)[0].items()}
    tensors[VICTIM] = read_header(file)[0][VICTIM].read()
    plan = {name: Planned(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_shard(other, plan, tensors.items(), {})


def misshapen(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({VICTIM: tensors[VICTIM][:, :-1].contiguous()}))


def misshapen_scale(folder: Path) -> None:
    scale = VICTIM.replace(".weight", ".scale")
    rewrite(folder, lambda tensors: tensors.update({scale: tensors[scale][:-1].contiguous()}))


def other_format(folder: Path) -> None:
    bf16 = torch.zeros(INTERMEDIATE, HIDDEN, dtype=torch.bfloat16)
    scale = VICTIM.replace(".weight", ".scale")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[VICTIM] = bf16
        del tensors[scale]

    rewrite(folder, change)
    edit_index(folder, lambda where: where.__delitem__(scale))


def unknown_name(folder: Path) -> None:
    other = VICTIM.replace(".w3.", ".w7.")
    edit_header(folder, f'"{VICTIM}"', f'"{other}"')
    edit_index(folder, lambda where: where.update({other: where.pop(VICTIM)}))


def one_expert_too_many(folder: Path) -> None:
    other = VICTIM.replace("experts.2", "experts.9")
    edit_header(folder, f'"{VICTIM}"', f'"{other}"')
    edit_index(folder, lambda where: where.update({other: where.pop(VICTIM)}))


def no_shard(folder: Path) -> None:
    victim_file(folder).unlink()


def pipe(folder: Path) -> None:
    file = victim_file(folder)
    file.unlink()
    os.mkfifo(file)


def no_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": "64"}))


def path_outside(folder: Path) -> None:
    edit_index(folder, lambda where: where.update({VICTIM: "../model.safetensors"}))


FILE, TENSOR = "model-0000", VICTIM
DAMAGE: list[tuple[Callable[[Path], None], tuple[str, ...]]] = [
    (missing, (FILE, TENSOR, "is missing, though")),
    (missing_everywhere, ("layers.1.ffn.experts.2: up: the weight is missing",)),
    (missing_scale, (FILE, TENSOR, "scales are missing")),
    (cut_off, (FILE, "cut off", "tensor ")),
    (longer, (FILE, "1 bytes after the last tensor")),
    (twice_in_a_file, (FILE, TENSOR, "twice")),
    (twice_in_two_files, (FILE, TENSOR, "is also in model-0000")),
    (misshapen, (FILE, TENSOR, "[128, 128]", "I8 [128, 127]")),
    (misshapen_scale, (FILE, TENSOR.replace(".weight", ".scale"), "[128, 8]", "F8_E8M0 [127, 8]")),
    (other_format, (FILE, TENSOR, "is dense", "others of its layer are mxfp4")),
    (unknown_name, (FILE, "experts.2.w7.weight", "layout that is not known")),
    (one_expert_too_many, (FILE, "experts.9.w3.weight", "expected 4 experts")),
    (no_shard, (FILE, "cannot be read")),
    (pipe, (FILE, "not a regular file")),
    (no_size, ("config.json", "hidden_size: expected a positive size, got '64'")),
    (path_outside, (INDEX, TENSOR, "../model.safetensors")),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGE, ids=[damage.__name__ for damage, _ in DAMAGE])
def test_damage_is_named(damage: Callable[[Path], None], words: tuple[str, ...], intact: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(intact, tmp_path / "damaged")
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    for word in words:
        assert word in str(caught.value)


def test_a_layer_that_is_not_there(intact: Path) -> None:
    checkpoint = Checkpoint(intact)
    for ask in (checkpoint.storage, checkpoint.load, lambda layer: checkpoint.expert(layer, 0)):
        with pytest.raises(
            CheckpointError, match=r"layer 'layers\.9\.ffn': expected one of \.layers, such as 'layers\.0"
        ):
            ask("layers.9.ffn")


def test_a_layer_whose_number_is_long(tmp_path: Path) -> None:
    tensors, number = published.write(tmp_path, "mixtral"), "9" * 5000
    published.write_shards(tmp_path, {n.replace("layers.1.", f"layers.{number}."): t for n, t in tensors.items()})
    assert Checkpoint(tmp_path).layers == tuple(f"model.layers.{n}.block_sparse_moe" for n in (number, "0"))


def test_a_file_that_shrinks_while_it_is_open(intact: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(intact, tmp_path / "damaged")
    checkpoint = Checkpoint(folder)
    os.truncate(victim_file(folder), 64)
    with pytest.raises(CheckpointError, match="became shorter"):
        checkpoint.expert("layers.1.ffn", 2)


def read_all(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    for layer in checkpoint.layers:
        checkpoint.load(layer)
    for name in checkpoint.tensors:
        checkpoint.tensor(name)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One of: bits flipped near the beginning, a piece cut out, doubled, or replaced by noise, the end cut off."""
    near = min(len(data), rng.choice([8, 64, 1024, 1 << 14, 1 << 30]))
    begin = rng.randrange(near)
    end = min(len(data), begin + rng.choice([1, 1, 2, 8, 100]))
    match rng.randrange(5):
        case 0:
            changed = bytearray(data)
            for _ in range(rng.choice([1, 3, 20])):
                changed[rng.randrange(near)] ^= 1 << rng.randrange(8)
            return bytes(changed)
        case 1:
            return data[:begin] + data[end:]
        case 2:
            return data[:end] + data[begin:]
        case 3:
            return data[:begin] + rng.randbytes(end - begin) + data[end:]
        case _:
            return data[:begin]


# What random bytes seldom hit: JSON that is valid and wrong.
WORDS = [
    '"I8"',
    '"shape"',
    "[128,128]",
    "0",
    "1",
    "128",
    "w1",
    "w3",
    ".scale",
    "experts.2",
    "weight",
    ":",
    ",",
    "layers",
]
REPLACEMENTS = ["-1", "1e9", "99999999999999999999", "null", "true", '"BF16"', "[]", "{}", "[" * 5000, "NaN", "1.5", ""]


def replace_words(data: bytes, rng: random.Random) -> bytes:
    word, replacement = rng.choice(WORDS).encode(), rng.choice([*WORDS, *REPLACEMENTS]).encode()
    places = [i for i in range(min(len(data), 1 << 14)) if data.startswith(word, i)]
    if not places:
        return mutate(data, rng)
    begin = rng.choice(places)
    return data[:begin] + replacement + data[begin + len(word) :]


def test_fuzz(intact: Path, tmp_path: Path, seed: int) -> None:
    """Damaged headers, indexes and configs are read or refused; nothing else, and in bounded time."""
    rng = random.Random(seed)
    files = sorted(path for path in intact.iterdir())
    refusals = []
    for _ in range(250):
        victim = rng.choice(files)
        folder = tmp_path / "damaged"
        folder.mkdir()
        for file in files:
            if file != victim:
                (folder / file.name).symlink_to(file)
        change = rng.choice([mutate, replace_words])
        (folder / victim.name).write_bytes(change(victim.read_bytes(), rng))
        started = time.monotonic()
        try:
            read_all(folder)
        except CheckpointError as error:
            refusals.append(str(error))
        assert time.monotonic() - started < 10
        shutil.rmtree(folder)
    assert len(refusals) > 50
    assert all(str(tmp_path) in refusal for refusal in refusals)
