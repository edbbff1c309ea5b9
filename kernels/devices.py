"""What the choice of tiles knows of a device. Facts about chips come from their vendors' public documents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Device:
    """family    the name of the compile target, or "interpreter"
    units     streaming multiprocessors or compute units, each of which runs at least one program at a time
    shared    bytes of shared memory (LDS) that one program may use
    chiplets  dies with an L2 cache of their own, over which the hardware deals programs in turn
    """

    family: str
    units: int
    shared: int
    chiplets: int = 1

    @property
    def descriptors(self) -> bool:
        """Whether tensor descriptors become bulk copies (TMA)."""
        return self.family in DESCRIPTOR_FAMILIES


DESCRIPTOR_FAMILIES = ("sm_90", "sm_100", "sm_120", "interpreter")
KiB = 1024

# One device for every compile target; `current` puts the numbers of the device at hand in their place.
TARGETS = {
    device.family: device
    for device in (
        Device("sm_80", units=108, shared=163 * KiB),  # A100
        Device("sm_90", units=132, shared=227 * KiB),  # H100, H200
        Device("sm_100", units=148, shared=227 * KiB),  # B200
        Device("sm_120", units=188, shared=99 * KiB),  # RTX PRO 6000
        Device("gfx942", units=304, shared=64 * KiB, chiplets=8),  # MI300X
        Device("gfx950", units=256, shared=160 * KiB, chiplets=8),  # MI355X
        Device("gfx1100", units=48, shared=64 * KiB),  # Radeon RX 7900 XTX: 48 work-group processors
        Device("gfx1200", units=16, shared=64 * KiB),  # Radeon RX 9060 XT: 16 work-group processors
    )
}
# Triton's interpreter runs programs one by one, slowly, on blocks of any size. It has two units here, so that small
# tests come by the persistent schedule too.
INTERPRETER = Device("interpreter", units=2, shared=1 << 40)
# A GPU of a kind that is not in the table: small tiles, plain pointers.
OTHER = Device("other", units=64, shared=48 * KiB)

_pretended: Device | None = None


@contextmanager
def pretend(device: Device) -> Iterator[None]:
    """Inside, `current` returns `device`: for compiling ahead of time, and for tests."""
    global _pretended
    before, _pretended = _pretended, device
    try:
        yield
    finally:
        _pretended = before


def current(device: torch.device) -> Device:
    """The facts about the device that a kernel is about to run on."""
    if _pretended is not None:
        return _pretended
    if device.type == "cpu":
        return INTERPRETER
    return _probe(device.type, device.index)


@cache
def _probe(kind: str, index: int | None) -> Device:
    if kind != "cuda":
        return OTHER
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is None:
        family = _nvidia_family(properties.major)
        shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # since torch 2.7, not in its stubs
    else:
        family = _amd_family(properties.gcnArchName.split(":")[0])
        shared = TARGETS[family].shared if family in TARGETS else OTHER.shared
    chiplets = TARGETS[family].chiplets if family in TARGETS else 1
    return Device(family, properties.multi_processor_count, shared, chiplets)


def _nvidia_family(major: int) -> str:
    """8.0, 8.6 and 8.9 share their matrix instructions, as do 10.0 and 10.3, and 12.0 and 12.1."""
    return {8: "sm_80", 9: "sm_90", 10: "sm_100", 12: "sm_120"}.get(major, OTHER.family)


def _amd_family(architecture: str) -> str:
    """gfx1101 to 1103 are smaller gfx1100, gfx1201 is a larger gfx1200; gfx940 and 941 were early gfx942."""
    if architecture in TARGETS:
        return architecture
    return {"gfx110": "gfx1100", "gfx120": "gfx1200", "gfx94": "gfx942"}.get(architecture[:-1], OTHER.family)
