"""First calls from several Python threads at once, in a fresh process: nothing is initialised twice or half."""

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import threading

import torch

backend = sys.argv[1] or None
THREADS, ROUNDS = 6, 5

import polymoe
from polymoe.testing.cases import Random
from polymoe.testing.conformance import experts, gate
from polymoe.testing.tolerances import assert_same_bits

case = experts.Case(T=40, H=96, I=64, E=8, K=2, dtype=torch.bfloat16)
inputs = [experts.make_inputs(case, Random(seed)) for seed in range(THREADS)]
logits = [Random(seed).normal(40, 8) for seed in range(THREADS)]


def layer(i):
    weights, ids = polymoe.gate(logits[i], 2, renormalize="max", backend=backend)
    plan = polymoe.plan(ids, 8, backend=backend)
    rows = polymoe.dispatch(inputs[i].x, plan, backend=backend)
    out = polymoe.experts(*inputs[i][:3], weights, ids, backend=backend)
    return weights, ids, *plan, rows, polymoe.combine(rows, plan, backend=backend), out


results, errors = [[] for _ in range(THREADS)], []
barrier = threading.Barrier(THREADS)


def work(i):
    try:
        barrier.wait()
        for _ in range(ROUNDS):
            results[i].append(layer(i))
    except BaseException as error:
        errors.append(error)
        raise


workers = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
assert not errors, errors
for i in range(THREADS):
    expected = layer(i)
    assert len(results[i]) == ROUNDS
    for result in results[i]:
        for got, correct in zip(result, expected, strict=True):
            assert_same_bits(got, correct, f"thread {i}")
print("equal")
"""


@pytest.mark.parametrize("backend", ["", "cpu", "reference"], ids=["default", "cpu", "reference"])
def test_concurrent_first_calls(backend):
    command = [sys.executable, "-c", SCRIPT, backend]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.strip() == "equal"
