"""The examples, and the code in the README, run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SNIPPETS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_readme_has_its_snippets() -> None:
    assert len(SNIPPETS) == 3


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_readme_snippet(number: int) -> None:
    run("-c", SNIPPETS[number])


def test_functional_ops() -> None:
    assert "experts equals its parts to the bit: True" in run("examples/functional_ops.py")


def test_demo_at_its_smallest() -> None:
    out = run("examples/demo_deepseek_v4.py", "--quick", "--experts", "6")
    assert "polymoe.experts ran 2 times for 2 MoE layers: backend" in out
    assert len(re.findall(r"^\| (?:decode|prefill \d+) .*\|$", out, re.MULTILINE)) == 9
