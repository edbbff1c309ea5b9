"""Writes docs/transformers.md: what becomes of every Transformers family under the experts implementation "polymoe"."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers
from experts_modules import batch
from torch import nn
from transformers import PreTrainedModel

import polymoe.integrations.transformers
from polymoe.testing.tolerances import relative_frobenius
from zoo import routers
from zoo.families import FAMILIES
from zoo.runs import random_inputs, run, same_experts
from zoo.shrink import experts_modules, model_classes, tiny_model

PATH = Path(__file__).parents[2] / "docs" / "transformers.md"

FLAGS = ("is_transposed", "has_bias", "has_post_expert_norm")
ABSENT_FLAGS = ("has_gate", "is_concatenated")

HEADER = """\
# Transformers models

What becomes of every model of Transformers {version} whose experts are behind its experts interface, that is, whose
experts class carries `@use_experts_implementation`, once its implementation is "polymoe":

    import polymoe.integrations.transformers
    model.set_experts_implementation("polymoe")

- **Class, flags**: the decorated class, and what its decorator says where that differs from the default.
- **Experts**: how they run, from `polymoe.explain(model)`. Fused experts are one op, `polymoe.experts`, with the named
  activation. Un-fused ones are polymoe's plan, dispatch, grouped_mm and combine around the model's own code.
- **Error**: relative Frobenius distance from the class's own "eager" forward in float32, of the experts alone and of
  the logits (or the last hidden state) of a whole small model. Both sides round; neither is the truth.
- **Router**: what `polymoe.integrations.routers`, an opt-in of its own, makes of the model's routers.

Experts that are not behind the interface are not in the table. Those of Llama 4 and Step 3.7 run in polymoe after
`polymoe.integrations.undecorated.replace_experts(model)`.

`make docs-transformers` writes this file; a test compares all but the errors with what it would write.

| Family | Class | Flags | Experts | Error, experts | Error, model | Router |
|---|---|---|---|---|---|---|
"""


def _flags(module: nn.Module) -> str:
    found = [name for name in FLAGS if getattr(module, name)]
    found += [f"{name}=False" for name in ABSENT_FLAGS if not getattr(module, name)]
    return ", ".join(found) or "-"


def _experts_error(module: nn.Module) -> float:
    module.config._experts_implementation = "eager"
    inputs = batch(64)
    eager = module(*inputs)
    module.config._experts_implementation = "polymoe"
    return relative_frobenius(module(*inputs), eager)


def _model_error(model: PreTrainedModel) -> float:
    while True:  # until no token is within rounding of going to another expert
        inputs = random_inputs(model)
        eager, eager_routed = run(model, "eager", inputs)
        ours, ours_routed = run(model, "polymoe", inputs)
        if same_experts([eager_routed, ours_routed]):
            return relative_frobenius(ours, eager)


def rows(family: str, measured: bool = True) -> list[list[str]]:
    """The cells of the table, a row for every experts class of the family; without the two errors unless `measured`."""
    found = []
    for model_class in model_classes(family):
        torch.manual_seed(0)
        model = tiny_model(family, model_class)
        model.set_experts_implementation("polymoe")
        notes = "; ".join(sorted({how.notes[0] for how in polymoe.explain(model).modules.values()}))
        for experts in {type(module): module for module in experts_modules(model)}.values():
            errors = [f"{error:.0e}" for error in (_experts_error(experts), _model_error(model))] if measured else []
            found.append(
                [family, type(experts).__name__, _flags(experts), notes, *errors, routers.describe(family)],
            )
    return found


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def text() -> str:
    lines = [line(cells) for family in FAMILIES for cells in rows(family)]
    return HEADER.format(version=transformers.__version__) + "".join(lines)


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(text())
    print(f"wrote {PATH}", file=sys.stderr)
