"""Several processes at once, and torch.inference_mode: the same bits as alone, and as under no_grad."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import polymoe
from polymoe.testing.cases import Random

SCRIPT = """
import sys
from test_processes import digest, layer
sys.stdin.readline()  # all begin together
print({digest(layer(int(sys.argv[1]))) for _ in range(20)})
"""


def layer(seed: int) -> Tensor:
    random = Random(seed)
    x, gate_up, down = (random.normal(*shape).bfloat16() for shape in ((40, 96), (8, 2 * 64, 96), (8, 96, 64)))
    weights, ids = polymoe.gate(random.normal(40, 8), 2, renormalize="max")
    return polymoe.experts(x, gate_up, down, weights, ids)


def digest(out: Tensor) -> str:
    return hashlib.sha256(out.view(torch.int16).numpy().tobytes()).hexdigest()


def test_processes_at_once(seed: int, request: pytest.FixtureRequest) -> None:
    command = [sys.executable, "-c", SCRIPT, str(seed)]
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": request.path.parent}
    workers = [subprocess.Popen(command, **options) for _ in range(3)]
    try:
        for worker in workers:
            worker.stdin.write("\n")
            worker.stdin.flush()
        found = [worker.communicate(timeout=120)[0].strip() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert found == [str({digest(layer(seed))})] * 3


def test_inference_mode(seed: int) -> None:
    with torch.no_grad():
        expected = layer(seed)
    with torch.inference_mode():
        out = layer(seed)
        assert out.is_inference()
        assert torch.equal(out, expected)
