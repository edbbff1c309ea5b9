"""Which kernels a call would launch on a device that is not there: the host code runs on meta tensors, and Triton's
launches are recorded instead of made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, compile, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from polymoe.kernels.devices import Device, pretend


@dataclass(frozen=True)
class Launch:
    """One kernel as Triton would specialise it for the arguments of one launch."""

    kernel: JITFunction
    target: GPUTarget
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]
    sizes: dict[str, int]  # the arguments that are integers, by name

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.removeprefix("_")

    @property
    def constexprs(self) -> dict[str, Any]:
        """The constants by the names of the arguments."""
        return {self.kernel.arg_names[path[0]]: value for path, value in self.constants.items()}

    @cached_property
    def key(self) -> str:
        """Equal for launches that run the same binary, as long as the sources stay the same, on every machine."""
        options = {name: value for name, value in self.options.items() if name != "extern_libs"}  # paths
        parts = (self.target, self.name, self.signature, self.constants, self.attributes, options)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def compile(self) -> CompiledKernel:
        source = ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        return compile(source, target=self.target, options=self.options)


def compile_target(family: str) -> GPUTarget:
    if family.startswith("sm_"):
        return GPUTarget("cuda", int(family.removeprefix("sm_")), 32)
    return GPUTarget("hip", family, 64 if family.startswith("gfx9") else 32)


@contextmanager
def _recorded(target: GPUTarget, found: list[Launch]) -> Iterator[None]:
    backend = make_backend(target)

    binders: dict[JITFunction, Any] = {}

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        binder = binders.get(self)
        if binder is None:
            binder = binders[self] = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = binder(*args, **kwargs)
        parsed, signature, constants, attributes = self._pack_args(backend, options, bound, specialization, options)
        sizes = {name: value for name, value in bound.items() if isinstance(value, int)}
        found.append(Launch(self, target, signature, constants, attributes, dict(parsed.__dict__), sizes))

    before, JITFunction.run = JITFunction.run, run
    try:
        yield
    finally:
        JITFunction.run = before


def launches(call: Callable[[], Any], device: Device) -> list[Launch]:
    """What `call` would launch on the device; its tensors live on torch's device "meta"."""
    found: list[Launch] = []
    with pretend(device), _recorded(compile_target(device.family), found):
        call()
    return found
