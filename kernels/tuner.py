"""An optional tuner of the matrix products: it times, on the device at hand, what `tiles.choose` may choose without any
result changing its bits, and keeps what is faster.

    from polymoe.kernels import tuner
    tuner.tune_experts(gate_up, down, K=8, tokens=(1, 64, 4096), file="tiles.json", seconds=60)   # once
    tuner.load("tiles.json")                                                                     # in later processes

Nothing needs it. What the bits of a result depend on (BLOCK_N, BLOCK_K, the instruction) is never varied, and every
choice is compared with the closed form's results, to the bit, before it is timed.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polymoe.kernels.devices import Device, current
from polymoe.kernels.operands import arithmetic
from polymoe.kernels.tiles import (
    Problem,
    Tiles,
    bucket,
    closed_form,
    most_registers,
    refine,
    refined,
    rule,
    stages_that_fit,
)

VERSION = 1
BANDS = (1, 2, 4, 8, 16)
TRIED_BANDS = BANDS[::2]
WORTH = 0.97  # a choice must take at most this share of the closed form's time
REPEATS = 10

Run = Callable[[], Tensor]


def candidates(problem: Problem, device: Device) -> Iterator[Tiles]:
    """The closed form's choice, then others that give the same bits."""
    first = closed_form(problem, device)
    yield first
    for height in sorted(rule(device.family, problem.arithmetic).warps):
        most = stages_that_fit(problem, device, height, first.block_n)
        for stages in range(most, max(0, most - 3), -1):
            for persistent in (True, False) if first.descriptors else (False,):
                for band in TRIED_BANDS:
                    other = _variant(problem, device, height, stages, persistent, band)
                    if other != first:
                        yield other


def _variant(problem: Problem, device: Device, height: int, stages: int, persistent: bool, band: int) -> Tiles:
    return replace(
        closed_form(problem, device),
        block_m=height,
        warps=rule(device.family, problem.arithmetic).warps[height],
        stages=stages,
        persistent=persistent,
        band=band,
        registers=most_registers(problem, device, persistent),
    )


def allowed(problem: Problem, device: Device, tiles: Tiles) -> bool:
    """Whether these tiles run, and give the bits of the closed form's, as far as one can know without a run."""
    return (
        tiles.block_m in rule(device.family, problem.arithmetic).warps
        and 1 <= tiles.stages <= stages_that_fit(problem, device, tiles.block_m, tiles.block_n)
        and tiles.band in BANDS
        and (tiles.descriptors or not tiles.persistent)
        and tiles == _variant(problem, device, tiles.block_m, tiles.stages, tiles.persistent, tiles.band)
    )


def tune(
    problem: Problem,
    device: Device,
    run: Run,
    timed: Callable[[Run], float],
    deadline: float,
    clock: Callable[[], float] = time.monotonic,
    show: Callable[[int, int, float], None] = lambda done, total, left: None,
) -> Tiles:
    """Times `run`, whose matrix products include `problem`, with one choice after the other until the clock reads
    `deadline`, and returns the fastest. `timed` gives the seconds of a run; `show` gets what is done, of how much, and
    the seconds left."""
    choices = list(candidates(problem, device))
    best, expected = choices[0], run()
    best_seconds = limit = math.inf
    for done, tiles in enumerate(choices):
        if done > 0 and clock() >= deadline:
            break
        seconds = _seconds(problem, device, tiles, run, timed, expected)
        if done == 0:
            best_seconds, limit = seconds, WORTH * seconds
        elif seconds < min(best_seconds, limit):
            best, best_seconds = tiles, seconds
        show(done + 1, len(choices), max(0.0, deadline - clock()))
    return best


def _seconds(
    problem: Problem, device: Device, tiles: Tiles, run: Run, timed: Callable[[Run], float], expected: Tensor
) -> float:
    """Infinite where a choice does not compile, does not fit, or changes a bit of the result."""
    with refined(problem, device, tiles):
        try:
            got = run()
            return timed(run) if torch.equal(got, expected) else math.inf
        except Exception:  # whatever the compiler or the driver says: then it is no choice
            return math.inf


def tune_experts(
    gate_up: Tensor,
    down: Tensor,
    K: int,
    tokens: Sequence[int],
    file: str | Path,
    seconds: float = 60.0,
    activation: str = "swiglu",
    timed: Callable[[Run], float] | None = None,
    clock: Callable[[], float] = time.monotonic,
    **options: Any,
) -> int:
    """Tunes both products of polymoe.experts for these weights and numbers of tokens, uses what it found from now on,
    and adds it to a file. The seconds are shared evenly, what is not used goes to those that follow. Returns how many
    choices differ from the closed form's. options: of polymoe.experts."""
    from polymoe.kernels.experts import experts

    transposed = bool(options.get("transposed", False))
    E, H, I = (down.mT if transposed else down).shape
    P, device = gate_up.shape[2 if transposed else 1], current(down.device)
    weights_of = [weight if transposed else weight.mT for weight in (gate_up, down)]
    todo = [(T, product) for T in tokens for product in (0, 1)]
    end, differing, found = clock() + seconds, 0, {}
    for done, (T, product) in enumerate(todo):
        x = torch.randn(T, H, device=down.device).to(down.dtype)
        ids = torch.rand(T, E, device=down.device).argsort(dim=1)[:, :K].int()
        weights = torch.rand(T, K, device=down.device)

        def run(x: Tensor = x, weights: Tensor = weights, ids: Tensor = ids) -> Tensor:
            return experts(x, gate_up, down, weights, ids, activation, **options)[0]

        N, D = (P, H) if product == 0 else (H, I)
        problem = Problem(arithmetic(x, weights_of[product], device), T * K, E, N, D)
        share = clock() + (end - clock()) / (len(todo) - done)
        best = tune(problem, device, run, timed or on_device(down.device), share, clock, _bar(f"{T} tokens, N {N}"))
        differing += best != closed_form(problem, device)
        refine(problem, device, best)
        found[problem] = best
    save(file, device, found)
    return differing


def on_device(device: torch.device) -> Callable[[Run], float]:
    """Seconds of a run by the device's events."""
    api = torch.get_device_module(device)

    def timed(run: Run) -> float:
        start, end = (api.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPEATS):
            run()
        end.record()
        api.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / REPEATS

    return timed


def _bar(what: str) -> Callable[[int, int, float], None]:
    def show(done: int, total: int, left: float) -> None:
        bar = "#" * (30 * done // total)
        end = "\n" if done == total or not sys.stderr.isatty() else "\r"
        print(f"[{bar:30}] {what}: {done} of {total}, {left:.0f} s left", end=end, file=sys.stderr, flush=True)

    return show


def _device_key(device: Device) -> dict[str, Any]:
    return asdict(device)


def save(file: str | Path, device: Device, found: dict[Problem, Tiles]) -> None:
    """Adds choices to a file, in place of older ones for the same device and shapes."""
    path = Path(file)
    key = _device_key(device)
    entries = _entries(path) if path.exists() else []
    new = [{"device": key, "problem": _bucketed(problem), "tiles": asdict(tiles)} for problem, tiles in found.items()]
    replaced = [(entry["device"], entry["problem"]) for entry in new]
    kept = [entry for entry in entries if (entry["device"], entry["problem"]) not in replaced]
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"version": VERSION, "choices": kept + new}, indent=1) + "\n")
    partial.replace(path)


def _bucketed(problem: Problem) -> dict[str, Any]:
    return asdict(replace(problem, S=bucket(problem.S)))


def _entries(path: Path) -> list[dict[str, Any]]:
    stored = json.loads(path.read_text())
    if stored.get("version") != VERSION:
        raise ValueError(f"polymoe.kernels.tuner: {path}: expected version {VERSION}, got {stored.get('version')}")
    entries: list[dict[str, Any]] = stored["choices"]
    return entries


def load(file: str | Path, device: Device | None = None) -> int:
    """Uses the choices of a file for the device at hand from now on, and returns how many. A choice that is not
    allowed here (one of another version, say) is left out with a warning."""
    device = current(torch.device(torch.accelerator.current_accelerator() or "cpu")) if device is None else device
    used = 0
    for entry in _entries(Path(file)):
        if entry["device"] == _device_key(device):
            problem, tiles = Problem(**entry["problem"]), Tiles(**entry["tiles"])
            if not allowed(problem, device, tiles):
                warnings.warn(f"polymoe.kernels.tuner: {file}: no choice for {problem}: {tiles}", stacklevel=2)
                continue
            refine(problem, device, tiles)
            used += 1
    return used
