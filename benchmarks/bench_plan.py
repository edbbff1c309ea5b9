"""polymoe.plan against torch's sort, bincount and a scatter for the way back.

Run it as `python -m benchmarks.bench_plan`; --help lists the options.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import polymoe
from benchmarks import inputs
from benchmarks._harness import Bench, Case, Contender, Options, main, ours
from benchmarks.inputs import SETS
from benchmarks.models import Shape

Plan = tuple[Tensor, Tensor, Tensor]  # offsets, row_slot, slot_row


def cases(options: Options) -> Iterator[Case]:
    for shape in options.shapes:
        for T in options.tokens:
            yield make_case(options, shape, T)


def make_case(options: Options, shape: Shape, T: int) -> Case:
    source, E = inputs.generator(options.seed, options.device), shape.E_model
    ids = [inputs.routing(T, E, shape.K, torch.float32, source)[1] for _ in range(SETS)]
    truth = [sort(one, E) for one in ids]

    def error(call: Callable[[int], Plan]) -> float:
        """Share of the numbers that differ: a plan is right or wrong."""
        pairs = [pair for i in range(SETS) for pair in zip(call(i), truth[i], strict=True)]
        return sum(int((a != b).sum()) for a, b in pairs) / sum(b.numel() for _, b in pairs)

    def on(backend: str) -> Callable[[int], Plan]:
        return lambda i: polymoe.plan(ids[i], E, backend=backend)

    return Case(
        labels={"shape": shape.name, "T": T},
        contenders=(
            Contender("torch", lambda i: sort(ids[i], E)),
            *ours(options, "plan", ids[0].dtype, {}, on),
        ),
        error=error,
        tolerance=0.0,
        bytes=ids[0].nbytes + 2 * 4 * ids[0].numel() + 4 * (E + 1),
    )


def sort(ids: Tensor, E: int) -> Plan:
    """The plan in plain torch, for ids that are all in range."""
    sorted_ids, slots = ids.reshape(-1).sort(stable=True)
    offsets = ids.new_zeros(E + 1, dtype=torch.int32)
    offsets[1:] = sorted_ids.bincount(minlength=E).cumsum(0)
    row_slot = slots.int()
    slot_row = torch.empty_like(row_slot)
    slot_row[slots] = torch.arange(slots.numel(), dtype=torch.int32, device=ids.device)
    return offsets, row_slot, slot_row.view(ids.shape)


BENCH = Bench("plan", cases, by_dtype=False)

if __name__ == "__main__":
    sys.exit(main(BENCH))
