"""The closed forms that cut a matmul into tasks, by their promises and by a table of real shapes."""

from __future__ import annotations

import pytest

_C = pytest.importorskip("polymoe._C", reason="the C++ extension is not built")

MIB = 1 << 20


@pytest.mark.parametrize(
    ("row_bytes", "l2_bytes", "rows"),
    [
        (4096 * 2, MIB, 64),  # DeepSeek-V4-Flash's rows of x in bf16
        (7168 * 2, MIB, 36),  # DeepSeek-V3
        (2048 * 2, MIB, 128),  # Qwen3-30B-A3B
        (7168 * 4, MIB, 18),  # widened to f32
        (64, MIB, 256),  # a hot expert of a tiny model is still shared out
        (1 << 20, MIB, 16),  # very long rows do not shrink a block to nothing
        (0, MIB, 256),  # an empty reduction
        (4096 * 2, 2 * MIB, 128),
    ],
)
def test_block_rows(row_bytes: int, l2_bytes: int, rows: int) -> None:
    assert _C.block_rows(row_bytes, l2_bytes) == rows


@pytest.mark.parametrize(
    ("width", "unit", "wanted", "blocks", "threads", "columns"),
    [
        (768, 32, 192, 8, 2, 192),  # one token of Qwen3-30B-A3B: 32 tasks
        (768, 32, 192, 8, 64, 32),  # ... for many threads, as narrow as a step allows
        (2048, 32, 192, 6, 2, 192),
        (2048, 16, 192, 1, 2, 48),
        (4096, 8, 48, 1, 2, 48),
        (2048, 8, 48, 1, 64, 8),
        (0, 32, 192, 0, 2, 32),
        (33, 32, 192, 128, 2, 192),
    ],
)
def test_task_columns(width: int, unit: int, wanted: int, blocks: int, threads: int, columns: int) -> None:
    assert _C.task_columns(width, unit, wanted, blocks, threads) == columns


@pytest.mark.parametrize("threads", [1, 2, 8, 64, 192])
@pytest.mark.parametrize("width", [1, 33, 704, 2880, 14336])
@pytest.mark.parametrize("blocks", [1, 8, 512])
def test_tasks_are_whole_units_and_enough(width: int, blocks: int, threads: int) -> None:
    unit, target = 32, 192
    columns = _C.task_columns(width, unit, target, blocks, threads)
    assert columns % unit == 0
    assert unit <= columns <= target
    tasks = blocks * -(-width // columns)
    wanted = 12 * threads if threads > 1 else 1
    assert columns == unit or tasks >= wanted, "wider tasks than one unit, yet too few to share out"


@pytest.mark.parametrize("threads", [1, 2, 64])
def test_a_small_call_wakes_no_thread(threads: int) -> None:
    assert _C.worthwhile_threads(threads, 2, 3 * 64 * 128) == 1  # a token of a toy layer
    assert _C.worthwhile_threads(threads, 8, 3 * 2048 * 768) == threads  # a token of Qwen3-30B-A3B
    assert _C.worthwhile_threads(threads, 0, 3 * 2048 * 768) == 1
