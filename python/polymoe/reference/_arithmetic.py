from __future__ import annotations

import torch


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
