"""A contender in a process of its own, which is stopped while it is not its turn.

Thread pools that spin while they wait would take the CPU from every other contender. The worker makes the same weights
from the same seed, takes its input sets from a file, and measures its own time: the way there and back does not count.

    python -m benchmarks.contenders.isolated '{"contender": ..., "shape": ..., ...}'
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import torch
from torch import Tensor

from benchmarks import inputs
from benchmarks._timing import LONG_CALL_SECONDS
from benchmarks.contenders.base import Prepared
from benchmarks.layer import InputSet, make_layer
from benchmarks.memory import peak_memory, resident
from benchmarks.models import Shape

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
ROOT = Path(__file__).parent.parent.parent


class WorkerFailed(RuntimeError):
    """The process of a contender ended."""


class Worker:
    """The parent's side. A context manager: the process ends with it."""

    def __init__(self, contender: str, shape: Shape, dtype: str, seed: int, threads: int) -> None:
        config = {"contender": contender, "shape": asdict(shape), "dtype": dtype, "seed": seed, "threads": threads}
        self._name = contender
        self._folder = tempfile.TemporaryDirectory(prefix="polymoe-bench-")
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(config)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )
        self.held: int = self._answer()["held"]

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.send_signal(signal.SIGCONT)
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()

    def take(self, sets: list[InputSet]) -> None:
        path = Path(self._folder.name) / "sets.pt"
        torch.save(sets, path)
        self._ask(take=str(path))

    def __call__(self, i: int) -> Tensor:
        path = Path(self._folder.name) / "output.pt"
        self._ask(output=i, path=str(path))
        out: Tensor = torch.load(path)
        return out

    def seconds(self, first: int, repeats: int, sets: int) -> float:
        return float(self._ask(first=first, repeats=repeats, sets=sets)["seconds"])

    def peak(self) -> int | None:
        return self._ask(peak=True)["peak"]

    def _ask(self, **request: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerFailed(f"benchmarks: the process of {self._name} ended") from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries print, too
                self._process.send_signal(signal.SIGSTOP)
                os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)  # it stands still a little later
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise WorkerFailed(f"benchmarks: the process of {self._name} ended with status {self._process.wait()}")


def serve(config: dict[str, Any]) -> None:
    """The worker's side: a line of JSON for every line of JSON."""
    from benchmarks.contenders import plugins
    from benchmarks.contenders.quantized import QUANTIZED

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # stopped, it would not notice that its parent is gone
    torch.set_num_threads(config["threads"])
    shape = Shape(**config["shape"] | {"groups": None})
    layer = make_layer(shape, inputs.DTYPES[config["dtype"]], inputs.generator(config["seed"]))
    before = resident()
    prepared = (plugins() | QUANTIZED)[config["contender"]].prepare(layer)
    _say(held=max(0, resident() - before))
    del layer  # what the contender has not taken over
    sets: list[InputSet] = []
    brief = True
    for line in sys.stdin:
        request = json.loads(line)
        if "take" in request:
            sets = [prepared.convert(one) for one in torch.load(request["take"])]
            _say(taken=len(sets))
        elif "output" in request:
            torch.save(prepared.run(sets[request["output"]]), request["path"])
            _say(saved=True)
        elif "peak" in request:
            _say(peak=peak_memory(partial(_run_set, prepared, sets)))
        else:
            if brief:  # then it matters that the threads are awake
                prepared.run(sets[request["first"] % request["sets"] - 1])
            start = perf_counter_ns()
            for i in range(request["first"], request["first"] + request["repeats"]):
                prepared.run(sets[i % request["sets"]])
            seconds = (perf_counter_ns() - start) * 1e-9 / request["repeats"]
            brief = seconds < LONG_CALL_SECONDS
            _say(seconds=seconds)


def _run_set(prepared: Prepared, sets: list[InputSet], i: int) -> Tensor:
    return prepared.run(sets[i])


def _say(**answer: object) -> None:
    print("\n" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        serve(json.loads(sys.argv[1]))
