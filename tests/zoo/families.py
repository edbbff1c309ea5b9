"""Which of the installed Transformers' models have experts behind the interface, read from their source."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import transformers
from torch import nn

_DECORATED = re.compile(r"^@use_experts_implementation\b.*\nclass (\w+)", re.MULTILINE)


def _read() -> dict[str, tuple[str, ...]]:
    """By model folder, the names of its decorated experts classes. Loads no model."""
    found = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        names = _DECORATED.findall(path.read_text())
        if names:
            found[path.parent.name] = tuple(names)
    return found


_NAMES = _read()
FAMILIES = tuple(_NAMES)


def modeling(family: str) -> ModuleType:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def experts_classes(family: str) -> list[type[nn.Module]]:
    return [getattr(modeling(family), name) for name in _NAMES[family]]
