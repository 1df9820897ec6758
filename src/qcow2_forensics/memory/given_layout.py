"""A layout that the examiner states: ``BLOCK@ADDRESS[,...]``, or ``BLOCK+OFFSET@ADDRESS`` for a part of a block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..errors import FormatError
from ..text import cut, quoted
from .layout_draft import ADDRESSES, LayoutDraft
from .model import Block, Region

_PAGE = 4096
_REASON = "stated by the examiner"


class Stated(NamedTuple):
    """A block, from ``offset`` on, and the guest-physical address at which it lies."""

    block: str
    offset: int
    address: int


Given = Sequence[Stated]


def parse(text: str) -> tuple[Stated, ...]:
    """Return what a text such as ``dimm1@0x108000000,pc.ram+0x80000000@0x10000000000`` states.

    Raises :class:`FormatError` for anything else.
    """
    found = []
    for part in text.split(","):
        name, at, address = part.strip().rpartition("@")
        block, plus, offset = name.rpartition("+")
        if not plus:
            block, offset = name, "0"
        try:
            stated = Stated(block, int(offset, 0), int(address, 0))
        except ValueError:
            stated = Stated("", 0, 0)
        if not at or not stated.block or stated.offset < 0 or stated.address < 0:
            message = f"layout: not BLOCK@ADDRESS or BLOCK+OFFSET@ADDRESS: {quoted(part)}"
            raise FormatError(message, field="layout")
        found.append(stated)
    return tuple(found)


def as_text(given: Given) -> str:
    """Return the text that :func:`parse` takes."""
    return ",".join(
        f"{item.block}+{item.offset:#x}@{item.address:#x}" if item.offset else f"{item.block}@{item.address:#x}"
        for item in given
    )


def apply(given: Given, blocks: Sequence[Block], made: LayoutDraft) -> None:
    """Place what is stated. A part of a block ends where the next stated part of it begins.

    Raises :class:`FormatError` for a block that the stream does not have, and for places that cannot be.
    """
    sizes = {block.name: block.size for block in blocks}
    for item in given:
        if item.block not in sizes:
            known = ", ".join(cut(block.name) for block in blocks)
            raise FormatError(f"layout: no RAM block {quoted(item.block)}; the stream has {known}", field="layout")
        offsets = sorted(other.offset for other in given if other.block == item.block and other.offset > item.offset)
        length = (offsets[0] if offsets else sizes[item.block]) - item.offset
        region = Region(item.address, length, item.block, item.offset)
        if length <= 0 or item.offset % _PAGE or item.address % _PAGE or region.end > ADDRESSES:
            raise FormatError(f"layout: {cut(as_text([item]))} is not a place for the block", field="layout")
        if not made.put(region, _REASON):
            raise FormatError(f"layout: {cut(as_text([item]))} overlaps another block", field="layout")
    if given:
        made.notes.append(f"stated by the examiner: {cut(as_text(given))}")
