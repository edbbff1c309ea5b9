"""Times that can be compared, and the bounds they are measured against."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice, pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks import (
    _case,
    _timing,
    bench_streams,
    bounds,
)
from benchmarks._timing import Effort, OtherCpuUse, interleave
from benchmarks.memory import peak_memory
from benchmarks.probes import BandwidthProbe, PeakProbe

from polymoe.hal import device


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


def test_a_cold_call_finds_the_caches_emptied_before_every_sample() -> None:
    seen: list[str] = []
    call = _timing.Cold(lambda i: seen.append("call"), lambda: seen.append("evict"))
    (timing,) = interleave([call], 4, Effort(seconds=0.01, min_rounds=5, max_rounds=8))
    runs = "".join("e" if what == "evict" else "c" for what in seen).split("e")
    assert runs[0] == ""
    assert (runs[1], len(runs[2])) == ("c", 3)  # what a call takes, by one and by the other sets
    assert timing.samples == len(runs) - 3 == 8
    assert len(set(runs[3:])) == 1


def test_what_stays_in_the_caches_is_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "last_level_cache", lambda: 2**23)
    calls: list[Any] = [lambda i: None]
    probe = BandwidthProbe(16, threads=1)
    assert _case.cold(calls, 2**25, probe) == (calls, True)
    (one,), streams = _case.cold(calls, 2**25 - 1, probe)
    assert isinstance(one, _timing.Cold)
    assert streams
    monkeypatch.setattr(bounds, "last_level_cache", lambda: 2**23 + 1)
    assert _case.cold(calls, 2**25 - 1, probe) == (calls, False)
    probe.close()


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


def test_streams(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_streams.main(["--threads=1", "--rounds=2", "--probe-mib=16"]) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^\| ([a-z ]+) \| (2 MiB|4 KiB) \| (\S+) \| (\S+) \| (\S+) \|$", out, re.MULTILINE)
    loads = [row[0] for row in rows]
    assert loads[:2] == [bench_streams.VECTORS] * 2
    assert all(float(number) > 0 for row in rows for number in row[2:])
    assert all(row[4] == "1.00" for row in rows[:2])
    if "amx" not in device.isa_supported():
        assert "Absent: tiles" in out
        pytest.skip("this CPU has no AMX: no loads of tiles")
    assert loads[2:] == [bench_streams.TILES] * 2 + [bench_streams.PRODUCTS] * 2


def test_peak_memory_is_that_of_the_call() -> None:
    taken = peak_memory(lambda i: torch.ones(2**24))
    assert taken is None or 0.95 * 2**26 <= taken < 2**27  # the kernel counts pages in batches
