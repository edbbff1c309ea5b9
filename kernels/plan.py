"""plan: a stable counting sort of the slots by expert.

Up to BLOCK slots one program sorts them, and their places in its order are their rows. More slots take four launches:
every block counts its slots per expert; the counts are summed over the blocks before; the totals are summed over the
experts before; and every block sorts its slots and moves each expert's to where these sums say. Skipped slots count as
one more expert, E, whose rows are the padding. Nothing depends on the order in which programs run, and the grids depend
on S and E alone.
"""

import torch
import triton
import triton.language as tl

from polymoe.kernels._launch import OPTIONS, cdiv, extent, index_type, next_power_of_2

BLOCK = 1024  # slots of a program
BINS = 2048  # experts that are counted at once
SUMMED = 32  # blocks that are summed at once, and experts that one program sums
WARPS = 8


@triton.jit
def _expert_of(ids, ids_token, ids_slot, slot, S, K, E, INDEX: tl.constexpr):
    """The experts of these slots: E for those that are skipped, E + 1 for those that do not exist."""
    place = (slot // K).to(INDEX) * ids_token + (slot % K).to(INDEX) * ids_slot
    expert = tl.load(ids + place, mask=slot < S, other=0)
    expert = tl.where((expert >= 0) & (expert < E), expert, E).to(tl.int32)
    return tl.where(slot < S, expert, E + 1)


@triton.jit
def _sort(expert, KEY: tl.constexpr, BLOCK: tl.constexpr):
    """The experts of a block in ascending order, and which of its slots each is of; stable."""
    key = tl.sort(expert.to(KEY) * BLOCK + tl.arange(0, BLOCK))
    return (key // BLOCK).to(tl.int32), (key % BLOCK).to(tl.int32)


@triton.jit
def _histogram(expert, first, BINS: tl.constexpr):
    """How often each of the experts from `first` on occurs."""
    return tl.histogram(expert - first, BINS, mask=(expert >= first) & (expert < first + BINS))


@triton.jit
def _store_rows(row_slot, slot_row, row, expert, slot, S, E):
    exists = slot < S
    skipped = expert == E
    tl.store(row_slot + row, tl.where(skipped, -1, slot).to(tl.int32), mask=exists)
    tl.store(slot_row + slot, tl.where(skipped, -1, row).to(tl.int32), mask=exists)


@triton.jit(do_not_specialize=["S"])
def _plan_one_block(
    ids,
    ids_token,
    ids_slot,
    offsets,
    row_slot,
    slot_row,
    S,
    K,
    E,
    INDEX: tl.constexpr,
    KEY: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    row = tl.arange(0, BLOCK)
    unsorted = _expert_of(ids, ids_token, ids_slot, row, S, K, E, INDEX)
    expert, slot = _sort(unsorted, KEY, BLOCK)
    _store_rows(row_slot, slot_row, row, expert, slot, S, E)
    before = 0
    for first in range(0, E + 1, BINS):
        count = _histogram(unsorted, first, BINS)
        bin = first + tl.arange(0, BINS)
        tl.store(offsets + bin, before + tl.cumsum(count, axis=0) - count, mask=bin <= E)
        before += tl.sum(count, axis=0)


@triton.jit(do_not_specialize=["S"])
def _count(
    ids,
    ids_token,
    ids_slot,
    counts,
    S,
    K,
    E,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """counts [blocks, E + 1]"""
    block = tl.program_id(0).to(INDEX)
    first = tl.program_id(1) * BINS
    expert = _expert_of(ids, ids_token, ids_slot, block * BLOCK + tl.arange(0, BLOCK), S, K, E, INDEX)
    bin = first + tl.arange(0, BINS)
    tl.store(counts + block * (E + 1) + bin, _histogram(expert, first, BINS), mask=bin <= E)


@triton.jit(do_not_specialize=["blocks"])
def _sum_blocks(counts, totals, blocks, E, INDEX: tl.constexpr, SUMMED: tl.constexpr):
    """Replaces every count by the sum over the blocks before; totals [E + 1] are the sums over all."""
    expert = tl.program_id(0) * SUMMED + tl.arange(0, SUMMED)
    total = tl.zeros((SUMMED,), dtype=tl.int32)
    for start in range(0, blocks, SUMMED):
        block = (start + tl.arange(0, SUMMED)).to(INDEX)
        place = counts + block[:, None] * (E + 1) + expert[None, :]
        exists = (block < blocks)[:, None] & (expert <= E)[None, :]
        count = tl.load(place, mask=exists, other=0)
        tl.store(place, total[None, :] + tl.cumsum(count, axis=0) - count, mask=exists)
        total += tl.sum(count, axis=0)
    tl.store(totals + expert, total, mask=expert <= E)


@triton.jit
def _sum_experts(totals, offsets, E, BINS: tl.constexpr):
    before = 0
    for first in range(0, E + 1, BINS):
        expert = first + tl.arange(0, BINS)
        total = tl.load(totals + expert, mask=expert <= E, other=0)
        tl.store(offsets + expert, before + tl.cumsum(total, axis=0) - total, mask=expert <= E)
        before += tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["S"])
def _place(
    ids,
    ids_token,
    ids_slot,
    counts,
    offsets,
    row_slot,
    slot_row,
    S,
    K,
    E,
    INDEX: tl.constexpr,
    KEY: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    block = tl.program_id(0).to(INDEX)
    position = tl.arange(0, BLOCK)
    unsorted = _expert_of(ids, ids_token, ids_slot, block * BLOCK + position, S, K, E, INDEX)
    expert, slot_in_block = _sort(unsorted, KEY, BLOCK)
    slot = block * BLOCK + slot_in_block
    exists = slot < S
    row = position
    row += tl.load(offsets + expert, mask=exists, other=0)
    row += tl.load(counts + block * (E + 1) + expert, mask=exists, other=0)
    # Less the slots of this block that have a smaller expert.
    before = 0
    for first in range(0, E + 1, BINS):
        count = _histogram(unsorted, first, BINS)
        smaller = before + tl.cumsum(count, axis=0) - count
        counted = (expert >= first) & (expert < first + BINS)
        row -= tl.where(counted, tl.gather(smaller, tl.where(counted, expert - first, 0), axis=0), 0)
        before += tl.sum(count, axis=0)
    _store_rows(row_slot, slot_row, row, expert, slot, S, E)


def plan(ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (T, K), E, S = ids.shape, num_experts, ids.numel()
    offsets = ids.new_empty((E + 1,), dtype=torch.int32)
    row_slot = ids.new_empty((S,), dtype=torch.int32)
    slot_row = ids.new_empty((T, K), dtype=torch.int32)
    if S == 0:
        return offsets.zero_(), row_slot, slot_row
    block = min(next_power_of_2(S), BLOCK)
    blocks, bins = cdiv(S, block), min(next_power_of_2(E + 1), BINS)
    where = (ids, ids.stride(0), ids.stride(1))
    sizes = {"S": S, "K": K, "E": E, "BLOCK": block, "BINS": bins}
    types = {"INDEX": index_type(max(extent(ids), S, blocks * (E + 1))), "KEY": index_type((E + 2) * block)}
    options = {"num_warps": max(block * WARPS // BLOCK, 1), **OPTIONS}
    if blocks == 1:
        _plan_one_block[(1,)](*where, offsets, row_slot, slot_row, **sizes, **types, **options)
        return offsets, row_slot, slot_row
    counts = ids.new_empty((blocks, E + 1), dtype=torch.int32)
    totals = ids.new_empty((E + 1,), dtype=torch.int32)
    index = types["INDEX"]
    _count[blocks, cdiv(E + 1, bins)](*where, counts, **sizes, INDEX=index, **options)
    _sum_blocks[(cdiv(E + 1, SUMMED),)](counts, totals, blocks, E, INDEX=index, SUMMED=SUMMED, **options)
    _sum_experts[(1,)](totals, offsets, E, BINS=bins, **options)
    _place[(blocks,)](*where, counts, offsets, row_slot, slot_row, **sizes, **types, **options)
    return offsets, row_slot, slot_row
