"""What a training loop calls between steps."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from polymoe import ops
from polymoe.nn import Router

__all__ = ["balance"]


@torch.no_grad()
def balance(model: nn.Module, gamma: float = 1e-3, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
    """One step of auxiliary-loss-free balancing of every polymoe.nn.Router in `model` with a selection bias and
    track_load: its bias moves by gamma against the load since the last call (see polymoe.update_bias), and counting
    starts anew. Call it once per optimiser step.

    Args:
        model: any module.
        gamma: the step.
        group: the processes whose batches count together; by default all, where torch.distributed is initialised.

    Returns:
        The load [E] int64 that the step was made for, by the router's name.

    Raises:
        ValueError: `model` has no such router.
    """
    found: dict[str, Tensor] = {}
    for name, router in model.named_modules():
        if isinstance(router, Router) and router.load is not None and router.selection_bias is not None:
            load = router.load.clone()
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(load, group=group)
            router.selection_bias.copy_(ops.update_bias(router.selection_bias, load, gamma))
            router.load.zero_()
            found[name] = load
    if not found:
        raise ValueError(
            "polymoe.training.balance: model: expected a Router with selection_bias and track_load, got none"
        )
    return found
