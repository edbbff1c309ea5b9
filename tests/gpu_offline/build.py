"""Compiles kernels in parallel processes, with a progress bar, and keeps what was found by the hash of all that could
change it."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from tests.gpu_offline import assembly
from tests.gpu_offline.assembly import Facts
from tests.gpu_offline.launches import Launch
from triton.runtime.jit import JITFunction

# Where in its file a kernel stands changes nothing in what it is compiled to, so it may not be a part of its key.
JITFunction.starting_line_number = property(lambda kernel: 0, lambda kernel, line: None)

CACHE = Path("build/gpu-check")
_analysis = hashlib.sha256(Path(assembly.__file__).read_bytes()).hexdigest()


@dataclass
class Built:
    """Facts of a kernel, or the error of its compilation; seconds it took."""

    facts: Facts | None
    error: str
    seconds: float


def _file(launch: Launch) -> Path:
    parts = (triton.__version__, _analysis, launch.key, launch.kernel.cache_key)
    return CACHE / f"{hashlib.sha256(repr(parts).encode()).hexdigest()}.json"


def _read(launch: Launch) -> Built | None:
    path = _file(launch)
    if not path.exists():
        return None
    stored = json.loads(path.read_text())
    return Built(Facts(**stored["facts"]) if stored["facts"] else None, stored["error"], stored["seconds"])


def _build(launch: Launch) -> Built:
    started = time.perf_counter()
    try:
        facts, error = assembly.facts(launch.compile()), ""
    except Exception as failure:  # the compiler's own message is the innermost
        while failure.__cause__ is not None and isinstance(failure.__cause__, Exception):
            failure = failure.__cause__
        facts, error = None, f"{type(failure).__name__}: {failure}"
    built = Built(facts, error, time.perf_counter() - started)
    stored = {"facts": asdict(facts) if facts else None, "error": error, "seconds": built.seconds}
    path = _file(launch)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(stored))
    partial.replace(path)
    return built


_todo: list[Launch] = []  # for the worker processes, which are forked: a launch cannot be pickled


def _work(index: int) -> tuple[int, Built]:
    return index, _build(_todo[index])


def build(launches: Sequence[Launch], jobs: int, seconds: float) -> dict[str, Built]:
    """By key, of all launches of different keys; those for which the seconds did not suffice are missing."""
    distinct = {launch.key: launch for launch in launches}
    CACHE.mkdir(parents=True, exist_ok=True)
    built = {key: stored for key, launch in distinct.items() if (stored := _read(launch)) is not None}
    # Those that take long come first, so that the processes end together.
    todo = [launch for key, launch in distinct.items() if key not in built]
    _todo[:] = sorted(todo, key=lambda launch: "BLOCK_K" not in launch.constexprs)
    known = len(built)
    os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE.resolve() / "triton"))
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "0")
    started = time.perf_counter()
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for index, result in pool.imap_unordered(_work, range(len(_todo))):
            built[_todo[index].key] = result
            _show(len(built), len(distinct), known, time.perf_counter() - started)
            if time.perf_counter() - started > seconds:
                pool.terminate()
                break
    print(file=sys.stderr)
    return built


def _show(done: int, total: int, known: int, elapsed: float) -> None:
    left = elapsed / max(done - known, 1) * (total - done)
    bar = "#" * (40 * done // total)
    end = "\r" if sys.stderr.isatty() else "\n" if done % 50 == 0 or done == total else ""
    if end:
        print(
            f"[{bar:40}] {done} of {total} kernels, {known} known before, {left:.0f} s left ", end=end, file=sys.stderr
        )
