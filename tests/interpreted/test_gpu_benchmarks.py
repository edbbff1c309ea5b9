"""The benchmarks for GPUs: their logic on the CPU, with a made-up device whose clock the tests turn."""

import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from math import isnan
from types import SimpleNamespace

import pytest
import torch
from benchmarks import __main__ as command
from benchmarks import contenders, gpu, inputs, tune
from benchmarks._case import Bench, Case, Contender
from benchmarks._harness import add_run_arguments, argparse, report, run
from benchmarks._options import add_arguments, options
from benchmarks._report import Row
from benchmarks.contenders import Problem, base
from benchmarks.layer import exact, gated, make_layer, make_set
from benchmarks.models import SHAPES

from polymoe.hal.problem import OPS
from polymoe.kernels import tiles
from polymoe.kernels.devices import INTERPRETER
from polymoe.testing.tolerances import relative_frobenius


class FakeApi:
    """What benchmarks.gpu uses of torch.cuda. Time is `now`; a graph takes as long as what it captured took."""

    def __init__(self):
        self.now, self.captures, self.waits = 0.0, 0, 0

    def is_available(self):
        return True

    def get_device_name(self):
        return "a made-up GPU"

    def synchronize(self):
        self.waits += 1

    def reset_peak_memory_stats(self):
        self.peak = 1000

    def memory_allocated(self):
        return 1000

    def max_memory_allocated(self):
        return self.peak

    def Event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda end: (end.at - event.at) * 1e3
        return event

    def CUDAGraph(self):
        graph = SimpleNamespace(seconds=0.0)
        graph.replay = lambda: setattr(self, "now", self.now + graph.seconds)
        return graph

    @contextmanager
    def graph(self, graph):
        self.captures += 1
        start = self.now
        yield
        graph.seconds = self.now - start


class Ticking(FakeApi):
    """To its events, whatever happens between two of them takes a millisecond."""

    def Event(self, enable_timing):
        event = super().Event(enable_timing)

        def record():
            self.now += 1e-3
            event.at = self.now

        event.record = record
        return event


def made_up(api, **sizes):
    return gpu.Gpu("cpu", api, **{"flushed": 64, "matmul": 64} | sizes)


def given(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return options(parser.parse_args(["--quick", "--shapes", "tiny", "--probe-mib", "1", *words]))


# --- times -----------------------------------------------------------------------------------------------------------


def test_a_call_is_timed_by_events_with_empty_caches():
    api, found_flushed = FakeApi(), []
    device = made_up(api)

    def run():
        found_flushed.append(not device._flushed.any())
        device._flushed.fill_(1)  # what a kernel leaves in the caches
        api.now += 0.25

    assert device.seconds([run, run]) == 0.25
    assert found_flushed == [True, True]
    assert api.waits == 1  # after all, not between: launches stay ahead of the device


def test_launches_are_captured_unless_the_host_reads():
    api, calls = FakeApi(), []
    device = made_up(api)

    def call(i):
        calls.append(i)
        api.now += 1.0
        return i

    captured = gpu.Call(Contender("fast", call), device)
    assert (captured.note, api.captures, sorted(set(calls))) == ("", inputs.SETS, list(range(inputs.SETS)))
    calls.clear()
    assert captured.seconds(0, 2, inputs.SETS) == 1.0
    assert captured(3) == 3
    assert calls == []  # it was replayed
    reading = gpu.Call(Contender("slow", call, reads=True), device)
    assert reading.note == "the host reads results on the way"
    assert reading.seconds(1, 1, inputs.SETS) == 1.0
    assert calls == [1]


def test_what_cannot_be_captured_is_timed_as_it_is():
    class Refuses(FakeApi):
        @contextmanager
        def graph(self, graph):
            yield
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    assert gpu.Call(Contender("c", lambda i: i), made_up(Refuses())).note == (
        "it cannot be captured (operation not permitted)"
    )
    without = SimpleNamespace(is_available=lambda: True, get_device_name=lambda: "")
    call = gpu.Call(Contender("c", lambda i: i), made_up(without))
    assert (call.note, call(2)) == ("this device has no graphs", 2)


# --- what is not timed -----------------------------------------------------------------------------------------------


def fails(i):
    raise ValueError("no kernel image")


def case_of(**calls):
    made = [Contender(name, call, peer=not name.startswith("polymoe")) for name, call in calls.items()]

    def error(call):
        return max(abs(call(i) - 1.0) for i in range(4))

    return Case({"case": "made up"}, tuple(made), error, tolerance=0.1, bytes=1e6)


def rows_of(case):
    rows, device = [], made_up(Ticking())
    gpu.run(Bench("made_up", lambda options: iter([case])), given(), device, rows.append)
    return rows


def test_wrong_results_are_not_timed():
    (row,) = rows_of(case_of(torch=lambda i: 1.0, other=lambda i: 1.0 + (i == 3), polymoe=lambda i: 1.0, broken=fails))
    assert row.verdict == "WRONG: other"
    assert row.absent == {"broken": "it raises ValueError: no kernel image"}
    assert [(result.name, isnan(result.seconds), result.samples > 0) for result in row.results] == [
        ("torch", False, True), ("other", True, False), ("polymoe", False, True)
    ]  # fmt: skip
    assert Row.from_json(row.to_json()).ours == row.ours
    assert "| nan |" in report("made_up", rows_of(case_of(torch=lambda i: 1.0, polymoe=lambda i: 2.0)), "a GPU")


def test_polymoe_must_not_fail():
    with pytest.raises(ValueError, match="no kernel image"):
        rows_of(case_of(torch=lambda i: 1.0, polymoe=fails))


# --- every op --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", list(OPS))
def test_every_op_is_measured(op, seed):
    words = ["--tokens", "1", "--backend", "triton", "--contenders", "eager", "F.grouped_mm", "--seed", str(seed)]
    rows = []
    gpu.run(command.bench_of(op), given(*words), made_up(Ticking()), rows.append)
    (row,) = rows
    assert (row.op, row.isa, row.subject, row.verdict) == (op, "interpreter", "polymoe/triton", "-")
    assert row.baseline.peer
    assert all(result.seconds > 0 and result.share > 0 for result in row.results)
    assert (row.peak > 0) == (row.instruction != "") == (op in ("experts", "grouped_mm"))
    assert all(bandwidth > 0 for bandwidth in row.bandwidths)
    assert ("loop" in row.notes) == (op == "grouped_mm")
    assert "a made-up GPU" in report(op, rows, made_up(FakeApi()).name)


@pytest.mark.parametrize("words", [["--device", "cuda", "--quick", "--silent"], ["tune"]], ids=["run", "tune"])
def test_without_a_gpu_it_says_so(words, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="--device cuda: torch sees no such device"):
        command.main(words)
    assert "polymoe" not in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--report", "mine.v2"]], ids=["default", "named"])
def test_a_run_leaves_one_json_and_one_markdown_report(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    device = made_up(Ticking())
    monkeypatch.setattr(gpu, "Gpu", lambda name: device)
    parser = argparse.ArgumentParser()
    add_run_arguments(parser)
    arguments = parser.parse_args(["--device", "cuda", "--quick", "--silent", "--probe-mib", "1", *words])
    cases = {"one": lambda i: 1.0, "other": lambda i: 1.0 + (i == 3)}
    benches = [
        Bench(op, lambda options, call=call: iter([case_of(torch=lambda i: 1.0, polymoe=call)]))
        for op, call in cases.items()
    ]
    assert run(benches, options(arguments), arguments) == 1  # `other` is wrong
    stem = words[1] if words else "benchmarks-cuda"
    assert {file.name for file in tmp_path.iterdir()} == {f"{stem}.json", f"{stem}.md"}
    stored = json.loads((tmp_path / f"{stem}.json").read_text())
    assert stored["machine"] == "a made-up GPU"
    assert [(row["op"], row["verdict"]) for row in stored["rows"]] == [("one", "-"), ("other", "WRONG: polymoe")]
    text = (tmp_path / f"{stem}.md").read_text()
    assert text.count("\n## ") == 2
    assert text.count("polymoe.other: a made-up GPU") == capsys.readouterr().out.count("polymoe.other: a made-up") == 1


# --- the tuner -------------------------------------------------------------------------------------------------------


def test_the_tuner_is_a_command(tmp_path, seed, capsys, monkeypatch):
    """It shares the seconds among the shapes, keeps what it finds, and says how to use it."""
    monkeypatch.setattr(tiles, "_refined", {})
    shapes = {name: replace(SHAPES[name], H=40, I=24, E=3, E_model=3, K=2) for name in ("v4-flash", "gpt-oss-20b")}
    monkeypatch.setattr(tune, "chosen_shapes", lambda given: tuple(shapes.values()))
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    file, ticks = tmp_path / "tiles.json", iter(range(10_000))
    words = ["--tokens", "6", "--dtype", "f32", "--seconds", "80", "--file", str(file), "--seed", str(seed)]
    arguments = parser.parse_args(words)
    arguments.device = "cpu"  # as no user can say; the interpreter's

    def timed(call):
        problems = (tiles.Problem("f32", 12, 3, *size) for size in ((48, 40), (40, 24)))
        return 1.0 / sum(tiles.choose(problem, INTERPRETER).block_m for problem in problems)

    assert tune.main(arguments, timed=timed, clock=lambda: float(next(ticks))) == 0
    choices = json.loads(file.read_text())["choices"]
    assert len(choices) == 2  # both shapes have the same problems
    assert all(choice["tiles"]["block_m"] > 16 for choice in choices)
    said = capsys.readouterr()
    assert f'tuner.load("{file}")' in said.out
    assert "s left" in said.err
    assert next(ticks) < 200


# --- other libraries -------------------------------------------------------------------------------------------------


def glu(x, gate_up, down, weights, ids, shape):
    """Experts by another library, in float64: one token after the other."""
    rows = [
        sum(w * (gated(gate_up[e] @ token, shape) @ down[e].mT) for w, e in zip(ws, es.tolist(), strict=True))
        for token, ws, es in zip(x.double(), weights.double(), ids, strict=True)
    ]
    return torch.stack(rows).to(x.dtype)


def scattermoe(shape):
    class GLUMLP:
        def __init__(self, H, I, E, K):
            assert (H, I, E, K) == (shape.H, shape.I, shape.E, shape.K)
            self.experts, self.output_experts = SimpleNamespace(), SimpleNamespace()

        def __call__(self, x, weights, ids):
            up, gate = self.experts.weight.double().chunk(2, dim=1)
            return glu(x, torch.cat([gate, up], dim=1), self.output_experts.weight.double(), weights, ids, shape)

    return {"scattermoe.mlp": SimpleNamespace(GLUMLP=GLUMLP)}


def liger(shape):
    def apply(x, gate_up, down, ids, weights):
        assert ids.dtype == torch.int32
        return glu(x, gate_up.double(), down.double(), weights, ids, shape)

    return {"liger_kernel.ops.fused_moe": SimpleNamespace(LigerFusedMoEFunction=SimpleNamespace(apply=apply))}


def vllm(shape):
    def fused_experts(hidden_states, w1, w2, topk_weights, topk_ids):
        assert topk_weights.dtype == torch.float32
        return glu(hidden_states, w1.double(), w2.double(), topk_weights, topk_ids, shape)

    return {"vllm.model_executor.layers.fused_moe.fused_moe": SimpleNamespace(fused_experts=fused_experts)}


def moe_ops(shape):
    def permute(x, ids, count, E):
        assert (count, E, ids.dtype) == (0, shape.E, torch.int32)
        order = ids.flatten().argsort(stable=True)
        return x[order // shape.K], order.argsort(), ends_of(ids, E)

    def grouped_gemm(rows, weight, ends):
        experts = torch.searchsorted(ends, torch.arange(len(rows)), right=True)
        return torch.stack([weight[e].double() @ row.double() for e, row in zip(experts, rows, strict=True)])

    def unpermute(y, row_id_map, weights, T, K):
        return (y[row_id_map].view(T, K, -1) * weights[..., None]).sum(1).bfloat16()

    return {"moe_ops": SimpleNamespace(permute=permute, grouped_gemm=grouped_gemm, unpermute=unpermute)}


def triton_kernels(shape):
    def matmul(a, b, bias, a_ragged_metadata, gather_indx=None, scatter_indx=None, fused_activation=None):
        rows = a if gather_indx is None else a[gather_indx]
        experts = torch.searchsorted(a_ragged_metadata, torch.arange(len(rows)), right=True)
        pairs = zip(experts, rows, strict=True)
        out = torch.stack([row.double() @ b[e].double() + bias[e] for e, row in pairs])
        if fused_activation is not None:
            assert fused_activation == ("swiglu", (1.702, shape.limit))
            out = gated(out, shape)
        return out if scatter_indx is None else torch.empty_like(out).index_copy_(0, scatter_indx.long(), out)

    def specs(name, fn, arguments, reduction_n):
        assert (fn, arguments, reduction_n) == ("the activation", ("alpha", "limit"), 2)
        return name

    library = SimpleNamespace(matmul=matmul, FnSpecs=specs, FusedActivation=lambda specs, given: (specs, given))
    return {
        "triton_kernels.matmul": library,
        "triton_kernels.swiglu": SimpleNamespace(swiglu_fn="the activation"),
        "triton_kernels.tensor": SimpleNamespace(make_ragged_tensor_metadata=lambda sizes, S: sizes.cumsum(0)),
    }


def ends_of(ids, E):
    return ids.flatten().bincount(minlength=E).cumsum(0)


# The module of each, its name on the command line, a shape that it can compute, and one that it cannot.
PEERS = [
    (scattermoe, "scattermoe", "v4-flash", "gpt-oss-20b"),
    (liger, "liger", "v4-flash", "gpt-oss-20b"),
    (vllm, "vllm", "v4-flash", "gpt-oss-20b"),
    (moe_ops, "moe-ops", "v4-flash", "gpt-oss-20b"),
    (triton_kernels, "triton_kernels", "gpt-oss-20b", "v4-flash"),
]


@pytest.mark.parametrize(("library", "name", "served", "refused"), PEERS)
def test_other_libraries_are_called_as_they_ask(library, name, served, refused, monkeypatch, seed):
    """Made-up modules that compute what the libraries document."""
    source = inputs.generator(seed)
    shape = replace(SHAPES[served], H=32, I=16, E=4, K=2)
    problem = Problem(shape, "bf16", "sm_90", best_level=False, device="cuda")
    assert "not installed" in contenders.choose(problem, [name])[1][name]
    assert "it runs on cuda" in contenders.choose(replace(problem, device="cpu"), [name])[1][name]
    monkeypatch.setattr(base, "find_spec", lambda name: "found")
    for module, content in library(shape).items():
        monkeypatch.setitem(sys.modules, module, content)
    plugin = {one.name: one for one in contenders.choose(problem, [name])[0]}[name]
    layer, one = make_layer(shape, torch.bfloat16, source), make_set(shape, 5, torch.bfloat16, source)
    prepared = plugin.prepare(layer)
    assert relative_frobenius(prepared.run(prepared.convert(one)), exact(layer, *one)) < 2**-8
    other = replace(problem, shape=SHAPES[refused])
    assert contenders.choose(other, [name])[1][name] == f"no activation {SHAPES[refused].activation}"
