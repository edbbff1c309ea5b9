"""FP8, FP4 and MXFP4 checkpoints in Transformers on the CPU, as they are stored.

Without a GPU Transformers expands such a model to bfloat16. After one call it keeps the stored weights, and polymoe
computes with them:

    import polymoe.integrations.transformers.quantized as quantized
    quantized.enable()
    model = AutoModelForCausalLM.from_pretrained(name)

`enable()` puts subclasses of Transformers' quantizers at "fp8" (DeepSeek-V3 and V4, MiniMax-M2 and others, experts in
fp8 or fp4) and "mxfp4" (gpt-oss) in its table of quantizers; `disable()` takes them out again, and models loaded
meanwhile keep running. No function is patched. Models that go to a GPU, are asked to be dequantised, or are not
quantised yet stay Transformers' own. save_pretrained writes the layout that was loaded, bit for bit.

Activations are not quantised, whatever the activation_scheme "dynamic" says of GPU kernels: products are those of
polymoe's weight-only mode, and so are logits those of the dequantised model up to the rounding of sums.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.integrations.finegrained_fp8 import (
    ALL_FP8_EXPERTS_FUNCTIONS,
    FP8Experts,
    FP8GroupedLinear,
    FP8Linear,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer
from transformers.quantizers.quantizer_mxfp4 import Mxfp4HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from polymoe import ops
from polymoe.hal.explain import Explanation, explain, register_module_hook
from polymoe.integrations.transformers import _autocast_dtype, _cast, _routing_weights
from polymoe.integrations.transformers._gates import ExpertsModule, Fused, fused

__all__ = ["TESTED", "Mxfp4Experts", "disable", "enable", "enabled"]

TESTED = ("5.23.0",)  # versions of Transformers, whose quantizers have no stable interface

_GROUP = 32  # elements that share a scale in mxfp4


class Stored(NamedTuple):
    """A weight [E, N, D] as an op takes it."""

    data: Tensor
    scale: Tensor
    format: str


def _fail(argument: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"polymoe for Transformers: {argument}: expected {expected}, got {got}")


def enable() -> None:
    """Serve quantised models that `from_pretrained` loads to the CPU from now on. A second call changes nothing.

    Raises:
        RuntimeError: this version of Transformers is not one that this was tested with.
    """
    if transformers.__version__ not in TESTED:
        raise RuntimeError(
            f"polymoe.integrations.transformers.quantized: expected Transformers {', '.join(TESTED)}, "
            f"got {transformers.__version__}"
        )
    for method, (stock, ours) in _QUANTIZERS.items():
        if AUTO_QUANTIZER_MAPPING[method] is stock:
            AUTO_QUANTIZER_MAPPING[method] = ours
        elif AUTO_QUANTIZER_MAPPING[method] is not ours:
            found = AUTO_QUANTIZER_MAPPING[method].__qualname__
            raise RuntimeError(
                f'polymoe.integrations.transformers.quantized: expected {stock.__qualname__} at "{method}", got {found}'
            )


def disable() -> None:
    """Give Transformers its own quantizers back. Models that are loaded keep running."""
    for method, (stock, ours) in _QUANTIZERS.items():
        if AUTO_QUANTIZER_MAPPING[method] is ours:
            AUTO_QUANTIZER_MAPPING[method] = stock


def enabled() -> bool:
    """True between `enable()` and `disable()`."""
    return all(AUTO_QUANTIZER_MAPPING[method] is ours for method, (_, ours) in _QUANTIZERS.items())


def _to_cpu(device_map: Any) -> bool:
    if device_map is None:
        return not torch.accelerator.is_available()
    targets = device_map.values() if isinstance(device_map, dict) else [device_map]
    if torch.accelerator.is_available():
        return all(str(target) == "cpu" for target in targets)
    return all(str(target) in ("cpu", "auto") for target in targets)


# --- fp8 and fp4 -----------------------------------------------------------------------------------------------------


_V4_ROOTS = ("layers", "embed_tokens", "norm", "hc_head")  # in published files without the "model." before them


class Fp8Quantizer(FineGrainedFP8HfQuantizer):
    """Keeps fp8 and fp4 weights on the CPU. Everything else is its parent's."""

    serves = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        self.serves = self.pre_quantized and not config.dequantize and _to_cpu(kwargs.get("device_map"))
        if not self.serves:
            return super().validate_environment(*args, **kwargs)
        if config.activation_scheme != "dynamic":
            _fail("activation_scheme", '"dynamic"', f'"{config.activation_scheme}"')
        _block_format(config.weight_block_size)
        vars(config)["fmt"] = "e4m3"  # Transformers drops this entry of published configs
        return None

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        conversions = super().update_weight_conversions(weight_conversions, model)
        if not self.serves or model.config.model_type != "deepseek_v4":
            return conversions
        # Transformers would load these names as well, but save them with the prefix.
        return conversions + [WeightRenaming(rf"^{root}\.", f"model.{root}.") for root in _V4_ROOTS]

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        gates = {name: _gate(module) for name, module in model.named_modules() if name.endswith(".experts")}
        super()._process_model_before_weight_loading(model, **kwargs)
        if not self.serves:
            return
        for name, module in model.named_modules():
            if isinstance(module, FP8Experts):
                vars(module)["polymoe_gate"] = gates[name]
            elif type(module) in _LINEAR:
                module.__class__ = _LINEAR[type(module)]
        model.set_experts_implementation("polymoe")

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        if self.serves:
            for module in model.modules():
                if isinstance(module, (FP8Experts, FP8Linear)):
                    for parameter in module.parameters(recurse=False):
                        parameter.requires_grad_(False)  # codes have no gradient
        return model


def _gate(module: ExpertsModule) -> Fused | str:
    return fused(module) if hasattr(module, "_apply_gate") else f"{type(module).__name__} has no _apply_gate"


def _block_format(block: Any) -> str:
    if block is not None and list(block) in ([32, 32], [64, 64], [128, 128]):
        return f"fp8_block{block[0]}"
    if block is not None and list(block) == [1, _GROUP]:
        return "mxfp8"
    _fail("weight_block_size", "[128, 128], [64, 64], [32, 32] or [1, 32]", block)


def _fp8_linear(module: FP8Linear, x: Tensor, groups: int) -> Tensor:
    """x [G, T, D] by a weight of G blocks of rows, each for its own x; [G, T, N]."""
    data = module.weight.view(groups, -1, module.weight.shape[1])
    scale = module.weight_scale_inv.view(groups, -1, module.weight_scale_inv.shape[1])
    bias = None if module.bias is None else _bias(module.bias, x.dtype).view(groups, -1)
    weight_format = _block_format(module.block_size)
    return ops.grouped_mm(x, data.mT, bias=bias, weight_format=weight_format, scale=scale)


def _multiplied(x: Tensor) -> Tensor:
    """x as it is multiplied: in the dtype of autocast, where that is on."""
    return _cast(x, _autocast_dtype(x) or x.dtype)


def _bias(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """As an op takes it: of the input's dtype, or float32."""
    return bias if bias.dtype == torch.float32 else _cast(bias, dtype)


class Linear(FP8Linear):
    """FP8Linear by polymoe.grouped_mm, with one group."""

    def forward(self, input: Tensor) -> Tensor:
        x = _multiplied(input).reshape(1, -1, input.shape[-1])
        return _fp8_linear(self, x, 1).view(*input.shape[:-1], -1)


class GroupedLinear(FP8GroupedLinear):
    """FP8GroupedLinear by polymoe.grouped_mm."""

    def forward(self, x: Tensor) -> Tensor:
        x, lead = _multiplied(x), x.shape[:-2]
        y = _fp8_linear(self, x.reshape(-1, *x.shape[-2:]).transpose(0, 1), self.n_groups)
        return y.transpose(0, 1).reshape(*lead, self.n_groups, -1)


_LINEAR: dict[type, type] = {FP8Linear: Linear, FP8GroupedLinear: GroupedLinear}


def _fp8_projection(module: ExpertsModule, which: str) -> Stored:
    name = _up_name(module) if which == "up" else "down_proj"
    data, scale = getattr(module, name), getattr(module, f"{name}_scale_inv")
    return Stored(data, scale, "mxfp4" if data.dtype == torch.int8 else _block_format(module.block_size))


def _up_name(module: ExpertsModule) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def fp8_experts_forward(
    self: ExpertsModule, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What Transformers calls as the forward of its FP8Experts under the implementation "polymoe".

    The gate is the one that the model's own experts have, fused where polymoe knows it; else FP8Experts' own code runs
    between polymoe's products. Arguments and result as in polymoe.integrations.transformers.experts_forward.
    """
    up, down = _fp8_projection(self, "up"), _fp8_projection(self, "down")
    how: Fused | str = getattr(self, "polymoe_gate", _UNKNOWN)
    x = _multiplied(hidden_states)
    if isinstance(how, str):
        out = _unfused(self, x, top_k_index, top_k_weights, up, down)
    else:
        out = _fused(how, x, top_k_index, top_k_weights, up, down)
    return _cast(out, hidden_states.dtype)


_UNKNOWN = "the model was not loaded by polymoe's quantizer"


def _fused(
    how: Fused,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    up: Stored,
    down: Stored,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    return ops.experts(
        x,
        up.data,
        down.data,
        _routing_weights(weights, x.dtype),
        ids,
        how.kind,
        how.alpha,
        how.limit,
        up_bias,
        down_bias,
        interleaved=how.interleaved,
        weight_format=up.format,
        gate_up_scale=up.scale,
        down_scale=down.scale,
    )


def _unfused(self: ExpertsModule, x: Tensor, ids: Tensor, weights: Tensor, up: Stored, down: Stored) -> Tensor:
    plan = ops.plan(ids, self.num_experts)
    ends = plan.offsets[1:]
    h = ops.grouped_mm(ops.dispatch(x, plan), up.data.mT, ends, weight_format=up.format, scale=up.scale)
    a = _cast(self._apply_gate(h) if self.has_gate else self.act_fn(h), x.dtype)
    y = ops.grouped_mm(a, down.data.mT, ends, weight_format=down.format, scale=down.scale)
    return ops.combine(y, plan, _routing_weights(weights, y.dtype))


ALL_FP8_EXPERTS_FUNCTIONS.register("polymoe", fp8_experts_forward)


# --- mxfp4 -----------------------------------------------------------------------------------------------------------


class Mxfp4Experts(nn.Module):
    """gpt-oss's experts with the tensors of its checkpoints as parameters, by their published names.

    gate_up_proj_blocks, down_proj_blocks  uint8 [E, 2I, H / 32, 16] and [E, H, I / 32, 16]
    gate_up_proj_scales, down_proj_scales  uint8 [E, 2I, H / 32] and [E, H, I / 32]
    gate_up_proj_bias, down_proj_bias      [E, 2I] and [E, H]
    """

    gate_up_proj_bias: Tensor
    down_proj_bias: Tensor

    def __init__(self, config: Any, gate: Fused, bias_dtype: torch.dtype) -> None:
        super().__init__()
        self.num_experts, self.gate = config.num_local_experts, gate
        H, I = config.hidden_size, config.intermediate_size
        for name, rows, columns in (("gate_up_proj", 2 * I, H), ("down_proj", H, I)):
            shape = (self.num_experts, rows, columns // _GROUP)
            for part, tensor in (
                ("blocks", torch.empty(*shape, _GROUP // 2, dtype=torch.uint8)),
                ("scales", torch.empty(shape, dtype=torch.uint8)),
                ("bias", torch.empty(shape[:2], dtype=bias_dtype)),
            ):
                self.register_parameter(f"{name}_{part}", nn.Parameter(tensor, requires_grad=False))

    def projection(self, name: str) -> Stored:
        return Stored(getattr(self, f"{name}_blocks").flatten(-2), getattr(self, f"{name}_scales"), "mxfp4")

    def forward(self, hidden_states: Tensor, router_indices: Tensor, routing_weights: Tensor) -> Tensor:
        """As GptOssExperts': [T, H], ids and weights [T, K]; returns [T, H]."""
        x = _multiplied(hidden_states)
        out = _fused(
            self.gate,
            x,
            router_indices,
            routing_weights,
            self.projection("gate_up_proj"),
            self.projection("down_proj"),
            _bias(self.gate_up_proj_bias, x.dtype),
            _bias(self.down_proj_bias, x.dtype),
        )
        return _cast(out, hidden_states.dtype)


class Mxfp4Quantizer(Mxfp4HfQuantizer):
    """Keeps gpt-oss's blocks and scales on the CPU. Everything else is its parent's."""

    serves = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        dequantize = self.quantization_config.dequantize
        self.serves = self.pre_quantized and not dequantize and _to_cpu(kwargs.get("device_map"))
        if not self.serves:
            super().validate_environment(*args, **kwargs)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, use_kernels: bool = False, **kwargs: Any
    ) -> None:
        if not self.serves:
            return super()._process_model_before_weight_loading(model, use_kernels=use_kernels, **kwargs)
        if use_kernels:
            _fail("use_kernels", "False while polymoe serves MXFP4 on the CPU; call disable() for hub kernels", True)
        skipped = list(self.quantization_config.modules_to_not_convert or ())
        self.modules_to_not_convert = self.get_modules_to_not_convert(
            model, skipped, list(model._keep_in_fp32_modules or ())
        )
        for name, module in list(model.named_modules()):
            if isinstance(module, GptOssExperts) and should_convert_module(name, self.modules_to_not_convert):
                gate = fused(module)
                if isinstance(gate, str):
                    _fail(name, "the gate of gpt-oss", gate)
                with torch.device("meta"):
                    new = Mxfp4Experts(model.config.get_text_config(), gate, module.down_proj_bias.dtype)
                model.set_submodule(name, new)
        return None

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return not self.serves and super().param_needs_quantization(model, param_name, **kwargs)

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        if self.serves:  # the parameters have the names of the checkpoint
            return weight_conversions
        return super().update_weight_conversions(weight_conversions, model)

    def get_weight_conversions(self) -> list[Any]:
        return [] if self.serves else super().get_weight_conversions()

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        return (None, {}) if self.serves else super().get_state_dict_and_metadata(model)

    @property
    def is_trainable(self) -> bool:
        return self.serves or super().is_trainable


_QUANTIZERS: dict[str, tuple[Any, Any]] = {  # Transformers' class and polymoe's
    "fp8": (FineGrainedFP8HfQuantizer, Fp8Quantizer),
    "mxfp4": (Mxfp4HfQuantizer, Mxfp4Quantizer),
}


@register_module_hook
def _explain(module: nn.Module) -> Explanation | None:
    """For `polymoe.explain`: how quantised experts run."""
    how: Fused | str
    if isinstance(module, Mxfp4Experts):
        up, down, how = module.projection("gate_up_proj"), module.projection("down_proj"), module.gate
    elif isinstance(module, FP8Experts) and module.config._experts_implementation == "polymoe":
        up, down = _fp8_projection(module, "up"), _fp8_projection(module, "down")
        how = vars(module).get("polymoe_gate", _UNKNOWN)
    else:
        return None
    x = torch.empty(0, down.data.shape[1], dtype=torch.bfloat16, device=up.data.device)
    if isinstance(how, str):
        found = explain("grouped_mm", x, up.data.mT, weight_format=up.format, scale=up.scale)
        note = f"un-fused, around the model's own code: {how}"
    else:
        scales = {"gate_up_scale": up.scale, "down_scale": down.scale}
        found = explain("experts", x, up.data, down.data, activation=how.kind, weight_format=up.format, **scales)
        note = f"fused: {how.kind}"
    return replace(found, notes=(note, *found.notes))
