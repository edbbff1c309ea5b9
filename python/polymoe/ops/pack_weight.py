"""The ops that repack dense weights in place. They have no gradient: a packed weight is not the tensor it was."""

from __future__ import annotations

import torch
from torch import Tensor

from polymoe.ops import _check as check_that
from polymoe.ops._library import LIB
from polymoe.reference import pack_weight as reference

_ARGUMENTS = "(Tensor(a!) weight, bool gate_up=False, bool interleaved=False, bool transposed=False) -> ()"


def check(op: str, name: str, weight: Tensor, gate_up: bool, interleaved: bool, transposed: bool) -> None:
    check_that.dtype(op, name, weight, check_that.FLOATS)
    check_that.shape(op, name, weight, dict.fromkeys(("E", "D", "N") if transposed else ("E", "N", "D")))
    check_that.contiguous(op, name, weight)
    if gate_up and weight.shape[2 if transposed else 1] % 2 != 0:
        check_that.fail(op, name, "an even N with gate_up", check_that.describe(weight))
    if interleaved and not gate_up:
        check_that.fail(op, "interleaved", "False without gate_up", True)


def _define(name: str) -> None:
    convert = reference.pack if name == "pack_weight_" else reference.unpack

    def kernel(weight: Tensor, gate_up: bool = False, interleaved: bool = False, transposed: bool = False) -> None:
        check(name, "weight", weight, gate_up, interleaved, transposed)
        for expert in weight.split(1):
            expert.copy_(convert(expert, gate_up, interleaved, transposed))

    def fake(weight: Tensor, gate_up: bool = False, interleaved: bool = False, transposed: bool = False) -> None:
        check(name, "weight", weight, gate_up, interleaved, transposed)

    LIB.define(name + _ARGUMENTS, tags=(torch.Tag.pt2_compliant_tag,))
    LIB.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"polymoe::{name}", fake, lib=LIB)


_define("pack_weight_")
_define("unpack_weight_")
