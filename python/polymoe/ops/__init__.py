"""The ops: one file each with schema, public wrapper, checks and fake kernel."""

from polymoe.ops.activate import activate
from polymoe.ops.balance import balance_loss, expert_counts, switch_loss, update_bias, z_loss
from polymoe.ops.combine import combine
from polymoe.ops.dispatch import dispatch
from polymoe.ops.experts import experts
from polymoe.ops.gate import gate
from polymoe.ops.grouped_mm import grouped_mm
from polymoe.ops.grouped_mm_gradient import grouped_mm_dw_
from polymoe.ops.plan import Plan, plan

__all__ = [
    "Plan",
    "activate",
    "balance_loss",
    "combine",
    "dispatch",
    "expert_counts",
    "experts",
    "gate",
    "grouped_mm",
    "grouped_mm_dw_",
    "plan",
    "switch_loss",
    "update_bias",
    "z_loss",
]
