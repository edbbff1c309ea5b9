"""kt-kernel, the CPU experts of KTransformers: its bf16 MoE for AVX-512 with BF16. Its worker threads spin while they
wait, so it is isolated. It is given the plain weights, and packs a copy."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders.base import Plugin, Prepared, Problem, limited, not_installed, only
from benchmarks.layer import InputSet, Layer
from benchmarks.models import Shape

MOST_TOKENS = 16384


class KtKernel(Plugin):
    name = "kt-kernel"
    isolated = True
    copies = 2

    def declined(self, problem: Problem) -> str | None:
        return (
            not_installed("kt_kernel")
            or limited(problem)
            or only("dtype", problem.dtype, ("bf16",))
            or only("level", problem.level, ("avx512_bf16", "amx"))
            or only("activation", problem.shape.activation, ("swiglu", "swiglu_clamped"))
        )

    def prepare(self, layer: Layer) -> Prepared:
        gate, up = (half.contiguous() for half in layer.gate_up.chunk(2, dim=1))

        def configure(config: Any) -> None:
            for name, weight in (("gate", gate), ("up", up), ("down", layer.down)):
                setattr(config, f"{name}_projs", [[expert.data_ptr() for expert in weight]])
                setattr(config, f"{name}_scales", [[0] * len(weight)])

        return prepared(layer.shape, "AMXBF16_MOE", configure)


def prepared(shape: Shape, kernel: str, configure: Callable[[Any], None]) -> Prepared:
    """The library's MoE of that name. `configure` tells its configuration where the weights are, of which it packs a
    copy."""
    kt = import_module("kt_kernel").kt_kernel_ext

    pools = kt.WorkerPoolConfig()
    pools.subpool_count, pools.subpool_numa_map = 1, [0]
    pools.subpool_thread_count = [torch.get_num_threads()]
    cpu = kt.CPUInfer(pools)
    on_gpu = torch.zeros(shape.E, dtype=torch.bool)
    config = kt.moe.MOEConfig(shape.E, shape.K, shape.H, shape.I, on_gpu.data_ptr())
    config.layer_idx, config.pool, config.max_len = 0, cpu.backend_, MOST_TOKENS
    configure(config)
    moe = getattr(kt.moe, kernel)(config)
    order = torch.arange(shape.E)
    cpu.submit(moe.load_weights_task(order.data_ptr()))
    cpu.sync()
    return Prepared(lambda inputs: _run(cpu, moe, on_gpu, inputs), _converted)


def _converted(inputs: InputSet) -> InputSet:
    x, weights, ids = inputs
    return x.contiguous(), weights.float().contiguous(), ids.contiguous()


def _run(cpu: Any, moe: Any, on_gpu: Tensor, inputs: InputSet) -> Tensor:
    """`on_gpu` comes along because the library holds its address."""
    x, weights, ids = inputs
    out, (T, K) = torch.empty_like(x), ids.shape
    count = torch.tensor([T], dtype=torch.int32)
    addresses = (count.data_ptr(), K, ids.data_ptr(), weights.data_ptr(), x.data_ptr(), out.data_ptr())
    cpu.submit(moe.forward_task(*addresses, False))
    cpu.sync()
    return out
