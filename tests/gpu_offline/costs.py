"""A static cost sheet: a roofline model of whole problems, and what the main loops consist of. Nothing is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.gpu_offline.models import DTYPES, MODELS, layer


@dataclass(frozen=True)
class Peak:
    """Of a chip, by its vendor's data sheet: TFLOP/s without sparsity, TB/s of its memory."""

    chip: str
    bf16: float
    tf32: float | None
    f32: float
    memory: float


PEAKS = {
    "sm_80": Peak("A100 SXM 80 GB", 312, 156, 19.5, 2.04),
    "sm_90": Peak("H100 SXM", 989, 495, 67, 3.35),
    "sm_100": Peak("B200", 2250, 1125, 75, 8.0),
    "sm_120": Peak("RTX PRO 6000", 504, 252, 126, 1.79),
    "gfx942": Peak("MI300X", 1307, 654, 163, 5.3),
    "gfx950": Peak("MI355X", 2517, None, 157, 8.0),
    "gfx1100": Peak("RX 7900 XTX", 123, None, 61, 0.96),
    "gfx1200": Peak("RX 9060 XT", 103, None, 26, 0.32),
}
SHEET_MODELS = ("deepseek-v4-flash", "gpt-oss-20b", "qwen3-30b-a3b")
SHEET_TOKENS = (1, 64, 8192)
KINDS = ("copy", "shared", "fma", "sync", "other")


def cost_sheet(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [
        "## A roofline model of whole problems",
        "",
        "The least time that the published peaks of a chip allow: the larger of FLOPs over its peak and bytes over its "
        "memory bandwidth, for weights read once (those of min(E, S) experts), rows, activations and the float32 rows "
        "of the down product. A model, not a measurement, of bf16 in microseconds; m: bound by memory, c: by compute.",
        "",
        *_roofline(),
        "",
        "## What the main loops consist of",
        "",
        "Instructions of the main loop per matrix instruction (per multiply-add in f32 where there is none), in the "
        "tallest tile of each kernel.",
        "",
        *_mixes(rows),
        "",
    ]


def bound(flops: float, size: float, peak: Peak) -> tuple[float, str]:
    """Microseconds, and what they are spent on."""
    compute, memory = flops / (peak.bf16 * 1e6), size / (peak.memory * 1e6)
    return max(compute, memory), "c" if compute > memory else "m"


def _roofline() -> list[str]:
    lines = ["| op | model | tokens | GFLOP | MB | " + " | ".join(f"{peak.chip}" for peak in PEAKS.values()) + " |"]
    lines.append("|---|---|---|---|---|" + "---|" * len(PEAKS))
    for model in MODELS:
        for T in SHEET_TOKENS if model.name in SHEET_MODELS else ():
            for call in layer(model, T, DTYPES["bf16"]):
                times = (bound(call.flops, call.bytes, peak) for peak in PEAKS.values())
                cells = " | ".join(f"{time:.3g} {what}" for time, what in times)
                lines.append(
                    f"| {call.op} | {model.name} | {T} | {call.flops / 1e9:.4g} | {call.bytes / 1e6:.4g} | {cells} |"
                )
    return lines


def _mixes(rows: Sequence[dict[str, Any]]) -> list[str]:
    tallest: dict[tuple[str, str, str], dict[str, Any]] = {}
    for entry in rows:
        if entry["arithmetic"] and entry["facts"] and entry["facts"]["loop"]:
            key = (entry["target"], entry["kernel"], entry["arithmetic"])
            if key not in tallest or entry["settings"]["block_m"] > tallest[key]["settings"]["block_m"]:
                tallest[key] = entry
    lines = ["| target | kernel | dtype | tile | per iteration | " + " | ".join(KINDS) + " |"]
    lines.append("|---|---|---|---|---|" + "---|" * len(KINDS))
    for (target, kernel, arithmetic), entry in tallest.items():
        loop, chosen = entry["facts"]["loop"], entry["settings"]
        unit = "matrix" if loop.get("matrix") else "fma"
        cells = " | ".join("-" if kind == unit else f"{loop.get(kind, 0) / loop[unit]:.2f}" for kind in KINDS)
        tile = f"{chosen['block_m']}x{chosen['block_n']}x{chosen['block_k']}"
        lines.append(f"| {target} | {kernel} | {arithmetic} | {tile} | {loop[unit]} {unit} | {cells} |")
    return lines
