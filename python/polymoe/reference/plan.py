from __future__ import annotations

import torch
from torch import Tensor


def plan(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    expert = ids.flatten().long()  # [S]
    expert = expert.where((expert >= 0) & (expert < num_experts), num_experts)  # skipped slots go last
    in_order, slots = expert.sort(stable=True)
    offsets = torch.searchsorted(in_order, torch.arange(num_experts + 1, device=ids.device))
    rows = torch.arange(expert.shape[0], device=ids.device)
    is_row = rows < offsets[-1]
    row_slot = slots.where(is_row, -1)
    slot_row = torch.empty_like(rows).scatter(0, slots, rows.where(is_row, -1))
    return offsets.int(), row_slot.int(), slot_row.int().reshape(ids.shape)
