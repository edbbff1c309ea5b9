from __future__ import annotations

import torch
from torch import Tensor

from polymoe.hal.select import select
from polymoe.ops import _check as check_that
from polymoe.ops._library import Gradient, define_op, public
from polymoe.ops._weights import QUANTIZED, check_options, check_quantized
from polymoe.ops.activate import KINDS, check_kind
from polymoe.ops.experts_gradient import gradients, setup
from polymoe.ops.experts_lora import experts_lora

WEIGHT_PLACEMENTS = ("output", "activation", "input")
UNQUANTIZED = ("plain", "packed")
WEIGHT_FORMATS = (*UNQUANTIZED, *QUANTIZED)


def check(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor,
    activation: str = "swiglu",
    alpha: float | None = None,
    limit: float | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    transposed: bool = False,
    interleaved: bool = False,
    weight_placement: str = "output",
    save: bool = False,
    weight_format: str = "plain",
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    gate_up_zero: Tensor | None = None,
    down_zero: Tensor | None = None,
    mode: str = "weight_only",
) -> None:
    op = "experts"
    check_that.dtype(op, "x", x, check_that.FLOATS)
    check_that.shape(op, "x", x, {"T": None, "H": None})
    check_kind(op, "activation", activation, alpha, limit, interleaved)
    check_that.choice(op, "weight_placement", weight_placement, WEIGHT_PLACEMENTS)
    companions = {
        "gate_up_scale": gate_up_scale,
        "down_scale": down_scale,
        "gate_up_zero": gate_up_zero,
        "down_zero": down_zero,
    }
    check_options(op, weight_format, UNQUANTIZED, mode, companions)
    if weight_format in QUANTIZED:
        pair = ((gate_up, gate_up_scale, gate_up_zero), (down, down_scale, down_zero))
        E, P = _check_quantized(x, *pair, activation, transposed, weight_format)
    else:
        E, P = _check_projections(x, gate_up, down, activation, transposed)
    if weight_format == "packed":
        check_that.contiguous(op, "gate_up", gate_up)
        check_that.contiguous(op, "down", down)
    check_that.dtype(op, "ids", ids, check_that.IDS)
    check_that.shape(op, "ids", ids, {"T": x.shape[0], "K": None})
    check_that.slots(op, ids)
    check_that.device(op, "ids", ids, x)
    check_that.routing_weights(op, weights, (x.dtype,), ids.shape, x)
    for name, bias, letter, width in (
        ("gate_up_bias", gate_up_bias, _up(activation), P),
        ("down_bias", down_bias, "H", x.shape[1]),
    ):
        if bias is not None:
            check_that.dtype(op, name, bias, (x.dtype, torch.float32))
            check_that.shape(op, name, bias, {"E": E, letter: width})
            check_that.device(op, name, bias, x)


def _up(activation: str) -> str:
    """The letter of the width of the gate/up projection."""
    return "2I" if KINDS[activation].gated else "I"


Stored = tuple[Tensor, Tensor | None, Tensor | None]  # data, scale and zero points


def _check_quantized(
    x: Tensor, gate_up: Stored, down: Stored, activation: str, transposed: bool, weight_format: str
) -> tuple[int, int]:
    """Returns E and the width of the gate/up projection."""
    op = "experts"
    if transposed:
        check_that.fail(op, "transposed", f"False for {weight_format}", True)

    def check_weight(name: str, weight: Stored, D: int) -> None:
        check_quantized(op, (name, f"{name}_scale", f"{name}_zero"), weight, weight_format, D, x)

    check_weight("gate_up", gate_up, x.shape[1])
    E, P = gate_up[0].shape[:2]
    _check_width(gate_up[0], P, activation)
    if down[0].dim() != 3 or down[0].shape[:2] != (E, x.shape[1]):
        check_that.fail(op, "down", f"a tensor [E={E}, H={x.shape[1]}, ...]", check_that.describe(down[0]))
    check_weight("down", down, P // 2 if KINDS[activation].gated else P)
    return E, P


def _check_width(gate_up: Tensor, P: int, activation: str) -> None:
    if gate_up.shape[0] < 1:
        check_that.fail("experts", "gate_up", "at least 1 expert", check_that.describe(gate_up))
    if KINDS[activation].gated and P % 2 != 0:
        check_that.fail("experts", "gate_up", f"an even 2I for {activation}", check_that.describe(gate_up))


def _check_projections(x: Tensor, gate_up: Tensor, down: Tensor, activation: str, transposed: bool) -> tuple[int, int]:
    """Returns E and the width of the gate/up projection."""
    op, H, up = "experts", x.shape[1], _up(activation)

    def check_weight(name: str, weight: Tensor, E: int | None, rows: dict[str, int | None]) -> None:
        check_that.dtype(op, name, weight, (x.dtype,))
        check_that.shape(op, name, weight, {"E": E} | (dict(reversed(rows.items())) if transposed else rows))
        check_that.device(op, name, weight, x)

    check_weight("gate_up", gate_up, None, {up: None, "H": H})
    E, P = gate_up.shape[0], gate_up.shape[2 if transposed else 1]
    _check_width(gate_up, P, activation)
    check_weight("down", down, E, {"H": H, "I": P // 2 if up == "2I" else P})
    return E, P


def fake(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor,
    activation: str = "swiglu",
    alpha: float | None = None,
    limit: float | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    transposed: bool = False,
    interleaved: bool = False,
    weight_placement: str = "output",
    save: bool = False,
    weight_format: str = "plain",
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    gate_up_zero: Tensor | None = None,
    down_zero: Tensor | None = None,
    mode: str = "weight_only",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    out = x.new_empty(x.shape)
    if not save:
        none = [ids.new_empty((0,), dtype=torch.int32) for _ in range(3)]
        return out, x.new_empty((0,)), none[0], none[1], none[2]
    (T, K), E, P = ids.shape, gate_up.shape[0], gate_up.shape[2 if transposed else 1]
    return (
        out,
        x.new_empty((T * K, P)),
        ids.new_empty((E + 1,), dtype=torch.int32),
        ids.new_empty((T * K,), dtype=torch.int32),
        ids.new_empty((T, K), dtype=torch.int32),
    )


_experts = define_op(
    "experts",
    '(Tensor x, Tensor gate_up, Tensor down, Tensor weights, Tensor ids, str activation="swiglu", float? alpha=None, '
    "float? limit=None, Tensor? gate_up_bias=None, Tensor? down_bias=None, bool transposed=False, "
    'bool interleaved=False, str weight_placement="output", bool save=False, str weight_format="plain", '
    "Tensor? gate_up_scale=None, Tensor? down_scale=None, Tensor? gate_up_zero=None, Tensor? down_zero=None, "
    'str mode="weight_only", *, str backend="") '
    "-> (Tensor out, Tensor pre_activation, Tensor offsets, Tensor row_slot, Tensor slot_row)",
    check,
    fake,
    options={"activation": "swiglu", "weight_placement": "output", "weight_format": "plain", "mode": "weight_only"},
    gradient=Gradient(setup, gradients),
)


@public
def experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    weights: Tensor,
    ids: Tensor,
    activation: str = "swiglu",
    alpha: float | None = None,
    limit: float | None = None,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    transposed: bool = False,
    interleaved: bool = False,
    weight_placement: str = "output",
    weight_format: str = "plain",
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    gate_up_zero: Tensor | None = None,
    down_zero: Tensor | None = None,
    mode: str = "weight_only",
    gate_up_lora_a: Tensor | None = None,
    gate_up_lora_b: Tensor | None = None,
    down_lora_a: Tensor | None = None,
    down_lora_b: Tensor | None = None,
    lora_scale: float = 1.0,
    *,
    recompute: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The routed experts of a Mixture-of-Experts layer as one op: for every token, the weighted sum over its experts e
    of activation(x @ gate_up[e]^T) @ down[e]^T.

    Args:
        x: [T, H], float32, bfloat16, float16 or float64.
        gate_up: [E, 2I, H] of x's dtype: the gate rows, then the up rows, or in turns if `interleaved`; [E, I, H] for
            an ungated activation. With `transposed`: [E, H, 2I] or [E, H, I].
        down: [E, H, I] of x's dtype; with `transposed`: [E, I, H].
        weights: [T, K] float32 or x's dtype: the routing weights, used in float32.
        ids: [T, K] int32 or int64: the experts of every token. An id < 0 or >= E skips its slot.
        activation, alpha, limit, interleaved: see polymoe.activate.
        gate_up_bias, down_bias: [E, 2I] ([E, I] ungated) and [E, H]; x's dtype or float32.
        weight_placement: what the routing weight multiplies: "output" (in combine), "activation" (in activate, before
            its rounding; DeepSeek's own code) or "input" (in dispatch, with one more rounding; Llama-4).
        weight_format: "plain", or "packed" for weights as polymoe.formats.pack_ left them: gate_up packed with
            gate_up=True where the activation is gated, and both contiguous. `interleaved` then speaks of the bias.
            Or the name of a quantised format: gate_up and down are then its data as polymoe.formats documents them, for
            weights [E, 2I, H] ([E, I, H] ungated) and [E, H, I]. They take no gradient, but everything else does.
        gate_up_scale, down_scale, gate_up_zero, down_zero: scales and zero points as the format documents them; for
            quantised weights only.
        mode: how products with quantised weights are computed. "weight_only": x as it is; a weight counts as code times
            scale, without any rounding. "int8": what is multiplied is rounded once per token to 8-bit integers in
            groups of 32 with a scale each, for mxfp4, int8 and int4 weights; faster, and less accurate. "int8_g128":
            the same in groups of 128. "fp8": rounded to MXFP8, as polymoe.formats.Mxfp8 does, for mxfp4 and mxfp8
            weights, which GPUs with scaled matrix instructions multiply as stored. `modes` of a format says which it
            has; the cpu backend has no "fp8".
        gate_up_lora_a, gate_up_lora_b: [E, r, H] and [E, 2I, r] ([E, I, r] ungated) of x's dtype, with any strides: an
            adapter (LoRA), which adds lora_scale * b[e] @ a[e] to gate_up[e] of [2I, H], in its row order, before the
            activation. down_lora_a, down_lora_b: [E, r, I] and [E, H, r], the same for down. Either pair alone will do.
            gate_up, down and the biases are then frozen: they take no gradient. See polymoe.lora.
        lora_scale: see there.
        recompute: save neither the pre-activation nor the plan for the gradient, but compute them once more: the same
            gradients, to the bit.

    Returns:
        [T, H] of x's dtype. On one backend, instruction set level and layout it equals, to the bit,

            p = plan(ids, E)
            h = grouped_mm(dispatch(x, p), gate_up^T, p.offsets[1:], gate_up_bias, out_dtype=float32)
            a = activate(h, activation, alpha, limit, interleaved, p, out_dtype=x.dtype)
            y = grouped_mm(a, down^T, p.offsets[1:], down_bias, out_dtype=float32)
            out = combine(y, p, weights, out_dtype=x.dtype)

        with the weights given to activate or dispatch instead for the other placements. A float64 x is computed in
        float64 throughout. With adapters, h and y gain lora_scale * (rows @ a^T) @ b^T, where rows @ a^T is rounded to
        x's dtype, and the sum is float32.

    Raises:
        ValueError: any other shape, dtype, device or option.
    """
    chosen = select("experts", x, (activation, weight_placement, weight_format, mode), backend)
    lora = (gate_up_lora_a, gate_up_lora_b, down_lora_a, down_lora_b)
    save = False
    if torch.is_grad_enabled() and not recompute:
        tensors = (x, gate_up, down, weights, gate_up_bias, down_bias, *lora)
        save = any(t is not None and t.requires_grad for t in tensors)
    arguments = (
        x,
        gate_up,
        down,
        weights,
        ids,
        activation,
        alpha,
        limit,
        gate_up_bias,
        down_bias,
        transposed,
        interleaved,
        weight_placement,
        save,
        weight_format,
        gate_up_scale,
        down_scale,
        gate_up_zero,
        down_zero,
        mode,
    )
    if not (gate_up_lora_a is gate_up_lora_b is down_lora_a is down_lora_b is None):
        adapted: Tensor = experts_lora(*arguments, *lora, lora_scale, backend=chosen)[0]
        return adapted
    out: Tensor = _experts(*arguments, backend=chosen)[0]
    return out
