"""What the machine can do at most: read bandwidth and instruction peaks, by benchmarks/native/probes.cpp.

The C++ is compiled on first use, by the compiler that builds polymoe, into build/benchmarks. It runs on torch's own
threads, as the kernels do.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).parent / "native" / "probes.cpp"
BUILD = Path(__file__).parent.parent / "build" / "benchmarks"
FLAGS = ["-O3", "-std=c++17", "-Wall", "-Wextra", "-shared", "-fPIC", "-fopenmp"]

STREAMS = (1, 4, 8)
PREFETCH = (0, 2048, 8192)  # bytes ahead; 0 for none
STEPS = 100_000  # of an instruction probe: one to two milliseconds


@cache
def library() -> ctypes.CDLL:
    """The compiled probes. RuntimeError if they do not compile."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    identity = hashlib.sha256(SOURCE.read_bytes() + repr((compiler, FLAGS)).encode()).hexdigest()[:16]
    path = BUILD / f"probes-{identity}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        done = subprocess.run([*compiler, *FLAGS, str(SOURCE), "-o", str(partial)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(
                f"benchmarks: {SOURCE.name} does not compile with {shlex.join(compiler)}:\n{done.stderr}"
            )
        partial.replace(path)
    probes = ctypes.CDLL(str(path))
    size, number = ctypes.c_size_t, ctypes.c_int
    probes.polymoe_probe_allocate.argtypes = [size, number, number]
    probes.polymoe_probe_allocate.restype = ctypes.c_void_p
    probes.polymoe_probe_free.argtypes = [ctypes.c_void_p, size]
    probes.polymoe_probe_free.restype = None
    probes.polymoe_probe_read.argtypes = [ctypes.c_void_p, size, number, number, size]
    probes.polymoe_probe_read.restype = ctypes.c_double
    probes.polymoe_probe_read_tiles.argtypes = [ctypes.c_void_p, size, number, number]
    probes.polymoe_probe_read_tiles.restype = ctypes.c_double
    probes.polymoe_probe_compute.argtypes = [ctypes.c_char_p, ctypes.c_int64, number]
    probes.polymoe_probe_compute.restype = ctypes.c_double
    return probes


@dataclass(frozen=True)
class Variant:
    """A way to read memory: pages of 2 MiB or of 4 KiB, streams side by side in every thread, prefetch distance."""

    huge_pages: bool
    streams: int
    prefetch: int


class BandwidthProbe:
    """Reads a buffer that no cache holds, in bytes per second. `survey()` tries every variant and keeps the best, which
    a call then uses."""

    def __init__(self, mebibytes: int = 1024, threads: int | None = None) -> None:
        self.threads = threads or torch.get_num_threads()
        self.bytes = mebibytes * 2**20
        self._buffers = {huge: self._allocate(huge) for huge in (True, False)}
        self.variant = Variant(True, 8, 2048)

    def _allocate(self, huge_pages: bool) -> int:
        buffer: int | None = library().polymoe_probe_allocate(self.bytes, huge_pages, self.threads)
        if buffer is None:
            raise MemoryError(f"benchmarks: no memory for a bandwidth probe of {self.bytes >> 20} MiB")
        return buffer

    def close(self) -> None:
        for buffer in self._buffers.values():
            library().polymoe_probe_free(buffer, self.bytes)
        self._buffers.clear()

    def survey(self) -> float:
        self.variant, rate = max((self.best(huge_pages) for huge_pages in self._buffers), key=lambda found: found[1])
        return rate

    def best(self, huge_pages: bool) -> tuple[Variant, float]:
        """Of all variants with such pages, and its bytes per second."""
        rates = {
            variant: self.read(variant) for variant in (Variant(huge_pages, s, p) for s in STREAMS for p in PREFETCH)
        }
        found = max(rates, key=rates.__getitem__)
        return found, rates[found]

    def read_tiles(self, huge_pages: bool, multiply: bool) -> float | None:
        """Bytes per second by matrix tiles, as the kernel for 16 rows reads packed bf16 weights, with its products or
        without. None where this CPU lacks them."""
        buffer = self._buffers[huge_pages]
        rate = float(library().polymoe_probe_read_tiles(buffer, self.bytes, self.threads, multiply))
        return rate if rate > 0 else None

    def __call__(self) -> float:
        return self.read(self.variant)

    def read(self, variant: Variant) -> float:
        buffer = self._buffers[variant.huge_pages]
        return library().polymoe_probe_read(buffer, self.bytes, self.threads, variant.streams, variant.prefetch)


@dataclass(frozen=True)
class PeakProbe:
    """Operations per second of one instruction, over all threads; a product and a sum are two."""

    instruction: str
    threads: int

    def __call__(self) -> float:
        rate = library().polymoe_probe_compute(self.instruction.encode(), STEPS, self.threads)
        if rate < 0:
            raise ValueError(f"benchmarks: this CPU lacks the instruction {self.instruction}")
        return rate
