"""Speeds of libraries that PyPI does not have, to stand in for them: times as fast as the eager bf16 loop beside them,
as measured once on two Zen 4 cores with AVX-512 and BF16, without AMX. On a machine whose loop has other instructions
they say little."""

from __future__ import annotations

# By shape and tokens; by format, whatever its group or block size.
SGL_KERNEL = {
    ("w1", 1): {"fp8": 6.201, "int4": 10.064, "int8": 7.52, "mxfp4": 7.016},
    ("w1", 16): {"fp8": 5.485, "int4": 10.474, "int8": 7.869, "mxfp4": 6.006},
    ("w1", 128): {"fp8": 2.141, "int4": 3.404, "int8": 5.395, "mxfp4": 2.936},
    ("w1", 1024): {"fp8": 1.266, "int4": 1.759, "int8": 2.74, "mxfp4": 1.365},
    ("w2", 1): {"fp8": 3.475, "int4": 5.861, "int8": 3.6, "mxfp4": 4.836},
    ("w2", 16): {"fp8": 2.295, "int4": 3.614, "int8": 3.449, "mxfp4": 2.461},
    ("w2", 128): {"fp8": 1.064, "int4": 1.646, "int8": 2.667, "mxfp4": 1.184},
    ("w2", 1024): {"fp8": 0.836, "int4": 1.071, "int8": 1.956, "mxfp4": 0.852},
    ("w3", 1): {"fp8": 4.154, "int4": 7.065, "int8": 4.281, "mxfp4": 5.56},
    ("w3", 16): {"fp8": 2.885, "int4": 4.859, "int8": 3.605, "mxfp4": 3.174},
    ("w3", 128): {"fp8": 1.351, "int4": 2.064, "int8": 3.141, "mxfp4": 1.607},
    ("w3", 512): {"fp8": 1.01, "int4": 1.138, "int8": 2.147, "mxfp4": 1.068},
}


def times_eager(shape: str, T: int, weight_format: str) -> float | None:
    """Of sgl-kernel's CPU experts in the format of that name; None where it was not measured."""
    return SGL_KERNEL.get((shape, T), {}).get(weight_format.split("_")[0])
