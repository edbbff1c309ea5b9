"""Small kernels that show what Triton's interpreter computes, beside what torch gives.

`python -m tests.interpreted.arithmetic SEED` prints for each how many elements differ in the interpreter as it comes.
"""

import json
import sys

import torch
import triton
import triton.language as tl

from polymoe.testing.tolerances import bits

N = 256
SIZE = 32  # of matrices


@triton.jit
def _elementwise(x, y, out, N: tl.constexpr, OP: tl.constexpr):
    at = tl.arange(0, N)
    a, b = tl.load(x + at), tl.load(y + at)
    if OP == "add":
        result = a + b
    elif OP == "multiply":
        result = a * b
    elif OP == "negate":
        result = -a
    elif OP == "fma":
        result = tl.fma(a, b, a)
    elif OP == "where":
        result = tl.where(a > b, a, b)
    else:
        result = a.to(out.dtype.element_ty)
    tl.store(out + at, result)


@triton.jit
def _dot(x, y, out, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None] * SIZE, tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(x + row + column), tl.load(y + row + column), input_precision=PRECISION)
    tl.store(out + row + column, product)


@triton.jit
def _sum(x, out, SIZE: tl.constexpr):
    row = tl.arange(0, SIZE)
    tl.store(out + row, tl.sum(tl.load(x + row[:, None] * SIZE + row[None, :]), axis=1))


def ascending(x, y):
    """x @ y, product after product, each rounded and added by itself."""
    total = torch.zeros(x.shape[0], y.shape[1])
    for k in range(x.shape[1]):
        total += x[:, k, None].float() * y[None, k].float()
    return total


def to_tf32(x):
    """Rounded to the nearest number with 10 bits after the point, ties to even."""
    integers = x.view(torch.int32)
    return ((integers + 0x0FFF + ((integers >> 13) & 1)) & -0x2000).view(torch.float32)


def elementwise(op, x, y, out):
    _elementwise[(1,)](x, y, out, N=N, OP=op)
    return out


def dot(x, y, precision="ieee"):
    out = torch.empty(SIZE, SIZE)
    _dot[(1,)](x, y, out, SIZE=SIZE, PRECISION=precision)
    return out


def sums(x):
    out = torch.empty(SIZE, dtype=x.dtype)
    _sum[(1,)](x, out, SIZE=SIZE)
    return out


def results(seed):
    """By name: what a kernel gives, and what is right."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(dtype)

    bf16 = torch.bfloat16
    x, y = normal(N, dtype=bf16), normal(N, dtype=bf16)
    wide = normal(N) * 100
    found = {
        "bfloat16 add": (elementwise("add", x, y, torch.empty_like(x)), x + y),
        "bfloat16 multiply": (elementwise("multiply", x, y, torch.empty_like(x)), x * y),
        "bfloat16 negate": (elementwise("negate", x, y, torch.empty_like(x)), -x),
        "bfloat16 fma": (elementwise("fma", x, y, torch.empty_like(x)), (x.double() * y.double() + x).to(bf16)),
        "bfloat16 compare": (elementwise("where", x, y, torch.empty_like(x)), torch.maximum(x, y)),
        "to bfloat16": (elementwise("cast", wide, wide, torch.empty_like(x)), wide.to(bf16)),
    }
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        largest = torch.finfo(dtype).max
        out = elementwise("cast", wide, wide, torch.empty(N, dtype=dtype))
        found[f"to {dtype}"] = (out.view(torch.uint8), wide.clamp(-largest, largest).to(dtype).view(torch.uint8))
    a, b = normal(SIZE, SIZE), normal(SIZE, SIZE)
    low, other = a.to(bf16), b.to(bf16)
    found["bfloat16 dot"] = (dot(low, other), ascending(low, other))
    found["float32 dot"] = (dot(a, b), ascending(a, b))
    found["tf32 dot"] = (dot(a, b, "tf32"), ascending(to_tf32(a), to_tf32(b)))
    total = torch.zeros(SIZE)
    for column in a.unbind(1):
        total += column
    found["sum"] = (sums(a), total)
    return found


def differences(seed):
    return {name: int((bits(got) != bits(right)).sum()) for name, (got, right) in results(seed).items()}


if __name__ == "__main__":
    print(json.dumps(differences(int(sys.argv[1]))))
