"""How the operands of a product are read: the arithmetic for their dtype, and tensor descriptors where they apply."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from polymoe.kernels.devices import Device
from polymoe.kernels.tiles import Tiles, offers_tf32

# Their instructions for tf32 read weights only along the reduction; others take them apart in registers.
TF32_ALONG_D = ("sm_90", "sm_100")
_HALVES = {torch.bfloat16: "bf16", torch.float16: "f16"}


def arithmetic(a: Tensor, b: Tensor, device: Device) -> str:
    """ "bf16", "f16", "tf32" or "f32". Float32 becomes tf32 where PyTorch's own switch for matmuls says so and the
    device has such an instruction for weights that lie as b [.., D, N] does."""
    if a.dtype in _HALVES:
        return _HALVES[a.dtype]
    wanted = torch.backends.cuda.matmul.fp32_precision == "tf32"
    served = offers_tf32(device.family) and (device.family not in TF32_ALONG_D or along_d(b))
    return "tf32" if wanted and served else "f32"


def precision(arithmetic: str) -> str:
    """tl.dot's input_precision."""
    return "tf32" if arithmetic == "tf32" else "ieee"


def along_d(b: Tensor) -> bool:
    """Whether weights [.., D, N] are stored as nn.Linear stores them, contiguous along the reduction."""
    return b.stride(-2) == 1


def described(a: Tensor, tiles: Tiles) -> TensorDescriptor | None:
    """A descriptor of a [S, D]; None where bulk copies cannot or need not read it."""
    return _descriptor(a, [tiles.block_m, tiles.block_k]) if tiles.descriptors else None


def described_weights(b: Tensor, tiles: Tiles, halves: bool = False) -> TensorDescriptor | None:
    """The same for weights [G, D, N], as [G, N, D] where they lie along D. With `halves` N is described as [2, N / 2],
    and a tile has half of its columns in either."""
    if not tiles.descriptors:
        return None
    rows, columns = tiles.block_k, tiles.block_n
    box, lies_along_d = [columns], along_d(b)
    if halves:
        box, b = [2, columns // 2], b.unflatten(2, (2, -1))
    if lies_along_d:
        return _descriptor(b.movedim(1, -1), [1, *box, rows])
    return _descriptor(b, [1, rows, *box])


def _descriptor(tensor: Tensor, block: list[int]) -> TensorDescriptor | None:
    *outer, inner = tensor.stride()
    size = tensor.element_size()
    readable = (
        tensor.numel() > 0
        and inner == 1
        and all(stride > 0 and stride * size % 16 == 0 for stride in outer)
        and tensor.data_ptr() % 16 == 0
    )
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block) if readable else None


def reach(tensor: Tensor, rows: int, columns: int) -> int:
    """The largest offset inside a tile of the last two dimensions."""
    return (rows - 1) * tensor.stride(-2) + (columns - 1) * tensor.stride(-1)


def strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    """Of the last `dims` dimensions; 0 for those that the tensor lacks."""
    own = () if tensor is None else tensor.stride()
    return (0,) * (dims - len(own)) + tuple(own)
