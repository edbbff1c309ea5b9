"""polymoe.combine against a gather, a product with the weights and a sum in torch.

Run it as `python -m benchmarks.bench_combine`; --help lists the options.
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
    y = [inputs.normal((T * shape.K, shape.H), torch_dtype, source) for _ in range(SETS)]
    routings = [inputs.routing(T, shape.E, shape.K, torch_dtype, source) for _ in range(SETS)]
    weights = [one for one, _ in routings]
    plans = [polymoe.plan(ids, shape.E) for _, ids in routings]
    rows = [plan.slot_row.reshape(-1) for plan in plans]
    truth = torch.cat([gather_sum(y[i].double(), rows[i], weights[i].double()) for i in range(SETS)])

    def error(call: Callable[[int], Tensor]) -> float:
        return relative_frobenius(torch.cat([call(i) for i in range(SETS)]), truth)

    def on(backend: str) -> Callable[[int], Tensor]:
        return lambda i: polymoe.combine(y[i], plans[i], weights[i], backend=backend)

    return Case(
        labels={"shape": shape.name, "dtype": dtype, "T": T},
        contenders=(
            Contender("torch", lambda i: gather_sum(y[i], rows[i], weights[i])),
            *ours(options, "combine", torch_dtype, {}, on),
        ),
        error=error,
        # torch rounds the products, and the sum.
        tolerance=inputs.error_bound(torch_dtype, roundings=2, reduction=shape.K),
        bytes=(1 + 1 / shape.K) * y[0].nbytes + (4 + weights[0].element_size()) * T * shape.K,
    )


def gather_sum(y: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    return (y.index_select(0, rows).view(*weights.shape, -1) * weights[:, :, None]).sum(dim=1)


BENCH = Bench("combine", cases)

if __name__ == "__main__":
    sys.exit(main(BENCH))
