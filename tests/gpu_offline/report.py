"""The results as rows, and as docs/triton.json and docs/triton.md."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from tests.gpu_offline.build import Built
from tests.gpu_offline.costs import cost_sheet
from tests.gpu_offline.expected import PRODUCTS, complaints
from tests.gpu_offline.launches import Launch

from polymoe.kernels.devices import TARGETS

JSON, MARKDOWN = Path("docs/triton.json"), Path("docs/triton.md")


@dataclass(frozen=True)
class Found:
    """A launch, and the call it belongs to."""

    launch: Launch
    target: str
    arithmetic: str
    model: str
    op: str

    @property
    def operands(self) -> str:
        """What a product multiplies: a dtype; and codes, with the number along the reduction that share a scale."""
        constants = self.launch.constexprs
        if "CODES" not in constants:
            return self.arithmetic
        group = f" by {constants['GROUP']}" if constants["GROUP"] else ""
        return f"{constants.get('ROWS_CODES') or self.arithmetic} x {constants['CODES']}{group}"

    @property
    def instruction(self) -> str:
        """What a product's matrix instruction multiplies."""
        constants = self.launch.constexprs
        if constants.get("SCALED"):
            return "mx"
        return {"int8": "int8", "e4m3": "bf16"}.get(constants.get("ROWS_CODES", ""), self.arithmetic)


def settings(launch: Launch) -> dict[str, Any]:
    """What tells kernels of one name apart, for readers: the constants, warps and stages."""
    constants = {
        name.lower(): value if isinstance(value, (int, str, float, bool)) else str(value)
        for name, value in launch.constexprs.items()
        if name.isupper()
    }
    return constants | {"warps": launch.options["num_warps"], "stages": launch.options["num_stages"]}


def described(launch: Launch) -> int:
    """How many operands come through descriptors."""
    return sum(str(kind).startswith("tensordesc") for kind in launch.signature.values())


def row(found: Sequence[Found], built: Built) -> dict[str, Any]:
    """One compiled kernel; `found` are all the launches that run it."""
    first = found[0]
    wrong = [built.error] if built.facts is None else complaints(
        first.launch.name, first.instruction, described(first.launch), first.target, built.facts
    )  # fmt: skip
    return {
        "target": first.target,
        "kernel": first.launch.name,
        "arithmetic": first.operands if first.launch.name in PRODUCTS else "",
        "id": first.launch.key[:12],
        "settings": settings(first.launch),
        "models": sorted({entry.model for entry in found}),
        "facts": asdict(built.facts) if built.facts else None,
        "wrong": wrong,
    }


def steps(found: Sequence[Found], built: dict[str, Built]) -> list[tuple[tuple[str, ...], str]]:
    """For expected.varying."""
    rows = []
    for entry in found:
        result = built.get(entry.launch.key)
        if entry.launch.name in PRODUCTS and result is not None and result.facts is not None:
            sizes, constants = entry.launch.sizes, entry.launch.constexprs
            N, D = (sizes["P"], sizes["H"]) if entry.launch.name.endswith("gate_up") else (sizes["N"], sizes["D"])
            key = (entry.launch.name, entry.operands, str(N), str(D), entry.target)
            instruction = "+".join(sorted(result.facts.matrix)) or "multiply-add"
            rows.append((key, f"{instruction} in steps of {constants['BLOCK_K']}"))
    return rows


def rows_of(found: Sequence[Found], built: dict[str, Built]) -> list[dict[str, Any]]:
    by_key: dict[str, list[Found]] = {}
    for entry in found:
        by_key.setdefault(entry.launch.key, []).append(entry)
    rows = [row(entries, built[key]) for key, entries in by_key.items() if key in built]
    order = list(TARGETS)
    return sorted(
        rows,
        key=lambda row: (
            order.index(row["target"]),
            row["kernel"],
            row["arithmetic"],
            repr(row["settings"]),
            row["id"],
        ),
    )


def title(row: dict[str, Any]) -> str:
    return " ".join(row[name] for name in ("target", "kernel", "arithmetic", "id"))


def write(rows: Sequence[dict[str, Any]], differing: Sequence[str]) -> None:
    JSON.parent.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(entry, sort_keys=True) for entry in rows)
    JSON.write_text(f'{{"triton": "{triton.__version__}", "kernels": [\n{lines}\n]}}\n')
    MARKDOWN.write_text(markdown(rows, differing))


def markdown(rows: Sequence[dict[str, Any]], differing: Sequence[str]) -> str:
    wrong = sum(bool(entry["wrong"]) for entry in rows)
    return "\n".join(
        [
            "# The Triton kernels, compiled for eight targets",
            "",
            f"Made by `make gpu-check` with Triton {triton.__version__}: every kernel in every configuration that the "
            "closed-form choice of tiles returns for the models of tests/gpu_offline/models.py, with 1 to 131072 "
            "tokens, compiled without a GPU and read back from the machine code. Nothing here was run on a GPU. "
            "[triton.json](triton.json) has one line for every compiled kernel.",
            "",
            f"{len(rows)} kernels, {wrong} of which break an expectation: no spills, no local memory, shared memory "
            "within the target's limit, the matrix instruction of the table below and no other, bulk copies (TMA) "
            "where descriptors are used, loads of 16 bytes in the main loop of a product (of quantised weights, scales "
            "by 1 to 4 bytes, and codes by 4 or 8 bytes too).",
            "",
            *_summary(rows),
            "",
            "## One instruction, one step",
            "",
            "For every (kernel, dtype, N, D, target) all batch sizes use one matrix instruction and one BLOCK_K: "
            + ("yes." if not differing else "no:"),
            *(f"- {line}" for line in differing),
            "",
            *_failures(rows),
            *cost_sheet(rows),
        ]
    )


def _table(header: Sequence[str], lines: Sequence[Sequence[Any]]) -> list[str]:
    cells = [[str(cell) for cell in line] for line in (header, *lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells
    ]
    return [text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]]


def _summary(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line per target, kernel and arithmetic."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for entry in rows:
        groups.setdefault((entry["target"], entry["kernel"], entry["arithmetic"]), []).append(entry)
    lines = []
    for key, entries in groups.items():
        facts = [entry["facts"] for entry in entries if entry["facts"]]
        opcodes = Counter(opcode for fact in facts for opcode in fact["matrix"])
        lines.append(
            (
                *key,
                len(entries),
                max((fact["registers"] for fact in facts), default="-"),
                f"{max((fact['shared'] for fact in facts), default=0) / 1024:.0f}",
                sum(fact["spilled"] for fact in facts),
                ", ".join(sorted(opcodes)) or "-",
                sum("tma" in fact["loads"] for fact in facts),
                sum(bool(entry["wrong"]) for entry in entries),
            )
        )
    header = ("target", "kernel", "dtype", "compiled", "registers", "KiB shared", "spilled", "matrix instructions",
              "with TMA", "wrong")  # fmt: skip
    return _table(header, lines)


def _failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    wrong = [entry for entry in rows if entry["wrong"]]
    if not wrong:
        return []
    lines = [f"- {title(entry)}: {'; '.join(entry['wrong'])}" for entry in wrong]
    return ["## What breaks an expectation", "", *lines, ""]
