"""`polymoe info`: what polymoe finds on this machine and what serves each op here. `polymoe quantize`: checkpoints."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterator

import torch

import polymoe
from polymoe.backends._extension import extension
from polymoe.checkpoint import CheckpointError, quantize
from polymoe.checkpoint.quantize import FORMATS
from polymoe.hal import device, registry
from polymoe.hal.explain import properties
from polymoe.hal.problem import OPS, Backend
from polymoe.hal.select import declined


def info() -> str:
    lines = [
        f"polymoe {polymoe.__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        f"device types: {', '.join(_device_types())}",
        *_cpu(),
        "backends, in order of preference:",
    ]
    for backend in registry.all_backends():
        promises = ", ".join(properties(backend)) or "neither deterministic nor batch-invariant"
        lines.append(f"  {backend.name} ({promises})")
        lines += [f"    {line}" for line in _service(backend)]
    return "\n".join(lines)


def _device_types() -> list[str]:
    accelerator = torch.accelerator.current_accelerator()
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def _cpu() -> Iterator[str]:
    if extension is None:
        yield f"torch threads: {torch.get_num_threads()}"
        return
    yield f"threads: {device.num_threads()}"
    caches = extension.cache_sizes()
    yield "caches: " + ", ".join(f"{name} {size >> 10} KiB" for name, size in caches.items())
    yield "ISA levels of the cpu backend:"
    active = device.isa_level()
    for level in device.isa_levels():
        missing = extension.isa_missing(level)
        state = "active" if level == active else "not supported" if missing else "supported"
        flags = ", ".join(device.isa_flags(level)) or "no CPUID flags"
        yield f"  {level}: {state}; " + (f"this machine lacks {', '.join(missing)}" if missing else f"uses {flags}")


def _service(backend: Backend) -> Iterator[str]:
    """Per device type: which ops the backend serves, and why not the others."""
    for device_type in _device_types():
        served, reasons = [], dict[str, list[str]]()
        for op in OPS.values():
            dtype = torch.int32 if op.name == "plan" else torch.float32
            reason = declined(backend, op.problem(device_type, dtype))
            if reason is None:
                served.append(op.name)
            else:
                reasons.setdefault(reason, []).append(op.name)
        if served:
            yield f"{device_type}: serves {', '.join(served)}"
        for reason, ops in reasons.items():
            yield f"{device_type}: cannot serve {'any op' if len(ops) == len(OPS) else ', '.join(ops)}: {reason}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="polymoe", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print device, ISA levels, threads, caches and backends")
    quantizing = commands.add_parser(
        "quantize",
        help="rewrite a checkpoint with quantised experts",
        description="Rewrites a dense Mixture-of-Experts checkpoint with its experts quantised, shard by shard. "
        "A run that was broken off goes on when it is repeated. Nothing is overwritten.",
    )
    quantizing.add_argument("source", metavar="IN", help="folder with config.json and safetensors")
    quantizing.add_argument("target", metavar="OUT", help="new folder")
    quantizing.add_argument("--format", required=True, choices=tuple(FORMATS), help="of the experts' weights")
    arguments = parser.parse_args()
    if arguments.command == "info":
        print(info())
        return
    try:
        quantize(arguments.source, arguments.target, arguments.format)
    except CheckpointError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
