"""The gradient of experts, composed of ops on the same backend.

It keeps x, the pre-activation and the plan, and nothing that they give: not the gathered x, not the activation, not the
output of the down projection. So no product with down is repeated: the routing weight's gradient is the dot product of
the activation and of the output's gradient sent back through down.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from polymoe.ops._library import grad_dtype
from polymoe.ops._weights import check_differentiable
from polymoe.ops.activate import KINDS, activate_backward
from polymoe.ops.down_backward import down_backward
from polymoe.ops.grouped_mm_gradient import grouped_mm_dx
from polymoe.ops.quantized_backward import quantized_backward
from polymoe.ops.row_dot import row_dot
from polymoe.reference._arithmetic import arithmetic_dtype

OPTIONS = (
    "activation",
    "alpha",
    "limit",
    "transposed",
    "interleaved",
    "weight_placement",
    "save",
    "weight_format",
    "mode",
)


def setup(ctx: Any, args: Any, results: tuple[Tensor, ...]) -> None:
    parts = ("gate_up", "down", "gate_up_scale", "down_scale")
    check_differentiable("experts", args.weight_format, {name: ctx.needs[name] for name in parts})
    ctx.mark_non_differentiable(*results[1:])
    needs, at_input = ctx.needs, args.weight_placement == "input"
    upstream = _needs_pre_activation_gradient(needs)
    x_is_used = not args.save or needs["gate_up"] or (at_input and needs["weights"])
    saved = results[1:] if args.save else (None, None, None, None)
    ctx.save_for_backward(
        args.x if x_is_used else None,
        args.gate_up if needs["x"] or (at_input and needs["weights"]) or not args.save else None,
        args.down if upstream or needs["weights"] else None,
        args.weights,
        args.gate_up_bias if not args.save else None,
        args.down_bias if needs["weights"] and args.weight_placement == "output" else None,
        None if args.save else args.ids,
        args.gate_up_scale,
        args.down_scale,
        args.gate_up_zero,
        args.down_zero,
        *saved,
    )
    ctx.options = SimpleNamespace(**{name: getattr(args, name) for name in OPTIONS})
    ctx.options.experts, ctx.options.dtype = args.gate_up.shape[0], args.x.dtype
    ctx.options.hidden = args.x.shape[1]
    ctx.options.grad_dtypes = {name: grad_dtype(getattr(args, name)) for name in ("gate_up", "down")}
    for name in ("gate_up_bias", "down_bias"):
        bias = getattr(args, name)
        setattr(ctx.options, f"{name}_dtype", None if bias is None else grad_dtype(bias))


def _needs_pre_activation_gradient(needs: dict[str, bool]) -> bool:
    return needs["x"] or needs["gate_up"] or needs["gate_up_bias"]


class Saved(NamedTuple):
    """What setup saved; None where no gradient needs it."""

    x: Tensor
    gate_up: Tensor
    down: Tensor
    weights: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    ids: Tensor
    gate_up_scale: Tensor | None
    down_scale: Tensor | None
    gate_up_zero: Tensor | None
    down_zero: Tensor | None
    pre_activation: Tensor
    offsets: Tensor
    row_slot: Tensor
    slot_row: Tensor


def gradients(ctx: Any, grad: Tensor, *unused: None) -> dict[str, Tensor]:
    saved, needs, options = Saved(*ctx.saved_tensors), ctx.needs, ctx.options
    if not options.save:
        saved = _recomputed(saved, options, ctx.backend)
    at_input, at_output = options.weight_placement == "input", options.weight_placement == "output"
    ops, backend, ends = torch.ops.polymoe, ctx.backend, saved.offsets[1:]
    weights = None if at_input else saved.weights  # what multiplies the activation, or what is linear in it
    rows = ops.dispatch(grad, saved.row_slot, saved.slot_row, backend=backend)  # [S, H]
    found: dict[str, Tensor] = {}

    act = (options.activation, options.alpha, options.limit, options.interleaved, saved.row_slot, weights)
    if _needs_pre_activation_gradient(needs) or needs["weights"]:
        need_weights = needs["weights"] and not at_input
        d_pre, activation, d_weights = _through_down(saved, rows, act, (needs["down"], need_weights), options, backend)
        if need_weights:
            found["weights"] = d_weights
        if needs["down"]:
            found["down"] = _down_gradient(rows, activation, ends, options, backend)
        del activation
        found |= _through_gate_up(saved, d_pre, needs, options, backend)
    elif needs["down"]:
        activation = ops.activate(saved.pre_activation, *act, options.dtype, backend=backend)
        found["down"] = _down_gradient(rows, activation, ends, options, backend)
    if needs["down_bias"]:
        weighted = ops.dispatch(
            grad, saved.row_slot, saved.slot_row, saved.weights if at_output else None, backend=backend
        )
        found["down_bias"] = _sums(weighted, ends, options.down_bias_dtype, backend)
    if saved.down_bias is not None:  # the output of a row is its product and the bias
        found["weights"] = found["weights"] + bias_dot(saved.down_bias, rows, ends, saved.slot_row, backend)
    if "weights" in found:
        found["weights"] = found["weights"].to(saved.weights.dtype)
    return found


def _through_down(
    saved: Saved, rows: Tensor, act: tuple[Any, ...], need: tuple[bool, bool], options: Any, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of the pre-activation; the activation, weighted, and the gradient of the routing weights, as far as
    they are needed."""
    ends = saved.offsets[1:]
    if saved.down_scale is None:
        down = saved.down.mT if options.transposed else saved.down  # [E, H, I]
        *kind, row_slot, weights = act
        plan = (ends, row_slot, saved.slot_row)
        results: tuple[Tensor, Tensor, Tensor] = down_backward(
            rows, down, saved.pre_activation, *plan, *kind, weights, *need, backend=backend
        )
        return results
    I = saved.pre_activation.shape[1] // (2 if KINDS[options.activation].gated else 1)
    down_weight = (saved.down, saved.down_scale, saved.down_zero)
    d_activation = through(rows, down_weight, I, ends, options, backend)
    d_pre, d_weights = activate_backward(saved.pre_activation, d_activation, *act, need[1], backend=backend)
    return d_pre, rows.new_empty(0), d_weights  # quantised weights are frozen


def _down_gradient(rows: Tensor, activation: Tensor, ends: Tensor, options: Any, backend: str) -> Tensor:
    pair = (activation.mT, rows) if options.transposed else (rows.mT, activation)
    found: Tensor = torch.ops.polymoe.grouped_mm(*pair, ends, None, options.grad_dtypes["down"], backend=backend)
    return found


def _recomputed(saved: Saved, options: Any, backend: str) -> Saved:
    """The plan and the pre-activation as the forward had them, to the bit."""
    ops = torch.ops.polymoe
    offsets, row_slot, slot_row = ops.plan(saved.ids, options.experts, backend=backend)
    factors = saved.weights if options.weight_placement == "input" else None
    gate_up = saved.gate_up if options.transposed else saved.gate_up.mT
    how = (options.weight_format, saved.gate_up_scale, saved.gate_up_zero, options.mode)
    rows = ops.dispatch(saved.x, row_slot, slot_row, factors, backend=backend)
    pre = ops.grouped_mm(rows, gate_up, offsets[1:], saved.gate_up_bias, None, *how, backend=backend)
    return saved._replace(pre_activation=pre, offsets=offsets, row_slot=row_slot, slot_row=slot_row)


def _through_gate_up(
    saved: Saved, d_pre: Tensor, needs: dict[str, bool], options: Any, backend: str
) -> dict[str, Tensor]:
    """From the gradient of the pre-activation [S, 2I]."""
    ops, ends, at_input = torch.ops.polymoe, saved.offsets[1:], options.weight_placement == "input"
    factors = saved.weights if at_input else None
    found: dict[str, Tensor] = {}
    if needs["gate_up"]:
        rows = ops.dispatch(saved.x, saved.row_slot, saved.slot_row, factors, backend=backend)
        pair = (rows.mT, d_pre) if options.transposed else (d_pre.mT, rows)
        found["gate_up"] = ops.grouped_mm(*pair, ends, None, options.grad_dtypes["gate_up"], backend=backend)
    if needs["gate_up_bias"]:
        found["gate_up_bias"] = _sums(d_pre, ends, options.gate_up_bias_dtype, backend)
    if needs["x"] or (at_input and needs["weights"]):
        gate_up = (saved.gate_up, saved.gate_up_scale, saved.gate_up_zero)
        d_rows = through(d_pre, gate_up, options.hidden, ends, options, backend)
        if needs["x"]:
            found["x"] = ops.combine(d_rows, saved.slot_row, factors, options.dtype, backend=backend)
        if at_input and needs["weights"]:
            found["weights"] = row_dot(saved.x, d_rows, saved.slot_row, backend=backend)
    return found


def through(
    rows: Tensor, weight: tuple[Tensor, Tensor | None, Tensor | None], D: int, ends: Tensor, options: Any, backend: str
) -> Tensor:
    """[S, D]: rows [S, N] sent back through a projection [E, N, D], given as data, scale and zero points."""
    data, scale, zero = weight
    if scale is None:
        plain = data if options.transposed else data.mT  # [E, D, N]
        product: Tensor = grouped_mm_dx(rows, plain, ends, arithmetic_dtype(rows.dtype), backend=backend)
        return product
    back: Tensor = quantized_backward(
        rows, data, scale, zero, ends, D, options.weight_format, arithmetic_dtype(rows.dtype), backend=backend
    )
    return back


def _sums(rows: Tensor, ends: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    """[E, columns]: the sums over the rows of each expert, in float32, as a product with ones."""
    ones = torch.ones((1, rows.shape[0]), dtype=rows.dtype, device=rows.device)
    sums: Tensor = torch.ops.polymoe.grouped_mm(ones, rows, ends, None, arithmetic_dtype(rows.dtype), backend=backend)
    return sums.squeeze(1).to(dtype)


def bias_dot(bias: Tensor, rows: Tensor, ends: Tensor, slot_row: Tensor, backend: str) -> Tensor:
    """[T, K]: the dot product of the output's gradient, rows [S, H], with the down bias [E, H] of the slot's expert, as
    the column of that expert in the product with all biases, on the same rows; 0 for skipped slots."""
    columns = bias.to(rows.dtype).unsqueeze(2)  # [E, H, 1]
    dots = torch.ops.polymoe.grouped_mm(rows, columns, ends, None, arithmetic_dtype(rows.dtype), backend=backend)
    row = slot_row.long()
    return dots[:, 0][row.clamp(min=0)].where(row >= 0, 0)
