"""Contenders for `experts`, one per file. A library that is not here joins by `register`, before `benchmarks` runs:

    class Mine(Plugin): ...
    register(Mine())

The baseline is "eager". Of polymoe's own contenders the first one that takes part is the one that is judged.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.contenders.base import Plugin, Prepared, Problem
from benchmarks.contenders.eager import Eager
from benchmarks.contenders.gpu_peers import Liger, MoeOps, ScatterMoe, TritonKernels, VllmTriton
from benchmarks.contenders.kt_kernel import KtKernel
from benchmarks.contenders.polymoe import PolymoePlain, PolymoePrepacked
from benchmarks.contenders.torch_grouped import TorchGrouped
from benchmarks.contenders.transformers_grouped import TransformersGrouped
from benchmarks.contenders.vllm import Vllm
from benchmarks.contenders.zentorch import Zentorch

__all__ = ["BASELINE", "Plugin", "Prepared", "Problem", "choose", "plugins", "register"]

BASELINE = "eager"
_plugins: dict[str, Plugin] = {}


def register(plugin: Plugin) -> None:
    """Adds a contender, or replaces the one of that name."""
    _plugins[plugin.name] = plugin


def plugins() -> dict[str, Plugin]:
    return dict(_plugins)


def choose(problem: Problem, names: Sequence[str] = ()) -> tuple[list[Plugin], dict[str, str]]:
    """Those contenders that can run a problem, the baseline first, and the reasons why the others do not. `names`
    restricts them; the baseline always takes part, and "polymoe" stands for polymoe on weights of any layout."""
    unknown = sorted(set(names) - _plugins.keys())
    if unknown:
        raise ValueError(f"contenders: expected some of {', '.join(_plugins)}, got {', '.join(unknown)}")
    named = {BASELINE, *names}
    wanted = [p for p in _plugins.values() if not names or p.name in named or p.name.split()[0] in named]
    reasons = {p.name: reason for p in wanted if (reason := _declined(p, problem))}
    return [p for p in wanted if p.name not in reasons], reasons


def _declined(plugin: Plugin, problem: Problem) -> str | None:
    if problem.device not in plugin.devices:
        return f"it runs on {', '.join(plugin.devices)}, not on {problem.device}"
    return plugin.declined(problem)


for _plugin in (
    Eager(),
    TransformersGrouped(),
    TorchGrouped(),
    Zentorch(),
    Vllm(),
    KtKernel(),
    PolymoePrepacked(),
    PolymoePlain(),
    PolymoePlain("triton"),
    PolymoePlain("reference"),
    ScatterMoe(),
    Liger(),
    VllmTriton(),
    MoeOps(),
    TritonKernels(),
):
    register(_plugin)
