"""The live mapping trees as numpy tables: what residue is told apart from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import LimitExceeded
from ..format.entries import COMPRESSED, OFFSET_MASK, ZERO
from ..format.image import Image
from ..format.snapshot_table import SnapshotEntry
from .structure_detection import Words, words_of

_L1_CHUNK = 1 << 16  # entries handled at once
_SPARE_ENTRIES = 65_536  # so that tiny images with a table cut off are no matter


class State(NamedTuple):
    """One L1 table: the active one (``snapshot`` None) or a snapshot's."""

    snapshot: SnapshotEntry | None
    l1_table_offset: int
    l1_size: int

    @property
    def name(self) -> str:
        """The snapshot's ID, empty for the active state."""
        return "" if self.snapshot is None else self.snapshot.id


def states(image: Image) -> Iterator[State]:
    """Yield the active state, then every snapshot whose L1 table is named soundly.

    Snapshots that share one L1 table count once: a crafted table of 65,536 entries costs no more
    than one.
    """
    header = image.header
    yield State(None, header.l1_table_offset, header.l1_size)
    seen = {(header.l1_table_offset, header.l1_size)}
    for entry in image.snapshots:
        key = (entry.l1_table_offset, entry.l1_size)
        if key not in seen:
            seen.add(key)
            yield State(entry, *key)


def l1_tables(image: Image) -> Iterator[tuple[State, Words]]:
    """Yield the L1 table of every state.

    Tables that do not overlap fit in the file together; a crafted image whose tables overlap so
    often that they do not raises :class:`LimitExceeded`.
    """
    most = image.file_size // 8 + _SPARE_ENTRIES
    total = 0
    for state in states(image):
        total += _l1_entries(image, state)
        if total > most:
            raise LimitExceeded("L1 entries of all states", total, most)
        yield state, l1_table(image, state)


def l1_table(image: Image, state: State) -> Words:
    """Return the host offsets in an L1 table; entries past the end of the file or the limit are left out."""
    table = np.empty(_l1_entries(image, state), np.uint64)
    for at in range(0, len(table), _L1_CHUNK):
        part = table[at : at + _L1_CHUNK]
        data = image.read(state.l1_table_offset + at * 8, len(part) * 8)
        np.bitwise_and(words_of(data), np.uint64(OFFSET_MASK), out=part)
    return table


def _l1_entries(image: Image, state: State) -> int:
    count = min(state.l1_size, image.limits.l1_bytes // 8)
    return max(0, min(count, (image.file_size - state.l1_table_offset) // 8))


def l2_table(image: Image, offset: int) -> Words | None:
    """Return the words of the L2 table at a host offset; None when it is not wholly in the file."""
    length = image.header.l2_entries * image.header.l2_entry_size
    if offset <= 0 or offset % image.cluster_size or offset + length > image.file_size:
        return None
    return words_of(image.read(offset, length))


class Entries(NamedTuple):
    """The columns of L2 tables, a row each or one alone; ``bitmaps`` is None unless entries are extended."""

    entries: Words
    bitmaps: Words | None

    @property
    def compressed(self) -> npt.NDArray[np.bool_]:
        flags: npt.NDArray[np.bool_] = (self.entries & np.uint64(COMPRESSED)) != 0
        return flags

    @property
    def offsets(self) -> Words:
        """Host offsets of plain entries, 0 where there is none or the entry is compressed."""
        return np.where(self.compressed, np.uint64(0), self.entries & np.uint64(OFFSET_MASK))

    @property
    def stored(self) -> Words:
        """The same, and 0 where all of the cluster reads as zeros or as nothing."""
        unread = self.zero_flags if self.bitmaps is None else (self.bitmaps & np.uint64(0xFFFF_FFFF)) == 0
        return np.where(unread, np.uint64(0), self.offsets)

    @property
    def named(self) -> Words:
        """What each entry names, equal where two name the same: a host offset, or a compressed cluster's whole entry."""
        return np.where(self.compressed, self.entries, self.entries & np.uint64(OFFSET_MASK))

    @property
    def zero_flags(self) -> npt.NDArray[np.bool_]:
        """Whether the whole cluster reads as zeros; always False for extended entries."""
        if self.bitmaps is not None:
            return np.zeros(self.entries.shape, np.bool_)
        flags: npt.NDArray[np.bool_] = ~self.compressed & ((self.entries & np.uint64(ZERO)) != 0)
        return flags


def columns(image: Image, table: Words) -> Entries:
    """Return L2 tables as columns, whichever entry format the image has."""
    if image.header.extended_l2:
        return Entries(table[..., 0::2], table[..., 1::2])
    return Entries(table, None)
