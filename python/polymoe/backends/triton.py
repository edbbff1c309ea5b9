"""The Triton backend: the kernels of kernels/, on every GPU that Triton compiles for. In Triton's interpreter
(TRITON_INTERPRET=1), which is for tests, it also serves CPU tensors."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from polymoe.hal.problem import Problem

# Each is the function of that name in the module of that name in kernels/.
KERNELS = ("activate", "combine", "dispatch", "experts", "gate", "grouped_mm", "plan")
GRADIENT_KERNELS = ("activate_backward", "down_backward", "gate_backward", "quantized_backward", "row_dot")
FORMAT_KERNELS = ("quantize",)

# Triton decides between compiler and interpreter where a kernel is defined, so it is decided once here too.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")

LOWEST_CAPABILITY = (8, 0)  # the first with bfloat16 matrix instructions


class TritonBackend:
    name = "triton"
    # ROCm devices are of torch's type cuda.
    device_types: tuple[str, ...] = ("cuda", "xpu", "cpu") if INTERPRETED else ("cuda", "xpu")
    deterministic = True
    batch_invariant = True

    def supports(self, op: str, problem: Problem) -> str | None:
        if op not in KERNELS + GRADIENT_KERNELS + FORMAT_KERNELS:
            return f"there is no Triton kernel for {op}"
        if find_spec("triton") is None:
            return "triton is not installed"
        if problem.dtype == torch.float64:
            return "its kernels compute in float32; float64 is for the cpu and reference backends"
        weight_format = problem.option.get("weight_format", "plain")
        if weight_format.startswith("packed"):
            return "packed weights are laid out for the CPU kernels"
        if problem.option.get("mode") == "int8_g128":
            return 'its kernels round rows to 8-bit integers in groups of 32, mode "int8"'
        return _too_old() if problem.device_type == "cuda" else None

    def implementation(self, op: str) -> Callable[..., Any]:
        if INTERPRETED:
            importlib.import_module("polymoe.testing.triton_interpreter").repair()
        kernel = getattr(importlib.import_module(f"polymoe.kernels.{op}"), op)

        def call(subject: Tensor, *args: Any) -> Any:
            if subject.device.type in ("cpu", "meta"):  # interpreted, or in a test of the launches
                return kernel(subject, *args)
            with torch.accelerator.device_index(subject.device.index):  # Triton launches on the current device
                return kernel(subject, *args)

        return call

    def notes(self, op: str, problem: Problem, arguments: Mapping[str, Any]) -> list[str]:
        """Remarks for explain(): what on this path costs extra."""
        notes = ["it runs in Triton's interpreter, which is for tests and very slow"] if INTERPRETED else []
        if problem.option.get("mode") == "fp8":
            from polymoe.kernels import devices, tiles

            family = devices.current(next(iter(arguments.values())).device).family
            if not tiles.offers_scaled(family):
                notes.append(f"{family} has no scaled matrix instructions: codes are decoded to bfloat16")
        return notes


def _too_old() -> str | None:
    """Why the NVIDIA devices of this machine cannot run the kernels, or None."""
    if getattr(torch.version, "hip", None) is not None or not torch.cuda.is_available():
        return None
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if capability < LOWEST_CAPABILITY:
            needed, found = (".".join(map(str, version)) for version in (LOWEST_CAPABILITY, capability))
            return f"it needs compute capability {needed}, and device {index} has {found}"
    return None
