"""How weights are stored: one class for each quantised format, and the packing of dense weights for the CPU.

A class quantises and dequantises in plain PyTorch, on any device, and its docstring says where every bit lies. On a GPU
a Triton kernel quantises, to the same bits:

    weight = polymoe.formats.Mxfp4().quantize(dense)            # a Weight: data, scale, zero, format, N, D
    polymoe.formats.parse(weight.format).dequantize(weight)

The CPU kernels multiply all of them as they are stored, also from a memory-mapped file: only dense weights are worth
packing (`pack_`, and `polymoe.optimize` for a whole model), and quantised ones need no such step.
"""

from polymoe.formats.fp8 import Fp8Block, Mxfp8
from polymoe.formats.integer import Int4, Int8, int4_from_awq, int4_from_gptq
from polymoe.formats.mxfp4 import Mxfp4, mxfp4_from_blocks, mxfp4_to_fp8
from polymoe.formats.names import FORMATS, parse
from polymoe.formats.packed import pack_, unpack_
from polymoe.formats.weight import MODES, Format, Weight

__all__ = [
    "FORMATS",
    "MODES",
    "Format",
    "Fp8Block",
    "Int4",
    "Int8",
    "Mxfp4",
    "Mxfp8",
    "Weight",
    "int4_from_awq",
    "int4_from_gptq",
    "mxfp4_from_blocks",
    "mxfp4_to_fp8",
    "pack_",
    "parse",
    "unpack_",
]
