"""polymoe.grouped_mm over the rows of every expert and its gate/up weight (nn.Linear layout), against
torch.nn.functional.grouped_mm and a loop of matmuls.

Run it as `python -m benchmarks.bench_grouped_mm`; --help lists the options. The reference backend is left
out by default: it widens all weights in every call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import polymoe
from benchmarks import inputs
from benchmarks._harness import Bench, Case, Contender, Options, main, ours
from benchmarks.inputs import DTYPES, SETS
from benchmarks.models import Shape
from polymoe.testing.tolerances import relative_frobenius

CHECKED_ROWS = 64  # of every input set; the float64 computation is slow


def cases(options: Options) -> Iterator[Case]:
    for dtype in options.dtypes:
        for shape in options.shapes:
            source = inputs.generator(options.seed, options.device)
            b = inputs.weight((shape.E, 2 * shape.I, shape.H), DTYPES[dtype], source).mT  # [E, H, 2I]
            for T in options.tokens:
                yield make_case(options, shape, b, T, dtype, source)
            del b  # before the next one: two may not fit the memory


def make_case(options: Options, shape: Shape, b: Tensor, T: int, dtype: str, source: torch.Generator) -> Case:
    S, torch_dtype = T * shape.K, DTYPES[dtype]
    a = [inputs.normal((S, shape.H), torch_dtype, source) for _ in range(SETS)]
    ids = [inputs.routing(T, shape.E, shape.K, torch_dtype, source)[1] for _ in range(SETS)]
    offs = [polymoe.plan(one, shape.E).offsets[1:] for one in ids]
    checked = torch.arange(0, S, max(1, S // CHECKED_ROWS), device=source.device)
    truth = torch.cat([exact(a[i], b, offs[i], checked) for i in range(SETS)])

    def error(call: Callable[[int], Tensor]) -> float:
        return relative_frobenius(torch.cat([call(i)[checked] for i in range(SETS)]), truth)

    def on(backend: str) -> Callable[[int], Tensor]:
        return lambda i: polymoe.grouped_mm(a[i], b, offs[i], backend=backend)

    hit = sum(one.unique().numel() for one in ids) / SETS
    return Case(
        labels={"shape": shape.name, "dtype": dtype, "T": T},
        contenders=(
            Contender("F.grouped_mm", lambda i: F.grouped_mm(a[i], b, offs=offs[i])),
            Contender("loop", lambda i: loop(a[i], b, offs[i]), reads=True),
            *ours(options, "grouped_mm", torch_dtype, {}, on, best_only=True),
        ),
        error=error,
        tolerance=inputs.error_bound(torch_dtype, roundings=1, reduction=shape.H),
        bytes=hit * b[0].nbytes + a[0].nbytes + 2 * S * shape.I * b.element_size(),
        flops=4.0 * S * shape.H * shape.I,
    )


def loop(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    out = a.new_empty((a.shape[0], b.shape[2]))
    start = 0
    for e, end in enumerate(offs.tolist()):
        if end > start:
            torch.mm(a[start:end], b[e], out=out[start:end])
        start = end
    return out


def exact(a: Tensor, b: Tensor, offs: Tensor, rows: Tensor) -> Tensor:
    """Those rows in float64, one expert at a time."""
    experts = torch.searchsorted(offs, rows.int(), right=True)
    out = b.new_empty((rows.numel(), b.shape[2]), dtype=torch.float64)
    for e in experts.unique().tolist():
        out[experts == e] = a[rows[experts == e]].double() @ b[e].double()
    return out


BENCH = Bench("grouped_mm", cases)

if __name__ == "__main__":
    sys.exit(main(BENCH))
