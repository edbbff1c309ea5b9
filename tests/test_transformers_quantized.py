"""Published FP8, FP4 and MXFP4 checkpoints in Transformers on the CPU, as they are stored."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import published
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

import polymoe
from polymoe.checkpoint import Checkpoint, quantize
from polymoe.formats import Weight, parse
from polymoe.integrations.transformers import quantized
from polymoe.testing.tolerances import assert_same_bits

# Stored weights are exact in float32, so only the order of sums of some 256 terms differs, in a dozen products.
ROUNDING = 64 * torch.finfo(torch.float32).eps

FAMILIES = {
    # a parameter of the experts, its dtype and its format
    "deepseek_v3": ("gate_up_proj", torch.float8_e4m3fn, "fp8_block128"),
    "deepseek_v4": ("gate_up_proj", torch.int8, "mxfp4"),
    "gpt_oss": ("gate_up_proj_blocks", torch.uint8, "mxfp4"),
}


@pytest.fixture(autouse=True)
def served(seed: int) -> Iterator[None]:
    torch.manual_seed(seed)
    quantized.enable()
    yield
    quantized.disable()


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def dequantised(folder: Path, tensors: dict[str, Tensor]) -> PreTrainedModel:
    """The model of the same weights in float32, from a checkpoint without a quantisation, by Transformers alone."""
    dense: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        known, scale = format_of(name, tensors)
        if known is not None:
            rows, width = tensor.flatten(-2).shape[-2:] if name.endswith("_blocks") else tensor.shape[-2:]
            data = tensor.flatten(-2) if name.endswith("_blocks") else tensor
            weight = Weight(data, tensors[scale], None, known, rows, 2 * width if known == "mxfp4" else width)
            value = parse(known).dequantize(weight)
            dense[name.removesuffix("_blocks")] = value.mT.contiguous() if name.endswith("_blocks") else value
        elif not name.endswith(("scale", "scales", "scale_inv")) or (tensor.dtype == torch.float32 and "hc_" in name):
            dense[name] = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    config = json.loads((folder / "config.json").read_text())
    other = folder / "dequantised"
    other.mkdir()
    kept = {entry: value for entry, value in config.items() if entry not in ("quantization_config", "expert_dtype")}
    (other / "config.json").write_text(json.dumps(kept))
    published.write_shards(other, dense)
    return load(other, experts_implementation="eager")


def format_of(name: str, tensors: dict[str, Tensor]) -> tuple[str | None, str]:
    """The format of a quantised tensor and the name of its scales."""
    for scale in (f"{name}_scale_inv", name.removesuffix("weight") + "scale", name.replace("_blocks", "_scales")):
        if scale in tensors and scale != name:
            return "fp8_block128" if tensors[name].dtype == torch.float8_e4m3fn else "mxfp4", scale
    return None, ""


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_dequantised_model(family: str, tmp_path: Path) -> None:
    """And it generates, and says how it runs."""
    tensors = published.write(tmp_path, family)
    model, want = load(tmp_path), dequantised(tmp_path, tensors)
    name, dtype, weight_format = FAMILIES[family]
    experts = [module for path, module in model.named_modules() if path.endswith(".experts")]
    assert experts
    for module in experts:
        assert getattr(module, name).dtype == dtype
    prompt = torch.randint(published.VOCAB, (2, 12))
    with torch.no_grad():
        got, expected = model(prompt).logits, want(prompt).logits
    assert (got - expected).norm() < ROUNDING * expected.norm()
    tokens = model.generate(prompt, max_new_tokens=5, do_sample=False)
    assert tokens.shape == (2, 17)
    explained = str(polymoe.explain(model))
    assert weight_format in explained
    assert "fused: swiglu" in explained


@pytest.mark.parametrize("family", FAMILIES)
def test_saves_the_published_layout(family: str, tmp_path: Path) -> None:
    tensors = published.write(tmp_path / "in", family)
    load(tmp_path / "in", torch.bfloat16).save_pretrained(tmp_path / "out")
    saved: dict[str, Tensor] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        saved |= load_file(file)
    assert {n: published.described(t) for n, t in saved.items()} == {
        n: published.described(t) for n, t in tensors.items()
    }
    for name, tensor in tensors.items():
        assert_same_bits(raw(saved[name]), raw(tensor), name)
    before, after = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("in", "out"))
    assert after["quantization_config"].items() >= before["quantization_config"].items()
    assert after.get("expert_dtype") == before.get("expert_dtype")


@pytest.mark.parametrize(
    ("family", "format"),
    [("qwen3_moe", "fp8"), ("qwen3_moe", "mxfp4"), ("mixtral", "mxfp4"), ("gpt_oss_bf16", "mxfp4")],
)
def test_what_polymoe_quantize_writes_loads(family: str, format: str, tmp_path: Path) -> None:
    """Experts quantised, everything else as it was."""
    published.write(tmp_path / "in", family)
    quantize(tmp_path / "in", tmp_path / "out", format)
    tensors = {name: entry.read() for name, entry in Checkpoint(tmp_path / "out").tensors.items()}
    model, want = load(tmp_path / "out"), dequantised(tmp_path / "out", tensors)
    assert not any(isinstance(module, quantized.Linear) for module in model.modules())
    experts = {path: module for path, module in model.named_modules() if path.endswith(".experts")}
    assert experts
    assert all(p.element_size() == 1 for m in experts.values() for n, p in m.named_parameters() if n.endswith("proj"))
    prompt = torch.randint(published.VOCAB, (2, 12))
    with torch.no_grad():
        got, expected = model(prompt).logits, want(prompt).logits
    assert (got - expected).norm() < ROUNDING * expected.norm()


def test_linear_layers_stay_fp8(tmp_path: Path) -> None:
    """DeepSeek-V4's attention and shared experts: those in 8 bits, by their names, and no other."""
    tensors = published.write(tmp_path, "deepseek_v4")
    model = load(tmp_path, torch.bfloat16)
    served = [module for module in model.modules() if isinstance(module, (quantized.Linear, quantized.GroupedLinear))]
    stored = [n for n, t in tensors.items() if t.dtype == torch.float8_e4m3fn]
    assert len(served) == len(stored) > 10
    assert any(isinstance(module, quantized.GroupedLinear) for module in served)
    for module in served:
        assert module.weight.dtype == torch.float8_e4m3fn
        assert not module.weight.requires_grad


def test_gradients_reach_behind_quantised_layers(tmp_path: Path) -> None:
    tensors = published.write(tmp_path, "deepseek_v3")
    model, want = load(tmp_path), dequantised(tmp_path, tensors)
    prompt = torch.randint(published.VOCAB, (1, 8))
    found = []
    for each in (model, want):
        embedded = each.get_input_embeddings()(prompt).detach().requires_grad_()
        each(inputs_embeds=embedded).logits.square().sum().backward()
        found.append(embedded.grad)
    assert (found[0] - found[1]).norm() < 1e-3 * found[1].norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(family: str, tmp_path: Path) -> None:
    """To the bit what rows that were cast before give, with the same float32 routing weights; experts return the dtype
    that came, linear layers that of autocast, as torch's do."""
    published.write(tmp_path, family)
    model = load(tmp_path)
    layers = (quantized.Linear, quantized.GroupedLinear)
    seen: list[tuple[nn.Module, tuple[Tensor, ...]]] = []
    watched = [m for name, m in model.named_modules() if name.endswith(".experts") or isinstance(m, layers)]
    for module in watched:
        module.register_forward_pre_hook(lambda module, given: seen.append((module, given)))
    with torch.no_grad():
        model(torch.randint(published.VOCAB, (2, 6)))
        calls = list(seen)
        assert {module for module, _ in calls} == set(watched)
        for module, (x, *routed) in calls:
            want = module(x.bfloat16(), *routed)
            with torch.autocast("cpu", torch.bfloat16):
                got = module(x, *routed)
            assert x.dtype == torch.float32
            assert want.dtype == torch.bfloat16
            assert_same_bits(got, want if isinstance(module, layers) else want.float(), type(module).__name__)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(torch.zeros(1, 3, dtype=torch.int64)).logits.isfinite().all()


def test_optimize_leaves_quantised_experts_alone(tmp_path: Path) -> None:
    published.write(tmp_path, "deepseek_v4")
    model = load(tmp_path, torch.bfloat16)
    before = {name: raw(parameter).clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ValueError, match=r"polymoe\.optimize: model"):
        polymoe.optimize(model)
    for name, parameter in model.named_parameters():
        assert_same_bits(raw(parameter), before.pop(name), name)
    assert not before


def functions() -> dict[tuple[str, ...], FunctionType]:
    """Every function and method of Transformers' modules that are loaded, as it is now."""
    found: dict[tuple[str, ...], FunctionType] = {}
    for module in [name for name in sys.modules if name.startswith("transformers.")]:
        for name, value in list(vars(sys.modules[module]).items()):
            if isinstance(value, FunctionType):
                found[module, name] = value
            elif isinstance(value, type) and value.__module__ == module:
                found |= {(module, name, n): f for n, f in vars(value).items() if isinstance(f, FunctionType)}
    return found


def test_no_function_is_patched(tmp_path: Path) -> None:
    """Transformers itself wraps its FP8Experts' methods where it makes such experts."""
    quantized.disable()
    before = functions()
    assert len(before) > 1000
    quantized.enable()
    published.write(tmp_path, "deepseek_v4")
    load(tmp_path)(torch.zeros(1, 3, dtype=torch.int64))
    after = functions()
    changed = {name for name, function in before.items() if after[name] is not function}
    assert not {name for name in changed if not after[name].__globals__["__name__"].startswith("transformers.")}


def test_disable_gives_the_stock_quantizers_back(tmp_path: Path) -> None:
    """Models that are loaded keep running."""
    published.write(tmp_path, "deepseek_v3")
    model, prompt = load(tmp_path), torch.randint(published.VOCAB, (1, 6))
    with torch.no_grad():
        before = model(prompt).logits
        quantized.disable()
        assert_same_bits(model(prompt).logits, before, "logits")
    assert not quantized.enabled()
    for method in ("mxfp4", "fp8"):
        assert AUTO_QUANTIZER_MAPPING[method].__module__.startswith("transformers.")


def test_other_versions_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized.disable()
    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    with pytest.raises(RuntimeError, match=r"expected Transformers 5\.23\.0, got 5\.99\.0"):
        quantized.enable()
    assert not quantized.enabled()


def test_another_quantizer_in_the_table_is_left_there(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized.disable()
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "mxfp4", nn.Linear)
    with pytest.raises(RuntimeError, match='at "mxfp4", got Linear'):
        quantized.enable()
    assert AUTO_QUANTIZER_MAPPING["mxfp4"] is nn.Linear


@pytest.mark.parametrize(
    ("entry", "words"),
    [({"weight_block_size": [128, 64]}, "weight_block_size"), ({"activation_scheme": "static"}, "activation_scheme")],
)
def test_what_is_not_served_is_named(entry: dict[str, object], words: str, tmp_path: Path) -> None:
    published.write(tmp_path, "deepseek_v3")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= entry
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"polymoe for Transformers: {words}: expected .*, got"):
        load(tmp_path)
