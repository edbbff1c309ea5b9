"""generate() with polymoe's experts gives eager's tokens: greedy, 64, in float32, with and without torch.compile.

Compiled as Transformers' documentation does it, which on a CPU has to be done by hand: a static cache, and the model's
forward through torch.compile(fullgraph=True), so that a graph break around the experts fails. DeepSeek-V4 has no static
cache in Transformers: there the MoE blocks are compiled, each as a full graph. They go through aot_eager, which traces
and functionalises as inductor does but generates no code; inductor itself takes minutes, and one model among the slow
tests.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import zoo
from experts_modules import float32_bound, watch_experts
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import PreTrainedModel
from zoo.shrink import VOCAB

from polymoe.integrations.undecorated import replace_experts

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "deepseek_v4", "gpt_oss", "olmoe", "llama4", "glm4_moe")
TOKENS = 64


@pytest.fixture(autouse=True)
def seeded(seed: int) -> Iterator[None]:
    """One thread: more would only wait for one another here."""
    torch.manual_seed(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def generate(model: PreTrainedModel, prompt: Tensor, cache: str | None = None) -> tuple[Tensor, Tensor]:
    """Tokens [1, T], and the logits [TOKENS, VOCAB] that chose the new ones."""
    out = model.generate(
        prompt,
        max_new_tokens=TOKENS,
        do_sample=False,
        cache_implementation=cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences, torch.cat(out.logits)


def decisive_prompt(model: PreTrainedModel, layers: int) -> tuple[Tensor, Tensor]:
    """A prompt after which no two best tokens are ever within the bound of the logits' error, and eager's tokens."""
    for _ in range(20):
        prompt = torch.randint(VOCAB, (1, 9))
        tokens, logits = generate(model, prompt)
        best = logits.topk(2).values
        if (best[:, 0] - best[:, 1] > 2 * float32_bound(layers) * logits.norm(dim=-1)).all():
            return prompt, tokens
    raise AssertionError("after every prompt two best tokens are within rounding of one another")


def use_polymoe(family: str, model: PreTrainedModel) -> int:
    """Returns how many layers it serves."""
    if family == "llama4":
        return len(replace_experts(model))
    model.set_experts_implementation("polymoe")
    return len(zoo.experts_modules(model))


def eager_and_ours(family: str) -> tuple[PreTrainedModel, int, Tensor, Tensor]:
    """The model, served by polymoe in so many layers; a prompt; eager's tokens."""
    model = zoo.tiny_model(family)
    if family != "llama4":
        model.set_experts_implementation("eager")
    prompt, expected = decisive_prompt(model, model.config.num_hidden_layers)
    return model, use_polymoe(family, model), prompt, expected


@pytest.mark.parametrize("family", FAMILIES)
def test_same_tokens(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, layers, prompt, expected = eager_and_ours(family)
    calls = watch_experts(monkeypatch)
    assert torch.equal(generate(model, prompt)[0], expected)
    assert len(calls) == TOKENS * layers
    assert min(calls) >= 2


@pytest.mark.parametrize(
    ("family", "backend"),
    [*((family, "aot_eager") for family in FAMILIES), pytest.param("qwen3_moe", "inductor", marks=pytest.mark.slow)],
)
def test_same_tokens_compiled(family: str, backend: str) -> None:
    model, layers, prompt, expected = eager_and_ours(family)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend(backend)
    if family == "deepseek_v4":
        for layer in model.model.layers:
            layer.mlp.compile(fullgraph=True, backend=graphs)
        got, _ = generate(model, prompt)
    else:
        model.forward = torch.compile(model.forward, fullgraph=True, backend=graphs)
        got, _ = generate(model, prompt, "static")
    assert torch.equal(got, expected)
    held = [
        sum(node.target is torch.ops.polymoe.experts.default for node in graph.graph.nodes) for graph in graphs.graphs
    ]
    assert held
    assert set(held) == {1 if family == "deepseek_v4" else layers}
