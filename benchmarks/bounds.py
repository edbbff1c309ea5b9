"""The bound: no call can be faster than its bytes take to read, nor than its operations take to compute.

The bandwidth is that of our own probe, run in every round between the contenders, since that of shared machines drifts;
so is the peak of the instruction that the kernels of this ISA level and dtype multiply with.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from polymoe.hal import device

VOID_ABOVE = 1.03  # a contender this far above its bound shows that a probe was too slow, or that data stayed in cache
CACHE_TIMES = 4  # inputs that take turns must exceed the last-level cache so many times, or nothing streams from memory
EVICT_TIMES = 2  # of the last-level cache, read one after the other, leave nothing else in it

INSTRUCTIONS = {
    "portable": "mul_add_sse",
    "avx2": "fma_avx2",
    "avx512": "fma_avx512",
    "avx512_bf16": "fma_avx512",
    "amx": "fma_avx512",
}
BF16_INSTRUCTIONS = {"avx512_bf16": "vdpbf16ps", "amx": "tdpbf16ps"}


def instruction(level: str, dtype: str) -> str:
    """What the fastest kernels of a level multiply with: bf16 pairs where the CPU has them, else f32."""
    if dtype == "bf16" and level in BF16_INSTRUCTIONS:
        return BF16_INSTRUCTIONS[level]
    return INSTRUCTIONS[level if level in INSTRUCTIONS else device.isa_supported()[-1]]


def bound(bytes_: float, flops: float, bandwidth: float, peak: float) -> float:
    """Seconds that a call takes at least. A peak of 0 means that only the bytes count."""
    return max(bytes_ / bandwidth, flops / peak if peak else 0.0)


def share(
    seconds: Sequence[float], bytes_: float, flops: float, bandwidths: Sequence[float], peaks: Sequence[float]
) -> float:
    """Bound over time: the median over rounds, each with its own bandwidth and peak."""
    return statistics.median(
        bound(bytes_, flops, bandwidth, peak) / s for s, bandwidth, peak in zip(seconds, bandwidths, peaks, strict=True)
    )


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core; 32 MiB where the system does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text.rstrip("KM")) << {"K": 10, "M": 20}.get(text[-1], 0))
    return max(sizes, default=32 << 20)


def evicts(read: int) -> bool:
    """Whether reading so many bytes leaves nothing else in the caches."""
    return read >= EVICT_TIMES * last_level_cache()


def streams(footprint: float) -> bool:
    """Whether inputs of so many bytes, all sets together, come from memory in every call."""
    return footprint >= CACHE_TIMES * last_level_cache()
