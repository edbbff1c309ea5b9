"""A Transformers model with its experts computed by polymoe: one argument, or one call on a loaded model.

    python examples/transformers_dropin.py                # a tiny Qwen3-MoE with random weights
    python examples/transformers_dropin.py PATH [PROMPT]  # a checkpoint on disk, in the dtype it was saved in

Prints how far the logits are from those of Transformers' own eager path, how long both take, whether greedy generation
gives the same tokens, and what ran in each layer. Exits with 1 if polymoe did not run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3MoeConfig

import polymoe
import polymoe.integrations.transformers  # registers the experts implementation "polymoe"

NEW_TOKENS = 16


def tiny_model() -> PreTrainedModel:
    config = Qwen3MoeConfig(
        vocab_size=512,
        hidden_size=256,
        moe_intermediate_size=128,
        num_experts=32,
        num_experts_per_tok=4,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        norm_topk_prob=True,
    )
    return AutoModelForCausalLM.from_config(config)


def load(path: str | None, prompt: str) -> tuple[PreTrainedModel, Tensor]:
    """A model and the tokens of a prompt, [1, T]."""
    if path is None:
        return tiny_model().eval(), torch.randint(0, 512, (1, 64))
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return model.eval(), tokenizer(prompt, return_tensors="pt").input_ids


def timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The result of a second call, and its milliseconds: the first warms up."""
    call()
    start = time.perf_counter()
    result = call()
    return result, (time.perf_counter() - start) * 1e3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", help="folder of a checkpoint; without one, a tiny random Qwen3-MoE")
    parser.add_argument("prompt", nargs="?", default="In the beginning", help="for a checkpoint")
    options = parser.parse_args()
    model, tokens = load(options.path, options.prompt)

    logits: dict[str, Tensor] = {}
    new_tokens: dict[str, list[int]] = {}
    for implementation in ("eager", "polymoe"):
        model.set_experts_implementation(implementation)  # or from_pretrained(..., experts_implementation="polymoe")
        with torch.no_grad():
            logits[implementation], prefill = timed(lambda: model(tokens).logits.float())
            start = time.perf_counter()
            generated = model.generate(tokens, max_new_tokens=NEW_TOKENS, do_sample=False)
        new_tokens[implementation] = generated[0, tokens.shape[1] :].tolist()
        decode = (time.perf_counter() - start) * 1e3
        print(f"{implementation:8} prefill of {tokens.shape[1]}: {prefill:.1f} ms, generate: {decode:.1f} ms")

    error = (logits["polymoe"] - logits["eager"]).norm() / logits["eager"].norm()
    print(f"logits, {str(model.dtype).removeprefix('torch.')}: relative difference {error.item():.1e}")
    same = new_tokens["polymoe"] == new_tokens["eager"]
    print(f"greedy generation, {len(new_tokens['eager'])} tokens: {'the same' if same else 'different'}")
    explanation = polymoe.explain(model)
    print(explanation)
    if not explanation.modules:
        print("polymoe ran nothing: is this a MoE model whose experts class takes an experts implementation?")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
