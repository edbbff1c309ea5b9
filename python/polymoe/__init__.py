"""polymoe: Mixture-of-Experts layers for PyTorch, from routing to combine, on the hardware you have.

The ops, each a torch.library op in the namespace `polymoe`: gate, plan, dispatch, grouped_mm, activate, combine, and
experts, which is the last five as one. `explain` says how a call runs, `use_backend` chooses who runs it.
"""

from polymoe.hal.device import force_isa_level, isa_level, isa_levels, isa_supported, set_isa_level
from polymoe.hal.explain import explain
from polymoe.hal.registry import backends, register_backend
from polymoe.hal.select import use_backend
from polymoe.ops import (
    Plan,
    activate,
    balance_loss,
    combine,
    dispatch,
    expert_counts,
    experts,
    gate,
    grouped_mm,
    grouped_mm_dw_,
    plan,
    switch_loss,
    update_bias,
    z_loss,
)
from polymoe.packing import optimize, unoptimize

__version__ = "0.1.0"

__all__ = [
    "Plan",
    "__version__",
    "activate",
    "backends",
    "balance_loss",
    "combine",
    "dispatch",
    "expert_counts",
    "experts",
    "explain",
    "force_isa_level",
    "gate",
    "grouped_mm",
    "grouped_mm_dw_",
    "isa_level",
    "isa_levels",
    "isa_supported",
    "optimize",
    "plan",
    "register_backend",
    "set_isa_level",
    "switch_loss",
    "unoptimize",
    "update_bias",
    "use_backend",
    "z_loss",
]
