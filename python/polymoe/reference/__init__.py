"""What every op means, in plain PyTorch: the same name and arguments as the op, on any device and float dtype.

Arithmetic is float32, or float64 for float64 inputs, and rounds exactly where the documentation of the op says.
"""

from polymoe.reference.activate import activate
from polymoe.reference.combine import combine
from polymoe.reference.dispatch import dispatch
from polymoe.reference.experts import experts
from polymoe.reference.gate import gate
from polymoe.reference.grouped_mm import grouped_mm
from polymoe.reference.plan import plan

__all__ = ["activate", "combine", "dispatch", "experts", "gate", "grouped_mm", "plan"]
