"""Random expert weights for the demo, in bf16 and quantised, at the speed of memcpy.

Every matrix [N, D] is put together from pieces of one pool of normal numbers. Pieces begin at whole blocks of 128 rows,
so quantising the pool once, as a matrix [.., D], quantises every piece of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from polymoe.formats import Weight, parse

FORMATS = {"fp8": "fp8_block128", "mxfp4": "mxfp4"}
ROWS = 128  # of a block
PIECE_ROWS = 1024
POOL = 1 << 24  # numbers


class Pool:
    """Numbers of standard deviation `scale`, and where the pieces of each matrix came from."""

    def __init__(self, scale: float, generator: torch.Generator) -> None:
        self.generator = generator
        self.numbers = torch.randn(POOL, generator=generator).mul_(scale).to(torch.bfloat16)
        self.begins: dict[int, list[int]] = {}  # by the address of a weight: rows of the pool
        self.pools: dict[tuple[int, str], Weight] = {}

    def weight(self, shape: torch.Size) -> nn.Parameter:
        """[E, N, D] in bf16; no two experts are alike."""
        weight = torch.empty(shape, dtype=torch.bfloat16)
        pool, rows = self._as_matrix(shape[-1]), weight.view(-1, shape[-1])
        last = (len(pool) - PIECE_ROWS) // ROWS
        begins = torch.randint(last + 1, (-(-len(rows) // PIECE_ROWS),), generator=self.generator) * ROWS
        _fill(rows, pool, begins.tolist())
        self.begins[weight.data_ptr()] = begins.tolist()
        return nn.Parameter(weight, requires_grad=False)

    def quantized(self, weight: Tensor, name: str) -> Weight:
        """What the format makes of a weight that came from here."""
        E, N, D = weight.shape
        begins = self.begins[weight.data_ptr()]
        if (D, name) not in self.pools:
            self.pools[D, name] = parse(FORMATS[name]).quantize(self._as_matrix(D))
        whole = self.pools[D, name]
        rows_per_scale = N // parse(FORMATS[name]).scale_shape(N, D)[0]
        data = torch.empty(E, N, whole.data.shape[-1], dtype=whole.data.dtype)
        scale = torch.empty(E, N // rows_per_scale, whole.scale.shape[-1], dtype=whole.scale.dtype)
        _fill(data.flatten(0, 1), whole.data, begins)
        _fill(scale.flatten(0, 1), whole.scale, begins, rows_per_scale)
        return Weight(data, scale, None, whole.format, N, D)

    def _as_matrix(self, D: int) -> Tensor:
        return self.numbers.view(-1, D)


def _fill(rows: Tensor, pool: Tensor, begins: list[int], rows_per_scale: int = 1) -> None:
    """Copies a piece after the other; both are counted in rows, of which `rows_per_scale` became one."""
    step = PIECE_ROWS // rows_per_scale
    for piece, begin in zip(rows.view(torch.uint8).split(step), begins, strict=True):
        first = begin // rows_per_scale
        piece.copy_(pool[first : first + len(piece)].view(torch.uint8))


def quantized_experts(name: str, experts: Callable[..., Tensor], mode: str = "weight_only") -> Callable[..., Tensor]:
    """DeepSeek-V4's experts, from the weights that their module has in the format `name`."""

    def forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        gate_up, down = self.quantized[name]
        return experts(
            hidden_states,
            gate_up.data,
            down.data,
            top_k_weights.float(),
            top_k_index,
            "swiglu_clamped",
            limit=self.limit,
            weight_format=gate_up.format,
            gate_up_scale=gate_up.scale,
            down_scale=down.scale,
            gate_up_zero=gate_up.zero,
            down_zero=down.zero,
            mode=mode,
        )

    return forward
