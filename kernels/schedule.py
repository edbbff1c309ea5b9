"""Which program computes which tile of the output, where rows are cut into groups by offsets that only the device
knows. Grids come from shapes alone: there may be more programs than tiles, and the surplus leaves at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from polymoe.kernels._launch import cdiv
from polymoe.kernels.devices import Device
from polymoe.kernels.tiles import Tiles

ENTRY = 3  # int32 numbers per tile: its group, its first row, the end of its group
GROUPS_PER_PROGRAM = 32


def most_tiles(S: int, G: int, block_m: int) -> int:
    """The largest number of row tiles that S rows in G groups can need: a full one for every block_m rows, and a ragged
    one for every group that has rows."""
    return S // block_m + min(S, G)


def row_tiles(offs: Tensor, S: int, block_m: int, padding: bool) -> Tensor:
    """The table of row tiles: their number, then ENTRY numbers for each, in order of rows.

    offs [G]: where every group ends. With `padding` the rows from offs[-1] to S make one more group, of index -1.
    """
    G, offs = offs.shape[0], offs.contiguous()
    table = torch.empty(1 + ENTRY * most_tiles(S, G + padding, block_m), dtype=torch.int32, device=offs.device)
    grid = (max(1, cdiv(G + padding, GROUPS_PER_PROGRAM)),)
    _row_tiles[grid](
        table,
        offs,
        S,
        G,
        PADDING=padding,
        BLOCK_M=block_m,
        GROUPS=triton.next_power_of_2(G + 1),
        PART=GROUPS_PER_PROGRAM,
        ENTRY=ENTRY,
        num_warps=4,
    )
    return table


def programs(most: int, tiles: Tiles, device: Device) -> int:
    """The size of the grid for at most so many tiles."""
    return min(most, device.units) if tiles.persistent else most


@triton.jit
def _group_bounds(offs, group, S, G, PADDING: tl.constexpr):
    """Where groups start and end; groups that do not exist are empty."""
    start = tl.load(offs + group - 1, mask=(group > 0) & (group <= G), other=0).to(tl.int32)
    end = tl.load(offs + group, mask=group < G, other=0).to(tl.int32)
    end = tl.where(group < G, end, S if PADDING else start)
    return tl.where(group <= G, start, 0), tl.where(group <= G, end, 0)


@triton.jit(do_not_specialize=["S"])
def _row_tiles(
    table,
    offs,
    S,
    G,
    PADDING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    GROUPS: tl.constexpr,
    PART: tl.constexpr,
    ENTRY: tl.constexpr,
):
    """Every program writes the tiles of PART groups, behind those of all the groups before."""
    first_group = tl.program_id(0) * PART
    everything = tl.arange(0, GROUPS)
    start, end = _group_bounds(offs, everything, S, G, PADDING)
    tiles = (end - start + BLOCK_M - 1) // BLOCK_M
    if first_group == 0:
        tl.store(table, tl.sum(tiles, axis=0))
    before = tl.sum(tl.where(everything < first_group, tiles, 0), axis=0)

    group = first_group + tl.arange(0, PART)
    start, end = _group_bounds(offs, group, S, G, PADDING)
    tiles = (end - start + BLOCK_M - 1) // BLOCK_M
    place = before + tl.cumsum(tiles, axis=0) - tiles
    label = tl.where(group < G, group, -1)
    for j in range(tl.max(tiles, axis=0)):
        entry = table + 1 + (place + j) * ENTRY
        mine = j < tiles
        tl.store(entry, label, mask=mine)
        tl.store(entry + 1, start + j * BLOCK_M, mask=mine)
        tl.store(entry + 2, end, mask=mine)


@triton.jit
def at(index, stride):
    """An offset from the start of a tensor, which may be large: in int64."""
    return tl.cast(index, tl.int64) * stride


@triton.jit
def table_entry(table, tile, ENTRY: tl.constexpr):
    """The group of a row tile, its first row, and where the group ends."""
    entry = table + 1 + tile * ENTRY
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)


@triton.jit
def tile_at(t, rows, columns, band):
    """Row tile and column tile of the t-th of rows * columns tiles. Neighbours share row tiles and weights: the order
    walks down `band` row tiles, then to the next column."""
    first = t // (band * columns) * band
    height = tl.minimum(rows - first, band)
    within = t - first * columns
    return first + within % height, within // height


@triton.jit
def dealt(t, total, CHIPLETS: tl.constexpr):
    """Hardware deals programs to chiplets in turn. This permutes [0, total) so that each chiplet, and its cache, gets
    neighbouring tiles."""
    if CHIPLETS > 1:
        chiplet = t % CHIPLETS
        t = chiplet * (total // CHIPLETS) + tl.minimum(chiplet, total % CHIPLETS) + t // CHIPLETS
    return t
