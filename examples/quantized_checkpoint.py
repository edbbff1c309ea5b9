"""A dense checkpoint, its experts quantised, and the result in Transformers on the CPU without being expanded again.

    python examples/quantized_checkpoint.py         # a small Qwen3-MoE with random weights
    python examples/quantized_checkpoint.py FOLDER  # a bf16 checkpoint on disk, such as Qwen3-MoE, Mixtral or gpt-oss

Prints, for fp8 and mxfp4, the bytes of the checkpoint, the relative error of the logits, how the first layer runs, and
whether greedy generation goes the same way.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import polymoe
from polymoe.checkpoint import quantize
from polymoe.integrations.transformers import quantized

NEW_TOKENS = 8


def write_small(folder: Path) -> None:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=256,
        moe_intermediate_size=128,
        num_experts=8,
        num_experts_per_tok=4,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@torch.no_grad()
def run(folder: Path, experts: str | None, prompt: Tensor | None) -> tuple[Tensor, Tensor, Tensor, str]:
    """A prompt, its logits, the tokens after it, and how the first layer's experts run, if by polymoe."""
    options = {} if experts is None else {"experts_implementation": experts}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True, **options).eval()
    if prompt is None:
        prompt = torch.randint(model.config.get_text_config().vocab_size, (1, 32))
    tokens = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)[:, prompt.shape[1] :]
    how = next((str(how) for name, how in polymoe.explain(model).modules.items() if name.endswith(".experts")), "")
    return prompt, model(prompt).logits.float(), tokens, how


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    source: Path | None = parser.parse_args().folder
    quantized.enable()  # Transformers would expand the checkpoints to bf16
    with tempfile.TemporaryDirectory() as scratch:
        if source is None:
            source = Path(scratch) / "bf16"
            write_small(source)
        prompt, want, tokens, _ = run(source, "eager", None)
        print(f"bf16: {size(source) >> 10} KiB")
        for format in ("fp8", "mxfp4"):
            folder = Path(scratch) / format
            quantize(source, folder, format)  # as `polymoe quantize SOURCE FOLDER --format ...` does
            _, got, new_tokens, how = run(folder, None, prompt)
            error = (got - want).norm() / want.norm()
            same = int((new_tokens == tokens).long().cumprod(1).sum())
            print(f"{format}: {size(folder) >> 10} KiB, logits off by {error:.4f}, the same first {same} tokens")
            print(f"  {how}")


if __name__ == "__main__":
    main()
