"""`optimize`: the expert weights of a whole model, packed in place for the CPU kernels; `unoptimize` takes it back.

A packed weight leaves the module's parameters: its elements are permuted, and whoever read them as a parameter would
compute with them. The storage becomes the buffer `<name>_packed`, and a `PackedWeight` takes the parameter's place,
which refuses every use. state_dict holds the original values under the original name, and load_state_dict takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from polymoe.formats.packed import pack_, unpack_
from polymoe.ops._check import describe, fail
from polymoe.ops.pack_weight import check as check_packable

_SHARDED: tuple[type, ...] = ()
if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor

    _SHARDED = (DTensor,)


class Packable(NamedTuple):
    """A parameter that can be packed, and the options of `polymoe.formats.pack_` for it."""

    name: str
    gate_up: bool = False
    interleaved: bool = False
    transposed: bool = False


PackHook = Callable[[nn.Module], Sequence[Packable]]
_hooks: list[PackHook] = []


def register_packable(hook: PackHook) -> PackHook:
    """Teaches `optimize` a kind of module: `hook` names the parameters of a module that its forward takes packed, none
    for any other module. Usable as a decorator."""
    _hooks.append(hook)
    return hook


class PackedWeightError(AttributeError):
    """A weight that `polymoe.optimize` packed was read as if it had its original elements."""


@dataclass(frozen=True)
class PackedWeight:
    """Stands where a parameter was. Shape and dtype are those of the parameter; any other use is one clear error."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    gate_up: bool
    interleaved: bool
    transposed: bool

    @property
    def buffer(self) -> str:
        return f"{self.name}_packed"

    def tensor(self, module: nn.Module) -> Tensor:
        """The packed elements, for an op that takes weight_format="packed".

        Raises:
            ValueError: the module was cast to another dtype since; the order of the elements depends on the dtype.
        """
        packed: Tensor = getattr(module, self.buffer)
        if packed.dtype != self.dtype:
            fail(
                "optimize",
                self.name,
                f"{self.dtype}, as it was packed; call polymoe.unoptimize(model) before the model is cast",
                packed.dtype,
            )
        return packed

    def unpacked(self, module: nn.Module) -> Tensor:
        """A copy with the original elements."""
        return unpack_(self.tensor(module).detach().clone(), **self._options())

    def pack(self, module: nn.Module) -> None:
        """Packs the buffer, which holds original elements."""
        pack_(self.tensor(module), **self._options())

    def unpack(self, module: nn.Module) -> Tensor:
        """Unpacks the buffer in place."""
        return unpack_(self.tensor(module), **self._options())

    def _options(self) -> dict[str, bool]:
        return {"gate_up": self.gate_up, "interleaved": self.interleaved, "transposed": self.transposed}

    def _refuse(self, use: str) -> NoReturn:
        raise PackedWeightError(
            f"polymoe.optimize: {self.name}: expected only polymoe to read this packed weight, got {use}; "
            "polymoe.unoptimize(model) gives the parameter back"
        )

    def __getattr__(self, attribute: str) -> NoReturn:
        if attribute.startswith("__"):  # what copy, pickle and inspection ask every object for
            raise AttributeError(attribute)
        self._refuse(f".{attribute}")

    def __getitem__(self, index: object) -> NoReturn:
        self._refuse("an index")

    def __iter__(self) -> NoReturn:
        self._refuse("a loop over it")

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: object = None
    ) -> NoReturn:
        packed = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls))
        packed._refuse(getattr(function, "__name__", "a torch function"))


def optimize(model: nn.Module) -> list[str]:
    """Packs the weights of a model's experts in place, so that the CPU kernels read them at full speed.

    It goes expert by expert in the parameter's own storage, and takes the memory of one expert besides. Afterwards the
    parameters are not parameters any more: who else reads one gets a PackedWeightError, never permuted numbers, and who
    holds one from before, such as an optimiser, holds a tensor without data (on the device meta). state_dict,
    save_pretrained, deepcopy and pickle keep working, and load_state_dict takes original values.

    Args:
        model: holds polymoe.nn.Experts, or experts of Transformers that run by the implementation "polymoe".

    Returns:
        The names of the weights packed. Weights that are packed already are left as they are.

    Raises:
        ValueError: there is nothing to pack, or one of the weights requires grad, is shared with another name, sharded,
            not contiguous, not on the CPU, or of a shape or dtype that polymoe.experts does not take, or a tensor
            outside the model, such as one in a state_dict, or another process shares its memory and would see it
            permuted. Nothing is changed then.
    """
    found = [
        (f"{prefix}.{packable.name}".lstrip("."), module, packable)
        for prefix, module in model.named_modules()
        for hook in _hooks
        for packable in hook(module)
    ]
    if not found:
        fail(
            "optimize",
            "model",
            'polymoe.nn.Experts, or experts of Transformers whose implementation is "polymoe"',
            type(model).__name__,
        )
    new = [(name, module, p) for name, module, p in found if not isinstance(getattr(module, p.name), PackedWeight)]
    extents = list(_extents(model))
    for name, module, packable in new:
        _check(name, getattr(module, packable.name), packable, extents)
    for _, module, packable in new:
        _pack(module, packable)
    return [name for name, _, _ in new]


def unoptimize(model: nn.Module) -> list[str]:
    """Gives every weight that `optimize` packed back as the parameter that it was, in place.

    Returns:
        The names of the parameters.
    """
    names = []
    for prefix, module in model.named_modules():
        for packed in packed_weights(module):
            plain = packed.unpack(module)
            delattr(module, packed.buffer)
            delattr(module, packed.name)
            module.register_parameter(packed.name, nn.Parameter(plain, requires_grad=False))
            names.append(f"{prefix}.{packed.name}".lstrip("."))
    return names


def packed_weights(module: nn.Module) -> list[PackedWeight]:
    return [value for value in vars(module).values() if isinstance(value, PackedWeight)]


class _Extent(NamedTuple):
    """The bytes from the first element of a parameter or buffer to its last."""

    begin: int
    end: int
    name: str
    tensor: Tensor


def _extents(model: nn.Module) -> Iterator[_Extent]:
    """Of every parameter and buffer on the CPU, under every name that it has."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None or isinstance(tensor, _SHARDED) or tensor.device.type != "cpu" or tensor.numel() == 0:
                continue
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            begin = tensor.data_ptr()
            yield _Extent(begin, begin + (last + 1) * tensor.element_size(), f"{prefix}.{name}".lstrip("."), tensor)


def _check(name: str, weight: Tensor, packable: Packable, extents: list[_Extent]) -> None:
    if isinstance(weight, _SHARDED) or getattr(weight, "_fsdp_flattened", False):
        fail("optimize", name, "a whole tensor; pack before the model is sharded", type(weight).__name__)
    if weight.requires_grad:
        fail("optimize", name, "a weight that does not require grad; call model.requires_grad_(False)", "one that does")
    if weight.device.type != "cpu":
        fail("optimize", name, "a weight on the CPU", describe(weight))
    _, *options = packable
    check_packable("optimize", name, weight, *options)
    begin, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
    sharing = [other.name for other in extents if other.name != name and other.begin < end and begin < other.end]
    if sharing:
        fail("optimize", name, "memory of its own", f"memory shared with {', '.join(sharing)}")
    if weight.is_shared():
        fail("optimize", name, "memory of its own", "memory shared with other processes, or with a file")
    storage = weight.untyped_storage()
    known = {id(other.tensor) for other in extents if other.tensor.untyped_storage()._cdata == storage._cdata}
    if torch._C._storage_Use_Count(storage._cdata) - 1 > len(known):  # 1: `storage`, here
        fail("optimize", name, "memory of its own", "memory that a tensor outside the model holds too")
    if weight._use_count() > 1:  # type: ignore[attr-defined]
        fail("optimize", name, "a weight of its own", "one that code in C++ holds too, such as a graph for gradients")


def _pack(module: nn.Module, packable: Packable) -> None:
    weight = getattr(module, packable.name)
    name, *options = packable
    packed = PackedWeight(name, weight.shape, weight.dtype, *options)
    # Whoever holds the parameter must not see it permuted: its inside moves to the buffer, and it has no data any more.
    buffer = torch.empty_like(weight, device="meta")
    torch._C._swap_tensor_impl(weight, buffer)
    delattr(module, name)
    if _save not in module._state_dict_hooks.values():
        module.register_state_dict_post_hook(_save)
        module.register_load_state_dict_pre_hook(_load)
    module.register_buffer(packed.buffer, buffer, persistent=False)
    setattr(module, name, packed)
    packed.pack(module)


def _save(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: object) -> None:
    for packed in packed_weights(module):
        state_dict[prefix + packed.name] = packed.unpacked(module)


def _load(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: object,
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    for packed in packed_weights(module):
        key = prefix + packed.name
        value = state_dict.pop(key, None)
        if value is None:
            missing_keys.append(key)
        elif value.shape != packed.shape:
            error_msgs.append(f"size mismatch for {key}: expected {tuple(packed.shape)}, got {tuple(value.shape)}.")
        else:
            with torch.no_grad():
                packed.tensor(module).copy_(value)
            packed.pack(module)
