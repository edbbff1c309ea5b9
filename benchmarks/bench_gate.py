"""polymoe.gate against torch's softmax or sqrt-softplus, topk, gather and division.

Run it as `python -m benchmarks.bench_gate`; --help lists the options.
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
from polymoe.testing.tolerances import FUNCTION_ERRORS, arithmetic_roundoff, relative_frobenius

Routing = tuple[Tensor, Tensor]  # weights, ids


def cases(options: Options) -> Iterator[Case]:
    for dtype in options.dtypes:
        for shape in options.shapes:
            for T in options.tokens:
                yield make_case(options, shape, T, dtype)


def make_case(options: Options, shape: Shape, T: int, dtype: str) -> Case:
    source, torch_dtype = inputs.generator(options.seed, options.device), DTYPES[dtype]
    E, K = shape.E_model, shape.K
    logits = [inputs.normal((T, E), torch_dtype, source) for _ in range(SETS)]
    # DeepSeek, GLM and Kimi select by score + bias, the softmax models by the score.
    biased = shape.scoring in ("sigmoid", "sqrtsoftplus")
    bias = inputs.normal((E,), torch.float32, source, scale=0.1) if biased else None
    truth = [route(one.double(), shape, bias)[0] for one in logits]

    def error(call: Callable[[int], Routing]) -> float:
        """Of the weights, and of what the chosen experts weigh in float64: equal scores may be chosen in any order."""
        got = []
        for i, one in enumerate(logits):
            weights, ids = call(i)
            got.append(torch.stack([weights.double(), weigh(one.double(), ids.long(), shape.scoring)]))
        return relative_frobenius(torch.cat(got, 1), torch.cat(truth).expand(2, -1, -1))

    def on(backend: str) -> Callable[[int], Routing]:
        n_group, topk_group = shape.groups or (1, 1)
        return lambda i: polymoe.gate(
            logits[i], K, shape.scoring, bias, n_group, topk_group, renormalize="max", backend=backend
        )

    contenders = [Contender("torch", lambda i: route(logits[i], shape, bias))]
    return Case(
        labels={"shape": shape.name, "dtype": dtype, "T": T},
        contenders=(*contenders, *ours(options, "gate", torch_dtype, {"scoring": shape.scoring}, on)),
        error=error,
        tolerance=(FUNCTION_ERRORS + K) * arithmetic_roundoff(torch_dtype),
        bytes=logits[0].nbytes + T * K * 8,
    )


def score(logits: Tensor, scoring: str) -> Tensor:
    if scoring == "softmax_topk":
        return logits
    if scoring == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if scoring == "sigmoid" else F.softplus(logits).sqrt()


def weigh(logits: Tensor, ids: Tensor, scoring: str) -> Tensor:
    """The weights [T, K] of experts that were chosen, in sum 1."""
    chosen = score(logits, scoring).gather(1, ids)
    return chosen.softmax(-1) if scoring == "softmax_topk" else chosen / chosen.sum(-1, keepdim=True)


def route(logits: Tensor, shape: Shape, bias: Tensor | None) -> Routing:
    """The gate in plain torch; in float64 for float64 logits, else in float32."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    scores = score(logits, shape.scoring)
    scores = scores if bias is None else scores + bias
    if shape.groups is not None:
        n_group, topk_group = shape.groups
        of_groups = scores.view(len(scores), n_group, -1)
        best = of_groups.topk(2).values.sum(-1).topk(topk_group).indices
        kept = of_groups.new_zeros(of_groups.shape[:2], dtype=torch.bool).scatter_(1, best, True)
        scores = of_groups.masked_fill(~kept[:, :, None], -torch.inf).view_as(scores)
    ids = scores.topk(shape.K).indices
    return weigh(logits, ids, shape.scoring), ids


BENCH = Bench("gate", cases)

if __name__ == "__main__":
    sys.exit(main(BENCH))
