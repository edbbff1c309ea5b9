"""The routed layers of published models, and the calls that run them. Nothing here holds data: tensors are of torch's
device "meta"."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from polymoe import formats
from polymoe.formats import Fp8Block, Int4, parse

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32, "f32": torch.float32}
# Tokens of a batch, from decode to a long prefill: enough to come by every height of a tile.
TOKENS = (1, 64, 1024, 8192, 131072)
FEW_TOKENS = (1, 8192)  # for the kernels whose blocks do not depend on the batch


@dataclass(frozen=True)
class Model:
    """H, I, E, K as everywhere in polymoe; the rest as polymoe.experts and polymoe.gate name it."""

    name: str
    H: int
    I: int
    E: int
    K: int
    activation: str = "swiglu"
    alpha: float | None = None
    limit: float | None = None
    transposed: bool = False
    interleaved: bool = False
    bias: bool = False
    placement: str = "output"
    scoring: str = "softmax"

    @property
    def up(self) -> int:
        """Columns of the gate/up projection."""
        return self.I if self.activation == "relu2" else 2 * self.I


def _deepseek(name: str, H: int, I: int, E: int, K: int, limit: float | None = 10.0) -> Model:
    kind, scoring = ("swiglu_clamped", "sqrtsoftplus") if limit else ("swiglu", "sigmoid")
    return Model(name, H, I, E, K, kind, limit=limit, placement="activation", scoring=scoring)


_GPT_OSS = Model(
    "gpt-oss-20b", 2880, 2880, 32, 4, "swiglu_oai", limit=7.0, transposed=True, interleaved=True, bias=True,
    scoring="softmax_topk",
)  # fmt: skip
_LLAMA = Model("llama-4-maverick", 5120, 8192, 128, 1, transposed=True, placement="input", scoring="sigmoid")

MODELS = (
    _deepseek("deepseek-v3", 7168, 2048, 256, 8, limit=None),
    _deepseek("deepseek-v4-flash", 4096, 2048, 256, 6),
    _deepseek("deepseek-v4-pro", 7168, 3072, 384, 6),
    _deepseek("deepseek-v4.1-flash", 5120, 2304, 384, 6),
    Model("mixtral-8x7b", 4096, 14336, 8, 2),
    Model("qwen3-30b-a3b", 2048, 768, 128, 8),
    Model("qwen3-235b-a22b", 4096, 1536, 128, 8),
    Model("qwen3-next-80b-a3b", 2048, 512, 512, 10),
    Model("qwen3.5-35b-a3b", 2048, 512, 256, 8),
    Model("qwen3.5-122b-a10b", 3072, 1024, 256, 8),
    Model("qwen3.5-397b-a17b", 4096, 1024, 512, 10),
    _GPT_OSS,
    replace(_GPT_OSS, name="gpt-oss-120b", E=128),
    Model("olmoe-1b-7b", 2048, 1024, 64, 8),
    Model("glm-4.5", 5120, 1536, 160, 8, scoring="sigmoid"),
    Model("glm-4.5-air", 4096, 1408, 128, 8, scoring="sigmoid"),
    Model("glm-5", 6144, 2048, 256, 8, scoring="sigmoid"),
    Model("kimi-k2", 7168, 2048, 384, 8, scoring="sigmoid"),
    Model("kimi-k3", 3584, 3072, 896, 16, "softcapped", alpha=4.0, limit=25.0, scoring="sigmoid"),
    Model("kimi-linear-48b", 2304, 1024, 256, 8, scoring="sigmoid"),
    Model("minimax-m2", 3072, 1536, 256, 8, scoring="sigmoid"),
    _LLAMA,
    replace(_LLAMA, name="llama-4-scout", E=16),
    Model("longcat-flash", 6144, 2048, 512, 12),
    Model("ling-1t", 8192, 2048, 256, 8, scoring="sigmoid"),
    # Nemotron-3's experts have one matrix and no gate; its widths are not known here, so these are Qwen3's.
    Model("ungated", 2048, 768, 128, 8, "relu2"),
)


def op(name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"polymoe.kernels.{name}"), name)


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Call:
    """One call of an op. flops and bytes: what it must compute, and must read or write, at least."""

    op: str
    model: str
    T: int
    run: Callable[[], Any]
    flops: float
    bytes: float


def layer(model: Model, T: int, dtype: torch.dtype) -> Iterator[Call]:
    """The forward of the layer, as one op and as the small ops that `experts` does not launch."""
    yield _experts(model, T, dtype)
    yield from _small(model, T, dtype)


def _small(model: Model, T: int, dtype: torch.dtype) -> Iterator[Call]:
    S, size = T * model.K, dtype.itemsize
    yield Call(
        "gate", model.name, T,
        lambda: op("gate")(meta(T, model.E, dtype=dtype), model.K, model.scoring, meta(model.E, dtype=torch.float32),
                           renormalize="add"),
        0, T * model.E * size + S * 8,
    )  # fmt: skip
    h = meta(S, model.up, dtype=torch.float32)
    yield Call(
        "activate", model.name, T,
        lambda: op("activate")(h, model.activation, model.alpha, model.limit, model.interleaved,
                               meta(S, dtype=torch.int32), None, dtype),
        0, S * (model.up * 4 + model.I * size),
    )  # fmt: skip
    x, slots = meta(T, model.H, dtype=dtype), meta(T, model.K, dtype=torch.int32)
    yield Call(
        "dispatch", model.name, T,
        lambda: op("dispatch")(x, meta(S, dtype=torch.int32), slots, None),
        0, (T + S) * model.H * size,
    )  # fmt: skip


def _experts(model: Model, T: int, dtype: torch.dtype) -> Call:
    up, down = (model.E, model.up, model.H), (model.E, model.H, model.I)
    if model.transposed:
        up, down = (up[0], up[2], up[1]), (down[0], down[2], down[1])
    S, size = T * model.K, dtype.itemsize

    def run() -> Any:
        biases = [meta(model.E, n, dtype=dtype) if model.bias else None for n in (model.up, model.H)]
        return op("experts")(
            meta(T, model.H, dtype=dtype),
            meta(*up, dtype=dtype),
            meta(*down, dtype=dtype),
            meta(T, model.K, dtype=torch.float32),
            meta(T, model.K, dtype=torch.int32),
            model.activation,
            model.alpha,
            model.limit,
            *biases,
            model.transposed,
            model.interleaved,
            model.placement,
        )

    weights = min(model.E, S) * (model.up + model.I) * model.H
    # Rows in and out, the activation and the float32 rows of the down product, both written and read.
    rows = 2 * T * model.H * size + S * (2 * model.I * size + 2 * model.H * 4)
    return Call("experts", model.name, T, run, 2.0 * S * (model.up + model.I) * model.H, weights * size + rows)


def _stored(name: str, E: int, N: int, D: int) -> tuple[Tensor, Tensor]:
    """Data and scales of a weight [E, N, D] as polymoe.formats stores it."""
    format = parse(name)
    codes = torch.float8_e4m3fn if "fp8" in name else torch.int8 if name == "int8" else torch.uint8
    scales = torch.uint8 if name.startswith("mx") else torch.float32
    return meta(E, N, format.data_width(D), dtype=codes), meta(E, *format.scale_shape(N, D), dtype=scales)


def _quantized_backward(model: Model, T: int, dtype: torch.dtype, name: str) -> Call:
    """The gradient of the rows through the gate and up weights."""
    S, size = T * model.K, dtype.itemsize
    data, scale = _stored(name, model.E, model.up, model.H)
    grad, offs = meta(S, model.up, dtype=dtype), meta(model.E, dtype=torch.int32)
    stored = (data.nbytes + scale.nbytes) / model.E * min(model.E, S)
    return Call(
        f"quantized_backward {name}", model.name, T,
        lambda: op("quantized_backward")(grad, data, scale, None, offs, model.H, name, torch.float32),
        2.0 * S * model.up * model.H, stored + S * (model.up * size + model.H * 4),
    )  # fmt: skip


def _quantized(model: Model, T: int, dtype: torch.dtype, name: str, mode: str = "weight_only") -> Call:
    """experts with weights of a format."""
    S, size = T * model.K, dtype.itemsize
    up, up_scale = _stored(name, model.E, model.up, model.H)
    down, down_scale = _stored(name, model.E, model.H, model.I)

    def run() -> Any:
        biases = [meta(model.E, n, dtype=dtype) if model.bias else None for n in (model.up, model.H)]
        numbers = (model.activation, model.alpha, model.limit)
        x, slots = meta(T, model.H, dtype=dtype), meta(T, model.K, dtype=torch.int32)
        return op("experts")(
            x, up, down, meta(T, model.K, dtype=torch.float32), slots, *numbers, *biases, False, model.interleaved,
            model.placement, False, name, up_scale, down_scale, None, None, mode,
        )  # fmt: skip

    stored = sum(part.nbytes for part in (up, up_scale, down, down_scale)) / model.E * min(model.E, S)
    rows = 2 * T * model.H * size + S * (2 * model.I * size + 2 * model.H * 4)
    return Call(f"experts {name} {mode}", model.name, T, run, 2.0 * S * (model.up + model.I) * model.H, stored + rows)


def _quantize(model: Model, T: int, dtype: torch.dtype, format: formats.Format) -> Call:
    """The gate and up weights as codes."""
    weight = meta(model.E, model.up, model.H, dtype=dtype)
    if model.transposed:
        weight = meta(model.E, model.H, model.up, dtype=dtype).mT
    form = (format.name, format.scale_dtype, format.zero_points)
    variant = ("" if format.scale_dtype == format.scale_dtypes[0] else " e8m0") + " zero points" * format.zero_points
    stored = sum(part.nbytes for part in _stored(format.name, *weight.shape))
    return Call(
        f"quantize {format.name}{variant}", model.name, T, lambda: op("quantize")(weight, *form),
        0, weight.nbytes + stored,
    )  # fmt: skip


def backward(model: Model, T: int, dtype: torch.dtype) -> Iterator[Call]:
    """The other forms of grouped_mm: the gradients of the inputs and of the weights, and a batch of products."""
    S, size = T * model.K, dtype.itemsize
    offs = meta(model.E, dtype=torch.int32)
    g, x = meta(S, model.up, dtype=dtype), meta(S, model.H, dtype=dtype)
    w = meta(model.E, model.up, model.H, dtype=dtype)
    flops = 2.0 * S * model.up * model.H
    rows, weights = S * (model.up + model.H) * size, model.E * model.up * model.H * size
    name = model.name
    yield Call("grouped_mm dX", name, T, lambda: op("grouped_mm")(g, w, offs), flops, rows + weights)
    yield Call("grouped_mm dW", name, T, lambda: op("grouped_mm")(g.mT, x, offs), flops, rows + weights)
    yield Call("grouped_mm dX^T", name, T, lambda: op("grouped_mm")(w.mT, g.mT, offs), flops, rows + weights)
    batch = meta(model.E, max(S // model.E, 1), model.H, dtype=dtype)
    yield Call("grouped_mm batch", name, T, lambda: op("grouped_mm")(batch, w.mT), flops, rows + weights)


def _down_backward(model: Model, T: int, dtype: torch.dtype) -> Call:
    """The gradients of the pre-activation, of the down weights' other operand and of the routing weights."""
    S, size = T * model.K, dtype.itemsize
    weights = meta(T, model.K, dtype=torch.float32) if model.placement != "input" else None

    def run() -> Any:
        down = meta(model.E, model.I, model.H, dtype=dtype).mT if model.transposed else meta(
            model.E, model.H, model.I, dtype=dtype
        )  # fmt: skip
        return op("down_backward")(
            meta(S, model.H, dtype=dtype),
            down,
            meta(S, model.up, dtype=dtype),
            meta(model.E, dtype=torch.int32),
            meta(S, dtype=torch.int32),
            meta(T, model.K, dtype=torch.int32),
            model.activation,
            model.alpha,
            model.limit,
            model.interleaved,
            weights,
            True,
            weights is not None,
        )

    weight_bytes = min(model.E, S) * model.H * model.I * size
    rows = S * (model.H + 2 * model.up + model.I) * size
    return Call("down_backward", model.name, T, run, 2.0 * S * model.H * model.I, weight_bytes + rows)


def _small_backward(model: Model, T: int, dtype: torch.dtype) -> Iterator[Call]:
    S, size, name = T * model.K, dtype.itemsize, model.name
    f32, i32 = torch.float32, torch.int32
    logits, weights, slots = meta(T, model.E, dtype=dtype), meta(T, model.K, dtype=f32), meta(T, model.K, dtype=i32)
    bias = meta(model.E, dtype=f32)
    yield Call(
        "gate_backward", name, T, lambda: op("gate_backward")(logits, weights, slots, model.scoring, bias, "add"),
        0, 2 * T * model.E * size + S * 8,
    )  # fmt: skip
    h, grad = meta(S, model.up, dtype=dtype), meta(S, model.I, dtype=dtype)
    numbers = (model.activation, model.alpha, model.limit, model.interleaved)
    yield Call(
        "activate_backward", name, T,
        lambda: op("activate_backward")(h, grad, *numbers, meta(S, dtype=i32), weights, True),
        0, S * (2 * model.up + model.I) * size,
    )  # fmt: skip
    x, rows = meta(T, model.H, dtype=dtype), meta(S, model.H, dtype=f32)
    yield Call("row_dot", name, T, lambda: op("row_dot")(x, rows, slots), 0, S * model.H * (size + 4))


# One model per activation, layout of the weights and placement of the routing weights.
VARIETY = ("deepseek-v3", "deepseek-v4-flash", "gpt-oss-20b", "kimi-k3", "llama-4-scout", "ungated")
LAYOUTS = ("deepseek-v4-flash", "gpt-oss-20b")
COMPILED = {"bf16": tuple(model.name for model in MODELS), "f32": LAYOUTS, "tf32": LAYOUTS[:1], "f16": LAYOUTS[:1]}

# Formats of weights, as published or on the shapes of a model.
FORMATS = {
    "deepseek-v3": ("fp8_block128",),
    "deepseek-v4-flash": ("mxfp4", "mxfp8", "int8", "int4_g128"),
    "gpt-oss-20b": ("mxfp4",),
}
ROUNDED = (("mxfp4", "int8"), ("int8", "int8"), ("mxfp4", "fp8"), ("mxfp8", "fp8"))  # formats and modes that round rows

# Of weights as they are quantised: every way there is, from bf16.
QUANTIZERS = (*formats.FORMATS.values(), Fp8Block(32, torch.float8_e8m0fnu), Fp8Block(128, torch.float8_e8m0fnu),
              Int4(128, zero_points=True))  # fmt: skip
FEW_QUANTIZERS = tuple(map(parse, ("mxfp4", "fp8_block128", "int8")))


def calls(model: Model, T: int, arithmetic: str) -> list[Call]:
    """What is compiled for a model. bf16 stands for the other arithmetics where only the model differs; small ops and
    the forms of the backward are compiled for a small and a large batch."""
    dtype = DTYPES[arithmetic]
    if model.name not in COMPILED[arithmetic]:
        return []
    found = [_experts(model, T, dtype)]
    names = FORMATS.get(model.name, ()) if arithmetic == "bf16" else ("mxfp4",) if model.name in LAYOUTS[:1] else ()
    found += [_quantized(model, T, dtype, name) for name in names]
    if arithmetic == "bf16" and model.name in LAYOUTS[:1]:
        found += [_quantized(model, T, dtype, name, mode) for name, mode in ROUNDED]
    if T in FEW_TOKENS and arithmetic in ("bf16", "f32"):
        found += [_quantized_backward(model, T, dtype, name) for name in names]
    if T == 1 and model.name in LAYOUTS and arithmetic != "tf32":  # no weight depends on the batch
        all_of_them = model.name == LAYOUTS[0] and arithmetic == "bf16"
        found += [_quantize(model, T, dtype, form) for form in (QUANTIZERS if all_of_them else FEW_QUANTIZERS)]
    # As tf32 the instructions of sm_90 and sm_100 cannot read weights in this order.
    found += [_down_backward(model, T, dtype)] if model.name in VARIETY and arithmetic != "tf32" else []
    if T in FEW_TOKENS and arithmetic in ("bf16", "f32"):
        found += [*_small(model, T, dtype), *_small_backward(model, T, dtype)] if model.name in VARIETY else []
        found += backward(model, T, dtype) if model.name in LAYOUTS else []
    return found
