"""The L1 and L2 tables in use as arrays: what they map is not residue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..census.arrays import U64
from ..census.columns import Columns, big_endian, table_offsets
from ..format.image import Image
from ..format.snapshot_table import SnapshotEntry
from ..limits import Budget

_L1_CHUNK = 1 << 16  # entries handled at once


class StateTable(NamedTuple):
    """One L1 table: the active one (``snapshot`` None) or a snapshot's."""

    snapshot: SnapshotEntry | None
    l1_table_offset: int
    l1_size: int

    @property
    def name(self) -> str:
        """The snapshot's ID, empty for the active state."""
        return "" if self.snapshot is None else self.snapshot.id


def states(image: Image) -> Iterator[StateTable]:
    """Yield the active state, then every snapshot whose L1 table can be read.

    Snapshots that share one L1 table count once: a crafted table of 65,536 entries costs no more
    than one.
    """
    header = image.header
    yield StateTable(None, header.l1_table_offset, header.l1_size)
    seen = {(header.l1_table_offset, header.l1_size)}
    for entry in image.snapshots:
        key = (entry.l1_table_offset, entry.l1_size)
        if key not in seen:
            seen.add(key)
            yield StateTable(entry, *key)


def l1_tables(image: Image) -> Iterator[tuple[StateTable, U64]]:
    """Yield the L1 table of every state.

    Tables that do not overlap fit in the file together; a crafted image whose tables overlap so
    often that they do not raises :class:`LimitExceeded`.
    """
    budget = Budget("bytes of the L1 tables of all states", image.file_size, image.limits)
    for state in states(image):
        budget.spend(8 * _l1_entries(image, state))
        yield state, l1_table(image, state)


def l1_table(image: Image, state: StateTable) -> U64:
    """Return the host offsets in an L1 table; entries past the end of the file or the limit are left out."""
    table = np.empty(_l1_entries(image, state), np.uint64)
    for at in range(0, len(table), _L1_CHUNK):
        part = table[at : at + _L1_CHUNK]
        data = image.read(state.l1_table_offset + at * 8, len(part) * 8)
        part[:] = table_offsets(big_endian(data), image.header)
    return table


def _l1_entries(image: Image, state: StateTable) -> int:
    count = min(state.l1_size, image.limits.l1_bytes // 8)
    return max(0, min(count, (image.file_size - state.l1_table_offset) // 8))


def l2_table(image: Image, offset: int) -> Columns | None:
    """Return the L2 table at a host offset; None when it is not wholly in the file."""
    length = image.header.l2_entries * image.header.l2_entry_size
    if offset <= 0 or offset % image.cluster_size or offset + length > image.file_size:
        return None
    return Columns.of(big_endian(image.read(offset, length)), image.header)


def l2_entry(image: Image, state: StateTable, cluster: int) -> Columns:
    """Return the L2 entry of one guest cluster, alone in its columns; zero where no table is or the file ends."""
    header = image.header
    slot, place = divmod(cluster, header.l2_entries)
    size = header.l2_entry_size
    table = 0
    if slot < state.l1_size:
        table = int(table_offsets(_words(image, state.l1_table_offset + slot * 8, 8), header)[0])
    words = _words(image, table + place * size, size) if table else np.zeros(size // 8, np.uint64)
    return Columns.of(words, header)


def _words(image: Image, offset: int, length: int) -> U64:
    return big_endian(image.read(offset, length).ljust(length, b"\0"))
