"""What every op means, in plain PyTorch: the same name and arguments as the op, on any device and float dtype.

Arithmetic is float32, or float64 for float64 inputs, and rounds exactly where the documentation of the op says.
"""

from polymoe.reference.activate import activate
from polymoe.reference.activate_backward import activate_backward
from polymoe.reference.combine import combine
from polymoe.reference.dispatch import dispatch
from polymoe.reference.down_backward import down_backward
from polymoe.reference.experts import experts
from polymoe.reference.gate import gate
from polymoe.reference.gate_backward import gate_backward
from polymoe.reference.grouped_mm import grouped_mm, grouped_mm_dx
from polymoe.reference.plan import plan
from polymoe.reference.quantized_backward import quantized_backward
from polymoe.reference.row_dot import row_dot

__all__ = [
    "activate",
    "activate_backward",
    "combine",
    "dispatch",
    "down_backward",
    "experts",
    "gate",
    "gate_backward",
    "grouped_mm",
    "grouped_mm_dx",
    "plan",
    "quantized_backward",
    "row_dot",
]
