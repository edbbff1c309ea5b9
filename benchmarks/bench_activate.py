"""polymoe.activate against F.silu(gate) * up, with clamps where the model has them.

Run it as `python -m benchmarks.bench_activate`; --help lists the options.
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
from benchmarks.layer import gated
from benchmarks.models import Shape
from polymoe.testing.tolerances import FUNCTION_ERRORS, arithmetic_roundoff, relative_frobenius


def cases(options: Options) -> Iterator[Case]:
    for dtype in options.dtypes:
        for shape in options.shapes:
            for T in options.tokens:
                yield make_case(options, shape, T, dtype)


def make_case(options: Options, shape: Shape, T: int, dtype: str) -> Case:
    source, torch_dtype, S = inputs.generator(options.seed, options.device), DTYPES[dtype], T * shape.K
    h = [inputs.normal((S, 2 * shape.I), torch_dtype, source) for _ in range(SETS)]
    truth = torch.cat([gated(one.double(), shape) for one in h])

    def error(call: Callable[[int], Tensor]) -> float:
        return relative_frobenius(torch.cat([call(i) for i in range(SETS)]), truth)

    def on(backend: str) -> Callable[[int], Tensor]:
        return lambda i: polymoe.activate(
            h[i], shape.activation, limit=shape.limit, interleaved=shape.interleaved, backend=backend
        )

    # torch rounds silu(gate) and its product with up; in gpt-oss's activation three more steps.
    roundings = 5 if shape.activation == "swiglu_oai" else 2
    return Case(
        labels={"shape": shape.name, "dtype": dtype, "T": T},
        contenders=(
            Contender("torch", lambda i: gated(h[i], shape)),
            *ours(options, "activate", torch_dtype, {"kind": shape.activation}, on),
        ),
        error=error,
        tolerance=inputs.error_bound(torch_dtype, roundings) + FUNCTION_ERRORS * arithmetic_roundoff(torch_dtype),
        bytes=1.5 * h[0].nbytes,
    )


BENCH = Bench("activate", cases)

if __name__ == "__main__":
    sys.exit(main(BENCH))
