"""A backend in one file: registered in this process, run, checked and explained. docs/backends.md is the longer story.

Its one kernel computes `combine` as a sparse matrix product: row t of the matrix holds the routing weights of token t.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import polymoe
from polymoe.hal.problem import Problem
from polymoe.testing.conformance import combine as conformance
from polymoe.testing.targets import Target


def combine(y: Tensor, slot_row: Tensor, weights: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """The arguments of polymoe::combine, with the same defaults: y [S, H], slot_row and weights [T, K] -> [T, H]."""
    token, k = torch.nonzero(slot_row >= 0, as_tuple=True)  # slots that are skipped have row -1
    row = slot_row[token, k].long()
    weight = torch.ones(len(row)) if weights is None else weights[token, k].float()
    at, shape = torch.stack([token, row]), (slot_row.shape[0], y.shape[0])
    matrix = torch.sparse_coo_tensor(at, weight, shape, check_invariants=True)
    used = torch.zeros(y.shape[0], 1, dtype=torch.bool).index_fill(0, row, True)
    return torch.sparse.mm(matrix, y.where(used, 0)).to(out_dtype or y.dtype)


class SparseBackend:
    name = "sparse"
    device_types = ("cpu",)
    # Nothing is known of the order in which a sparse product adds, so nothing is promised.
    deterministic = False
    batch_invariant = False

    def supports(self, op: str, problem: Problem) -> str | None:
        if op != "combine":
            return f"it has no {op}"
        return None if problem.dtype == torch.float32 else f"its matrices are float32, not {problem.dtype}"

    def implementation(self, op: str) -> Callable[..., Any]:
        return combine


def main() -> None:
    polymoe.register_backend(SparseBackend())
    print("backends:", ", ".join(polymoe.backends()))

    T, H, E, K = 64, 256, 16, 4  # tokens, hidden width, experts, experts per token
    weights, ids = polymoe.gate(torch.randn(T, E), K, renormalize=True)
    plan = polymoe.plan(ids, E)
    y = torch.randn(T * K, H)
    ours = polymoe.combine(y, plan, weights, backend="sparse")
    difference = (ours - polymoe.combine(y, plan, weights)).abs().max().item()
    print(f"largest difference from the usual combine: {difference:.1e}")
    print(polymoe.explain("combine", y, plan, weights, backend="sparse"))

    try:
        with polymoe.use_backend("sparse"):
            polymoe.combine(y.bfloat16(), plan, weights)
    except ValueError as error:
        print("a call it declines:", error)

    # The conformance kit, here in this process; pytest runs it for backends that are installed.
    cases = [case for case in conformance.CASES if case.dtype == torch.float32]
    for case in cases:
        conformance.check(case, Target("sparse"), seed=int(torch.randint(2**31, ())))
    print(f"conformance: {len(cases)} float32 cases of combine are right")


if __name__ == "__main__":
    main()
