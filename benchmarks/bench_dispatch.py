"""polymoe.dispatch against torch.index_select by a given index of tokens.

Run it as `python -m benchmarks.bench_dispatch`; --help lists the options.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import polymoe
from benchmarks import inputs
from benchmarks._harness import Bench, Case, Contender, Options, main, ours
from benchmarks.inputs import DTYPES, SETS
from benchmarks.models import Shape
from polymoe.testing.tolerances import relative_frobenius


def cases(options: Options) -> Iterator[Case]:
    for dtype in options.dtypes:
        for shape in options.shapes:
            for T in options.tokens:
                yield make_case(options, shape, T, dtype)


def make_case(options: Options, shape: Shape, T: int, dtype: str) -> Case:
    source, torch_dtype = inputs.generator(options.seed, options.device), DTYPES[dtype]
    x = [inputs.normal((T, shape.H), torch_dtype, source) for _ in range(SETS)]
    ids = [inputs.routing(T, shape.E, shape.K, torch_dtype, source)[1] for _ in range(SETS)]
    plans = [polymoe.plan(one, shape.E) for one in ids]
    tokens = [plan.row_slot // shape.K for plan in plans]
    truth = torch.cat([x[i][tokens[i].long()] for i in range(SETS)])

    def error(call: Callable[[int], Tensor]) -> float:
        return relative_frobenius(torch.cat([call(i) for i in range(SETS)]), truth)

    def on(backend: str) -> Callable[[int], Tensor]:
        return lambda i: polymoe.dispatch(x[i], plans[i], backend=backend)

    return Case(
        labels={"shape": shape.name, "dtype": dtype, "T": T},
        contenders=(
            Contender("index_select", lambda i: x[i].index_select(0, tokens[i])),
            *ours(options, "dispatch", torch_dtype, {}, on),
        ),
        error=error,
        tolerance=0.0,
        bytes=(1 + shape.K) * x[0].nbytes + 4 * T * shape.K,
    )


BENCH = Bench("dispatch", cases)

if __name__ == "__main__":
    sys.exit(main(BENCH))
