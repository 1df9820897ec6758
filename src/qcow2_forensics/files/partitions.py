"""The partition table of a disk, as The Sleuth Kit reads it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytsk3

from ..limits import PARTITION_GAP
from ..text import decoded, printable
from .records import Span


class Partition(NamedTuple):
    """A partition in use; offset and length are in bytes of the disk."""

    number: int
    offset: int
    length: int
    description: str

    def __str__(self) -> str:
        return f"partition {self.number} ({printable(self.description) or 'no description'})"


def partitions(image: pytsk3.Img_Info) -> Iterator[Partition]:
    """Yield the partitions in use; nothing without a table."""
    sector, parts = _table(image)
    used = (part for part in parts if int(part.flags) == int(pytsk3.TSK_VS_PART_FLAG_ALLOC))
    for number, part in enumerate(used, 1):
        description = decoded(part.desc or b"")
        yield Partition(number, int(part.start) * sector, int(part.len) * sector, description)


def table_spans(image: pytsk3.Img_Info) -> Iterator[Span]:
    """Yield where the partition table itself is, all its pieces; an extended partition is none."""
    sector, parts = _table(image)
    for part in parts:
        if int(part.flags) == int(pytsk3.TSK_VS_PART_FLAG_META) and int(part.len) * sector < PARTITION_GAP:
            yield Span(int(part.start) * sector, int(part.len) * sector)


def _table(image: pytsk3.Img_Info) -> tuple[int, list[Any]]:
    """Return bytes per sector and the entries of the partition table, none without one.

    Where the GPT at the start of the disk is damaged, its copy at the end is read.
    """
    try:
        table = pytsk3.Volume_Info(image)
        parts = list(table)
        if any(b"(0xee)" in (part.desc or b"") for part in parts):  # what protects a GPT
            with contextlib.suppress(OSError, RuntimeError):
                table = pytsk3.Volume_Info(image, pytsk3.TSK_VS_TYPE_GPT)
                parts = list(table)
        return int(table.info.block_size), parts
    except (OSError, RuntimeError):
        return 1, []  # no partition table, which is common
