"""python -m polymoe info."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import polymoe
from polymoe.__main__ import info, main
from polymoe.backends._extension import extension
from polymoe.hal.problem import OPS


def test_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "polymoe", "info"], capture_output=True, text=True, check=True)
    assert done.stdout == info() + "\n"
    assert done.stderr == ""


def test_a_command_is_needed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["polymoe"])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "usage: polymoe" in capsys.readouterr().err


def test_names_versions_devices_and_threads() -> None:
    lines = info().splitlines()
    assert lines[0].startswith(f"polymoe {polymoe.__version__}, torch {torch.__version__}, Python ")
    assert any(line.startswith("device types: cpu") for line in lines)
    assert f"threads: {torch.get_num_threads()}" in lines


def test_every_level_has_a_state() -> None:
    assert extension is not None
    text = info()
    for level in polymoe.isa_levels():
        missing = extension.isa_missing(level)
        if missing:
            assert f"  {level}: not supported; this machine lacks {', '.join(missing)}" in text
        else:
            state = "active" if level == polymoe.isa_level() else "supported"
            flags = ", ".join(extension.isa_flags(level)) or "no CPUID flags"
            assert f"  {level}: {state}; uses {flags}" in text
    for cache, size in extension.cache_sizes().items():
        assert f"{cache} {size // 1024} KiB" in text


def test_every_backend_says_what_it_serves() -> None:
    lines = info().splitlines()
    listed = lines[lines.index("backends, in order of preference:") + 1 :]
    names = [line.split()[0] for line in listed if not line.startswith("    ")]
    assert names == polymoe.backends()
    assert listed[0] == "  cpu (deterministic, batch-invariant)"
    assert set(listed[1].removeprefix("    cpu: serves ").split(", ")) == set(OPS)
    triton = listed[listed.index("  triton (deterministic, batch-invariant)") + 1]
    assert triton == "    cpu: cannot serve any op: it serves cuda, xpu tensors, not cpu"
