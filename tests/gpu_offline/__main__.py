"""Compiles the Triton kernels for GPUs that are not there, and checks what comes out:

python -m tests.gpu_offline            everything; writes docs/triton.json and docs/triton.md
python -m tests.gpu_offline --subset   the part that CI compiles; compares it with docs/triton.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from tests.gpu_offline import report
from tests.gpu_offline.build import build
from tests.gpu_offline.expected import QUANTIZED, varying
from tests.gpu_offline.launches import launches
from tests.gpu_offline.models import DTYPES, MODELS, TOKENS, calls
from tests.gpu_offline.report import Found

from polymoe.backends.triton import GRADIENT_KERNELS
from polymoe.kernels.devices import TARGETS
from polymoe.kernels.tiles import offers_tf32

SUBSET_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx1100")
SUBSET_MODELS = ("deepseek-v4-flash", "gpt-oss-20b")
SUBSET_TOKENS = (1, 8192)
# Kernels of gradients and of quantised weights take long to compile: one target of either vendor stands for them, and
# one format for the others. The scaled matrix instructions are another target's.
SUBSET_OF_OTHERS = ("sm_90", "gfx942")
SUBSET_OF_QUANTIZED = ("experts mxfp4 weight_only", "quantized_backward mxfp4", "quantize mxfp4")
SUBSET_OF_SCALED = ("experts mxfp4 fp8", "sm_100")


def find(
    targets: Sequence[str], models: Sequence[str], tokens: Sequence[int], arithmetics: Sequence[str]
) -> list[Found]:
    """Every launch of these models on these targets."""
    found = []
    for arithmetic in arithmetics:
        torch.backends.cuda.matmul.fp32_precision = "tf32" if arithmetic == "tf32" else "ieee"
        for target in targets:
            if arithmetic == "tf32" and not offers_tf32(target):
                continue
            for model in MODELS:
                for T in tokens if model.name in models else ():
                    found += [
                        Found(launch, target, arithmetic, model.name, call.op)
                        for call in calls(model, T, arithmetic)
                        for launch in launches(call.run, TARGETS[target])
                    ]
    return found


def in_subset(entry: Found) -> bool:
    """Whether CI compiles a launch of its models and targets."""
    quantized = entry.launch.name in QUANTIZED or entry.op.startswith("quantize ")
    if quantized and entry.model != SUBSET_MODELS[0]:
        return False
    if quantized and entry.op not in SUBSET_OF_QUANTIZED:
        return (entry.op, entry.target) == SUBSET_OF_SCALED
    return entry.target in SUBSET_OF_OTHERS or not (quantized or entry.op in GRADIENT_KERNELS)


def compare(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How these rows differ from those in docs/triton.json."""
    stored = {entry["id"]: entry for entry in json.loads(report.JSON.read_text())["kernels"]}
    different = []
    for entry in rows:
        name = report.title(entry)
        known = stored.get(entry["id"])
        if known is None:
            different.append(f"{name}: not in {report.JSON}")
        elif known["facts"] != entry["facts"]:
            different.append(f"{name}: {entry['facts']}, in {report.JSON} {known['facts']}")
    return different


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_offline", description=__doc__.splitlines()[0])
    parser.add_argument("--subset", action="store_true", help="compile CI's part and compare it with docs/triton.json")
    parser.add_argument("--targets", default=",".join(TARGETS), help="of all that there are, by commas")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long; call again to go on")
    options = parser.parse_args()
    if options.subset:
        found = find(SUBSET_TARGETS, SUBSET_MODELS, SUBSET_TOKENS, ("bf16",))
        found = [entry for entry in found if in_subset(entry)]
    else:
        found = find(options.targets.split(","), [model.name for model in MODELS], TOKENS, tuple(DTYPES))
    built = build([entry.launch for entry in found], options.jobs, options.seconds)
    missing = len({entry.launch.key for entry in found} - built.keys())
    rows = report.rows_of(found, built)
    differing = varying(report.steps(found, built))
    problems = [
        f"{r['target']} {r['kernel']} {r['arithmetic']} {r['settings']}: {'; '.join(r['wrong'])}"
        for r in rows
        if r["wrong"]
    ]
    problems += [f"more than one instruction: {line}" for line in differing]
    if options.subset:
        problems += compare(rows)
    elif missing == 0 and options.targets == ",".join(TARGETS):
        report.write(rows, differing)
    for line in problems:
        print(line)
    print(f"{len(rows)} kernels, {len(problems)} problems" + (f", {missing} not compiled yet" if missing else ""))
    return 1 if problems or missing else 0


if __name__ == "__main__":
    sys.exit(main())
