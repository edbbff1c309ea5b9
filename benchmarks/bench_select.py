"""What it costs to choose a backend in every call, and what the public functions cost beside torch.ops on a layer so
small that little else takes time (T 1, H 64, I 128, E 8, K 2).

Run it as `python -m benchmarks.bench_select`; --help lists the options.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

import polymoe
from benchmarks import inputs
from benchmarks._harness import cpu_name, say
from benchmarks._report import markdown, other_cpu
from benchmarks._timing import FULL, QUICK, Effort, OtherCpuUse, Timing, interleave
from polymoe.hal.select import select

LIMIT = 5e-6  # seconds a selection may take
CALL_LIMITS = {"experts": (12e-6, 10e-6)}  # seconds a whole call may take, through polymoe and through torch.ops
T, H, I, E, K = 1, 64, 128, 8, 2


@dataclass(frozen=True)
class SmallCall:
    """One op: what its backend is chosen by, and the same call through polymoe and through torch.ops."""

    op: str
    subject: Tensor
    options: tuple[str, ...]
    public: Callable[[], Any]
    bare: Callable[[], Any]


@dataclass(frozen=True)
class Costs:
    op: str
    select: Timing
    public: Timing
    bare: Timing
    other_cpu: float | None

    @property
    def verdict(self) -> str:
        public, bare = CALL_LIMITS.get(self.op, (inf, inf))
        fast = self.select.median < LIMIT and self.public.median < public and self.bare.median < bare
        return "pass" if fast else "FAIL: too slow"


def small_calls(dtype: torch.dtype = torch.bfloat16) -> list[SmallCall]:
    source = inputs.generator(0)
    x, logits = inputs.normal((T, H), dtype, source), inputs.normal((T, E), dtype, source)
    gate_up, down = inputs.weight((E, 2 * I, H), dtype, source), inputs.weight((E, H, I), dtype, source)
    weights, ids = inputs.routing(T, E, K, dtype, source)
    p = polymoe.plan(ids, E)
    rows = polymoe.dispatch(x, p)
    h = polymoe.grouped_mm(rows, gate_up.mT, p.offsets[1:])
    y = polymoe.grouped_mm(polymoe.activate(h, "swiglu"), down.mT, p.offsets[1:])
    offs, ops = p.offsets[1:], torch.ops.polymoe
    return [
        SmallCall("gate", logits, ("softmax",), lambda: polymoe.gate(logits, K), lambda: ops.gate(logits, K)),
        SmallCall("plan", ids, (), lambda: polymoe.plan(ids, E), lambda: ops.plan(ids, E)),
        SmallCall("dispatch", x, (), lambda: polymoe.dispatch(x, p), lambda: ops.dispatch(x, p.row_slot, p.slot_row)),
        SmallCall(
            "grouped_mm",
            rows,
            (),
            lambda: polymoe.grouped_mm(rows, gate_up.mT, offs),
            lambda: ops.grouped_mm(rows, gate_up.mT, offs),
        ),
        SmallCall("activate", h, ("swiglu",), lambda: polymoe.activate(h, "swiglu"), lambda: ops.activate(h, "swiglu")),
        SmallCall(
            "combine", y, (), lambda: polymoe.combine(y, p, weights), lambda: ops.combine(y, p.slot_row, weights)
        ),
        SmallCall(
            "experts",
            x,
            ("swiglu", "output"),
            lambda: polymoe.experts(x, gate_up, down, weights, ids),
            lambda: ops.experts(x, gate_up, down, weights, ids),
        ),
    ]


def measure(call: SmallCall, effort: Effort) -> Costs:
    contenders = [lambda _: select(call.op, call.subject, call.options, None)]
    contenders += [lambda _: call.public(), lambda _: call.bare()]
    with OtherCpuUse() as others:
        chosen, public, bare = interleave(contenders, 1, effort)
    return Costs(call.op, chosen, public, bare, others.share)


def table(rows: Sequence[Costs]) -> str:
    header = ["op", "select [us]", "polymoe [us]", "torch.ops [us]", "difference", "limits", "verdict", "other CPU"]
    lines = [
        [
            row.op,
            f"{row.select.median * 1e6:.2f}",
            f"{row.public.median * 1e6:.2f}",
            f"{row.bare.median * 1e6:.2f}",
            f"{(row.public.median - row.bare.median) * 1e6:+.2f}",
            ", ".join(f"{limit * 1e6:.0f}" for limit in (LIMIT, *CALL_LIMITS.get(row.op, ()))),
            row.verdict,
            other_cpu(row.other_cpu),
        ]
        for row in rows
    ]
    return markdown(header, lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table. Returns the exit status: with --check 1 if a selection or a call takes too long."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_select", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a selection or a call takes too long")
    given = parser.parse_args(arguments)
    rows = []
    with torch.no_grad():
        for call in small_calls():
            rows.append(measure(call, QUICK if given.quick else FULL))
            say(f"select {call.op}: {rows[-1].select.median * 1e6:.2f} us, verdict {rows[-1].verdict}")
    print(f"polymoe, choice of a backend: {cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}.")
    print(f"\n{table(rows)}")
    return int(given.check and any(row.verdict != "pass" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
