"""polymoe: Mixture-of-Experts layers for PyTorch, from routing to combine, on the hardware you have."""

from polymoe.hal.registry import backends
from polymoe.hal.select import use_backend
from polymoe.ops import Plan, activate, combine, dispatch, experts, gate, grouped_mm, plan

__version__ = "0.1.0"

__all__ = [
    "Plan",
    "__version__",
    "activate",
    "backends",
    "combine",
    "dispatch",
    "experts",
    "gate",
    "grouped_mm",
    "plan",
    "use_backend",
]
