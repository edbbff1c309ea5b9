"""What all launches share."""

import torch
import triton
import triton.language as tl

# A product and a sum are contracted into one multiply-add only where a kernel says tl.fma. Left to the compiler, whose
# default depends on the version, the same expression could round differently in two kernels, and `experts` would no
# longer equal the ops that it fuses to the bit.
OPTIONS = {"enable_fp_fusion": False}

# The largest offset for which 32 bits do: a tile may reach past the last row, and its row numbers must not wrap around.
LARGEST_INT32 = 2**31 - 2**16


def extent(*tensors: torch.Tensor | None) -> int:
    """The largest offset, in elements, that addressing any of the tensors needs."""
    return max(
        (
            sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            for tensor in tensors
            if tensor is not None and tensor.numel() > 0
        ),
        default=0,
    )


def index_type(largest: int) -> tl.dtype:
    """The integer type for offsets up to `largest`: 64 bits only where a tensor needs them."""
    return tl.int32 if largest <= LARGEST_INT32 else tl.int64


# How much larger the tiles of the interpreter are, for which a small tile takes as long as a large one.
INTERPRETED_TILE = 16


def tile(width: int, columns: int, elements: int) -> tuple[int, int]:
    """Rows and columns, powers of two, of a tile of matrices of that width: at most so many columns, and `elements` in
    all."""
    columns = min(next_power_of_2(width), columns)
    return elements * (INTERPRETED_TILE if triton.knobs.runtime.interpret else 1) // columns, columns


def cdiv(n: int, block: int) -> int:
    return -(-n // block)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
