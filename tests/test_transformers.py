"""The experts implementation "polymoe" inside Transformers' models, against eager and against experts in float64."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from experts_modules import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    batch,
    fill,
    float32_bound,
    float64_experts,
    watch_experts,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.activations import ACT2FN
from transformers.integrations.moe import ExpertsInterface
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.beam.modeling_beam import BeamExperts
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.hy_v4.modeling_hy_v4 import HYV4Experts
from transformers.models.inkling2.modeling_inkling2 import Inkling2Experts
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.openai_privacy_filter.modeling_openai_privacy_filter import OpenAIPrivacyFilterExperts
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

import polymoe
from polymoe.integrations.transformers import experts_forward
from polymoe.testing.tolerances import assert_same_bits, relative_frobenius

VOCAB, LAYERS = 96, 4


@pytest.fixture(autouse=True)
def seeded(seed: int) -> None:
    torch.manual_seed(seed)


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return watch_experts(monkeypatch)


ExpertsInterface.register("float64", float64_experts)


# --- whole models ---------------------------------------------------------------------------------------------------

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 3,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def deepseek_v4(hash_layers: int = 3, **changes: Any) -> PreTrainedModel:
    config = DeepseekV4Config(
        **(COMMON | changes),
        moe_intermediate_size=INTERMEDIATE,
        n_routed_experts=EXPERTS,
        num_hash_layers=hash_layers,
        layer_types=["sliding_attention"] * LAYERS,
        swiglu_limit=0.5,
        head_dim=16,
        q_lora_rank=16,
        o_groups=1,
        o_lora_rank=16,
    )
    model = DeepseekV4ForCausalLM(config)
    for layer in model.model.layers[:hash_layers]:
        noise = torch.rand(layer.mlp.gate.tid2eid.shape[0], EXPERTS)
        layer.mlp.gate.tid2eid.copy_(noise.argsort(-1)[:, : config.num_experts_per_tok])
    return model


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "deepseek_v4": deepseek_v4,
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**COMMON, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS)
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**COMMON, head_dim=16, moe_intermediate_size=INTERMEDIATE, num_experts=EXPERTS)
    ),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**COMMON, intermediate_size=INTERMEDIATE, num_experts=EXPERTS)),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **COMMON,
            moe_intermediate_size=INTERMEDIATE,
            intermediate_size=2 * INTERMEDIATE,
            n_routed_experts=EXPERTS,
            n_group=4,
            topk_group=2,
            first_k_dense_replace=1,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=16,
        )
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**COMMON, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS, head_dim=16, swiglu_limit=0.5)
    ),
}
KINDS = {"deepseek_v4": "swiglu_clamped", "gpt_oss": "swiglu_oai"}


def experts_modules(model: nn.Module) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith(".mlp.experts")]


def run(model: PreTrainedModel, implementation: str, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the experts that each layer's tokens went to."""
    routed: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: routed.append(args[1].sort(-1).values))
        for module in experts_modules(model)
    ]
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits, routed


def agree(runs: list[list[Tensor]]) -> bool:
    return all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_a_model(name: str, fused_calls: list[int]) -> None:
    model = MODELS[name]().eval()
    layers = len(experts_modules(model))
    assert layers >= LAYERS - 1
    for _ in range(5):  # a token whose next best expert is within rounding of its last one shows nothing: draw again
        tokens = torch.randint(VOCAB, (2, 24))
        truth, truth_routed = run(model, "float64", tokens)
        eager, eager_routed = run(model, "eager", tokens)
        fused_calls.clear()
        ours, ours_routed = run(model, "polymoe", tokens)
        if agree([truth_routed, eager_routed, ours_routed]):
            break
    else:
        raise AssertionError("the layers' inputs differ so much that the tokens go to other experts")
    assert len(fused_calls) == layers
    assert min(fused_calls) >= 2
    assert relative_frobenius(eager, truth) <= float32_bound(layers)
    assert relative_frobenius(ours, truth) <= float32_bound(layers)
    explanations = polymoe.explain(model).modules
    assert len(explanations) == layers
    assert {explanation.notes[0] for explanation in explanations.values()} == {f"fused: {KINDS.get(name, 'swiglu')}"}


def eager_in_bfloat16(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    eager = type(self).forward.__wrapped__
    return eager(self, hidden_states.bfloat16(), top_k_index, top_k_weights.bfloat16()).to(hidden_states.dtype)


ExpertsInterface.register("eager_in_bfloat16", eager_in_bfloat16)


def test_bfloat16_logits_are_as_accurate_as_eager() -> None:
    """All layers hash-routed, so that the same experts serve each token in every run; all but the experts in float32,
    so that the errors are theirs."""
    model = deepseek_v4(hash_layers=LAYERS, vocab_size=512).eval()
    for module in experts_modules(model):
        module.bfloat16()
    tokens = torch.randint(512, (1, 256))
    truth = run(model, "float64", tokens)[0]
    assert truth.numel() >= 1e5
    eager = relative_frobenius(run(model, "eager_in_bfloat16", tokens)[0], truth)
    assert relative_frobenius(run(model, "polymoe", tokens)[0], truth) <= 1.05 * eager
    logits = run(model.bfloat16(), "polymoe", tokens)[0]
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


def test_from_pretrained_and_generate(fused_calls: list[int], tmp_path: Any) -> None:
    MODELS["mixtral"]().save_pretrained(tmp_path)
    model = MixtralForCausalLM.from_pretrained(tmp_path, experts_implementation="polymoe").eval()
    tokens = torch.randint(VOCAB, (1, 7))
    out = model.generate(tokens, max_new_tokens=5, do_sample=False)
    assert out.shape == (1, 12)
    assert len(fused_calls) == 5 * LAYERS


def test_import_loads_no_model() -> None:
    code = (
        "import sys, warnings; warnings.simplefilter('ignore'); import polymoe.integrations.transformers; "
        "print([name for name in sys.modules if name.startswith('transformers.models.') and 'modeling' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


# --- experts modules of every gate family ---------------------------------------------------------------------------


def config(**changes: Any) -> SimpleNamespace:
    values = {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "hidden_act": "silu",
        "swiglu_limit": 0.5,
        "swiglu_alpha": 1.4,
        "mlp_gate_softcap": 1.5,
        "mlp_up_softcap": 0.8,
        "mlp_hidden_act": "relu2",
        "moe_latent_size": None,
        "post_norm_eps": 1e-6,
        "_experts_implementation": "polymoe",
    }
    for experts in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        values[experts] = EXPERTS
    return SimpleNamespace(**values, moe_intermediate_size=INTERMEDIATE, moe_hidden_size=HIDDEN, **changes)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "mixtral": (lambda: MixtralExperts(config()), "fused: swiglu"),
    "mixtral_gelu": (lambda: MixtralExperts(replaced(hidden_act="gelu")), "fused: geglu"),
    "mixtral_gelu_tanh": (lambda: MixtralExperts(replaced(hidden_act="gelu_pytorch_tanh")), "fused: geglu_tanh"),
    "mixtral_gelu_new": (lambda: MixtralExperts(replaced(hidden_act="gelu_new")), "fused: geglu_tanh"),
    "mixtral_relu": (lambda: MixtralExperts(replaced(hidden_act="relu")), "fused: reglu"),
    "mixtral_mish": (lambda: MixtralExperts(replaced(hidden_act="mish")), "un-fused"),
    "mixtral_relu2": (lambda: MixtralExperts(replaced(hidden_act="relu2")), "un-fused"),
    "deepseek_v4": (lambda: DeepseekV4Experts(config()), "fused: swiglu_clamped"),
    "deepseek_v4_gelu": (lambda: DeepseekV4Experts(replaced(hidden_act="gelu")), "un-fused"),
    "glm5_next": (lambda: Glm5NextTextExperts(config()), "fused: swiglu_clamped"),
    "hy_v4": (lambda: HYV4Experts(config()), "fused: swiglu_clamped"),
    "gpt_oss": (lambda: GptOssExperts(config()), "fused: swiglu_oai"),
    "openai_privacy_filter": (lambda: OpenAIPrivacyFilterExperts(config()), "fused: swiglu_oai"),
    "minimax_m3_vl": (lambda: MiniMaxM3VLExperts(config()), "fused: swiglu_oai"),
    "inkling2": (lambda: Inkling2Experts(config()), "fused: softcapped"),
    "beam": (lambda: BeamExperts(config()), "fused: swiglu"),
    "aria": (lambda: AriaExperts(config()), "fused: swiglu"),
    "nemotron_h": (lambda: NemotronHExperts(config()), "fused: relu2"),
    "nemotron_h_mish": (lambda: NemotronHExperts(replaced(mlp_hidden_act="mish")), "un-fused"),
    "muse_spark": (lambda: MuseSparkExperts(config()), "un-fused"),
    # Transformers 5.23 does not put these behind the interface; the function serves them all the same.
    "step3p7": (lambda: Step3p7Experts(config(), swiglu_limit=0.5), ""),
    "step3p7_unclamped": (lambda: Step3p7Experts(config()), ""),
}


def replaced(**changes: Any) -> SimpleNamespace:
    values = config()
    vars(values).update(changes)
    return values


@pytest.mark.parametrize("name", FAMILIES)
def test_gate_families(name: str, fused_calls: list[int]) -> None:
    make, expected = FAMILIES[name]
    module = fill(make())
    x, ids, weights = batch(40)
    ids[3:9, 1] = EXPERTS  # sentinels of expert parallelism
    ids[5, 0] = EXPERTS + 7
    ours = experts_forward(module, x, ids, weights)
    assert len(fused_calls) == (not expected.startswith("un-fused"))
    assert relative_frobenius(ours, float64_experts(module, x, ids, weights)) <= float32_bound()
    explanations = list(polymoe.explain(module).modules.values())
    assert [explanation.notes[0].startswith(expected) for explanation in explanations] == ([True] if expected else [])
    assert experts_forward(module, x[:0], ids[:0], weights[:0]).shape == (0, HIDDEN)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v4", "gpt_oss", "inkling2", "nemotron_h", "muse_spark"])
def test_bfloat16_is_as_accurate_as_eager(name: str) -> None:
    module = fill(FAMILIES[name][0]()).bfloat16()
    x, ids, weights = batch(2048, torch.bfloat16)
    wide = copy.deepcopy(module).double()
    truth = float64_experts(wide, x.double(), ids, weights)
    assert truth.numel() >= 1e5
    module.config = replaced(_experts_implementation="eager")
    eager = relative_frobenius(module(x, ids, weights), truth)
    assert relative_frobenius(experts_forward(module, x, ids, weights), truth) <= 1.05 * eager


class HalvedGate(MixtralExperts):
    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up * 0.5


class ShiftedClamp(DeepseekV4Experts):
    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return super()._apply_gate(gate_up + 1)


class Inherited(DeepseekV4Experts):
    pass


def test_a_subclass_with_its_own_gate_is_not_fused(fused_calls: list[int]) -> None:
    x, ids, weights = batch(40)
    for own, fused in ((HalvedGate, False), (ShiftedClamp, False), (Inherited, True)):
        module = fill(own(config()))
        fused_calls.clear()
        ours = experts_forward(module, x, ids, weights)
        assert len(fused_calls) == fused
        assert relative_frobenius(ours, float64_experts(module, x, ids, weights)) <= float32_bound()


def test_changes_on_the_instance_are_seen(fused_calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The decision is remembered; none of these may meet the remembered one."""
    x, ids, weights = batch(40)
    module = fill(FAMILIES["mixtral"][0]())
    before = experts_forward(module, x, ids, weights)
    assert len(fused_calls) == 1

    def check() -> None:
        ours = experts_forward(module, x, ids, weights)
        assert len(fused_calls) == 1
        assert relative_frobenius(ours, before) > 0.01
        assert relative_frobenius(ours, float64_experts(module, x, ids, weights)) <= float32_bound()

    module._apply_gate = lambda gate_up: gate_up.chunk(2, dim=-1)[0]
    check()
    del module._apply_gate
    with monkeypatch.context() as patch:
        patch.setattr(MixtralExperts, "_apply_gate", lambda self, gate_up: gate_up.chunk(2, dim=-1)[1])
        check()
    hook = module.act_fn.register_forward_hook(lambda _, args, out: 2 * out)
    check()
    hook.remove()
    module.act_fn = ACT2FN["mish"]
    module.act_fn.requires_grad_(False)
    check()
    module.act_fn = ACT2FN["silu"]
    module.is_concatenated = False  # the default gate reads halves whatever the flag says; so must we
    ours = experts_forward(module, x, ids, weights)
    assert len(fused_calls) == 1
    assert relative_frobenius(ours, before) <= float32_bound()


def test_dtypes_are_cast_as_transformers_does() -> None:
    module = fill(FAMILIES["mixtral"][0]()).bfloat16()
    x, ids, weights = batch(40)
    wide = experts_forward(module, x, ids, weights)
    assert wide.dtype == torch.float32
    narrow = experts_forward(module, x.bfloat16(), ids, weights)
    assert_same_bits(narrow, wide.bfloat16(), "x in float32 and in the weights' dtype")
    again = experts_forward(module, x.bfloat16(), ids.int(), weights.double())
    assert_same_bits(again, narrow, "weights in float64, ids in int32")


@pytest.mark.parametrize("name", list(FAMILIES))
def test_gradients_are_those_of_eager(name: str) -> None:
    module = fill(FAMILIES[name][0]()).requires_grad_()
    x, ids, weights = batch(9)
    tensors = [x.requires_grad_(), weights.requires_grad_(), *module.parameters()]
    grad = torch.randn_like(x)
    found = torch.autograd.grad(experts_forward(module, x, ids, weights), tensors, grad)
    module.config = replaced(_experts_implementation="eager")
    expected = torch.autograd.grad(module(x, ids, weights), tensors, grad)
    for got, wanted in zip(found, expected, strict=True):
        assert relative_frobenius(got, wanted) <= 1e-5


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "muse_spark"])
def test_compiles_once_for_any_number_of_tokens(name: str) -> None:
    module = fill(FAMILIES[name][0]())
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    counts: list[int] = []
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=graphs)
    module.config = config()
    for tokens in (9, 40):
        x, ids, weights = batch(tokens)
        assert_same_bits(compiled(x, ids, weights), experts_forward(module, x, ids, weights), name)
        counts.append(graphs.frame_count)
    assert counts[0] == counts[1]
