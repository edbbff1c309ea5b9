"""What becomes of a family's routers under `polymoe.integrations.routers`, in words."""

from __future__ import annotations

import re

import torch

from polymoe.integrations.routers import routers, would_be
from zoo.shrink import model_classes, tiny_config

_NUMBERS = ((r", top \d+", ""), (r"best \d+ of \d+ groups by their top (\d)", r"groups by their top \1"))


def describe(family: str) -> str:
    """gate's settings without the small numbers of the zoo's configs, or why the routers stay the model's own."""
    texts: list[str] = []
    for model_class in model_classes(family):
        with torch.device("meta"):
            model = model_class(tiny_config(family, model_class))
        for router in routers(model).values():
            how = would_be(router)
            text = f"the model's own: {how}" if isinstance(how, str) else how.describe(router)
            for pattern, replacement in _NUMBERS:
                text = re.sub(pattern, replacement, text)
            if not isinstance(how, str) and how.rounds:
                text += " (float32 only)"
            if text not in texts:
                texts.append(text)
    return "; ".join(texts)
