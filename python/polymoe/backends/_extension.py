"""Loads the C++ extension, or says why it cannot be loaded."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import torch


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _load() -> tuple[ModuleType | None, str]:
    try:
        built_for: str = importlib.import_module("polymoe._build_info").TORCH_VERSION
    except ImportError:
        built_for = torch.__version__  # not recorded; the import below decides
    if _minor(built_for) != _minor(torch.__version__):
        return None, (
            f"its C++ extension was built for torch {_minor(built_for)} and this is torch {_minor(torch.__version__)}; "
            "build polymoe again for this torch"
        )
    try:
        return importlib.import_module("polymoe._C"), ""
    except ModuleNotFoundError:
        return None, "its C++ extension polymoe._C is not built"
    except ImportError as error:
        return None, f"its C++ extension polymoe._C does not load: {error}"


extension, missing_reason = _load()
if extension is None:
    warnings.warn(
        f"polymoe: the cpu backend is unavailable: {missing_reason}. The reference, which is slow, serves instead.",
        stacklevel=2,
    )
