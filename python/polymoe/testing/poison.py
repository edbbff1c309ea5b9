"""Poisoned memory: what an op allocates and does not write shows up in its result.

Fresh memory often holds zeros, and then an output element that no kernel wrote passes for a correct zero.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_M_PERTURB = -6  # mallopt parameter of glibc: fill what malloc returns with the complement of a byte
_PERTURB_BYTE = 0x80


def _perturb_malloc(byte: int) -> bool:
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_PERTURB, byte))
    except (AttributeError, OSError):
        return False  # not glibc: torch's own filling below still covers every tensor


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, memory is not zero before it is written:

    - torch.empty, also called from C++, fills float tensors with NaN and integer tensors with their largest value
      (torch.utils.deterministic.fill_uninitialized_memory);
    - on glibc every byte from malloc is 0x7F, which covers scratch memory of kernels: 3.4e38 as float32 or bfloat16,
      NaN as float16, 2139062143 as int32. (Small blocks that a thread frees and takes again keep their content.)
    """
    were = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # torch.utils.deterministic.fill_uninitialized_memory, a property that type checkers cannot see
    filled = torch._C._get_deterministic_fill_uninitialized_memory()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch._C._set_deterministic_fill_uninitialized_memory(True)
    _perturb_malloc(_PERTURB_BYTE)
    try:
        yield
    finally:
        _perturb_malloc(0)
        torch._C._set_deterministic_fill_uninitialized_memory(filled)
        torch.use_deterministic_algorithms(were[0], warn_only=were[1])
