"""The benchmarks run, and notice what is wrong, slow or unfair."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from importlib import import_module
from typing import Any

import pytest
import torch
from benchmarks import _harness, bench_select
from benchmarks._harness import Bench, Case, Contender
from benchmarks._report import Result, Row, table
from benchmarks._timing import BandwidthProbe, Effort, OtherCpuUse, interleave
from benchmarks.shapes import SHAPES

from polymoe.hal import device
from polymoe.hal.problem import OPS

BEST = device.isa_supported()[-1]


def run(capsys: pytest.CaptureFixture[str], bench: Bench, *arguments: str) -> list[Row]:
    seed = random.randrange(2**31)
    common = ["--quick", "--json", "--shape", "tiny", "--threads", "1", "--seed", str(seed)]
    status = _harness.main(bench, [*common, *arguments])
    rows = [Row.from_json(line) for line in capsys.readouterr().out.splitlines()]
    print(f"seed {seed}")
    assert status == 0
    return rows


def bench_of(op: str) -> Bench:
    return import_module(f"benchmarks.bench_{op}").BENCH


@pytest.mark.parametrize("op", list(OPS))
def test_every_op_has_a_benchmark(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(capsys, bench_of(op), "--isa", BEST, "--tokens", "1", "5", "--backend", "cpu", "reference")
    assert [row.labels["T"] for row in rows] == [1, 5]
    for row in rows:
        assert (row.op, row.isa, row.threads, row.verdict, row.subject) == (op, BEST, 1, "-", "cpu")
        assert [result.name for result in row.results if not result.peer] == ["cpu", "reference"]
        assert row.baseline.peer
        assert all(0 < result.low <= result.seconds <= result.high for result in row.results)
        assert row.bytes > 0
        assert row.probe_before > 0
        assert row.probe_after > 0
    assert all(len(line.split("|")) == len(table(rows).splitlines()[0].split("|")) for line in table(rows).splitlines())


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_experts_in_other_dtypes(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = run(capsys, bench_of("experts"), "--isa", BEST, "--tokens", "3", "--dtype", dtype)
    assert row.labels["dtype"] == dtype
    assert row.verdict == "-"


def test_a_lower_level_runs_with_torch_limited_alike(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(capsys, bench_of("plan"), "--isa", "portable", BEST, "--tokens", "2")
    assert [row.isa for row in rows] == ["portable", BEST]
    assert rows[0].torch_isa == "DEFAULT"
    assert rows[1].torch_isa == torch.backends.cpu.get_cpu_capability()
    assert device.isa_level() == BEST


def test_backend_selection_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_select.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert all(f"| {op} |" in printed for op in OPS)


def case_of(*contenders: Contender, required: float | None = None) -> Case:
    """Contenders that return a number, of which 1 is right."""
    return Case(
        labels={"case": "made up"},
        contenders=contenders,
        error=lambda call: max(abs(call(i) - 1.0) for i in range(4)),
        tolerance=0.1,
        bytes=1.0,
        required=required,
    )


def status_of(case: Case, *arguments: str) -> int:
    return _harness.main(Bench("made_up", lambda options: iter([case])), ["--quick", "--isa", BEST, *arguments])


def test_wrong_results_are_found() -> None:
    right, wrong = Contender("torch", lambda i: 1.0), Contender("cpu", lambda i: 1.0 + (i == 3), peer=False)
    assert status_of(case_of(right, replace(right, name="cpu", peer=False))) == 0
    assert status_of(case_of(right, wrong)) == 1


def test_a_contender_that_spoils_the_inputs_is_found() -> None:
    shared, calls = torch.ones(4), iter(range(1_000_000))

    def spoils(i: int) -> float:
        if next(calls) > 10:  # after its result was looked at
            shared.zero_()
        return 1.0

    contenders = Contender("torch", lambda i: float(shared[i])), Contender("cpu", spoils, peer=False)
    assert status_of(case_of(*contenders)) == 1


def test_check_fails_on_a_missed_requirement() -> None:
    same = Contender("torch", lambda i: 1.0), Contender("cpu", lambda i: 1.0, peer=False)
    assert status_of(case_of(*same, required=1e6), "--check") == 1
    assert status_of(case_of(*same, required=1e6)) == 0
    assert status_of(case_of(*same, required=1e-6), "--check") == 0


def row_of(*, peer_seconds: float = 2.0, error: float = 0.001, **fields: Any) -> Row:
    results = (
        Result("torch", True, peer_seconds, peer_seconds, peer_seconds, 8, 0.001),
        Result("cpu", False, 1.0, 1.0, 1.0, 8, error),
    )
    row = Row("op", {"T": 1}, "avx2", "AVX2", 2, results, "cpu", 1.0, 0.0, 1.0, 1.0, 0.01, 0.1, 1.5, True)
    return replace(row, **fields)


def test_verdicts() -> None:
    assert row_of().verdict == "pass"
    assert row_of(peer_seconds=1.4).verdict == "FAIL: too slow"
    assert row_of(error=0.00104).verdict == "pass"
    assert row_of(error=0.00106).verdict == "FAIL: too inexact"
    assert row_of(error=0.00106, judge_accuracy=False).verdict == "pass"
    assert row_of(error=float("nan")).verdict == "WRONG: cpu"
    assert row_of(peer_seconds=0.1, required=None).verdict == "pass"
    assert row_of(error=0.01, required=None).verdict == "FAIL: too inexact"
    assert row_of(error=0.01, required=None, judge_accuracy=False).verdict == "-"
    assert "20% (!)" in table([row_of(other_cpu=0.2)])
    assert "(!)" not in table([row_of(other_cpu=0.1)])
    assert Row.from_json(row_of().to_json()) == row_of()


@pytest.mark.parametrize("contenders", [1, 2, 3, 4, 5])
def test_contenders_meet_all_inputs_equally_often(contenders: int) -> None:
    met: list[Counter[int]] = [Counter() for _ in range(contenders)]
    calls = [lambda i, j=j: met[j].update([i]) for j in range(contenders)]
    timings = interleave(calls, sets=4, effort=Effort(seconds=0.01, min_rounds=5, max_rounds=8))
    assert [timing.samples for timing in timings] == [8] * contenders
    assert all(set(counter) == {0, 1, 2, 3} and len(set(counter.values())) == 1 for counter in met)


def test_required_ratios_are_the_ones_asked_for() -> None:
    experts = import_module("benchmarks.bench_experts")
    options = _harness.parse(experts.BENCH, ["--isa", BEST])
    qwen, at_avx2 = SHAPES["qwen3-30b-a3b"], replace(options, levels=("avx2",))
    assert [experts.required(at_avx2, qwen, "bf16", T) for T in (1, 16, 128, 1024)] == [1.1, 1.5, 1.0, 0.9]
    assert experts.required(replace(options, levels=("portable",)), qwen, "bf16", 1) is None
    assert experts.required(at_avx2, qwen, "f32", 1) is None


def test_probe_and_cpu_use_are_plausible() -> None:
    with OtherCpuUse() as others:
        assert 1e8 < BandwidthProbe(64)() < 1e13
    assert others.share is None or 0 <= others.share <= 1
