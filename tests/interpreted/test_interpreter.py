"""Triton's interpreter is wrong as it comes, and right after polymoe.testing.triton_interpreter.repair."""

import json
import subprocess
import sys

import pytest
import torch
from tests.interpreted import arithmetic


def test_the_repaired_interpreter_equals_torch(seed):
    assert {name: n for name, n in arithmetic.differences(seed).items() if n} == {}


def test_the_stock_interpreter_does_not(seed):
    """If one of these comes out right in a later version of Triton, its repair can go."""
    command = [sys.executable, "-m", "tests.interpreted.arithmetic", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    different = json.loads(done.stdout)
    assert {name for name, n in different.items() if n == 0} == set()


def test_sums_of_packed_floats_are_refused():
    with pytest.raises(Exception, match="convert it to float32"):
        arithmetic.sums(torch.ones(arithmetic.SIZE, arithmetic.SIZE, dtype=torch.bfloat16))
