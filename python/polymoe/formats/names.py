"""The names of the quantised formats."""

from __future__ import annotations

from polymoe.formats.fp8 import BLOCKS, Fp8Block, Mxfp8
from polymoe.formats.integer import GROUPS, Int4, Int8
from polymoe.formats.mxfp4 import Mxfp4
from polymoe.formats.weight import Format
from polymoe.ops import _check as check_that

FORMATS: dict[str, Format] = {
    known.name: known for known in (*map(Fp8Block, BLOCKS), Mxfp4(), Mxfp8(), Int8(), *map(Int4, GROUPS))
}


def parse(name: str) -> Format:
    """The format of that name, with its defaults for quantising; ValueError names the known ones."""
    check_that.choice("formats", "format", name, tuple(FORMATS))
    return FORMATS[name]
