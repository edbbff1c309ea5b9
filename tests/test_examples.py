"""The examples, and the code in the README, run as they stand."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SNIPPETS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_readme_has_its_snippets() -> None:
    assert len(SNIPPETS) == 4


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_readme_snippet(number: int) -> None:
    run("-c", SNIPPETS[number])


def test_functional_ops() -> None:
    assert "experts equals its parts to the bit: True" in run("examples/functional_ops.py")


def test_new_backend() -> None:
    out = run("examples/new_backend.py")
    assert "backend: sparse (explicit argument); neither deterministic nor batch-invariant" in out
    assert "got 'sparse': its matrices are float32, not torch.bfloat16" in out
    assert float(re.search(r"largest difference from the usual combine: (\S+)", out)[1]) < ROUNDING
    assert re.search(r"conformance: \d+ float32 cases of combine are right", out)


# Sums of up to 256 terms in another order are off by some sqrt(256) roundings, in each of two matmuls of two layers.
ROUNDING = 64 * torch.finfo(torch.float32).eps


def check_dropin(out: str) -> None:
    assert float(re.search(r"logits, float32: relative difference (\S+)", out)[1]) < ROUNDING
    assert re.search(r"^model\.layers\.0\b", out, re.MULTILINE)
    assert "polymoe.experts on cpu, float32" in out


def test_transformers_dropin() -> None:
    out = run("examples/transformers_dropin.py")
    check_dropin(out)
    assert "greedy generation, 16 tokens: the same" in out


def test_transformers_dropin_from_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[UNK]", "let", "there", "be", "light"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(tmp_path)
    sizes = {"vocab_size": 5, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "eos_token_id": None, "bos_token_id": None}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(tmp_path)
    example = str(ROOT / "examples" / "transformers_dropin.py")
    monkeypatch.setattr(sys, "argv", [example, str(tmp_path), "let there be light"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(example, run_name="__main__")
    out = capsys.readouterr().out
    check_dropin(out)
    assert "prefill of 4:" in out


def test_quantized_checkpoint() -> None:
    out = run("examples/quantized_checkpoint.py")
    sizes = [int(size) for size in re.findall(r"(\d+) KiB", out)]
    assert len(sizes) == 3
    assert sizes[0] > sizes[1] > sizes[2]
    errors = [float(error) for error in re.findall(r"logits off by (\S+),", out)]
    assert 0 < errors[0] < errors[1] < 0.3
    assert "fp8_block128" in out
    assert "mxfp4" in out


def test_demo_at_its_smallest() -> None:
    out = run("examples/demo_deepseek_v4.py", "--quick", "--experts", "6")
    assert "polymoe.experts ran 2 times for 2 MoE layers: backend" in out
    assert len(re.findall(r"^\| (?:decode|prefill \d+) .*\|$", out, re.MULTILINE)) == 15


def test_train_tiny_moe_at_its_smallest(tmp_path: Path) -> None:
    sizes = {"steps": 4, "batch": 2, "length": 16, "hidden": 32, "experts": 6, "layers": 2, "out": tmp_path / "out.png"}
    out = run("examples/train_tiny_moe.py", "--control", *(f"--{name}={value}" for name, value in sizes.items()))
    assert len(re.findall(r"^\| (?:eager|polymoe|eager, moved) \|(?: \S+ \|){3} \S+, \S+ \|$", out, re.MULTILINE)) == 3
    assert float(re.search(r"largest difference of the two losses: (\S+)", out)[1]) < 1e-3
    assert float(re.search(r"of eager's from one ulp away at the start: (\S+)", out)[1]) < 1e-3
    drawn = (tmp_path / "out.png").exists()
    assert ("no picture: matplotlib is not installed" in out) != drawn


def test_quantized_perplexity_at_its_smallest(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    run("examples/quantized_perplexity.py", "--steps=1", "--hidden=32", "--held-out=400", f"--out={page}")
    rows = re.findall(r"^\| (\w+) \| (\w*) +\| (\S+) \| (\S+) \| \S+% \|$", page.read_text(), re.MULTILINE)
    assert [row[0] for row in rows[:2]] == ["float32", "bf16"]
    assert {row[0] for row in rows if row[1] == "int8"} == {"mxfp4", "int8", "int4_g32", "int4_g64", "int4_g128"}
    assert all(1 < float(row[3]) < 1e4 for row in rows)  # 256 for a model that knows nothing
