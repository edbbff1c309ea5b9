"""The weights of experts and grouped_mm that are not plain tensors: their formats, and the checks of quantised ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from polymoe.formats.names import FORMATS
from polymoe.formats.weight import MODES, Weight
from polymoe.ops import _check as check_that

QUANTIZED = tuple(FORMATS)


def check_options(
    op: str, weight_format: str, accepted: Sequence[str], mode: str, companions: Mapping[str, Tensor | None]
) -> None:
    """The format and the mode; `companions` are the scales and zero points by name, which plain weights lack."""
    check_that.choice(op, "weight_format", weight_format, (*accepted, *QUANTIZED))
    check_that.choice(op, "mode", mode, MODES)
    if weight_format in QUANTIZED:
        modes = FORMATS[weight_format].modes
        if mode not in modes:
            own = " or ".join(f'"{each}"' for each in modes)
            check_that.fail(op, "mode", f"{own} for {weight_format}", f'"{mode}"')
        return
    if mode != "weight_only":
        check_that.fail(op, "mode", f'"weight_only" for {weight_format} weights', f'"{mode}"')
    for name, tensor in companions.items():
        if tensor is not None:
            check_that.fail(op, name, f"nothing for {weight_format} weights", check_that.describe(tensor))


def check_quantized(
    op: str, names: Sequence[str], weight: tuple[Tensor, Tensor | None, Tensor | None], format: str, D: int, x: Tensor
) -> None:
    """A weight [G, N, D] as (data, scale, zero), whose arguments have the names `names`."""
    data, scale, zero = weight
    data_name, scale_name, zero_name = names
    if data.dim() != 3:
        check_that.fail(op, data_name, f"3 dimensions for {format}", check_that.describe(data))
    if scale is None:
        check_that.fail(op, scale_name, f"the scales of {format}", None)
    stored = Weight(data, scale, zero, format, data.shape[1], D)
    FORMATS[format].check(op, data_name, stored, scale_name, zero_name)
    for name, tensor in ((data_name, data), (scale_name, scale), (zero_name, zero)):
        if tensor is not None:
            check_that.device(op, name, tensor, x)
            check_that.contiguous(op, name, tensor)


def check_differentiable(op: str, weight_format: str, needs: Mapping[str, bool]) -> None:
    """Plain weights have gradients; what is behind quantised ones has. `needs`: the parts of weights that want one."""
    if weight_format.startswith("packed"):
        check_that.fail(
            op, "weight_format", '"plain" or a quantised format where a gradient is needed', f'"{weight_format}"'
        )
    if weight_format in QUANTIZED:
        for name, needed in needs.items():
            if needed:
                check_that.fail(op, name, f"a tensor that does not require grad for {weight_format}", "one that does")
