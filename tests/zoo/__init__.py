"""Every Transformers model whose experts are behind the experts interface, small enough for tests.

`python -m zoo.table` (with this folder's parent on the path; `make docs-transformers`) writes docs/transformers.md.
"""

from zoo.families import FAMILIES, experts_classes
from zoo.shrink import PARTS, experts_modules, model_classes, name_of, tiny_config, tiny_model

__all__ = [
    "FAMILIES",
    "PARTS",
    "experts_classes",
    "experts_modules",
    "model_classes",
    "name_of",
    "tiny_config",
    "tiny_model",
]
