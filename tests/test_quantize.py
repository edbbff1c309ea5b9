"""polymoe quantize: dense checkpoints rewritten with quantised experts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import published
import pytest
import torch
from published import EXPERTS
from torch import Tensor

from polymoe.__main__ import main
from polymoe.checkpoint import Checkpoint, CheckpointError, quantize
from polymoe.checkpoint.quantize import FORMATS, UNFINISHED
from polymoe.checkpoint.shards import Planned, write_shard
from polymoe.formats import parse
from polymoe.testing.tolerances import assert_same_bits

INDEX = "model.safetensors.index.json"
DENSE = ("qwen3_moe", "mixtral", "gpt_oss_bf16")


@pytest.fixture(autouse=True)
def seeded(seed: int) -> None:
    torch.manual_seed(seed)


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", DENSE)
def test_round_trip(family: str, format: str, tmp_path: Path) -> None:
    """Every expert is what `polymoe.formats` makes of its matrices, and every other tensor what it was."""
    published.write(tmp_path / "in", family)
    quantize(tmp_path / "in", tmp_path / "out", format)
    before, after, known = Checkpoint(tmp_path / "in"), Checkpoint(tmp_path / "out"), parse(FORMATS[format])
    assert after.layers == before.layers
    for layer in before.layers:
        assert after.storage(layer).format == format
        whole = after.load(layer)
        for index in range(EXPERTS):
            dense, one = before.expert(layer, index), after.expert(layer, index)
            assert (one.interleaved, one.transposed) == (dense.interleaved, False)
            for name in ("gate_up", "down"):
                matrix = getattr(dense, name)
                want = known.quantize(matrix.mT if dense.transposed else matrix)
                for got in (one, whole):
                    data, scale = getattr(got, name), getattr(got, f"{name}_scale")
                    lead = () if got is one else (index,)
                    assert data[lead].shape == want.data.shape
                    assert scale[lead].shape == want.scale.shape
                    assert_same_bits(raw(data[lead]), raw(want.data), f"{name} of {layer}, expert {index}")
                    assert_same_bits(raw(scale[lead]), raw(want.scale), f"scales of {name} of {layer}, expert {index}")
    for name, entry in before.tensors.items():
        if ".experts." not in name or name.endswith("_bias"):
            assert_same_bits(raw(after.tensor(name)), raw(entry.read()), name)
    stored = sum(entry.nbytes for entry in after.tensors.values())
    assert json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]["total_size"] == stored
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {path.name for path in (tmp_path / "in").iterdir()}


def test_gpt_oss_gets_its_published_layout(tmp_path: Path) -> None:
    tensors = published.write(tmp_path / "published", "gpt_oss")
    published.write(tmp_path / "in", "gpt_oss_bf16")
    quantize(tmp_path / "in", tmp_path / "out", "mxfp4")
    made = Checkpoint(tmp_path / "out")
    assert {name: str(entry) for name, entry in made.tensors.items()} == {
        name: published.described(tensor) for name, tensor in tensors.items()
    }
    assert made.config["quantization_config"]["quant_method"] == "mxfp4"


@pytest.mark.parametrize("ragged", [(200, 328), (96, 40)])
@pytest.mark.parametrize("format", ["fp8", "int8", "int4"])
def test_widths_that_no_block_divides(format: str, ragged: tuple[int, int], tmp_path: Path) -> None:
    """gate and up have blocks of their own, fused or apart."""
    H, I = ragged
    (tmp_path / "in").mkdir()
    config = {"num_local_experts": 2, "hidden_size": H, "intermediate_size": I}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    tensors = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.randn(2, 2 * I, H).bfloat16(),
        "model.layers.0.mlp.experts.down_proj": torch.randn(2, H, I).bfloat16(),
    }
    plan = {name: Planned(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_shard(tmp_path / "in" / "model.safetensors", plan, tensors.items(), {})
    quantize(tmp_path / "in", tmp_path / "out", format)
    after, known = Checkpoint(tmp_path / "out"), parse(FORMATS[format])
    for index in range(2):
        one = after.expert("model.layers.0.mlp", index)
        gate, up = (known.quantize(half) for half in tensors["model.layers.0.mlp.experts.gate_up_proj"][index].chunk(2))
        for name, got, want in (
            ("data", one.gate_up, (gate.data, up.data)),
            ("scale", one.gate_up_scale, (gate.scale, up.scale)),
        ):
            assert got is not None
            assert_same_bits(raw(got), torch.cat([raw(part) for part in want]), f"{name} of gate_up, expert {index}")
    assert not (tmp_path / "out" / INDEX).exists()


def command(source: Path, target: Path, format: str) -> list[str]:
    return [sys.executable, "-m", "polymoe", "quantize", str(source), str(target), "--format", format]


def large(folder: Path, layers: int = 8) -> None:
    """As many shards as layers, each slow enough to be interrupted."""
    folder.mkdir()
    sizes = {"num_experts": 4, "hidden_size": 512, "moe_intermediate_size": 512}
    (folder / "config.json").write_text(json.dumps(sizes))
    (folder / "tokenizer.json").write_text("{}")
    where = {}
    for layer in range(layers):
        names = [
            f"model.layers.{layer}.mlp.experts.{e}.{m}_proj.weight" for e in range(4) for m in ("gate", "up", "down")
        ]
        tensors = {name: torch.randn(512, 512).bfloat16() for name in names}
        file = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        write_shard(folder / file, {n: Planned(t.dtype, (512, 512)) for n, t in tensors.items()}, tensors.items(), {})
        where.update(dict.fromkeys(names, file))
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    source, target, whole = tmp_path / "in", tmp_path / "out", tmp_path / "whole"
    large(source)
    process = subprocess.Popen(command(source, target, "int8"), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list(target.glob("*.safetensors")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not (target / UNFINISHED).exists():
        pytest.fail("the run ended before it could be killed")
    assert not (target / "config.json").exists()
    done = {path.name: path.stat().st_mtime_ns for path in target.glob("*.safetensors")}
    assert 0 < len(done) < 8
    with pytest.raises(CheckpointError, match="another source or format"):
        quantize(source, target, "fp8")
    subprocess.run(command(source, target, "int8"), check=True, capture_output=True)
    assert {name: (target / name).stat().st_mtime_ns for name in done} == done
    quantize(source, whole, "int8")
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }


PEAK = """
import resource, sys
from polymoe.checkpoint import quantize

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

quantize(sys.argv[1], sys.argv[3], "int8")  # what a run takes at all
before = peak()
quantize(sys.argv[2], sys.argv[4], "int8")
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """63 MB of experts in the memory of a few tensors."""
    large(tmp_path / "small", layers=1)
    large(tmp_path / "large", layers=10)
    folders = [str(tmp_path / name) for name in ("small", "large", "small_out", "large_out")]
    done = subprocess.run([sys.executable, "-c", PEAK, *folders], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 24 << 10  # KiB


def test_nothing_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published.write(tmp_path / "in", "mixtral")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    monkeypatch.setattr(sys, "argv", command(tmp_path / "in", tmp_path / "out", "fp8")[2:])
    with pytest.raises(SystemExit, match="exists and is not empty"):
        main()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    (tmp_path / "out" / "mine").unlink()
    main()
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        quantize(tmp_path / "in", tmp_path / "out", "fp8")
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        quantize(tmp_path / "in", tmp_path / "in", "fp8")


def test_what_a_killed_run_may_leave_before_its_mark(tmp_path: Path) -> None:
    published.write(tmp_path / "in", "mixtral")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{UNFINISHED}.partial").write_bytes(b"{")
    quantize(tmp_path / "in", tmp_path / "out", "int8")
    assert Checkpoint(tmp_path / "out").storage("model.layers.0.block_sparse_moe").format == "int8"


def test_a_source_with_more_than_a_checkpoint_needs(tmp_path: Path) -> None:
    """A link to nowhere is no file, and the metadata of an index may be anything."""
    published.write(tmp_path / "in", "mixtral")
    (tmp_path / "in" / "dangling").symlink_to(tmp_path / "nowhere")
    index = json.loads((tmp_path / "in" / INDEX).read_text())
    (tmp_path / "in" / INDEX).write_text(json.dumps({**index, "metadata": None}))
    quantize(tmp_path / "in", tmp_path / "in" / "out", "int8")
    written = json.loads((tmp_path / "in" / "out" / INDEX).read_text())
    assert written["metadata"]["total_size"] > 0
    assert written["weight_map"].keys() == Checkpoint(tmp_path / "in" / "out").tensors.keys()


def test_targets_that_cannot_be_written(tmp_path: Path) -> None:
    published.write(tmp_path / "in", "mixtral")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"file/out: cannot be written: .*Not a directory"):
        quantize(tmp_path / "in", tmp_path / "file" / "out", "int8")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / UNFINISHED).write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match="another source or format"):
        quantize(tmp_path / "in", tmp_path / "out", "int8")


def test_quantised_experts_and_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    published.write(tmp_path / "v3", "deepseek_v3")
    with pytest.raises(CheckpointError, match=r"experts\.0\..*expected dense experts, got fp8"):
        quantize(tmp_path / "v3", tmp_path / "out", "mxfp4")
    tensors = published.write(tmp_path / "in", "qwen3_moe")
    victim = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensors[victim][3, 5] = torch.nan
    published.write_shards(tmp_path / "in", tensors)
    with pytest.raises(CheckpointError, match=rf"{victim}.*finite"):
        quantize(tmp_path / "in", tmp_path / "out", "mxfp4")
