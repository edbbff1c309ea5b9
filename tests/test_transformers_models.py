"""The experts implementation "polymoe" in every Transformers model that has the interface: whole models, small."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
import zoo
from experts_modules import float32_bound
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.moe import ExpertsInterface
from zoo import table
from zoo.runs import random_inputs, run, same_experts

import polymoe
from polymoe import ops
from polymoe.integrations.transformers import experts_forward
from polymoe.testing.tolerances import relative_frobenius

# Families that do not pass, and why: a test fails if one of them starts to.
EXPECTED_FAILURES: dict[str, str] = {}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def seeded(seed: int) -> None:
    torch.manual_seed(seed)


class Seen:
    """Calls of polymoe's experts_forward as (module, number of different experts hit), and of the fused op."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, int]] = []
        self.fused = 0
        experts = ops.experts

        def forward(module: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            self.calls.append((module, int(ids[(ids >= 0) & (ids < module.num_experts)].unique().numel())))
            return experts_forward(module, x, ids, weights)

        def counted(*args: Any, **options: Any) -> Tensor:
            self.fused += 1
            return experts(*args, **options)

        monkeypatch.setitem(ExpertsInterface._global_mapping, "polymoe", forward)
        monkeypatch.setattr(ops, "experts", counted)


def test_every_decorated_class_is_in_the_zoo() -> None:
    """The counts are those of Transformers 5.23.0; another version may have others."""
    assert transformers.__version__ == "5.23.0"
    assert len(zoo.FAMILIES) == 64
    assert sum(len(zoo.experts_classes(family)) for family in zoo.FAMILIES) == 65
    met = {type(module) for part in zoo.PARTS for module in zoo.experts_modules(zoo.tiny_model(*part))}
    assert met == {experts for family in zoo.FAMILIES for experts in zoo.experts_classes(family)}


def assert_agrees(family: str, model_class: type[PreTrainedModel], seen: Seen) -> None:
    # Draw again where a token's next best expert is within rounding of its last one, where all tokens of a layer go to
    # one expert, or where the rest of the model, such as a norm of something tiny, makes far more of eager's rounding
    # errors than experts leave: these show nothing.
    for _ in range(5):
        model = zoo.tiny_model(family, model_class)
        modules = zoo.experts_modules(model)
        bound = float32_bound(len(modules))
        inputs = random_inputs(model)
        truth, truth_routed = run(model, "float64", inputs)
        eager, eager_routed = run(model, "eager", inputs)
        seen.calls.clear()
        seen.fused = 0
        ours, ours_routed = run(model, "polymoe", inputs)
        if (
            same_experts([truth_routed, eager_routed, ours_routed])
            and min(ids.unique().numel() for ids in truth_routed) >= 2
            and relative_frobenius(eager, truth) <= bound / 4
        ):
            break
    else:
        raise AssertionError("eager itself, or its choice of experts, is too far from float64 experts in every draw")
    assert len(modules) >= 2
    assert [module for module, _ in seen.calls] == modules
    assert min(hit for _, hit in seen.calls) >= 2
    explained = polymoe.explain(model).modules.values()
    assert len(explained) == len(modules)
    assert seen.fused == sum(explanation.notes[0].startswith("fused") for explanation in explained)
    assert truth.isfinite().all()
    assert relative_frobenius(ours, truth) <= bound
    assert relative_frobenius(run(model, "none", inputs)[0], truth) > 1000 * bound


@pytest.mark.parametrize(("family", "model_class"), zoo.PARTS, ids=zoo.name_of)
def test_model(family: str, model_class: type[PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    if family not in EXPECTED_FAILURES:
        assert_agrees(family, model_class, seen)
        return
    with pytest.raises(Exception, match=EXPECTED_FAILURES[family]):
        assert_agrees(family, model_class, seen)


def test_the_table_in_docs_is_current() -> None:
    """All but the errors, which differ from one machine to the next; `make docs-transformers` writes it anew."""
    written = [line for line in table.PATH.read_text().splitlines(keepends=True) if line.startswith("| ")][1:]
    cells = [line.strip("| \n").split(" | ") for line in written]
    described = [table.line([*row[:4], row[6]]) for row in cells]
    assert described == [table.line(row) for family in zoo.FAMILIES for row in table.rows(family, measured=False)]
