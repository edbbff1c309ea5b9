"""The tuner, with a made-up clock; and that what it may choose gives the same bits."""

import json
from dataclasses import replace

import pytest
import torch

from polymoe.kernels import tiles, tuner
from polymoe.kernels.devices import INTERPRETER, TARGETS
from polymoe.kernels.tiles import Problem, choose, closed_form
from polymoe.testing.cases import Random, routing
from polymoe.testing.tolerances import assert_same_bits

H100 = TARGETS["sm_90"]
PROBLEM = Problem("bf16", S=4096, G=64, N=4096, D=2048)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """What a test makes `choose` return does not outlive it."""
    monkeypatch.setattr(tiles, "_refined", {})


class Clock:
    """Every run takes as long as `seconds` says of the tiles in use, and a compilation beside."""

    def __init__(self, seconds, device=H100, wrong=None):
        self.now, self.seconds, self.device, self.wrong, self.tried = 0.0, seconds, device, wrong, []

    def __call__(self):
        return self.now

    def run(self):
        self.now += 1.0
        chosen = choose(PROBLEM, self.device)
        return torch.tensor([float(self.wrong is not None and self.wrong(chosen))])

    def timed(self, run):
        chosen = choose(PROBLEM, self.device)
        self.tried.append(chosen)
        return self.seconds(chosen)

    def tune(self, deadline=1e6, show=lambda *args: None):
        return tuner.tune(PROBLEM, self.device, self.run, self.timed, deadline, self, show)


def test_it_varies_nothing_that_bits_depend_on():
    for device in (H100, TARGETS["gfx942"], TARGETS["sm_120"]):
        first, *others = tuner.candidates(PROBLEM, device)
        assert first == closed_form(PROBLEM, device)
        assert len(others) > 10
        assert len({first, *others}) == len(others) + 1
        for other in others:
            assert (other.block_n, other.block_k, other.nonkdim) == (first.block_n, first.block_k, first.nonkdim)
            assert all(tuner.allowed(replace(PROBLEM, S=S), device, other) for S in (1, PROBLEM.S, 8192))


def test_the_fastest_is_found():
    best = list(tuner.candidates(PROBLEM, H100))[7]
    seen = []
    clock = Clock(lambda chosen: 0.5 if chosen == best else 1.0)
    assert clock.tune(show=lambda *args: seen.append(args)) == best
    total = len(list(tuner.candidates(PROBLEM, H100)))
    assert [done for done, _, _ in seen] == list(range(1, total + 1))
    assert choose(PROBLEM, H100) == closed_form(PROBLEM, H100)  # until somebody uses it


def test_a_little_faster_is_not_worth_it():
    first = closed_form(PROBLEM, H100)
    assert Clock(lambda chosen: 1.0 if chosen == first else 0.98).tune() == first


def test_it_stops_at_the_deadline():
    clock = Clock(lambda chosen: 1.0)
    clock.tune(deadline=5.0)
    assert clock.now <= 6.0
    assert len(clock.tried) < 8
    late = Clock(lambda chosen: 1.0)
    late.now = 100.0
    assert late.tune(deadline=5.0) == closed_form(PROBLEM, H100)


def test_wrong_results_and_failures_are_no_choice():
    first = closed_form(PROBLEM, H100)

    def seconds(chosen):
        if chosen.stages != first.stages:
            raise RuntimeError("out of resources: shared memory")
        return 1.0 if chosen == first else 0.1 if chosen.block_m != first.block_m else 0.5

    clock = Clock(seconds, wrong=lambda chosen: chosen.block_m != first.block_m)
    best = clock.tune()
    assert best != first
    assert (best.block_m, best.stages) == (first.block_m, first.stages)


# --- the file --------------------------------------------------------------------------------------------------------


def test_a_file_is_for_a_device_and_shapes(tmp_path):
    file = tmp_path / "tiles.json"
    one, other = list(tuner.candidates(PROBLEM, H100))[3:5]
    tuner.save(file, H100, {PROBLEM: one})
    tuner.save(file, H100, {PROBLEM: other, replace(PROBLEM, D=4096): one})
    assert tuner.load(file, TARGETS["sm_100"]) == 0
    assert tuner.load(file, replace(H100, units=114)) == 0
    assert choose(PROBLEM, H100) == closed_form(PROBLEM, H100)
    assert tuner.load(file, H100) == 2
    assert choose(PROBLEM, H100) == other
    assert choose(replace(PROBLEM, S=2049), H100) == other
    assert choose(replace(PROBLEM, S=2048), H100) == closed_form(replace(PROBLEM, S=2048), H100)
    assert choose(PROBLEM, H100, widest=64).block_n == 64


def test_what_is_no_candidate_is_left_out(tmp_path):
    file = tmp_path / "tiles.json"
    tuner.save(file, H100, {PROBLEM: replace(closed_form(PROBLEM, H100), block_k=32)})
    with pytest.warns(UserWarning, match="no choice for Problem"):
        assert tuner.load(file, H100) == 0
    file.write_text(json.dumps({"version": 0}))
    with pytest.raises(ValueError, match="expected version 1, got 0"):
        tuner.load(file, H100)


# --- the whole -------------------------------------------------------------------------------------------------------


def test_experts_are_tuned(tmp_path, seed, capsys):
    """The made-up clock likes tall tiles; bits stay as they were."""
    random, T, K, E, H, I = Random(seed), 6, 2, 3, 40, 24
    gate_up, down = random.matrix(E, 2 * I, H, dtype=torch.float32), random.matrix(E, H, I, dtype=torch.float32)
    x, weights = random.normal(T, H), random.weights(T, K)
    ids = routing(random, "distinct", T, K, E)
    problems = [Problem("f32", T * K, E, N, D) for N, D in ((2 * I, H), (H, I))]

    def layer():
        from polymoe.kernels.experts import experts

        return experts(x, gate_up, down, weights, ids)[0]

    def timed(run):
        return 1.0 / sum(choose(problem, INTERPRETER).block_m for problem in problems)

    before, ticks = layer(), iter(range(1000))
    file = tmp_path / "tiles.json"
    changed = tuner.tune_experts(gate_up, down, K, (T,), file, 40.0, timed=timed, clock=lambda: float(next(ticks)))
    assert changed == 2
    assert all(choose(problem, INTERPRETER).block_m > 16 for problem in problems)
    assert_same_bits(layer(), before, "tuned")
    assert "s left" in capsys.readouterr().err
    tiles._refined.clear()
    assert tuner.load(file) == 2
    assert all(choose(problem, INTERPRETER).block_m > 16 for problem in problems)
