"""experts with a low-rank adapter (LoRA, arXiv 2106.09685) on either projection, beside frozen weights.

Composed of the other ops, forward and backward, so every backend has it. For the gradient it keeps what experts keeps,
and the gate/up adapter's inner rows [S, r]; those of the down adapter are computed once more.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polymoe.hal.problem import COMPOSED_OPS
from polymoe.ops import _check as check_that
from polymoe.ops._library import Gradient, define_op, grad_dtype
from polymoe.ops._weights import check_differentiable
from polymoe.ops.activate import KINDS, activate_backward
from polymoe.ops.experts_gradient import bias_dot, through
from polymoe.ops.grouped_mm_gradient import grouped_mm_dx
from polymoe.ops.lora import Adapter, check_adapter
from polymoe.ops.row_dot import row_dot
from polymoe.reference._arithmetic import arithmetic_dtype

FROZEN = ("gate_up", "down", "gate_up_bias", "down_bias", "gate_up_scale", "down_scale")


class Arguments(NamedTuple):
    x: Tensor
    gate_up: Tensor
    down: Tensor
    weights: Tensor
    ids: Tensor
    activation: str = "swiglu"
    alpha: float | None = None
    limit: float | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    transposed: bool = False
    interleaved: bool = False
    weight_placement: str = "output"
    save: bool = False
    weight_format: str = "plain"
    gate_up_scale: Tensor | None = None
    down_scale: Tensor | None = None
    gate_up_zero: Tensor | None = None
    down_zero: Tensor | None = None
    mode: str = "weight_only"
    gate_up_lora_a: Tensor | None = None
    gate_up_lora_b: Tensor | None = None
    down_lora_a: Tensor | None = None
    down_lora_b: Tensor | None = None
    lora_scale: float = 1.0

    def adapter(self, projection: str) -> Adapter | None:
        a, b = getattr(self, f"{projection}_lora_a"), getattr(self, f"{projection}_lora_b")
        return None if a is None or b is None else Adapter(a, b, self.lora_scale)

    def width(self) -> int:
        """2I, or I of an ungated activation."""
        return self.gate_up.shape[2 if self.transposed else 1]


def check(*given: Any) -> None:
    from polymoe.ops.experts import check as check_experts  # which calls this op

    args = Arguments(*given)
    check_experts(*given[: Arguments._fields.index("gate_up_lora_a")])
    E, H, P = args.gate_up.shape[0], args.x.shape[1], args.width()
    I = P // 2 if KINDS[args.activation].gated else P
    check_adapter("experts", "gate_up_", args.gate_up_lora_a, args.gate_up_lora_b, args.x, E, P, H)
    check_adapter("experts", "down_", args.down_lora_a, args.down_lora_b, args.x, E, H, I)


def fake(*given: Any) -> tuple[Tensor, ...]:
    args = Arguments(*given)
    (T, K), x = args.ids.shape, args.x
    rank = 0 if args.gate_up_lora_a is None else args.gate_up_lora_a.shape[1]
    kept = [(T * K, args.width()), (args.gate_up.shape[0] + 1,), (T * K,), (T, K), (T * K, rank)]
    shapes = kept if args.save else [(0,)] * 5
    dtypes = (x.dtype, torch.int32, torch.int32, torch.int32, x.dtype)
    return x.new_empty(x.shape), *(x.new_empty(s, dtype=d) for s, d in zip(shapes, dtypes, strict=True))


def _low(rows: Tensor, adapter: Adapter, ends: Tensor, backend: str) -> Tensor:
    """[S, r]"""
    found: Tensor = torch.ops.polymoe.grouped_mm(rows, adapter.a.mT, ends, backend=backend)
    return found


def _add(product: Tensor, low: Tensor, adapter: Adapter, ends: Tensor, backend: str) -> Tensor:
    """The product of rows with a projection, and with its adapter, in float32."""
    change = torch.ops.polymoe.grouped_mm(low, adapter.b.mT, ends, None, product.dtype, backend=backend)
    return product.add_(change, alpha=adapter.scale)


def _project(args: Arguments, projection: str, rows: Tensor, ends: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """[S, N] in float32 and the adapter's inner rows [S, r] (r = 0 without one)."""
    weight = getattr(args, projection)
    how = (args.weight_format, getattr(args, f"{projection}_scale"), getattr(args, f"{projection}_zero"), args.mode)
    plain = weight if args.transposed else weight.mT
    bias, ops = getattr(args, f"{projection}_bias"), torch.ops.polymoe
    product: Tensor = ops.grouped_mm(rows, plain, ends, bias, arithmetic_dtype(rows.dtype), *how, backend=backend)
    adapter = args.adapter(projection)
    if adapter is None:
        return product, rows.new_empty((rows.shape[0], 0))
    low = _low(rows, adapter, ends, backend)
    return _add(product, low, adapter, ends, backend), low


def compute(*given: Any, backend: str) -> tuple[Tensor, ...]:
    args, ops = Arguments(*given), torch.ops.polymoe
    offsets, row_slot, slot_row = ops.plan(args.ids, args.gate_up.shape[0], backend=backend)
    ends = offsets[1:]
    place = {args.weight_placement: args.weights}
    rows = ops.dispatch(args.x, row_slot, slot_row, place.get("input"), backend=backend)
    pre, low = _project(args, "gate_up", rows, ends, backend)
    act = (args.activation, args.alpha, args.limit, args.interleaved, row_slot, place.get("activation"))
    activation = ops.activate(pre, *act, args.x.dtype, backend=backend)
    y, _ = _project(args, "down", activation, ends, backend)
    out = ops.combine(y, slot_row, place.get("output"), args.x.dtype, backend=backend)
    if not args.save:
        none = [offsets.new_empty(0) for _ in range(3)]
        return out, args.x.new_empty(0), *none, args.x.new_empty(0)
    return out, pre.to(args.x.dtype), offsets, row_slot, slot_row, low


def setup(ctx: Any, given: Any, results: tuple[Tensor, ...]) -> None:
    for name in FROZEN:
        if ctx.needs[name]:
            check_that.fail("experts", name, "a tensor that does not require grad beside an adapter", "one that does")
    check_differentiable("experts", given.weight_format, {})
    args = Arguments(**vars(given))
    ctx.mark_non_differentiable(*results[1:])
    tensors = {name: value for name, value in args._asdict().items() if isinstance(value, Tensor)}
    if not (ctx.needs["gate_up_lora_a"] or args.weight_placement == "input" or not args.save):
        del tensors["x"]
    if args.save:
        del tensors["ids"]
    ctx.names = tuple(tensors)
    ctx.others = {name: None if isinstance(value, Tensor) else value for name, value in args._asdict().items()}
    ctx.like = SimpleNamespace(experts=args.gate_up.shape[0], hidden=args.x.shape[1], dtype=args.x.dtype)
    ctx.grad_dtypes = {name: grad_dtype(tensor) for name, tensor in tensors.items() if "lora" in name}
    ctx.save_for_backward(*tensors.values(), *(results[1:] if args.save else ()))


def _kept(ctx: Any) -> tuple[Arguments, tuple[Tensor, ...]]:
    """The arguments, and what the forward saved or would have."""
    tensors = ctx.saved_tensors
    args = Arguments(**(ctx.others | dict(zip(ctx.names, tensors, strict=False))))
    if args.save:
        return args, tensors[len(ctx.names) :]
    return args, compute(*args._replace(save=True), backend=ctx.backend)[1:]


def _adapter_gradients(
    found: dict[str, Tensor], ctx: Any, projection: str, adapter: Adapter, grads: tuple[Tensor, Tensor], low: Tensor,
    rows: Tensor | None, ends: Tensor,
) -> None:  # fmt: skip
    """From the gradients of the projection's result [S, N] and of the inner rows [S, r]."""
    ops, backend = torch.ops.polymoe, ctx.backend
    grad, d_low = grads
    if ctx.needs[f"{projection}_lora_b"]:
        d_b = ops.grouped_mm(grad.mT, low, ends, None, arithmetic_dtype(grad.dtype), backend=backend)
        found[f"{projection}_lora_b"] = d_b.mul_(adapter.scale).to(ctx.grad_dtypes[f"{projection}_lora_b"])
    if ctx.needs[f"{projection}_lora_a"] and rows is not None:
        dtype = ctx.grad_dtypes[f"{projection}_lora_a"]
        found[f"{projection}_lora_a"] = ops.grouped_mm(d_low.mT, rows, ends, None, dtype, backend=backend)


def _back(grad: Tensor, adapter: Adapter, ends: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """From the gradient of the result [S, N] to that of the inner rows [S, r], rounded, and of the rows [S, D]."""
    d_low = grouped_mm_dx(grad, adapter.b.mT, ends, arithmetic_dtype(grad.dtype), backend=backend)
    d_low = d_low.mul_(adapter.scale).to(grad.dtype)
    return d_low, grouped_mm_dx(d_low, adapter.a.mT, ends, arithmetic_dtype(grad.dtype), backend=backend)


def gradients(ctx: Any, grad: Tensor, *unused: None) -> dict[str, Tensor]:
    args, (pre, offsets, row_slot, slot_row, low) = _kept(ctx)
    needs, backend, ops, ends = ctx.needs, ctx.backend, torch.ops.polymoe, offsets[1:]
    options = SimpleNamespace(**{name: getattr(args, name) for name in ("transposed", "weight_format")})
    place = {args.weight_placement: args.weights}
    at_input = "input" in place
    found: dict[str, Tensor] = {}
    upstream = needs["x"] or needs["weights"] or needs["gate_up_lora_a"] or needs["gate_up_lora_b"]
    weights = None if at_input else args.weights
    rows = ops.dispatch(grad, row_slot, slot_row, backend=backend)  # [S, H]
    act = (args.activation, args.alpha, args.limit, args.interleaved, row_slot, weights)
    I = pre.shape[1] // (2 if KINDS[args.activation].gated else 1)

    adapter, d_low_and_delta = args.adapter("down"), None
    if adapter is not None:
        d_low_and_delta = _back(rows, adapter, ends, backend)
        if needs["down_lora_a"] or needs["down_lora_b"]:
            # The routing weight is in the activation here, wherever the forward had it: what follows is linear.
            activation = ops.activate(pre, *act, ctx.like.dtype, backend=backend)
            inner = _low(activation, adapter, ends, backend)
            pair = (rows, d_low_and_delta[0])
            _adapter_gradients(found, ctx, "down", adapter, pair, inner, activation, ends)
    if not upstream:
        return found

    d_activation = through(rows, (args.down, args.down_scale, args.down_zero), I, ends, options, backend)
    if d_low_and_delta is not None:
        d_activation.add_(d_low_and_delta[1])
    need_weights = needs["weights"] and not at_input
    d_pre, d_weights = activate_backward(pre, d_activation, *act, need_weights, backend=backend)
    if need_weights:
        found["weights"] = d_weights
        if args.down_bias is not None and "output" in place:
            found["weights"] = d_weights + bias_dot(args.down_bias, rows, ends, slot_row, backend)

    adapter, delta = args.adapter("gate_up"), None
    if adapter is not None:
        d_low, delta = _back(d_pre, adapter, ends, backend)
        into = None
        if needs["gate_up_lora_a"]:
            into = ops.dispatch(args.x, row_slot, slot_row, place.get("input"), backend=backend)
        _adapter_gradients(found, ctx, "gate_up", adapter, (d_pre, d_low), low, into, ends)
    if needs["x"] or (at_input and needs["weights"]):
        gate_up = (args.gate_up, args.gate_up_scale, args.gate_up_zero)
        d_rows = through(d_pre, gate_up, ctx.like.hidden, ends, options, backend)
        if delta is not None:
            d_rows.add_(delta)
        if needs["x"]:
            found["x"] = ops.combine(d_rows, slot_row, place.get("input"), ctx.like.dtype, backend=backend)
        if at_input and needs["weights"]:
            found["weights"] = row_dot(args.x, d_rows, slot_row, backend=backend)
    if "weights" in found:
        found["weights"] = found["weights"].to(args.weights.dtype)
    return found


experts_lora = define_op(
    "experts_lora",
    '(Tensor x, Tensor gate_up, Tensor down, Tensor weights, Tensor ids, str activation="swiglu", float? alpha=None, '
    "float? limit=None, Tensor? gate_up_bias=None, Tensor? down_bias=None, bool transposed=False, "
    'bool interleaved=False, str weight_placement="output", bool save=False, str weight_format="plain", '
    "Tensor? gate_up_scale=None, Tensor? down_scale=None, Tensor? gate_up_zero=None, Tensor? down_zero=None, "
    'str mode="weight_only", Tensor? gate_up_lora_a=None, Tensor? gate_up_lora_b=None, Tensor? down_lora_a=None, '
    'Tensor? down_lora_b=None, float lora_scale=1.0, *, str backend="") '
    "-> (Tensor out, Tensor pre_activation, Tensor offsets, Tensor row_slot, Tensor slot_row, Tensor low)",
    check,
    fake,
    gradient=Gradient(setup, gradients),
    specs=COMPOSED_OPS,
    composed=compute,
    like="experts",
)
