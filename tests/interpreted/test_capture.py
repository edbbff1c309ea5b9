"""Launches depend on shapes alone: no kernel's wrapper reads what a tensor holds. So a GPU never waits for the host,
and calls can be captured in a graph. Tensors without data prove it: whatever reads them raises."""

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from polymoe.backends.triton import FORMAT_KERNELS, GRADIENT_KERNELS, KERNELS, TritonBackend

BF16, F32, I32 = torch.bfloat16, torch.float32, torch.int32
T, K, H, I, E = 700, 4, 96, 64, 16
S = T * K


def empty(*shape, dtype=BF16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def plan_of():
    return empty(S, dtype=I32), empty(T, K, dtype=I32)


def calls(op):
    """Arguments of calls that take every path of the wrapper."""
    row_slot, slot_row = plan_of()
    weights, ids = empty(T, K, dtype=F32), empty(T, K, dtype=I32)
    offs = empty(E, dtype=I32)
    logits, bias = empty(T, E, dtype=F32), empty(E, dtype=F32)
    return {
        "activate_backward": [
            (empty(S, 2 * I), empty(S, I), "swiglu", None, None, True, row_slot, weights, True),
            (empty(S, I), empty(S, I), "relu2"),
        ],
        "down_backward": [
            (
                empty(S, H),
                empty(E, H, I),
                empty(S, 2 * I),
                offs,
                row_slot,
                slot_row,
                "swiglu",
                None,
                None,
                False,
                weights,
                True,
                True,
            ),
            (empty(S, H), empty(E, I, H).mT, empty(S, I), offs, row_slot, slot_row, "relu2"),
        ],
        "gate_backward": [(logits, weights, ids, "softmax", bias, "max"), (logits, weights, ids, "sigmoid")],
        "quantized_backward": [
            (
                empty(S, I),
                empty(E, I, H // 2, dtype=torch.uint8),
                empty(E, I, H // 32, dtype=torch.uint8),
                None,
                offs,
                H,
                "mxfp4",
            ),
            (empty(S, I), empty(E, I, H, dtype=torch.int8), empty(E, I, dtype=F32), None, offs, H, "int8"),
        ],
        "quantize": [
            (empty(E, I, H), "mxfp4", torch.float8_e8m0fnu, False),
            (empty(E, I, H), "fp8_block128", F32, False),
            (empty(I, H), "int4_g64", F32, True),
            (empty(I, H), "int8", F32, False),
        ],
        "row_dot": [(empty(T, H), empty(S, H, dtype=F32), slot_row)],
        "activate": [(empty(S, 2 * I), "swiglu", None, None, True, row_slot, weights, F32), (empty(S, I), "relu2")],
        "combine": [(empty(S, H), slot_row), (empty(S, H), slot_row, weights, F32)],
        "dispatch": [(empty(T, H), row_slot, slot_row), (empty(T, H), row_slot, slot_row, weights)],
        "experts": [
            (empty(T, H), empty(E, 2 * I, H), empty(E, H, I), weights, ids),
            (empty(1, H), empty(E, 2 * I, H), empty(E, H, I), weights[:1], ids[:1]),
        ],
        "gate": [
            (logits, K, "sigmoid", bias, 4, 2, 2, "add"),
            (logits, K, "softmax", None, 1, 1, 2, "max", 1e-20, 1.0, ids, empty(T, dtype=torch.bool)),
        ],
        "grouped_mm": [
            (empty(S, H), empty(E, H, I), offs),
            (empty(E, T, H), empty(H, S), offs),
            (empty(H, S), empty(S, I), offs),
            (empty(E, T, H), empty(E, H, I)),
        ],
        "plan": [(ids, E), (ids[:2], E), (empty(T, K, dtype=torch.int64), 5000)],
    }[op]


@pytest.fixture
def launches(monkeypatch):
    """Launches are listed instead of run."""
    grids = []
    monkeypatch.setattr(InterpretedFunction, "run", lambda self, *args, grid, warmup, **options: grids.append(grid))
    return grids


@pytest.mark.parametrize("op", KERNELS + GRADIENT_KERNELS + FORMAT_KERNELS)
def test_launches_depend_on_shapes_alone(op, launches):
    for arguments in calls(op):
        launches.clear()
        results = TritonBackend().implementation(op)(*arguments)
        assert launches
        assert all(isinstance(size, int) and size > 0 for grid in launches for size in grid)
        for result in results if isinstance(results, tuple) else (results,):
            assert result is None or result.is_meta


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.sum().item(),
        lambda t: t.tolist(),
        lambda t: t.cpu(),
        lambda t: t.nonzero(),
        lambda t: bool(t.any()),
        lambda t: t[t > 0],
    ],
    ids=["item", "tolist", "cpu", "nonzero", "bool", "mask"],
)
def test_reading_raises(read):
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(empty(4, dtype=I32))
